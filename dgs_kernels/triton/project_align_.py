"""Gradient surgery on layers in Triton: the portable GPU kernels behind `dgs::project_align_`.

Every tensor is cut into chunks. The first launch leaves partial sums of each chunk, the second adds up those
of a layer in a fixed order, the third reads everything again and edits the gradients: 4 reads and 1 write
without alignment, 6 and 1 with it, whatever the number of tensors. The tensors' addresses lie in a table on
the device, sent without waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgs_kernels.triton.project_align import CONFLICT, PROJECT_FIRST, _direction, _strength

# Numbers of a tensor that a program works on, and those it holds at a time: 8 in each of 256 threads.
CHUNK = 8192
BLOCK = tl.constexpr(2048)
WARPS = 8
SUMS = tl.constexpr(6)
POINTERS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _chunk(chunks_ptr, chunks, CHUNK: tl.constexpr):
    """Tensor, layer, first and last number of this program's chunk, and the size of its tensor."""
    chunks_ptr += tl.program_id(0)
    begin = tl.load(chunks_ptr + 2 * chunks) * CHUNK
    numel = tl.load(chunks_ptr + 3 * chunks)
    return tl.load(chunks_ptr), tl.load(chunks_ptr + chunks), begin, tl.minimum(begin + CHUNK, numel), numel


@triton.jit
def _pointer(table_ptr, tensors, which: tl.constexpr, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + which * tensors + tensor).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _read(pointer, at, numel, ACC: tl.constexpr, TAILS: tl.constexpr):
    """A block of a tensor, its end filled up with zeros; full blocks move 16 bytes at a time."""
    index = at + tl.arange(0, BLOCK)
    if TAILS:
        if at + BLOCK <= numel:
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


