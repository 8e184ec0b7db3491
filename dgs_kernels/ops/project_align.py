"""Gradient surgery on rows: `dgs::project_align`, its schema, shape rules, fake kernel and autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dgs_kernels import backends, reference
from dgs_kernels.ops.arguments import check_options, check_tensors, in_forward_mode
from dgs_kernels.reference import ORDERS, RULES, compute_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_library = torch.library.Library("dgs", "FRAGMENT")
_library.define(
    "project_align(Tensor grad, Tensor harmful, Tensor? beneficial, Tensor? scale, "
    "float alignment, float eps, str order, str rule) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
    strength, scale = (1.0, alignment) if isinstance(alignment, Tensor) else (alignment, None)
    arguments = (grad, harmful, beneficial, scale, strength, eps, order, rule)
    transformed = torch._C._are_functorch_transforms_active() or in_forward_mode()
    differentiated = torch.is_grad_enabled() and (
        getattr(grad, "requires_grad", False) or (scale is not None and scale.requires_grad)
    )
    below_autograd = not (transformed or differentiated or backends.watched())
    if below_autograd and isinstance(grad, Tensor) and grad.layout == torch.strided:
        serve = backends.implementation("project_align", grad.device.type)
        if backends.is_native(serve):
            out = _native(serve, *arguments)
            if out is not None:
                return out
    check(grad, harmful, beneficial, alignment, eps, order, rule)
    if transformed:  # operators with an autograd formula know neither function transforms nor tangents
        constants = (harmful.detach(), None if beneficial is None else beneficial.detach())
        return reference.project_align(grad, *constants, alignment=alignment, eps=eps, order=order, rule=rule)
    # The autograd formula is Python: entering it to find that there is nothing to do would double the
    # host time of a small call.
    with torch._C._AutoDispatchBelowAutograd() if below_autograd else contextlib.nullcontext():
        return _op(*arguments)


def check(
    grad: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None,
    alignment: float | Tensor,
    eps: float,
    order: str,
    rule: str,
    *,
    caller: str = "project_align",
    name: str = "grad",
) -> None:
    """Raise what the docstrings promise; `name` is what the caller calls its first argument."""
    check_tensors(caller, **{name: grad, "harmful": harmful})
    if beneficial is not None:
        check_tensors(caller, beneficial=beneficial)
    shape, device = grad.shape, grad.device
    check_options(caller, device, alignment, eps, order, rule)
    if not shape or shape[-1] == 0:
        raise ValueError(f"{caller}: {name} must be [..., D] with D >= 1, got shape {tuple(shape)}")
    if grad.dtype not in DTYPES:
        raise TypeError(f"{caller}: {name} must be of {', '.join(map(str, DTYPES))}, got {grad.dtype}")
    for which, direction in (("harmful", harmful), ("beneficial", beneficial)):
        if direction is None:
            continue
        if direction.shape != shape and not _broadcasts(direction.shape, shape):
            raise ValueError(
                f"{caller}: {which} must broadcast to {name}'s shape {tuple(shape)}, "
                f"got {tuple(direction.shape)}"
            )
        if direction.dtype not in DTYPES:
            raise TypeError(
                f"{caller}: {which} must be of {', '.join(map(str, DTYPES))}, got {direction.dtype}"
            )
        if direction.device != device:
            raise ValueError(f"{caller}: {which} is on {direction.device} and {name} on {device}")


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    """Whether `shape` expands to `target`; the last axis has to be there in full."""
    if not 1 <= len(shape) <= len(target) or shape[-1] != target[-1]:
        return False
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(target)))


def rows_of(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A [rows, D] view with unit stride inside the row; a broadcast keeps stride 0 between rows."""
    if x.dtype != dtype:
        x = x.to(dtype)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.shape != shape:
        x = x.expand(shape)
    return backends.plain(x if x.dim() == 2 else x.reshape(-1, shape[-1]))


def _native(
    serve: Callable,
    grad: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None,
    scale: Tensor | None,
    alignment: float,
    eps: float,
    order: str,
    rule: str,
) -> Tensor | None:
    """The result of a native function; None if it does not take these tensors."""
    out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    options = (alignment, eps, code(ORDERS, order), code(RULES, rule))
    return out if serve(grad, harmful, beneficial, scale, out, *options) else None


def number(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A 0-dim tensor as kernels take it, of this type and no subclass; `check` sees to complex ones."""
    return None if x is None else backends.plain(x if x.is_complex() else x.to(dtype))


def code(names: tuple[str, ...], name: str) -> int:
    """An option as kernels are told it: its place; -1 if there is no such option."""
    return names.index(name) if name in names else -1


def _kernel(
    grad: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None,
    scale: Tensor | None,
    alignment: float,
    eps: float,
    order: str,
    rule: str,
) -> Tensor:
    check(grad, harmful, beneficial, alignment if scale is None else scale, eps, order, rule)
    shape, dtype = grad.shape, grad.dtype
    # Kernels read one type; mixed types meet in their common type, and the result returns to grad's.
    if harmful.dtype != dtype or (beneficial is not None and beneficial.dtype != dtype):
        dtype = compute_dtype(grad, harmful, beneficial)
    scale = number(scale, compute_dtype(grad, harmful, beneficial))
    rows = (
        rows_of(grad, shape, dtype),
        rows_of(harmful, shape, dtype),
        None if beneficial is None else rows_of(beneficial, shape, dtype),
    )
    serve = backends.implementation("project_align", grad.device.type)
    if backends.is_native(serve):
        out = _native(serve, *rows, scale, alignment, eps, order, rule)
        assert out is not None, "a native function takes what has been checked and laid out"
    else:
        out = serve(*rows, scale, alignment, eps, ORDERS.index(order), RULES.index(rule))
    if out.shape != shape:
        out = out.view(shape)
    return out if out.dtype == grad.dtype else out.to(grad.dtype)


def _fake(
    grad: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None,
    scale: Tensor | None,
    alignment: float,
    eps: float,
    order: str,
    rule: str,
) -> Tensor:
    check(grad, harmful, beneficial, alignment if scale is None else scale, eps, order, rule)
    return grad.new_empty(grad.shape)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    grad, harmful, beneficial, scale, ctx.alignment, ctx.eps, ctx.order, ctx.rule = inputs
    ctx.save_for_backward(grad if ctx.rule == "conflict" else None, harmful, beneficial, scale)


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """The forward is P grad + alignment * scale * P b (or b): linear, and the projection P is symmetric."""
    grad, harmful, beneficial, scale = ctx.saved_tensors
    wants_grad, _, _, wants_scale = ctx.needs_input_grad[:4]
    rule = "full" if ctx.rule == "conflict" else ctx.rule
    projected = _op(cotangent, harmful, None, None, 1.0, ctx.eps, ctx.order, rule)
    if ctx.rule == "conflict":
        projected = torch.where(_conflicts(ctx, grad, harmful, beneficial, scale), projected, cotangent)
    grad_scale = None
    if wants_scale and beneficial is not None:
        dtype = compute_dtype(cotangent, beneficial)
        through = projected if ctx.order == "align_first" else cotangent
        pull = beneficial.detach().to(dtype).clamp(max=0)
        grad_scale = (ctx.alignment * (through.to(dtype) * pull).sum()).to(scale.dtype)
    return (projected if wants_grad else None), None, None, grad_scale, None, None, None, None


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


_library.impl("project_align", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("dgs::project_align", _fake, lib=_library)
torch.library.register_autograd("dgs::project_align", _backward, setup_context=_setup_context, lib=_library)
_op = torch.ops.dgs.project_align.default
