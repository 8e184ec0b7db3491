"""Gradient surgery on layers in Triton: the portable GPU kernels behind `dgs::project_align_`.

Every tensor is cut into chunks. The first launch leaves partial sums of each chunk, the second adds up those
of a layer in a fixed order, the third reads everything again and edits the gradients: 4 reads and 1 write
without alignment, 6 and 1 with it, whatever the number of tensors. Sizes and addresses lie in a table on the
device, made anew by every call and sent without waiting; a program finds its chunk's tensor there by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgs_kernels.reference import RULES
from dgs_kernels.triton.project_align import CONFLICT, PROJECT_FIRST, _direction, _strength, places
from dgs_kernels.triton.rounding import divide, root

# Numbers of a tensor that a program works on, and those it holds at a time: 8 in each of 256 threads.
CHUNK = 8192
BLOCK = tl.constexpr(2048)
WARPS = 8
SUMS = tl.constexpr(6)
# Rows of a table before those of addresses, and tensors looked at together when a program looks for its own.
ADDRESSES = tl.constexpr(3)
SEARCHED = tl.constexpr(1024)
POINTERS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _chunk(table_ptr, tensors, CHUNK: tl.constexpr):
    """Tensor, layer, first and last number of this program's chunk, and the size of its tensor."""
    chunk = tl.program_id(0)
    # This becomes the number of tensors that end before the chunk.
    tensor = 0
    for first in range(0, tensors, SEARCHED):
        i = first + tl.arange(0, SEARCHED)
        tensor += tl.sum((tl.load(table_ptr + i, i < tensors, chunk + 1) <= chunk).to(tl.int32), 0)
    begin = (chunk - tl.load(table_ptr + tensor - 1, tensor > 0, 0)) * CHUNK
    numel = tl.load(table_ptr + tensors + tensor)
    layer = tl.load(table_ptr + 2 * tensors + tensor)
    return tensor, layer, begin, tl.minimum(begin + CHUNK, numel), numel


