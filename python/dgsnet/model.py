"""DGS-Net's model: an open_clip CLIP with LoRA on its vision tower, the same tower without LoRA as its own
teacher, the frozen text tower, and three linear heads.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import zipfile
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dgs_kernels import SurgeryHead, SurgeryHeadOutput
from dgsnet.config import ModelConfig
from dgsnet.errors import UserError

BUILTIN_NAME = "dgsnet-tiny"
BUILTIN_WEIGHTS = "builtin"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"

# Paths of the adapted linears inside the vision tower, matched whole by peft.
LORA_TARGETS = r"transformer\.resblocks\.\d+\.attn\.(q_proj|k_proj|v_proj)"


class SplitAttention(nn.Module):
    """Self-attention with separate query, key and value linears, in place of a fused `nn.MultiheadAttention`.

    peft cannot adapt the fused module faithfully, and open_clip 4 drops it. Weights are copied, so the
    output is the fused module's to rounding. Called as open_clip's blocks call theirs: [N, L, D] in, a pair
    of [N, L, D] and None out.

    Args:
        fused: the module to take the weights from; batch first, with biases, without attention dropout.
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = fused.num_heads
        self.adapted = True  # False: skip the adapters, if any
        weights, biases = fused.in_proj_weight.chunk(3), fused.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        q, k, v = (
            self._project(linear, x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        attended = _attention(q, k, v, attn_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None

    def _project(self, linear: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(linear, BaseTunerLayer):
            return linear(x)
        if not self.adapted:
            return linear.get_base_layer()(x)
        return _adapted(linear, x)


def _adapted(linear: BaseTunerLayer, x: Tensor) -> Tensor:
    """peft's forward of an adapted linear, base(x) + scaling * B A dropout(x), for x [N, L, D].

    peft widens x to the adapter's fp32 and adds in three passes. Here the adapter is brought to the type of
    x, its fp32 weights being the ones that are trained, and added by the product that computes it.
    """
    if linear.merged or linear.disable_adapters:
        return linear(x)
    a, b = (weights["default"].weight for weights in (linear.lora_A, linear.lora_B))
    rows = x.flatten(0, -2)
    out = linear.get_base_layer()(rows)
    dropped = _dropout(rows, linear.lora_dropout["default"])
    low = F.linear(dropped, a.to(rows.dtype)).to(out.dtype)
    return out.addmm_(low, b.to(out.dtype).T, alpha=linear.scaling["default"]).unflatten(0, x.shape[:-1])


def _dropout(x: Tensor, dropout: nn.Module) -> Tensor:
    """`dropout(x)`; on a CPU five times as fast, with 16 random bits for an element."""
    p = getattr(dropout, "p", 0.0)  # peft has nn.Identity for none
    if not (p and dropout.training):
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    kept = max(1, round((1 - p) * 2**16))
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = torch.empty_like(x)
    torch.lt(bits[: x.numel()].view(x.shape), kept - 2**15, out=keep)
    return x * keep.mul_(2**16 / kept)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """scaled_dot_product_attention, or its formula where that is several times as fast: bf16 on a CPU."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return torch.softmax(scores if mask is None else scores + mask, dim=-1) @ v


class DGSNet(nn.Module):
    """CLIP as student, teacher and text encoder, with a linear head for each; only adapters and heads train.

    There is one copy of the vision tower: the teacher is the student with its adapters skipped. Features are
    CLIP's projected embeddings, not normalised. Initialisation draws from torch's global generator, so
    `torch.manual_seed` decides it.

    Args:
        config: open_clip model name, weights and adapters; `lora_rank=0` makes no adapters (linear probe).
        with_text: False leaves the text tower out, as scoring needs none.

    Attributes:
        visual: open_clip's vision tower with split attention and LoRA.
        text: open_clip's frozen text tower, or None.
        head: `dgs_kernels.SurgeryHead` with image_head, teacher_head and text_head.
        dim: width D of the features.
        image_size: side S of the square input, in pixels.

    Raises:
        UserError: an unknown name or tag, weights that cannot be found, downloaded, read or fitted, a vision
            tower that is not open_clip's plain vision transformer, or adapter settings out of range.

    Example:
        >>> model = DGSNet(ModelConfig(name="dgsnet-tiny", pretrained=""), with_text=False)
        >>> pixels = torch.zeros(2, 3, model.image_size, model.image_size)
        >>> model.logits(pixels).shape
        torch.Size([2])
    """

    def __init__(self, config: ModelConfig, *, with_text: bool = True) -> None:
        super().__init__()
        self.config = config
        clip = _build_clip(config.name, config.pretrained, with_text)
        self.visual: nn.Module = clip.visual
        self.text: nn.Module | None = clip.text if with_text else None
        del clip
        self.requires_grad_(False)
        self._tokenizer = open_clip.get_tokenizer(_canonical(config.name)) if with_text else None

        _split_attention(self.visual)
        if config.lora_rank:
            _inject_lora(self.visual, config)
        self.dim: int = self.visual.output_dim
        height, width = self.visual.image_size
        if height != width:
            raise UserError(
                f"model {config.name} takes {height}x{width} images; only square inputs are supported"
            )
        self.image_size: int = height
        self.head = SurgeryHead(self.dim)
        self.train()

    def forward(
        self, pixels: Tensor, captions: list[str] | None = None, labels: Tensor | None = None, **surgery
    ) -> Tensor | SurgeryHeadOutput:
        """Student logits [N]; or, given labels [N], the losses and logits of the three branches.

        All trained parameters are used inside this one call, as data-parallel wrappers require.

        Args:
            pixels: normalised images [N, 3, S, S].
            captions: one caption per image; None leaves the text branch out.
            labels: 0 real, 1 generated.
            surgery: `order`, `eps` and `reference_batch_size` of `dgs_kernels.surgery_head`.
        """
        if labels is None:
            return self.logits(pixels)
        teacher = self.teacher_features(pixels)  # first, while no activations are kept for backward
        return self.head(
            self.student_features(pixels),
            teacher,
            None if captions is None else self.text_features(captions),
            labels,
            **surgery,
        )

    def student_features(self, pixels: Tensor) -> Tensor:
        """Features [N, D] of normalised images [N, 3, S, S], with adapters."""
        return self._encode(pixels)

    @torch.no_grad()
    def teacher_features(self, pixels: Tensor) -> Tensor:
        """Features [N, D] of normalised images [N, 3, S, S] from the tower without adapters; no gradient."""
        with self._adapters_skipped():
            return self._encode(pixels)

    def _encode(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():  # nothing before the first block is trained
            tokens = self.visual._embeds(pixels.to(self.visual.conv1.weight.dtype))
        pooled, _ = self.visual._pool(self.visual.transformer(tokens))
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    @torch.no_grad()
    def text_features(self, captions: list[str]) -> Tensor:
        """Features [N, D] of captions, tokenised to the longest of them; no gradient.

        Captions longer than the model's context are cut, as open_clip's tokenizer does.
        """
        if self.text is None:
            raise ValueError("this DGSNet was built with with_text=False and has no text tower")
        tokens = self._tokenizer(captions).to(self.text.token_embedding.weight.device)
        return _encode_text(self.text, tokens)

    def logits(self, pixels: Tensor) -> Tensor:
        """Student logits [N]: above 0 means generated."""
        return _logits(self.head.image_head, self.student_features(pixels))

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
        self.visual.set_grad_checkpointing(enable)

    def compile_blocks(self, mode: str | None = None) -> None:
        """Have torch.compile fuse every vision block, whole; they share their compiled code."""
        for block in self.visual.transformer.resblocks:
            block.compile(fullgraph=True, mode=mode)

    def set_base_dtype(self, dtype: torch.dtype) -> DGSNet:
        """Store the frozen CLIP weights in `dtype`; adapters and heads keep their precision."""
        with torch.no_grad():
            for tower in filter(None, (self.visual, self.text)):
                for name, tensor in [*tower.named_parameters(), *tower.named_buffers()]:
                    if "lora_" not in name:
                        tensor.data = tensor.data.to(dtype)
        return self

    def train(self, mode: bool = True) -> DGSNet:
        """As `nn.Module.train`, but the frozen text tower stays in evaluation mode."""
        super().train(mode)
        if self.text is not None:
            self.text.eval()
        return self

    @contextlib.contextmanager
    def _adapters_skipped(self) -> Iterator[None]:
        # peft's own switch also flips requires_grad of every adapter, which would undo a caller's freezing.
        attentions = [block.attn for block in self.visual.transformer.resblocks]
        for attention in attentions:
            attention.adapted = False
        try:
            yield
        finally:
            for attention in attentions:
                attention.adapted = True


def _logits(head: nn.Linear, features: Tensor) -> Tensor:
    return head(features.to(head.weight.dtype)).squeeze(-1)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    # Made on "meta" so that no random numbers are drawn and no memory is filled twice.
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def _split_attention(visual: nn.Module) -> None:
    for block in visual.transformer.resblocks:
        if not (isinstance(block.attn, nn.MultiheadAttention) and block.attn.batch_first):
            raise UserError(
                f"open_clip {open_clip.__version__} builds attention as {type(block.attn).__name__}, which "
                "dgsnet does not know: install open_clip 3 (pip install 'open_clip_torch>=3,<4')"
            )
        block.attn = SplitAttention(block.attn)


def _inject_lora(visual: nn.Module, config: ModelConfig) -> None:
    if config.lora_rank < 0 or not 0 <= config.lora_dropout < 1:
        raise UserError(
            f"lora_rank={config.lora_rank} must be at least 0, lora_dropout={config.lora_dropout} in [0, 1)"
        )
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=True,  # scaling alpha / sqrt(r), as officially; peft's default is alpha / r
        target_modules=LORA_TARGETS,
    )
    inject_adapter_in_model(lora, visual)


def _encode_text(text: nn.Module, tokens: Tensor) -> Tensor:
    """Text features [N, D] of tokens [N, context], without the columns that cannot change them.

    Under a causal mask nothing after the token that is pooled reaches it, so columns after the batch's last
    such token are cut, with the mask. Towers that pool or attend otherwise get all columns.
    """
    mask = getattr(text, "attn_mask", None)
    if mask is None or text.cls_emb is not None or text.pool_type not in ("argmax", "eos"):
        return text(tokens)
    end = tokens if text.pool_type == "argmax" else (tokens == text.eos_id).int()
    length = int(end.argmax(dim=-1).max()) + 1
    return torch.func.functional_call(text, {"attn_mask": mask[:length, :length]}, (tokens[:, :length],))


def _build_clip(name: str, pretrained: str, with_text: bool) -> nn.Module:
    """open_clip's model with its towers as `.visual` and `.text`, on the CPU in fp32.

    The weights are the file's own tensors, taken over one by one: nothing is initialised only to be
    overwritten, and there is never a second CLIP in memory.
    """
    config = _model_config(name)
    quick_gelu = bool(config.get("quick_gelu"))
    config.pop("custom_text", None)  # the text tower is always made a module of its own
    config["vision_cfg"]["patch_dropout"] = 0.0  # a device for pretraining, and noise to the teacher
    config["text_cfg"]["hf_model_pretrained"] = False
    weights = _find_weights(name, pretrained, quick_gelu)
    if weights is None:
        return open_clip.CustomTextCLIP(**config)

    with init_empty_weights(include_buffers=False):
        clip = open_clip.CustomTextCLIP(**config)
    clip.load_state_dict = functools.partial(clip.load_state_dict, assign=True)
    try:
        # Old TorchScript archives hold no pickled objects but need the full loader to be recognised.
        open_clip.load_checkpoint(clip, str(weights), weights_only=not _is_torchscript(weights))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"cannot load {weights} as weights of {name} ({reason}): check that the file is complete and was "
            "made for this model"
        ) from error
    del clip.load_state_dict
    if not with_text:
        clip.text = None
    for parameter in clip.parameters():  # a copy, as the tensors may be windows into the file
        parameter.data = parameter.data.to(torch.float32, copy=True)
    return clip


def _canonical(name: str) -> str:
    return name.replace("/", "-")


def _model_config(name: str) -> dict:
    """open_clip's configuration of a model whose vision tower DGS-Net can adapt."""
    if name == BUILTIN_NAME and name not in open_clip.list_models():
        open_clip.add_model_config(BUILTIN_FOLDER / f"{BUILTIN_NAME}.json")
    known = open_clip.list_models()
    if _canonical(name) not in known:
        close = difflib.get_close_matches(name, known, n=3) or ["ViT-L-14-quickgelu", BUILTIN_NAME]
        raise UserError(
            f"unknown model {name!r}: did you mean {' or '.join(close)}? "
            "open_clip.list_models() names them all"
        )
    config = open_clip.get_model_config(_canonical(name))
    vision = config["vision_cfg"]
    found = (
        "a timm tower"
        if "timm_model_name" in vision
        else "a ResNet"
        if isinstance(vision.get("layers"), (list, tuple))
        else "CoCa, with attentional pooling"
        if "multimodal_cfg" in config or vision.get("attentional_pool")
        else "a transformer with custom attention blocks"
        if vision.get("block_type") == "custom"
        else None
    )
    if found:
        raise UserError(
            f"model {name} is {found}; dgsnet adapts plain CLIP vision transformers, e.g. ViT-L-14-quickgelu"
        )
    return config


def _find_weights(name: str, pretrained: str, quick_gelu: bool) -> Path | None:
    """The weights file for a tag, a path or "builtin"; None for "" (random weights)."""
    if not pretrained:
        return None
    if pretrained == BUILTIN_WEIGHTS:
        if name != BUILTIN_NAME:
            raise UserError(f"pretrained='builtin' goes with name='{BUILTIN_NAME}' only, not with {name}")
        return BUILTIN_FOLDER / f"{BUILTIN_NAME}.safetensors"

    tag = open_clip.get_pretrained_cfg(_canonical(name), pretrained)
    path = Path(pretrained).expanduser()
    if tag:
        _check_activation(name, f"the {pretrained!r} weights", bool(tag.get("quick_gelu")), quick_gelu)
        return _download(name, pretrained, tag)
    if path.is_file():
        if _is_torchscript(path):  # the only TorchScript CLIPs are OpenAI's originals
            _check_activation(name, str(path), True, quick_gelu)
        return path
    if path.suffix or len(path.parts) > 1:
        raise UserError(
            f"weights file {pretrained} does not exist: give an existing .pt, .bin or .safetensors file"
        )
    tags = [
        known
        for known in open_clip.list_pretrained_tags_by_model(_canonical(name))
        if bool(open_clip.get_pretrained_cfg(_canonical(name), known).get("quick_gelu")) == quick_gelu
    ]
    raise UserError(
        f"{name} has no pretrained weights {pretrained!r}: give a weights file"
        + (f" or one of {', '.join(tags)}" if tags else "")
    )


def _check_activation(name: str, weights: str, trained: bool, built: bool) -> None:
    # The wrong activation loads without complaint and only costs accuracy.
    if trained != built:
        fitting = _canonical(name).removesuffix("-quickgelu") + "-quickgelu" * trained
        remedy = f"use name={fitting}" if fitting in open_clip.list_models() else "use other weights"
        raise UserError(
            f"{weights} were trained {'with' if trained else 'without'} QuickGELU but model {name} is built "
            f"{'with' if built else 'without'} it: {remedy}"
        )


def _download(name: str, pretrained: str, tag: dict) -> Path:
    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # whatever the hub, the proxy or the socket raised
        source = tag.get("hf_hub") or tag.get("url")
        raise UserError(
            f"cannot download the {pretrained!r} weights of {name} from {source.rstrip('/')}: check the "
            "network, or fetch the file elsewhere and give its path as pretrained"
        ) from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(member).name == "constants.pkl" for member in archive.namelist())
