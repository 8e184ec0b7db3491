"""Gradient surgery on layers in plain PyTorch, by its functions on lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    g, h, b = ([t.to(sums.dtype) for t in tensors] for tensors in (grads, harmful, beneficial))
    h = list(torch._foreach_clamp_min(h, 0.0)) if rule == "positive" else h
    b = list(torch._foreach_clamp_max(b, 0.0)) if b else b
    if part != "apply":
        sums.copy_(_layer_sums(g, h, b, groups, len(sums)))
    if part == "sums":
        return
    pull = alignment if scale is None else alignment * scale
    shares = (-projection(sums, pull, eps, order, rule)).unbind()
    if b:
        torch._foreach_add_(g, torch._foreach_mul(b, pull))
    torch._foreach_addcmul_(g, h, [shares[group] for group in groups])
    if g[0].dtype != grads[0].dtype:
        torch._foreach_copy_(grads, g)


def projection(sums: Tensor, pull: float | Tensor, eps: float, order: str, rule: str) -> Tensor:
    """k [G] such that the surgery subtracts k h from a layer, from its sums [G, 6]."""
    inner = sums[:, 0] + pull * sums[:, 3] if order == "align_first" else sums[:, 0]
    if rule == "conflict":
        inner = inner.clamp(max=0)
    norm = sums[:, 1].sqrt() + eps
    return inner / norm / norm


def _layer_sums(g: list[Tensor], h: list[Tensor], b: list[Tensor], groups: list[int], count: int) -> Tensor:
    pairs = [(g, h), (h, h), (g, g)] + ([(b, h), (b, b), (g, b)] if b else [])
    flat = {id(tensors): [t.reshape(-1) for t in tensors] for tensors in (g, h, b)}
    sums = g[0].new_zeros(count, 6)
    sums[:, : len(pairs)] = products(
        [(flat[id(left)], flat[id(right)]) for left, right in pairs], groups, count
    )
    return sums


def products(pairs: Sequence[tuple[list[Tensor], list[Tensor]]], groups: list[int], count: int) -> Tensor:
    """Inner products [G, P] of P pairs of lists of flat tensors, layer by layer."""
    columns = [torch.stack([torch.dot(x, y) for x, y in zip(*pair)]) for pair in pairs]
    # Not index_add_, whose order is not fixed on a GPU, nor a product with 0 and 1, which spreads NaN.
    by_layer = sorted(range(len(groups)), key=groups.__getitem__)
    lengths = torch.bincount(torch.tensor(groups, device="cpu"), minlength=count).to(columns[0].device)
    return torch.segment_reduce(torch.stack(columns, 1)[by_layer], "sum", lengths=lengths, unsafe=True)
