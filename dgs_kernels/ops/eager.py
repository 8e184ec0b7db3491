"""The `eager` backend: the formulas of `reference.py` in plain PyTorch, behind the arguments of kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dgs_kernels import reference
from dgs_kernels.reference import ENTROPY_EPS, ORDERS, RULES


def project_align(
    grad: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None,
    scale: Tensor | None,
    alignment: float,
    eps: float,
    order: int,
    rule: int,
) -> Tensor:
    pull = alignment if scale is None else alignment * scale
    out = reference.project_align(
        grad, harmful, beneficial, alignment=pull, eps=eps, order=ORDERS[order], rule=RULES[rule]
    )
    return out.contiguous()


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
    g, h, b = ([t.to(sums.dtype) for t in tensors] for tensors in (grads, harmful, beneficial))
    h = list(torch._foreach_clamp_min(h, 0.0)) if RULES[rule] == "positive" else h
    b = list(torch._foreach_clamp_max(b, 0.0)) if b else b
    if part != 2:
        sums.copy_(_layer_sums(g, h, b, groups, len(sums)))
    if part == 1:
        return
    pull = alignment if scale is None else alignment * scale
    shares = (-projection(sums, pull, eps, order, rule)).unbind()
    if b:
        torch._foreach_add_(g, torch._foreach_mul(b, pull))
    torch._foreach_addcmul_(g, h, [shares[group] for group in groups])
    if g[0].dtype != grads[0].dtype:
        torch._foreach_copy_(grads, g)


def projection(sums: Tensor, pull: float | Tensor, eps: float, order: int, rule: int) -> Tensor:
    """k [G] such that the surgery subtracts k h from a layer, from its sums [G, 6]."""
    inner = sums[:, 0] + pull * sums[:, 3] if ORDERS[order] == "align_first" else sums[:, 0]
    if RULES[rule] == "conflict":
        inner = inner.clamp(max=0)
    norm = sums[:, 1].sqrt() + eps
    return inner / norm / norm


def _layer_sums(g: list[Tensor], h: list[Tensor], b: list[Tensor], groups: list[int], count: int) -> Tensor:
    pairs = [(g, h), (h, h), (g, g)] + ([(b, h), (b, b), (g, b)] if b else [])
    flat = {id(tensors): [t.reshape(-1) for t in tensors] for tensors in (g, h, b)}
    sums = g[0].new_zeros(count, 6)
    sums[:, : len(pairs)] = _products(
        [(flat[id(left)], flat[id(right)]) for left, right in pairs], groups, count
    )
    return sums


def _products(pairs: Sequence[tuple[list[Tensor], list[Tensor]]], groups: list[int], count: int) -> Tensor:
    """Inner products [G, P] of P pairs of lists of flat tensors, layer by layer."""
    columns = [torch.stack([torch.dot(x, y) for x, y in zip(*pair)]) for pair in pairs]
    # Not index_add_, whose order is not fixed on a GPU, nor a product with 0 and 1, which spreads NaN.
    by_layer = sorted(range(len(groups)), key=groups.__getitem__)
    lengths = torch.bincount(torch.tensor(groups), minlength=count).to(columns[0].device)
    return torch.segment_reduce(torch.stack(columns, 1)[by_layer], "sum", lengths=lengths, unsafe=True)


def gramian(objectives: list[Tensor], groups: list[int], out: Tensor) -> None:
    count = len(groups)
    flat = [
        [t.to(out.dtype).reshape(-1) for t in objectives[i : i + count]]
        for i in range(0, len(objectives), count)
    ]
    above = list(itertools.combinations_with_replacement(range(len(flat)), 2))
    products = _products([(flat[i], flat[j]) for i, j in above], groups, len(out))
    for (i, j), column in zip(above, products.unbind(1)):
        out[:, i, j] = out[:, j, i] = column


def combine_(grads: list[Tensor], objectives: list[Tensor], weights: Tensor, groups: list[int]) -> None:
    count = len(grads)
    columns = [column.expand(max(groups) + 1).unbind() for column in weights.unbind(-1)]
    sums: list[Tensor] = []
    for k, column in enumerate(columns):
        tensors = [t.to(weights.dtype) for t in objectives[k * count : (k + 1) * count]]
        of_tensors = [column[group] for group in groups]
        if k == 0:
            sums = list(torch._foreach_mul(tensors, of_tensors))
        else:
            torch._foreach_addcmul_(sums, tensors, of_tensors)
    torch._foreach_copy_(grads, sums)


def surgery_head(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return reference.surgery_head(*arguments)


def surgery_head_backward(
    residuals: Tensor,
    image_weight: Tensor,
    teacher_weight: Tensor,
    text_weight: Tensor | None,
    image_scale: Tensor,
    alignment_scale: Tensor,
    out: Tensor,
    eps: float,
    order: int,
    reference_batch_size: int | None,
    differences: Tensor | None,
    distillation_scale: Tensor | None,
    distillation: float,
) -> None:
    out.copy_(
        reference.surgery_head_backward(
            residuals,
            image_weight,
            teacher_weight,
            text_weight,
            image_scale,
            alignment_scale,
            out.dtype,
            eps,
            ORDERS[order],
            reference_batch_size,
            differences,
            distillation_scale,
            distillation,
        )
    )


# Patches transformed at once, so that their spectra stay in a core's cache.
_PATCHES_AT_ONCE = 128


def spectral_entropy(images: Tensor, patch_size: int) -> Tensor:
    batch, _, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images[:, :, : rows * patch_size, : columns * patch_size]
    bands = cut.split(patch_size * max(1, _PATCHES_AT_ONCE // (batch * columns)), dim=2)
    return torch.cat([_entropies(reference.luma(band), patch_size) for band in bands], dim=1)


def _entropies(luma: Tensor, size: int) -> Tensor:
    """[B, rows * size, columns * size] -> [B, rows * columns]."""
    batch, height, width = luma.shape
    patches = luma.reshape(batch, height // size, size, width // size, size).transpose(2, 3)
    # The spectrum of real numbers is symmetric: half of it, most of that counted twice, is all of it.
    squares = torch.view_as_real(torch.fft.rfft2(patches)).square()
    energy = squares[..., 0] + squares[..., 1]
    copies = luma.new_full((energy.shape[-1],), 2.0)
    copies[0] = 1.0
    if size % 2 == 0:
        copies[-1] = 1.0
    share = energy / (energy.sum(-2) @ copies + ENTROPY_EPS)[..., None, None]
    return -((share * torch.log2(share + ENTROPY_EPS)).sum(-2) @ copies).flatten(1)


def surgery_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    harmful: list[Tensor],
    beneficial: list[Tensor],
    groups: list[int],
    sums: Tensor,
    scale: Tensor | None,
    alignment: float,
    surgery_eps: float,
    order: int,
    rule: int,
    part: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    edited = [g.clone() for g in grads]
    project_align_(
        edited, harmful, beneficial, groups, sums, scale, alignment, surgery_eps, order, rule, part
    )
    adamw(
        params,
        edited,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        foreach=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
    )
