"""The image towers that DGS-Net adapts, taken apart as training needs them: one class per family of towers.

A new family is a subclass of `Backbone` that says what is abstract there, and a line in `FAMILIES`.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipTransformer
from timm.layers import Attention, AttentionRope, PatchEmbed
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dgsnet.errors import UserError
from dgsnet.model.adapters import SplitAttention, frozen_linear

QKV = r"attn\.[qkv]_proj"


class Backbone(ABC):
    """An image tower in three parts: what comes before the blocks, the blocks, what comes after them.

    Making one splits the tower's attention in place, so that q, k and v are linears of their own.

    Attributes:
        visual: the tower; its own forward gives the same features, with adapters too.
        checkpointing: keep one activation per block and recompute the rest in backward.
    """

    # Of a family: the path of its blocks in the tower, and in a block the linear after attention and those of
    # the MLP, all as regular expressions.
    path: str
    output: str
    mlp: str

    def __init__(self, visual: nn.Module) -> None:
        self.visual = visual
        self.checkpointing = False
        for block in self.blocks:
            block.attn = self.split(block.attn)

    @property
    @abstractmethod
    def blocks(self) -> Sequence[Any]:
        """The transformer's blocks, each from tokens [N, L, W] to the same."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width D of the features."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input, in pixels."""

    @property
    @abstractmethod
    def patch_size(self) -> tuple[int, int]:
        """Height and width of the patches that the tower cuts its input into, in pixels."""

    @staticmethod
    @abstractmethod
    def resize(visual: Any, size: int) -> None:
        """Have a tower take square images of another side, a multiple of its patch, as its library does."""

    @abstractmethod
    def split(self, attention: Any) -> nn.Module:
        """Attention with linears q_proj, k_proj and v_proj, in place of a block's; UserError if unknown."""

    @abstractmethod
    def fuse(self, attention: str, kind: str, parts: list[Tensor]) -> dict[str, Tensor]:
        """The inverse of split for one entry of a state: attention's path to its dot, "weight" or "bias"."""

    @abstractmethod
    def embed(self, pixels: Tensor) -> tuple[Tensor, Iterable[dict[str, Any]]]:
        """Tokens [N, L, W] of normalised images [N, 3, H, W]; for every block what else it is called with."""

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """Features [N, D] of the last block's tokens."""

    def encode(self, pixels: Tensor, depth: int | None = None) -> Tensor:
        """Features [N, D] of normalised images [N, 3, H, W]; of the first `depth` blocks alone, if given."""
        # Nothing before the first block is trained.
        with torch.no_grad():
            tokens, contexts = self.embed(pixels)
        for block, context in zip(itertools.islice(self.blocks, depth), contexts):
            if self.checkpointing:
                tokens = checkpoint(block, tokens, use_reentrant=False, **context)
            else:
                tokens = block(tokens, **context)
        return self.pool(tokens)

    def targets(self, which: str) -> str:
        """A regular expression for the paths of the linears that `model.lora_targets` names."""
        linears = {
            "qkv": [QKV],
            "qkvo": [QKV, self.output],
            "mlp": [self.mlp],
            "all": [QKV, self.output, self.mlp],
        }[which]
        return rf"{self.path}\.\d+\.({'|'.join(linears)})"

    def state(self) -> dict[str, Tensor]:
        """The tower's weights by the names of the library it comes from; adapters must be merged."""
        state = self.visual.state_dict()
        for name in [name for name in state if ".attn.q_proj." in name]:
            attention, kind = name.split("q_proj.")
            names = [f"{attention}{letter}_proj.{kind}" for letter in "qkv"]
            state |= self.fuse(attention, kind, [state.pop(n) for n in names if n in state])
        return state


