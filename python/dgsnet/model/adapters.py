"""LoRA on a vision transformer's linears, and attention that is split so that it can be adapted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from dgsnet.config import ModelConfig


class Adapter(LoraLinear):
    """peft's LoRA on a linear, base(x) + scaling * B A dropout(x) for x [..., D]; the teacher skips it."""

    # True stands for the base alone; peft's own switch would touch requires_grad too.
    skipped = False

    def forward(self, x: Tensor) -> Tensor:
        if self.skipped:
            return self.base_layer(x)
        if self.merged or self.disable_adapters:
            return super().forward(x)
        return self.adapted(x)

    def adapted(self, x: Tensor) -> Tensor:
        """peft widens x to the adapter's fp32 and adds in three passes. Here the adapter is brought to the
        type of x, its fp32 weights being those that are trained, and added by the product that computes it.
        """
        a, b = (weights.get_parameter("default.weight") for weights in (self.lora_A, self.lora_B))
        rows = x.flatten(0, -2)
        out = self.base_layer(rows)
        dropped = _dropout(rows, self.lora_dropout["default"])
        low = F.linear(dropped, a.to(rows.dtype)).to(out.dtype)
        return out.addmm_(low, b.to(out.dtype).T, alpha=self.scaling["default"]).unflatten(0, x.shape[:-1])


def inject_lora(visual: nn.Module, config: ModelConfig, targets: str) -> None:
    """Put adapters on the linears of a tower whose whole paths match the regular expression `targets`."""
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        # The official scaling is alpha / sqrt(r); peft's default is alpha / r.
        use_rslora=True,
        target_modules=targets,
    )
    lora._register_custom_module({nn.Linear: Adapter})
    inject_adapter_in_model(lora, visual)


@contextlib.contextmanager
def adapters_skipped(visual: nn.Module) -> Iterator[None]:
    """Within it the tower is as it was before `inject_lora`."""
    adapters = [module for module in visual.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.skipped = True
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.skipped = False


def merge_adapters(visual: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Add every adapter to its linear, which takes its place again: in float64, rounded once, to `dtype`."""
    for adapter in visual.modules():
        if isinstance(adapter, Adapter):
            linear = adapter.get_base_layer()
            merged = merged_weight(adapter).to(linear.weight.device, dtype or linear.weight.dtype)
            linear.weight = nn.Parameter(merged, requires_grad=False)
    drop_adapters(visual)


def drop_adapters(visual: nn.Module) -> None:
    """Put every linear in its adapter's place again, as it was before `inject_lora`."""
    for path, adapter in list(visual.named_modules()):
        if isinstance(adapter, Adapter):
            visual.set_submodule(path, adapter.get_base_layer())


def merged_weight(adapter: Adapter) -> Tensor:
    """What stands for linear and adapter together, float64 on the CPU."""
    base, a, b = (
        weight.detach().cpu().double()
        for weight in (
            adapter.get_base_layer().weight,
            *(weights.get_parameter("default.weight") for weights in (adapter.lora_A, adapter.lora_B)),
        )
    )
    return torch.addmm(base, b, a, alpha=adapter.scaling["default"])


def _dropout(x: Tensor, dropout: nn.Module) -> Tensor:
    """`dropout(x)`; on a CPU five times as fast, with 16 random bits for an element."""
    # peft has nn.Identity for none.
    p = getattr(dropout, "p", 0.0)
    if not (p and dropout.training):
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    kept = max(1, round((1 - p) * 2**16))
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = torch.empty_like(x)
    torch.lt(bits[: x.numel()].view(x.shape), kept - 2**15, out=keep)
    return x * keep.mul_(2**16 / kept)


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
        weights, biases = fused.in_proj_weight.chunk(3), fused.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(frozen_linear, weights, biases)
        self.out_proj = frozen_linear(fused.out_proj.weight, fused.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        attended = _attention(q, k, v, attn_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """scaled_dot_product_attention, or its formula where that is several times as fast: bf16 on a CPU."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return torch.softmax(scores if mask is None else scores + mask, dim=-1) @ v


def frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear with copies of these weights that are not trained."""
    # Made on "meta" so that no random numbers are drawn and no memory is filled twice.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear
