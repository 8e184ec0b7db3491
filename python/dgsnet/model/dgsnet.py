"""DGS-Net's model: a CLIP with LoRA on its vision tower, the same tower without LoRA as its own teacher, the
frozen text tower, and three linear heads.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from dgs_kernels import SurgeryHead
from dgsnet.config import ModelConfig
from dgsnet.errors import UserError
from dgsnet.model.adapters import adapters_skipped, drop_adapters, inject_lora, merge_adapters
from dgsnet.model.backbones import backbone_of, use_class_token
from dgsnet.model.catalogue import check_image_size, side
from dgsnet.model.pretrained import build_towers, encode_text, tokenizer_of


class DGSNet(nn.Module):
    """CLIP as student, teacher and text encoder, with a linear head for each; only adapters and heads train.

    There is one copy of the vision tower: the teacher is the student with its adapters skipped. Features are
    CLIP's projected embeddings, not normalised, or what `ModelConfig` names instead. Initialisation draws
    from torch's global generator, so `torch.manual_seed` decides it.

    Args:
        config: model name, weights and adapters; `lora_rank=0` makes no adapters (linear probe).
        with_text: False leaves the text tower out, as scoring needs none; towers from timm have none.
        image_size: side of the images in pixels, a multiple of the tower's patch; None is the side that it
            was made for. For another one its library interpolates its position embeddings.

    Attributes:
        visual: the vision tower of open_clip or timm with split attention and LoRA.
        backbone: the same tower in its parts, `dgsnet.model.backbones.Backbone`.
        text: open_clip's frozen text tower, or None.
        head: `dgs_kernels.SurgeryHead` with image_head, teacher_head and text_head.
        dim: width D of the features.
        image_size: side S of the square input, in pixels.
        resized: whether that is another side than the tower was made for.

    Raises:
        UserError: an unknown name or tag, weights that cannot be found, downloaded, read or fitted, a vision
            tower of no known family or that takes no such images, no text tower where one is asked for, or
            adapter settings out of range.

    Example:
        >>> model = DGSNet(ModelConfig(name="dgsnet-tiny", pretrained=""), with_text=False)
        >>> pixels = torch.zeros(2, 3, model.image_size, model.image_size)
        >>> model.logits(pixels).shape
        torch.Size([2])
    """

    def __init__(self, config: ModelConfig, *, with_text: bool = True, image_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        visual, text = build_towers(config.name, config.pretrained, with_text, image_size)
        self.visual = visual
        # It is open_clip's TextTransformer or, around a model of transformers, HFTextEncoder.
        self.text: Any = text
        self.requires_grad_(False)
        self._tokenizer = tokenizer_of(config.name) if with_text else None

        if config.feature == "class":
            use_class_token(visual, config.name)
        self.backbone = backbone_of(visual, config.name)
        self.resized = image_size not in (None, side(config.name, self.backbone.image_size))
        if image_size is not None and self.resized:
            check_image_size(config.name, side(config.name, self.backbone.patch_size), image_size)
            self.backbone.resize(visual, image_size)
        if config.lora_rank:
            inject_lora(visual, config, self.backbone.targets(config.lora_targets))
        self.dim = self.backbone.dim
        self.image_size = side(config.name, self.backbone.image_size)
        self.head = SurgeryHead(self.dim)
        self.train()

    def student_features(self, pixels: Tensor, depth: int | None = None) -> Tensor:
        """Features [N, D] of normalised images [N, 3, S, S], with adapters; depth as of `Backbone.encode`."""
        return self._scaled(self.backbone.encode(pixels, depth))

    @torch.no_grad()
    def teacher_features(self, pixels: Tensor) -> Tensor:
        """Features [N, D] of normalised images [N, 3, S, S] from the tower without adapters; no gradient."""
        with adapters_skipped(self.visual):
            return self._scaled(self.backbone.encode(pixels))

    @torch.no_grad()
    def text_features(self, captions: list[str]) -> Tensor:
        """Features [N, D] of captions, tokenised to the longest of them; no gradient.

        Captions longer than the model's context are cut, as open_clip's tokenizer does.
        """
        if self.text is None or self._tokenizer is None:
            raise ValueError("this DGSNet was built with with_text=False and has no text tower")
        tokens = self._tokenizer(captions).to(next(self.text.parameters()).device)
        return self._scaled(encode_text(self.text, tokens))

    def _scaled(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) if self.config.l2 else features

    def logits(self, pixels: Tensor, depth: int | None = None) -> Tensor:
        """Student logits [N]: above 0 means generated; depth as of `Backbone.encode`."""
        return _logits(self.head.image_head, self.student_features(pixels, depth))

    def teacher_logits(self, pixels: Tensor) -> Tensor:
        """Logits [N] of the teacher's head on the frozen features; gradients reach that head only."""
        return _logits(self.head.teacher_head, self.teacher_features(pixels))

    def adapter_state(self) -> dict[str, Tensor]:
        """The LoRA tensors by name, sharing memory with the model; empty at rank 0."""
        return get_peft_model_state_dict(self.visual) if self.config.lora_rank else {}

    @torch.no_grad()
    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Copy LoRA tensors, as from `adapter_state`, into the model; names and shapes must match exactly."""
        own = self.adapter_state()
        if own.keys() != state.keys():
            name = sorted(own.keys() ^ state.keys())[0]
            problem = "lack" if name in own else "hold an unexpected"
            raise UserError(f"the adapters {problem} {name}: they were saved from another model or lora_rank")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise UserError(
                    f"adapter {name} has shape {tuple(state[name].shape)}, the model wants "
                    f"{tuple(tensor.shape)}: it was saved with another lora_rank or model"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that require a gradient: adapters and heads, less what the caller froze."""
        return [p for p in self.parameters() if p.requires_grad]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep one activation per vision block and recompute the rest in backward: less memory, more time."""
        self.backbone.checkpointing = enable

    def compile_blocks(self, mode: str | None = None) -> None:
        """Have torch.compile fuse every vision block, whole; they share their compiled code."""
        for block in self.backbone.blocks:
            block.compile(fullgraph=True, mode=mode)

    def set_base_dtype(self, dtype: torch.dtype) -> DGSNet:
        """Store the frozen towers' weights in `dtype`; adapters, heads and rotary angles keep theirs."""
        frozen = [*self.visual.named_parameters()]
        if self.text is not None:
            frozen += [*self.text.named_parameters(), *self.text.named_buffers()]
        for name, tensor in frozen:
            if "lora_" not in name:
                tensor.data = tensor.data.to(dtype)
        return self

    def merged(self, dtype: torch.dtype, *, teacher: bool = False) -> DGSNet:
        """A copy that gives logits alone: adapters in the weights, the tower in `dtype`, the head as it is.

        Args:
            dtype: of the tower's weights. Those that are in it already are shared with this model.
            teacher: make of it the frozen tower with the teacher's head.
        """
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        copied = copy.deepcopy(self, shared | {id(self.text): None, id(self._tokenizer): None})
        if teacher:
            drop_adapters(copied.visual)
            copied.head.image_head = copied.head.teacher_head
        else:
            merge_adapters(copied.visual, dtype)
        for module in copied.visual.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
        return copied.eval()

    def train(self, mode: bool = True) -> DGSNet:
        """As `nn.Module.train`, but the frozen text tower stays in evaluation mode."""
        super().train(mode)
        if self.text is not None:
            self.text.eval()
        return self


def _logits(head: nn.Linear, features: Tensor) -> Tensor:
    return head(features.to(head.weight.dtype)).squeeze(-1)
