"""Tensors as kernels take them: of one type, without gaps, of no subclass, and apart where one is written."""

from __future__ import annotations

import bisect
import itertools
import operator
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dgs_kernels import private_torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GAPLESS = torch.ops.aten.is_non_overlapping_and_dense
# A native function's reason ends so where a tensor's storage is not there.
NO_MEMORY = "has no memory of its own"
_KIND = operator.attrgetter("device", "dtype", "layout")


# Types


def sums_dtype(*lists: Sequence[Tensor]) -> torch.dtype:
    """float64 if any tensor is, else float32: of the tensors that are let through their common type."""
    types = {getattr(t, "dtype", None) for tensors in lists for t in tensors}
    return torch.float64 if torch.float64 in types else torch.float32


def common_dtype(*lists: Sequence[Tensor]) -> torch.dtype:
    """The one type in which kernels read all of these: theirs or, of mixed ones, what they compute in."""
    types = {t.dtype for tensors in lists for t in tensors}
    return types.pop() if len(types) == 1 else sums_dtype(*lists)


def check_dtype(caller: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{caller}: {name} must be of {', '.join(map(str, DTYPES))}, got {dtype}")


# One tensor


def plain(x: Tensor) -> Tensor:
    """The same tensor, of no subclass; a copy where memory does not hold its numbers as they are.

    In the imaginary part of a conjugate, torch changes the signs as it reads them. Zero tensors, which
    autograd makes where a derivative is zero, have no memory.
    """
    x = x if type(x) in (Tensor, torch.nn.Parameter) else x.as_subclass(Tensor)
    return x.clone() if private_torch.is_zero_tensor(x) else x.resolve_neg()


def refuse_freed(caller: str, arguments: Sequence[object]) -> None:
    """Raise where a tensor's memory was given back: reading it ends the process, in torch too."""
    lists = (argument if isinstance(argument, list) else [argument] for argument in arguments)
    for x in itertools.chain.from_iterable(lists):
        if not isinstance(x, Tensor) or type(x) not in (Tensor, torch.nn.Parameter):
            continue
        if x.layout is not torch.strided or x.is_meta or private_torch.is_zero_tensor(x):
            continue
        if x.numel() and not x.untyped_storage().nbytes():
            raise ValueError(f"{caller}: a tensor of shape {tuple(x.shape)} has no memory: it was freed")


def refuse_zero_tensors(caller: str, written: Iterable[Tensor]) -> None:
    """Raise where a tensor that is to be written is one of zeros that lie nowhere."""
    if any(map(private_torch.is_zero_tensor, written)):
        raise ValueError(f"{caller}: a zero tensor, as autograd makes them, cannot be written: clone() it")


def number(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A 0-dim tensor as kernels take it, of this type and no subclass; checks see to complex ones."""
    return None if x is None else plain(x if x.is_complex() else x.to(dtype))


def numbers(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Few numbers, of this type and one after the other."""
    return None if x is None else plain(x.to(dtype).contiguous())


def rows_of(x: Tensor | None, dtype: torch.dtype, shape: torch.Size | None = None) -> Tensor | None:
    """[rows, D] with unit stride inside the row; a broadcast to `shape` keeps stride 0 between rows."""
    if x is None:
        return None
    if x.dtype != dtype:
        x = x.to(dtype)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if shape is not None and x.shape != shape:
        x = x.expand(shape)
    return plain(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))


def common_rows(*matrices: Tensor | None) -> list[Tensor | None]:
    """Matrices of the first one's rows, in one type: theirs or, of mixed ones, what they compute in."""
    first = matrices[0]
    assert first is not None
    dtype = common_dtype([x for x in matrices if x is not None])
    return [rows_of(x, dtype, first.shape) for x in matrices]


# Lists of tensors


def number_layers(caller: str, groups: Sequence[int] | None, count: int) -> tuple[list[int], int]:
    """Layer numbers 0..G-1 of `count` tensors, in order of first appearance, and G."""
    if groups is None:
        return list(range(count)), count
    if len(groups) != count:
        raise ValueError(f"{caller}: groups must name the layer of {count} tensors, got {len(groups)}")
    numbers: dict[int, int] = {}
    layers = [numbers.setdefault(group, len(numbers)) for group in groups]
    return layers, len(numbers)


def check_groups(caller: str, groups: Sequence[int], count: int, num_groups: int) -> None:
    if len(groups) != count or (groups and not 0 <= min(groups) <= max(groups) < num_groups):
        raise ValueError(
            f"{caller}: groups must hold a number in 0..{num_groups - 1} for each of the tensors"
        )


def check_list(
    caller: str,
    name: str,
    tensors: Sequence[Tensor],
    model_name: str,
    model: Sequence[Tensor],
    device: torch.device,
) -> None:
    """Tensors of the model's shapes, dense, on this device, of types that kernels read."""
    if len(tensors) != len(model):
        raise ValueError(
            f"{caller}: {name} must have {len(model)} tensors as {model_name} has, got {len(tensors)}"
        )
    if not all(map(Tensor.is_same_size, tensors, model)):
        i = next(i for i, (t, m) in enumerate(zip(tensors, model)) if t.shape != m.shape)
        raise ValueError(
            f"{caller}: {name}[{i}] must have shape {tuple(model[i].shape)} as {model_name}[{i}], "
            f"got {tuple(tensors[i].shape)}"
        )
    for its_device, dtype, layout in set(map(_KIND, tensors)):
        if its_device != device:
            raise ValueError(f"{caller}: {name} has a tensor on {its_device}; all must be on {device}")
        check_dtype(caller, name, dtype)
        if layout != torch.strided:
            raise TypeError(f"{caller}: {name} must be dense tensors, not sparse ones")


def dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` without gaps, overlaps or changed signs, each copied only where it has some."""
    return [(t if t.is_contiguous() or _GAPLESS(t) else t.contiguous()).resolve_neg() for t in tensors]


def common_layout(dtype: torch.dtype, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` in one dtype and with the strides of `like`, copied only where they are not."""
    return [
        t
        if t.dtype == dtype
        and ((t.is_contiguous() and g.is_contiguous()) or t.stride() == g.stride())
        and not t.is_neg()
        else torch.empty_like(g, dtype=dtype).copy_(t)
        for t, g in zip(tensors, like)
    ]


def in_a_row(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Dense tensors as contiguous ones of no subclass: their numbers as they follow each other in memory."""
    return [t if t.is_contiguous() else t.as_strided((t.numel(),), (1,)) for t in map(plain, tensors)]


# Memory


def refuse_shared_memory(caller: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Raise where an edit of one number would be one of another."""
    spans = sorted((*_span(x), i) for i, x in enumerate(tensors) if x.numel())
    # Tensors whose spans cross one another: only there single numbers are looked at.
    together: list[int] = []
    reached = 0
    for begin, end, i in [*spans, (sys.maxsize, sys.maxsize, -1)]:
        if begin >= reached:
            if len(together) > 1 or not all(map(_GAPLESS, (tensors[j] for j in together))):
                places = torch.cat([_places(tensors[j]) for j in together])
                if len(places.unique()) < len(places):
                    names = [f"{name}[{j}]" for j in sorted(together)]
                    if len(names) > 3:
                        names[2:] = [f"{len(names) - 2} more"]
                    raise ValueError(
                        f"{caller}: numbers of {' and '.join(names)} share memory: clone what overlaps"
                    )
            together = []
        together.append(i)
        reached = max(reached, end)


def refuse_overlaps(caller: str, written: Sequence[Tensor], lists: Sequence[Sequence[Tensor]]) -> None:
    """Raise where a tensor without gaps that is written to, of grads, is read elsewhere in `objectives`."""
    spans = sorted((*_span(g), i) for i, g in enumerate(written) if g.numel() and _GAPLESS(g))
    for (_, end, i), (begin, _, j) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"{caller}: grads[{i}] and grads[{j}] share memory; write to distinct tensors")
    for k, tensors in enumerate(lists):
        for i, t in enumerate(tensors):
            if not t.numel() or not _GAPLESS(t):
                continue
            begin, end = _span(t)
            # Spans before it begin before t ends.
            place = bisect.bisect_left(spans, (end, 0, 0))
            if place and spans[place - 1][1] > begin and spans[place - 1] != (begin, end, i):
                raise ValueError(
                    f"{caller}: grads[{spans[place - 1][2]}] and objectives[{k}][{i}] share memory; only "
                    f"grads[{i}] may be objectives[{k}][{i}], and the same tensor then"
                )


def _span(x: Tensor) -> tuple[int, int]:
    """The first address of a tensor's numbers, and the one after the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _places(x: Tensor) -> Tensor:
    """The addresses at which the numbers of a tensor begin; a CPU tensor."""
    places = torch.tensor(0, device="cpu")
    for size, stride in zip(x.shape, x.stride()):
        places = places[..., None] + torch.arange(size, device="cpu") * stride
    return places.flatten() * x.element_size() + x.data_ptr()
