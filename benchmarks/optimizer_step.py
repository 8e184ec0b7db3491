"""A step of AdamW with surgery through the hooks, from the capture of both reference gradients on.

From 8192 rows on, the default, on the 152 tensors of ViT-B/16's vision tower, 86 M numbers, in layers as
`OptimizerSurgery` makes them of modules; below, on `rows` LoRA tensors of 8 x `dim` in layers of 12.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from benchmarks import harness
from benchmarks.project_align_ import formula as surgery_formula
from benchmarks.project_align_ import lists
from benchmarks.project_align_ import loop as surgery_loop
from benchmarks.surgery_adamw_ import BETA1, BETA2, DECAY, EPS, LR, OPTIONS, SMALLEST_SQUARE
from dgs_kernels import OptimizerSurgery, SurgeryAdamW

ADAMW = {"lr": LR, "betas": (BETA1, BETA2), "weight_decay": DECAY, "eps": EPS}
SURGERY = {"alignment": 0.2, "granularity": "layer"}


def vision_tower(width: int = 768, depth: int = 12, patch: int = 16, tokens: int = 197) -> dict[str, tuple]:
    """Names and shapes of a vision transformer's parameters, as open_clip has them."""
    shapes = {"conv1.weight": (width, 3, patch, patch), "embedding.cls": (width,)}
    shapes |= {"embedding.positions": (tokens, width), "proj": (width, 512)}
    for i in range(depth):
        linears = {"attn.in": (3 * width, width), "attn.out": (width, width)}
        linears |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
        for name, shape in linears.items():
            shapes |= {f"{i}.{name}.weight": shape, f"{i}.{name}.bias": shape[:1]}
        shapes |= {f"{i}.{name}.{part}": (width,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")}
    shapes |= {f"{name}.{part}": (width,) for name in ("ln_pre", "ln_post") for part in ("weight", "bias")}
    return shapes


def tensors_of(rows: int, dim: int) -> dict[str, tuple]:
    return vision_tower() if rows >= 8192 else {f"{i // 12}.{i}": (8, dim) for i in range(rows)}


def fused(named: list) -> tuple[torch.optim.Optimizer, SurgeryAdamW]:
    optimizer = SurgeryAdamW(named, **ADAMW, **SURGERY)
    return optimizer, optimizer


def hooked(named: list) -> tuple[torch.optim.Optimizer, OptimizerSurgery]:
    optimizer = torch.optim.AdamW(named, **ADAMW, foreach=True)
    return optimizer, OptimizerSurgery(optimizer, **SURGERY)


def step_with(make: Callable, names: list[str]) -> Callable[..., None]:
    """A step of what `make` makes of the parameters; it lives as long as their tensors."""

    def optimizer_of(params, grads, averages, squares):
        parameters = [nn.Parameter(p) for p in params]
        optimizer, surgery = make(list(zip(names, parameters)))
        for p, grad, average, square in zip(parameters, grads, averages, squares):
            p.grad = grad
            optimizer.state[p] = {"step": torch.tensor(9.0), "exp_avg": average, "exp_avg_sq": square}
        return parameters, optimizer, surgery

    def step(*tensors: Tensor) -> None:
        params, grads, averages, squares, harmful, beneficial = lists(tensors, 6)
        held = params[0].__dict__.setdefault("optimizers", {})
        if make not in held:
            held[make] = optimizer_of(params, grads, averages, squares)
        parameters, optimizer, surgery = held[make]
        for context, gradients in ((surgery.harmful(), harmful), (surgery.beneficial(), beneficial)):
            with context:
                # backward() does this.
                for p, gradient in zip(parameters, gradients):
                    p.grad = gradient
        optimizer.step()

    return step


def plain(surgery: Callable, names: list[str], **kind: bool) -> Callable[..., None]:
    """The surgery by itself, in place, then AdamW."""
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(name.rpartition(".")[0], len(numbers)) for name in names]

    def step(*tensors: Tensor) -> None:
        params, grads, averages, squares, harmful, beneficial = lists(tensors, 6)
        surgery(*grads, *harmful, *beneficial, groups=groups)
        adamw(params, grads, averages, squares, [], [torch.tensor(9.0) for _ in params], **kind, **OPTIONS)

    return step


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    shapes = tensors_of(rows, dim)
    names, count, numbers = (
        list(shapes),
        len(shapes),
        sum(map(torch.Size.numel, map(torch.Size, shapes.values()))),
    )

    def inputs() -> tuple[Tensor, ...]:
        made = [torch.randn(s, device=device) for _ in range(6) for s in shapes.values()]
        for square in made[3 * count : 4 * count]:
            square.square_().add_(SMALLEST_SQUARE)
        return tuple(t.to(dtype) for t in made)

    return harness.Case(
        operation="optimizer_step",
        inputs=inputs,
        bytes_moved=9 * numbers * dtype.itemsize,
        variants={
            "SurgeryAdamW": step_with(fused, names),
            "OptimizerSurgery + AdamW": step_with(hooked, names),
            harness.EAGER: plain(surgery_loop, names, foreach=False),
        },
        exact=plain(surgery_formula, names, foreach=False),
        edited=(*range(count), *range(2 * count, 4 * count)),
    )
