"""LoRA on a vision transformer's attention, whose fused modules are split so that it can be adapted."""

from __future__ import annotations

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from dgsnet.config import ModelConfig
from dgsnet.errors import UserError

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
        if not isinstance(linear, LoraLinear):
            return linear(x)
        if not self.adapted:
            return linear.get_base_layer()(x)
        return _adapted(linear, x)


def _adapted(linear: LoraLinear, x: Tensor) -> Tensor:
    """peft's forward of an adapted linear, base(x) + scaling * B A dropout(x), for x [N, L, D].

    peft widens x to the adapter's fp32 and adds in three passes. Here the adapter is brought to the type of
    x, its fp32 weights being the ones that are trained, and added by the product that computes it.
    """
    if linear.merged or linear.disable_adapters:
        return linear(x)
    a, b = (weights.get_parameter("default.weight") for weights in (linear.lora_A, linear.lora_B))
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


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    # Made on "meta" so that no random numbers are drawn and no memory is filled twice.
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def split_attention(visual: VisionTransformer) -> None:
    for block in visual.transformer.resblocks:
        if not (isinstance(block.attn, nn.MultiheadAttention) and block.attn.batch_first):
            raise UserError(
                f"open_clip {open_clip.__version__} builds attention as {type(block.attn).__name__}, which "
                "dgsnet does not know: install open_clip 3 (pip install 'open_clip_torch>=3,<4')"
            )
        block.attn = SplitAttention(block.attn)


def inject_lora(visual: VisionTransformer, config: ModelConfig) -> None:
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=True,  # scaling alpha / sqrt(r), as officially; peft's default is alpha / r
        target_modules=LORA_TARGETS,
    )
    inject_adapter_in_model(lora, visual)
