"""Gradient surgery on rows: `dgs::project_align`.

What an implementation has to do with the operator's arguments and its result `out`; the schema is below.

The matrices are [rows, D], D >= 1, of one dtype and device, with unit stride inside a row and any stride
between rows (0: one row for all); out is contiguous. scale is 0-dim, of the computing type (float64 for
float64, else float32); alignment * scale is the weight of the alignment, None stands for 1. Of a native
function, out and grad may have any leading axes, and a direction may be one row, [D] or [1, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgs_kernels import private_torch, reference
from dgs_kernels.arguments import check_tensors
from dgs_kernels.operation import Named, Operation
from dgs_kernels.options import Surgery
from dgs_kernels.reference import compute_dtype
from dgs_kernels.tensors import check_dtype, common_rows, number


def project_align(
    grad: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None = None,
    *,
    alignment: float | Tensor = 1.0,
    eps: float = 1e-6,
    order: str = "align_first",
    rule: str = "positive",
) -> Tensor:
    """Project the harmful direction out of every gradient row and align it with the beneficial one.

    The surgery of DGS-Net (arXiv 2511.13108): with u = h / (||h|| + eps) and b = min(beneficial, 0)::

        align_first:    a = grad + alignment * b;   out = a - <a, u> u      (the published code)
        project_first:  out = grad - <grad, u> u + alignment * b            (the paper's formula)

    Args:
        grad: [..., D], D >= 1; the leading axes are rows. float32, float64, bfloat16 or float16, any strides.
        harmful: direction to remove, broadcastable to grad's shape ([D], [1, D], ...); never materialised
            for [D] and [1, D]. A zero row removes nothing. A constant: it receives no gradient.
        beneficial: direction to align with, likewise; None aligns with nothing.
        alignment: weight of the alignment: a number, or a 0-dim tensor on grad's device (read there, without
            a host synchronisation; receives a gradient).
        eps: added to the norm, > 0.
        order: "align_first" or "project_first".
        rule: how h is made. "positive": the positive part of `harmful` (DGS-Net); "full": all of it
            (orthogonal gradient descent); "conflict": all of it, and only in rows whose inner product with
            it is negative (PCGrad, A-GEM). Under "conflict", differentiation holds that choice of rows fixed.

    Returns:
        Contiguous tensor of grad's shape and dtype. Arithmetic is float32 (float64 if any input is), rounded
        once. NaN and infinity in a row stay visible in that row.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit, saying what was expected.

    Example:
        >>> import torch, dgs_kernels
        >>> dgs_kernels.project_align(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, -1.0]), eps=1e-12)
        tensor([[0., 4.]])
    """
    surgery = Surgery.of(alignment, eps, order, rule)
    if private_torch.transformed() or private_torch.forward_mode():
        # Operators with an autograd formula know neither function transforms nor tangents.
        check_kinds(grad, harmful, beneficial, surgery)
        check_shapes(grad, harmful, beneficial)
        constants = (harmful.detach(), None if beneficial is None else beneficial.detach())
        return reference.project_align(grad, *constants, alignment=alignment, eps=eps, order=order, rule=rule)
    return _operation(grad, harmful, beneficial, *surgery)


def check_kinds(
    grad: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None,
    surgery: Surgery,
    caller: str = "project_align",
    name: str = "grad",
) -> None:
    """Tensors and options, whatever the shapes; `name` is what the caller calls its first argument."""
    tensors = {name: grad, "harmful": harmful}
    check_tensors(caller, **(tensors if beneficial is None else tensors | {"beneficial": beneficial}))
    surgery.check(caller, grad.device)


def check_shapes(
    grad: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None,
    caller: str = "project_align",
    name: str = "grad",
) -> None:
    shape, device = grad.shape, grad.device
    if not shape or shape[-1] == 0:
        raise ValueError(f"{caller}: {name} must be [..., D] with D >= 1, got shape {tuple(shape)}")
    check_dtype(caller, name, grad.dtype)
    for which, direction in (("harmful", harmful), ("beneficial", beneficial)):
        if direction is None:
            continue
        if direction.shape != shape and not _broadcasts(direction.shape, shape):
            raise ValueError(
                f"{caller}: {which} must broadcast to {name}'s shape {tuple(shape)}, "
                f"got {tuple(direction.shape)}"
            )
        check_dtype(caller, which, direction.dtype)
        if direction.device != device:
            raise ValueError(f"{caller}: {which} is on {direction.device} and {name} on {device}")


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    """Whether `shape` expands to `target`; the last axis has to be there in full."""
    if not 1 <= len(shape) <= len(target) or shape[-1] != target[-1]:
        return False
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(target)))


def _lay_out(a: Named) -> Named:
    grad, harmful, beneficial = common_rows(a.grad, a.harmful, a.beneficial)
    scale = None if a.scale is None else number(a.scale, compute_dtype(grad))
    return a._replace(grad=grad, harmful=harmful, beneficial=beneficial, scale=scale)


def _finish(a: Named, out: Tensor) -> Tensor:
    out = out if out.shape == a.grad.shape else out.view(a.grad.shape)
    return out if out.dtype == a.grad.dtype else out.to(a.grad.dtype)


def _setup_context(ctx: Any, a: Named, output: Tensor) -> None:
    ctx.alignment, ctx.eps, ctx.order, ctx.rule = a.alignment, a.eps, a.order, a.rule
    ctx.save_for_backward(a.grad if a.rule == "conflict" else None, a.harmful, a.beneficial, a.scale)


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """The forward is P grad + alignment * scale * P b (or b): linear, and the projection P is symmetric."""
    grad, harmful, beneficial, scale = ctx.saved_tensors
    wants = _operation.arguments(*ctx.needs_input_grad)
    rule = "full" if ctx.rule == "conflict" else ctx.rule
    projected = _operation(cotangent, harmful, None, None, 1.0, ctx.eps, ctx.order, rule)
    if ctx.rule == "conflict":
        projected = torch.where(_conflicts(ctx, grad, harmful, beneficial, scale), projected, cotangent)
    grad_scale = None
    if wants.scale and beneficial is not None:
        dtype = compute_dtype(cotangent, beneficial)
        through = projected if ctx.order == "align_first" else cotangent
        pull = beneficial.detach().to(dtype).clamp(max=0)
        grad_scale = (ctx.alignment * (through.to(dtype) * pull).sum()).to(scale.dtype)
    return _operation.gradients(grad=projected if wants.grad else None, scale=grad_scale)


def _conflicts(
    ctx: Any, grad: Tensor, harmful: Tensor, beneficial: Tensor | None, scale: Tensor | None
) -> Tensor:
    """The rows [..., 1] that the forward projected under the conflict rule."""
    dtype = compute_dtype(grad, harmful, beneficial)
    x = grad.detach().to(dtype)
    if beneficial is not None and ctx.order == "align_first":
        weight = ctx.alignment if scale is None else ctx.alignment * scale.detach().to(dtype)
        x = x + weight * beneficial.detach().to(dtype).clamp(max=0)
    return (x * harmful.detach().to(dtype)).sum(-1, keepdim=True) < 0


_operation = Operation(
    "project_align(Tensor grad, Tensor harmful, Tensor? beneficial, Tensor? scale, "
    "float alignment, float eps, str order, str rule) -> Tensor",
    kinds=lambda a: check_kinds(a.grad, a.harmful, a.beneficial, Surgery.among(a)),
    check=lambda a: check_shapes(a.grad, a.harmful, a.beneficial),
    lay_out=_lay_out,
    results=lambda a: (torch.empty_like(a.grad, memory_format=torch.contiguous_format),),
    finish=_finish,
    gradient=(_setup_context, _backward),
    differentiable=("grad", "scale"),
)