@triton.jit
def _pointer(table_ptr, tensors, which: tl.constexpr, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a tensor begins: at a multiple of 16 if ALIGNED, in the interpreter too, as `multiple` is."""
    address = tl.load(table_ptr + (ADDRESSES + which) * tensors + tensor)
    if ALIGNED:
        return tl.multiple_of((address & -16).to(tl.pointer_type(TYPE)), 16)
    else:
        return address.to(tl.pointer_type(TYPE))


@triton.jit
def _read(pointer, at, numel, ACC: tl.constexpr, TAILS: tl.constexpr, WIDTH: tl.constexpr = BLOCK):
    """WIDTH numbers of a tensor, its end filled up with zeros; full blocks move 16 bytes at a time."""
    index = at + tl.arange(0, WIDTH)
    if TAILS:
        if at + WIDTH <= numel:
            x = tl.load(pointer + index)
        else:
            x = tl.load(pointer + index, index < numel, 0.0)
    else:
        x = tl.load(pointer + index)
    return x.to(ACC)


@triton.jit
def _write(pointer, at, numel, x, TAILS: tl.constexpr):
    index = at + tl.arange(0, BLOCK)
    if TAILS:
        if at + BLOCK <= numel:
            tl.store(pointer + index, x)
        else:
            tl.store(pointer + index, x, index < numel)
    else:
        tl.store(pointer + index, x)


@triton.jit
def _negative(x):
    # A comparison that is false for NaN keeps it, which tl.minimum would not.
    return tl.where(x > 0, 0.0, x)


@triton.jit(do_not_specialize=["tensors", "rule"])
def _chunk_kernel(
    table_ptr,
    partials_ptr,
    tensors,
    rule,
    HAS_BENEFICIAL: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAILS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Partial sums [chunks, 6] of <g, h>, <h, h>, <g, g>, <b, h>, <b, b>, <g, b>."""
    tensor, _, begin, end, numel = _chunk(table_ptr, tensors, CHUNK)
    grad = _pointer(table_ptr, tensors, 0, tensor, TYPE, ALIGNED)
    harmful = _pointer(table_ptr, tensors, 1, tensor, TYPE, ALIGNED)
    beneficial = _pointer(table_ptr, tensors, 2, tensor, TYPE, ALIGNED) if HAS_BENEFICIAL else harmful
    none = tl.zeros((BLOCK,), ACC)
    gh, hh, gg, bh, bb, gb = none, none, none, none, none, none
    for at in range(begin, end, BLOCK):
        g = _read(grad, at, numel, ACC, TAILS)
        h = _direction(_read(harmful, at, numel, ACC, TAILS), rule)
        gh += g * h
        hh += h * h
        gg += g * g
        if HAS_BENEFICIAL:
            b = _negative(_read(beneficial, at, numel, ACC, TAILS))
            bh += b * h
            bb += b * b
            gb += g * b
    partials_ptr += tl.program_id(0).to(tl.int64) * SUMS
    tl.store(partials_ptr, tl.sum(gh, 0))
    tl.store(partials_ptr + 1, tl.sum(hh, 0))
    tl.store(partials_ptr + 2, tl.sum(gg, 0))
    tl.store(partials_ptr + 3, tl.sum(bh, 0))
    tl.store(partials_ptr + 4, tl.sum(bb, 0))
    tl.store(partials_ptr + 5, tl.sum(gb, 0))


@triton.jit(do_not_specialize_on_alignment=["begins_ptr"])
def _layer_kernel(partials_ptr, begins_ptr, sums_ptr, ACC: tl.constexpr, ROWS: tl.constexpr):
    """The sums of one layer from those of its chunks, which stand next to each other."""
    layer = tl.program_id(0)
    column = tl.arange(0, 8)[None, :]
    total = tl.zeros((ROWS, 8), ACC)
    end = tl.load(begins_ptr + layer + 1)
    for first in range(tl.load(begins_ptr + layer), end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partials_ptr + row * SUMS + column, (row < end) & (column < SUMS), 0.0)
    column = tl.arange(0, 8)
    tl.store(sums_ptr + layer.to(tl.int64) * SUMS + column, tl.sum(total, 0), column < SUMS)


@triton.jit
def _share(sums_ptr, layer, strength, eps, order, rule, ACC: tl.constexpr):
    """k, of which k h is subtracted from the layer."""
    sums_ptr += layer * SUMS
    inner = tl.load(sums_ptr)
    inner += tl.where(order == PROJECT_FIRST, 0.0, strength * tl.load(sums_ptr + 3))
    inner = tl.where((rule == CONFLICT) & (inner > 0), 0.0, inner)
    norm = root(tl.load(sums_ptr + 1)) + (tl.full((), 1.0, tl.float64) * eps).to(ACC)
    return divide(divide(inner, norm), norm)


@triton.jit(do_not_specialize=["tensors", "order", "rule"])
def _apply_kernel(
    table_ptr,
    sums_ptr,
    scale_ptr,
    tensors,
    alignment: tl.float64,
    eps: tl.float64,
    order,
    rule,
    HAS_BENEFICIAL: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAILS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tensor, layer, begin, end, numel = _chunk(table_ptr, tensors, CHUNK)
    grad = _pointer(table_ptr, tensors, 0, tensor, TYPE, ALIGNED)
    harmful = _pointer(table_ptr, tensors, 1, tensor, TYPE, ALIGNED)
    beneficial = _pointer(table_ptr, tensors, 2, tensor, TYPE, ALIGNED) if HAS_BENEFICIAL else harmful
    strength = _strength(alignment, scale_ptr, ACC)
    share = _share(sums_ptr, layer, strength, eps, order, rule, ACC)
    for at in range(begin, end, BLOCK):
        g = _read(grad, at, numel, ACC, TAILS)
        h = _direction(_read(harmful, at, numel, ACC, TAILS), rule)
        if HAS_BENEFICIAL:
            g += strength * _negative(_read(beneficial, at, numel, ACC, TAILS))
        _write(grad, at, numel, g - share * h, TAILS)


class Lists(NamedTuple):
    """Lists of tensors as kernels see them, the tensors sorted by layer and cut into chunks.

    `table` is int64 [3 + lists (+ extra), T]: a tensor's last chunk + 1, size, layer, addresses, extra. The
    chunks of layer g are `begins[g]` to `begins[g + 1]`, int64 [G + 1].
    """

    table: Tensor
    begins: Tensor
    tensors: int
    chunks: int
    constants: dict[str, object]


def lists_of(
    groups: Sequence[int],
    num_groups: int,
    *lists: Sequence[Tensor],
    extra: Sequence[Sequence[int]] = (),
) -> Lists:
    """Lists of tensors of the same sizes, on their device; `extra` are rows of further numbers of each.

    Nothing of it is kept for the next call: no stream could come upon a table that another one is still
    writing, and a captured graph depends on nothing outside. ALIGNED is whether all addresses divide by 16,
    TAILS whether some tensor does not end with a full block, or may as well not.
    """
    first = lists[0]
    order = sorted(range(len(first)), key=groups.__getitem__)
    numels, layers = [first[i].numel() for i in order], [groups[i] for i in order]
    ends: list[int] = []
    begins = [0] * (num_groups + 1)
    for numel, layer in zip(numels, layers):
        ends.append((ends[-1] if ends else 0) + triton.cdiv(numel, CHUNK))
        begins[layer + 1] = ends[-1]
    # Layers without tensors have sums of zero.
    for layer in range(num_groups):
        begins[layer + 1] = max(begins[layer], begins[layer + 1])
    addresses = [tensors[i].data_ptr() for tensors in lists for i in order]
    rest = [row[i] for row in extra for i in order]
    sent = send(ends + numels + layers + addresses + rest + begins, first[0].device)
    aligned = not any(address % 16 for address in addresses)
    constants = {
        "TYPE": POINTERS[first[0].dtype],
        "ACC": tl.float64 if first[0].dtype == torch.float64 else tl.float32,
        "ALIGNED": aligned,
        "TAILS": not aligned or any(n % BLOCK.value for n in numels),
        "CHUNK": CHUNK,
        "num_warps": WARPS,
    }
    return Lists(sent[: -len(begins)], sent[-len(begins) :], len(first), ends[-1], constants)


def send(numbers: list[int], device: torch.device) -> Tensor:
    """int64 numbers on the device, without waiting for it.

    Under capture they are scalar arguments of kernels, as a graph would read memory of the host anew whenever
    it runs.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    if not torch.cuda.is_current_stream_capturing():
        return torch.tensor(numbers, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
    return as_arguments(numbers, device)


def as_arguments(numbers: list[int], device: torch.device) -> Tensor:
    sent = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    torch._foreach_add_(sent.unbind(), numbers)
    return sent


def layer_sums(lists: Lists, sums: Tensor, rule: str, has_beneficial: bool) -> None:
    """The first two launches."""
    partials = sums.new_empty((lists.chunks, SUMS.value))
    if lists.chunks:
        _chunk_kernel[(lists.chunks,)](
            lists.table,
            partials,
            lists.tensors,
            RULES.index(rule),
            HAS_BENEFICIAL=has_beneficial,
            **lists.constants,
        )
    _layer_kernel[(len(sums),)](partials, lists.begins, sums, ACC=lists.constants["ACC"], ROWS=128)


def project_align_(
    grads: list[Tensor],
    harmful: list[Tensor],
    beneficial: list[Tensor],
    groups: list[int],
    sums: Tensor,
    scale: Tensor | None,
    alignment: float,
    eps: float,
    order: str,
    rule: str,
    part: str,
) -> None:
    with torch.cuda.device_of(sums):
        lists = lists_of(groups, len(sums), grads, harmful, *([beneficial] if beneficial else []))
        if part != "apply":
            layer_sums(lists, sums, rule, bool(beneficial))
        if part != "sums" and lists.chunks:
            given = (lists.table, sums, scale, lists.tensors, alignment, eps, *places(order, rule))
            _apply_kernel[(lists.chunks,)](*given, HAS_BENEFICIAL=bool(beneficial), **lists.constants)