class OpenClip(Backbone):
    """open_clip's own vision transformers."""

    path = r"transformer\.resblocks"
    output = r"attn\.out_proj"
    mlp = r"mlp\.c_(fc|proj)"
    visual: OpenClipTransformer

    @property
    def blocks(self) -> Sequence[Any]:
        return self.visual.transformer.resblocks

    @property
    def dim(self) -> int:
        return self.visual.conv1.out_channels if self.visual.proj is None else self.visual.output_dim

    @property
    def image_size(self) -> tuple[int, int]:
        return self.visual.image_size

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.visual.patch_size

    @staticmethod
    def resize(visual: Any, size: int) -> None:
        name = "visual.positional_embedding"
        visual.image_size = (size, size)
        visual.grid_size = tuple(size // patch for patch in visual.patch_size)
        state = {name: visual.positional_embedding.detach()}
        # As for weights that are loaded into a model of another size: bicubic, with antialiasing.
        resize_pos_embed(state, SimpleNamespace(visual=visual))
        trained = visual.positional_embedding.requires_grad
        visual.positional_embedding = nn.Parameter(state[name], requires_grad=trained)

    def split(self, attention: Any) -> nn.Module:
        if not (isinstance(attention, nn.MultiheadAttention) and attention.batch_first):
            raise UserError(
                f"open_clip {open_clip.__version__} builds attention as {type(attention).__name__}, which "
                "dgsnet does not know: install open_clip 3 (pip install 'open_clip_torch>=3,<4')"
            )
        return SplitAttention(attention)

    def fuse(self, attention: str, kind: str, parts: list[Tensor]) -> dict[str, Tensor]:
        return {f"{attention}in_proj_{kind}": torch.cat(parts)}

    def embed(self, pixels: Tensor) -> tuple[Tensor, Iterable[dict[str, Any]]]:
        tokens = self.visual._embeds(pixels.to(self.visual.conv1.weight.dtype))
        return tokens, itertools.repeat({})

    def pool(self, tokens: Tensor) -> Tensor:
        pooled, _ = self.visual._pool(tokens)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


class Timm(Backbone):
    """timm's vision transformers, plain (SigLIP) or rotary (PE-Core, EVA, DINOv3), alone or in open_clip."""

    path = r"(trunk\.)?blocks"
    output = r"attn\.proj"
    mlp = r"mlp\.fc\d(_[gx])?"

    def __init__(self, visual: nn.Module) -> None:
        self.trunk: Any = getattr(visual, "trunk", visual)
        self.projection: Any = visual.head if isinstance(visual, TimmModel) else nn.Identity()
        # EVA-02 has them apart.
        self.fused = any(block.attn.qkv is not None for block in self.blocks)
        super().__init__(visual)

    @property
    def blocks(self) -> Sequence[Any]:
        return self.trunk.blocks

    @property
    def dim(self) -> int:
        last = [m for m in (self.trunk.head, *self.projection.modules()) if isinstance(m, nn.Linear)]
        return last[-1].out_features if last else self.trunk.num_features

    @property
    def image_size(self) -> tuple[int, int]:
        return self.trunk.patch_embed.img_size

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.trunk.patch_embed.patch_size

    @staticmethod
    def resize(visual: Any, size: int) -> None:
        visual.set_input_size((size, size))

    def split(self, attention: Any) -> nn.Module:
        if type(attention) is Attention:
            attention = _without_rotation(attention)
        if type(attention) not in (AttentionRope, EvaAttention):
            raise UserError(f"dgsnet cannot split timm's {type(attention).__name__}: choose another model")
        if attention.qkv is None:
            return attention
        biases: Sequence[Tensor | None] = (None,) * 3
        if attention.qkv.bias is not None:
            biases = attention.qkv.bias.chunk(3)
        elif getattr(attention, "q_bias", None) is not None:
            # The bias of k is zero then.
            biases = attention.q_bias, None, attention.v_bias
            attention.q_bias = attention.k_bias = attention.v_bias = None
        linears = map(frozen_linear, attention.qkv.weight.chunk(3), biases)
        attention.q_proj, attention.k_proj, attention.v_proj = linears
        attention.qkv = None
        return attention

    def fuse(self, attention: str, kind: str, parts: list[Tensor]) -> dict[str, Tensor]:
        if len(parts) == 2:
            return {f"{attention}q_bias": parts[0], f"{attention}v_bias": parts[1]}
        return {f"{attention}qkv.{kind}": torch.cat(parts)}

    def state(self) -> dict[str, Tensor]:
        return super().state() if self.fused else self.visual.state_dict()

    def embed(self, pixels: Tensor) -> tuple[Tensor, Iterable[dict[str, Any]]]:
        trunk = self.trunk
        tokens = trunk._pos_embed(trunk.patch_embed(pixels.to(trunk.patch_embed.proj.weight.dtype)))
        if isinstance(trunk, TimmTransformer):
            return trunk.norm_pre(tokens), itertools.repeat({})
        tokens, rope = tokens
        each = rope if trunk.rope_mixed else itertools.repeat(rope)
        return trunk.norm_pre(tokens), ({"rope": one} for one in each)

    def pool(self, tokens: Tensor) -> Tensor:
        return self.projection(self.trunk.forward_head(self.trunk.norm(tokens)))


def _without_rotation(fused: Attention) -> AttentionRope:
    """timm's plain attention as its rotary one, which without a rotation is the same and can be split."""
    attention = AttentionRope(
        fused.qkv.in_features, fused.num_heads, attn_head_dim=fused.head_dim, device="meta"
    )
    for name in ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop", "fused_attn"):
        setattr(attention, name, getattr(fused, name))
    return attention


def _is_open_clip(visual: nn.Module) -> bool:
    return isinstance(visual, OpenClipTransformer) and visual.attn_pool is None


def _is_timm(visual: nn.Module) -> bool:
    trunk: Any = visual.trunk if isinstance(visual, TimmModel) else visual
    # Other ways to cut patches hold batch norms, whose statistics a frozen tower would go on moving.
    known = type(trunk) in (TimmTransformer, Eva) and type(trunk.patch_embed) is PatchEmbed
    return known and all(type(block) in (Block, EvaBlock, EvaBlockPostNorm) for block in trunk.blocks)


FAMILIES = {OpenClip: _is_open_clip, Timm: _is_timm}


def use_class_token(visual: Any, name: str) -> None:
    """Have a tower give its class token after the last norm, without a projection; UserError: it has none."""
    if _is_open_clip(visual):
        visual.proj, visual.pool_type = None, "tok"
    elif _is_timm(visual):
        trunk: Any = getattr(visual, "trunk", visual)
        if trunk.cls_token is None:
            raise UserError(f"model {name} has no class token: leave model.feature at own")
        trunk.reset_classifier(0, "token")
        if trunk is not visual:
            visual.head = nn.Identity()


def family_of(visual: nn.Module, name: str) -> type[Backbone]:
    """The family of the tower of the model of this name; UserError if it is of no known one."""
    for family, holds in FAMILIES.items():
        if holds(visual):
            return family
    kind = type(getattr(visual, "trunk", visual)).__name__
    raise UserError(
        f"model {name} has a {kind} for an image tower; dgsnet adapts the vision transformers of open_clip "
        "and timm, e.g. ViT-L-14-quickgelu or ViT-B-16-SigLIP2"
    )


def backbone_of(visual: nn.Module, name: str) -> Backbone:
    """The tower of the model of this name as its family takes it apart; splits its attention in place.

    UserError if it is of no known family.
    """
    return family_of(visual, name)(visual)
