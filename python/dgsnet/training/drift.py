"""How far training has moved the features, and whether the student errs where the expert errs.

All is made of sums over images or batches, taken as these go by, so it costs no pass of its own, adds up over
micro-batches and processes, and goes on after a resumption.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOSSES = ("distillation_loss", "nuisance_loss")
_KERNELS, _CLASSES = 3, (2, 6)
_FIXED = len(LOSSES) + _KERNELS + math.prod(_CLASSES)


def size(dim: int) -> int:
    """Length of what `moments` returns for features of width `dim`."""
    return _FIXED + 2 * dim


@torch.no_grad()
def moments(
    losses: tuple[Tensor, Tensor],
    student: Tensor,
    teacher: Tensor,
    image_logits: Tensor,
    expert_logits: Tensor | None,
    labels: Tensor,
) -> Tensor:
    """Means over a batch, float64 [size(D)], whose weighted mean over batches `summary` understands.

    Args:
        losses: LOSSES, 0 where there is none.
        student, teacher: features [B, D].
        image_logits, expert_logits, labels: [B]; labels are 0 or 1.
    """
    classes = torch.zeros(_CLASSES, dtype=torch.float64, device=labels.device)
    if expert_logits is not None:
        p, e = torch.sigmoid(torch.stack([image_logits, expert_logits]).double())
        members = torch.stack([labels <= 0.5, labels > 0.5]).double()
        classes = members @ torch.stack([torch.ones_like(p), p, e, p * p, e * e, p * e], dim=1) / len(labels)
    parts = (
        torch.stack(losses),
        _kernels(student, teacher),
        classes.flatten(),
        student.mean(dim=0),
        teacher.mean(dim=0),
    )
    return torch.cat([part.double() for part in parts])


def summary(moments: Tensor) -> dict[str, float]:
    """Measures from the moments; NaN without an expert, with batches below 4 or with a single class.

    - prior/drift: ||mean f - mean f_T|| / ||mean f_T||, of student's and teacher's features.
    - prior/cka: linear centred kernel alignment of the two, 1 for features equal but for rotation and scale.
      Numerator and denominator are unbiased and averaged over batches (Nguyen et al. 2021, equation 3), so
      that it does not depend on the batch size.
    - expert/residual_correlation: of the student's residual with the expert's, sigmoid(logit) - label,
      within the classes: both residuals hold the label, and would correlate by it alone.
    """
    losses, kernels, classes, features = moments.cpu().split(
        [len(LOSSES), _KERNELS, math.prod(_CLASSES), len(moments) - _FIXED]
    )
    student, teacher = features.chunk(2)
    crossed, own, others = kernels.tolist()
    n, p, e, pp, ee, pe = (column for column in classes.view(_CLASSES).T)
    seen = n > 0
    both, first, second = (
        (product - a * b / n)[seen].sum().item() for product, a, b in ((pe, p, e), (pp, p, p), (ee, e, e))
    )
    return {
        **{name: value or math.nan for name, value in zip(LOSSES, losses.tolist())},
        "prior/drift": ((student - teacher).norm() / teacher.norm()).item(),
        "prior/cka": _ratio(crossed, own, others),
        "expert/residual_correlation": _ratio(both, first, second),
    }


@torch.no_grad()
def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of features [N, D] and [N, E], N of 4 or more, as `summary` has it."""
    return _ratio(*_kernels(x, y).tolist())


def _ratio(product: float, a: float, b: float) -> float:
    return product / math.sqrt(a * b) if min(a, b) > 1e-12 else math.nan


def _kernels(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased HSIC of x and y, x and x, y and y with linear kernels (Song et al. 2012); 0 for n < 4."""
    n = len(x)
    if n < 4:
        return x.new_zeros(_KERNELS)
    # A shift of the features changes nothing but the rounding.
    k, l = ((z := f - f.mean(dim=0)) @ z.T for f in (x, y))
    k, l = (gram.double().fill_diagonal_(0) for gram in (k, l))
    k_rows, l_rows = k.sum(dim=0), l.sum(dim=0)

    def hsic(a: Tensor, b: Tensor, a_rows: Tensor, b_rows: Tensor) -> Tensor:
        means = a_rows.sum() * b_rows.sum() / ((n - 1) * (n - 2))
        return ((a * b).sum() + means - 2 / (n - 2) * (a_rows @ b_rows)) / (n * (n - 3))

    return torch.stack([hsic(k, l, k_rows, l_rows), hsic(k, k, k_rows, k_rows), hsic(l, l, l_rows, l_rows)])