@triton.jit
def _chunk_kernel(
    table_ptr,
    chunks_ptr,
    partials_ptr,
    tensors,
    chunks,
    HAS_BENEFICIAL: tl.constexpr,
    RULE: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAILS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Partial sums [chunks, 6] of <g, h>, <h, h>, <g, g>, <b, h>, <b, b>, <g, b>."""
    tensor, _, begin, end, numel = _chunk(chunks_ptr, chunks, CHUNK)
    grad = _pointer(table_ptr, tensors, 0, tensor, TYPE, ALIGNED)
    harmful = _pointer(table_ptr, tensors, 1, tensor, TYPE, ALIGNED)
    beneficial = _pointer(table_ptr, tensors, 2, tensor, TYPE, ALIGNED) if HAS_BENEFICIAL else harmful
    none = tl.zeros((BLOCK,), ACC)
    gh, hh, gg, bh, bb, gb = none, none, none, none, none, none
    for at in range(begin, end, BLOCK):
        g = _read(grad, at, numel, ACC, TAILS)
        h = _direction(_read(harmful, at, numel, ACC, TAILS), RULE)
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


@triton.jit
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
def _share(sums_ptr, layer, strength, eps, ORDER: tl.constexpr, RULE: tl.constexpr, ACC: tl.constexpr):
    """k, of which k h is subtracted from the layer."""
    sums_ptr += layer * SUMS
    inner = tl.load(sums_ptr)
    if ORDER != PROJECT_FIRST:
        inner += strength * tl.load(sums_ptr + 3)
    if RULE == CONFLICT:
        inner = tl.where(inner > 0, 0.0, inner)
    norm = tl.sqrt(tl.load(sums_ptr + 1)) + (tl.full((), 1.0, tl.float64) * eps).to(ACC)
    return inner / norm / norm


@triton.jit
def _apply_kernel(
    table_ptr,
    chunks_ptr,
    sums_ptr,
    scale_ptr,
    tensors,
    chunks,
    alignment: tl.float64,
    eps: tl.float64,
    HAS_BENEFICIAL: tl.constexpr,
    ORDER: tl.constexpr,
    RULE: tl.constexpr,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAILS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tensor, layer, begin, end, numel = _chunk(chunks_ptr, chunks, CHUNK)
    grad = _pointer(table_ptr, tensors, 0, tensor, TYPE, ALIGNED)
    harmful = _pointer(table_ptr, tensors, 1, tensor, TYPE, ALIGNED)
    beneficial = _pointer(table_ptr, tensors, 2, tensor, TYPE, ALIGNED) if HAS_BENEFICIAL else harmful
    strength = _strength(alignment, scale_ptr, ACC)
    share = _share(sums_ptr, layer, strength, eps, ORDER, RULE, ACC)
    for at in range(begin, end, BLOCK):
        g = _read(grad, at, numel, ACC, TAILS)
        h = _direction(_read(harmful, at, numel, ACC, TAILS), RULE)
        if HAS_BENEFICIAL:
            g += strength * _negative(_read(beneficial, at, numel, ACC, TAILS))
        _write(grad, at, numel, g - share * h, TAILS)


class Plan(NamedTuple):
    """How tensors of given sizes are cut, on the device."""

    chunks: Tensor  # [4, C] int64: tensor, layer, number of the chunk in its tensor, size of the tensor
    begins: Tensor  # [G + 1] int64: a layer's chunks are begins[g] to begins[g + 1]
    tails: bool  # whether some tensor does not end with a full block


_plans: dict[tuple, Plan] = {}
_spare: dict[int, Tensor] = {}
_captured: list[Tensor] = []


def plan(tensors: Sequence[Tensor], groups: Sequence[int]) -> Plan:
    """The chunks of these tensors, sorted by layer; kept for the next call."""
    numels, device = tuple(t.numel() for t in tensors), tensors[0].device
    key = (numels, tuple(groups), device, CHUNK)
    if (known := _plans.get(key)) is not None:
        return known
    by_layer = sorted(range(len(numels)), key=groups.__getitem__)
    chunks = [(i, groups[i], c, numels[i]) for i in by_layer for c in range(triton.cdiv(numels[i], CHUNK))]
    begins = [0] * (max(groups) + 2)
    for _, layer, _, _ in chunks:
        begins[layer + 1] += 1
    for layer in range(len(begins) - 1):
        begins[layer + 1] += begins[layer]
    columns = [number for column in zip(*chunks) for number in column]
    table = upload(columns + begins, device)
    found = Plan(
        table[: len(columns)].view(4, -1), table[len(columns) :], any(n % BLOCK.value for n in numels)
    )
    if not _capturing(device):  # there, the table holds numbers only once the graph runs
        if len(_plans) >= 64:
            _plans.clear()
        _plans[key] = found
    return found


def upload(numbers: list[int], device: torch.device) -> Tensor:
    """int64 numbers on the device, without waiting for it.

    A captured graph copies them again whenever it runs, so it keeps its pinned memory for itself. None can be
    allocated under capture: each call outside leaves some of its size for one inside.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    if _capturing(device):
        host = _spare.pop(len(numbers), None)
        if host is None:
            raise RuntimeError(
                "dgs_kernels: run the step once on these tensors before each capture of a graph"
            )
        _captured.append(host.copy_(torch.tensor(numbers, dtype=torch.int64)))
    else:
        host = torch.tensor(numbers, dtype=torch.int64).pin_memory()
        if len(numbers) not in _spare:
            _spare[len(numbers)] = torch.empty_like(host, pin_memory=True)
    return host.to(device, non_blocking=True)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def addresses(*lists: Sequence[Tensor]) -> tuple[list[int], bool]:
    """Addresses of the tensors, and whether all divide by 16."""
    found = [t.data_ptr() for tensors in lists for t in tensors]
    return found, not any(address % 16 for address in found)


def layer_sums(table: Tensor, cut: Plan, count: int, sums: Tensor, constants: dict[str, object]) -> None:
    """The first two launches."""
    chunks = cut.chunks.shape[1]
    partials = sums.new_empty((chunks, SUMS.value))
    if chunks:
        _chunk_kernel[(chunks,)](
            table, cut.chunks, partials, count, chunks, **constants, CHUNK=CHUNK, num_warps=WARPS
        )
    _layer_kernel[(len(sums),)](partials, cut.begins, sums, ACC=constants["ACC"], ROWS=128)


def project_align_(
    grads: list[Tensor],
    harmful: list[Tensor],
    beneficial: list[Tensor],
    groups: list[int],
    sums: Tensor,
    scale: Tensor | None,
    alignment: float,
    eps: float,
    order: int,
    rule: int,
    part: int,
) -> None:
    cut = plan(grads, groups)
    pointers, aligned = addresses(grads, harmful, beneficial)
    constants = {
        "HAS_BENEFICIAL": bool(beneficial),
        "RULE": rule,
        "TYPE": POINTERS[grads[0].dtype],
        "ACC": tl.float64 if sums.dtype == torch.float64 else tl.float32,
        "ALIGNED": aligned,
        "TAILS": cut.tails,
    }
    with torch.cuda.device_of(sums):
        table = upload(pointers, sums.device)
        if part != 2:
            layer_sums(table, cut, len(grads), sums, constants)
        chunks = cut.chunks.shape[1]
        if part != 1 and chunks:
            _apply_kernel[(chunks,)](
                table,
                cut.chunks,
                sums,
                scale,
                len(grads),
                chunks,
                alignment,
                eps,
                **constants,
                ORDER=order,
                CHUNK=CHUNK,
                num_warps=WARPS,
            )
