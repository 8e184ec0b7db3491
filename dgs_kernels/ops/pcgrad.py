"""PCGrad on pairs of rows: `dgs::pcgrad`, its schema, shape rules and fake kernel.

What an implementation has to do (`dgs_kernels.triton.pcgrad`)::

    pcgrad(Tensor first, Tensor second, float eps) -> Tensor

first and second are [rows, D], D >= 1, of one dtype and device, with unit stride inside a row; eps > 0. It
returns a contiguous tensor of that shape and dtype, rounded once, from one reading of both. The native
function takes the result's tensor before eps, checks all of this, and returns whether it served the call.

The kernels are those of `project_align`, with a rule of their own: it is one more inner product for them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from dgs_kernels import backends, reference
from dgs_kernels.ops.arguments import check_eps, check_tensors, in_forward_mode
from dgs_kernels.ops.project_align import DTYPES, rows_of

_library = torch.library.Library("dgs", "FRAGMENT")
_library.define(
    "pcgrad(Tensor first, Tensor second, float eps) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def pcgrad(first: Tensor, second: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Add two gradients row by row, each without what conflicts with the other.

    PCGrad (Yu et al. 2020, arXiv 2001.06782) of every pair of rows g_1 and g_2::

        <g_1, g_2> >= 0:  out = g_1 + g_2
        <g_1, g_2> <  0:  out = g_1 - <g_1, u_2> u_2 + g_2 - <g_2, u_1> u_1,   u_i = g_i / (||g_i|| + eps)

    This is `project_align` with `rule="conflict"` both ways, and the sum, from one reading of both. Made for
    gradients of features, where every sample is a pair. A model's gradients, or more than two, are for
    `gramian` and `combine_`, or for `ObjectiveSurgery`.

    Args:
        first: [..., D], D >= 1; the leading axes are rows. float32, float64, bfloat16 or float16, any
            strides.
        second: of the same shape.
        eps: added to the norms, > 0.

    Returns:
        Contiguous tensor of that shape, of the dtype that both promote to. Arithmetic is float32 (float64 if
        an input is), rounded once. NaN and infinity in a row stay visible in that row. Where a gradient is
        asked for, or inside `torch.func`'s transforms, it is computed in plain PyTorch.

    Raises:
        ValueError, TypeError: a shape, dtype, device or eps that does not fit, saying what was expected.

    Example:
        >>> import torch, dgs_kernels
        >>> dgs_kernels.pcgrad(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 1.0]]), eps=1e-12)
        tensor([[0.5000, 1.5000]])
    """
    transformed = torch._C._are_functorch_transforms_active() or in_forward_mode()
    differentiated = torch.is_grad_enabled() and any(
        getattr(x, "requires_grad", False) for x in (first, second)
    )
    in_plain_torch = transformed or differentiated
    below_torch = not (in_plain_torch or backends.watched())
    if below_torch and isinstance(first, Tensor) and first.layout == torch.strided:
        out = _native(first, second, eps)
        if out is not None:
            return out
    check(first, second, eps)
    if in_plain_torch:
        return reference.pcgrad(first, second, eps=eps)
    with torch._C._AutoDispatchBelowAutograd() if below_torch else contextlib.nullcontext():
        return _op(first, second, eps)


def check(first: Tensor, second: Tensor, eps: Any) -> None:
    """Raise what the docstring promises."""
    check_tensors("pcgrad", first=first, second=second)
    check_eps("pcgrad", eps)
    if not first.dim() or first.shape[-1] == 0:
        raise ValueError(f"pcgrad: first must be [..., D] with D >= 1, got shape {tuple(first.shape)}")
    if second.shape != first.shape:
        raise ValueError(
            f"pcgrad: second must have first's shape {tuple(first.shape)}, got {tuple(second.shape)}"
        )
    for name, x in (("first", first), ("second", second)):
        if x.dtype not in DTYPES:
            raise TypeError(f"pcgrad: {name} must be of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if second.device != first.device:
        raise ValueError(f"pcgrad: second is on {second.device} and first on {first.device}")


def _native(first: Tensor, second: Tensor, eps: float) -> Tensor | None:
    """The result of a native function; None if there is none or it does not take these tensors."""
    serve = backends.implementation("pcgrad", first.device.type)
    if not backends.is_native(serve):
        return None
    out = torch.empty_like(first, memory_format=torch.contiguous_format)
    return out if serve(first, second, out, eps) else None


def _kernel(first: Tensor, second: Tensor, eps: float) -> Tensor:
    check(first, second, eps)
    # Kernels read one type: mixed types meet in their common type.
    dtype = torch.promote_types(first.dtype, second.dtype)
    x, y = rows_of(first, first.shape, dtype), rows_of(second, first.shape, dtype)
    out = _native(x, y, eps)
    if out is None:
        serve = backends.implementation("pcgrad", first.device.type)
        assert not backends.is_native(serve), "a native function takes what has been checked and laid out"
        out = serve(x, y, eps)
    return out.view(first.shape)


def _fake(first: Tensor, second: Tensor, eps: float) -> Tensor:
    check(first, second, eps)
    return first.new_empty(first.shape, dtype=torch.promote_types(first.dtype, second.dtype))


_library.impl("pcgrad", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("dgs::pcgrad", _fake, lib=_library)
_op = torch.ops.dgs.pcgrad.default
