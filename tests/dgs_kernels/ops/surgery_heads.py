"""Batches for the three branches, what comes of them by name, and how far it may be from the exact result."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dgs_kernels import SurgeryHeadOutput, reference, surgery_head

DIM = 24


class Batch(NamedTuple):
    """What surgery_head takes, in its order."""

    features: Tensor
    teacher: Tensor
    text: Tensor | None
    labels: Tensor
    image_weight: Tensor
    image_bias: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor
    text_weight: Tensor
    text_bias: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """With every tensor changed and none attached to the old one; what required grad still does."""
        return Batch(
            *(None if x is None else change(x.detach()).requires_grad_(x.requires_grad) for x in self)
        )

    def detached(self) -> Batch:
        return Batch(*(None if x is None else x.detach() for x in self))

    def floats(self) -> Batch:
        return self.map(lambda x: x.float() if x.is_floating_point() else x)


def problem(batch, *, labels="mixed", logits=None, dtype=torch.float64, seed=0):
    """A batch, in which what is trained requires grad; `logits` sets their size."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, batch, DIM, generator=generator, dtype=dtype)
    weights = torch.randn(3, 1, DIM, generator=generator, dtype=dtype) / DIM**0.5
    biases = torch.randn(3, 1, generator=generator, dtype=dtype) / 10
    if logits is not None:
        # This brings every sample's logit to plus or minus `logits`.
        biases.zero_()
        z = (features * weights).sum(-1, keepdim=True)
        features *= logits / z.abs()
    y = {
        "mixed": torch.arange(batch) % 2,
        "real": torch.zeros(batch, dtype=torch.long),
        "generated": torch.ones(batch, dtype=torch.long),
    }[labels]
    image, teacher, text = (x.clone() for x in features)
    heads = [x.clone().requires_grad_() for pair in zip(weights, biases) for x in pair]
    return Batch(image.requires_grad_(), teacher, text.requires_grad_(), y, *heads)


def outcome(function, inputs, weights=(0.9, 0.7, 0.2, 1.3), **options):
    """Losses, logits and the gradients of the weighted sum, by name; gradients of inputs start anew."""
    inputs = inputs.map(torch.clone)
    out = function(*inputs, **options)
    sum(w * loss for w, loss in zip(weights, (*out[:3], out[6]))).backward()
    results = {name: x.detach() for name, x in zip(SurgeryHeadOutput._fields, out) if x is not None}
    for name in ("features", "text", "image_weight", "image_bias", "text_weight", "text_bias"):
        if inputs.text is not None or not name.startswith("text"):
            results[name] = getattr(inputs, name).grad
    return results


def assert_equal(ours, theirs, tolerance=1e-12, loss_rounding=0.0):
    for name, want in theirs.items():
        assert ours[name].shape == want.shape, name
        difference = (ours[name] - want).norm()
        slack = loss_rounding if name.endswith("_loss") else 0.0
        assert difference <= tolerance * want.norm() + slack, f"{name}: {difference / want.norm():.1e}"


def tensors(batch, dim, dtype, device, seed=0):
    """A batch as an implementation takes it: heads and labels in the computing type."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    compute = torch.promote_types(dtype, torch.float32)
    matrices = [draw(batch, dim).to(device, dtype).requires_grad_(i != 1) for i in range(3)]
    labels = (torch.arange(batch) % 2).to(device)
    heads = [(draw(1, n) / n**0.5).view(-1 if n == 1 else 1, n) for n in (dim, 1) * 3]
    heads = [x.flatten() if i % 2 else x for i, x in enumerate(heads)]
    heads = [x.to(device, compute).requires_grad_(i not in (2, 3)) for i, x in enumerate(heads)]
    return Batch(*matrices, labels, *heads)


def assert_accurate(inputs, **options):
    """At most twice the error of plain PyTorch in the same dtype and units of rounding, of its largest term.

    Losses and bias gradients are one number, whose plain error may be small by luck: they are allowed the
    rounding of the sums that they are made of.
    """
    ours = outcome(surgery_head, inputs, **options)
    exact = inputs.map(lambda x: x.cpu().double())
    want = outcome(reference.official_graph, exact, **options)
    dtype = torch.promote_types(inputs.features.dtype, torch.float32)
    plain = outcome(reference.official_graph, inputs.map(lambda x: x.cpu().to(dtype)), **options)
    for name, exactly in want.items():
        got = ours[name]
        assert got.is_contiguous() or got.numel() < 2
        error, theirs = ((x.cpu().double() - exactly).norm() for x in (got, plain[name]))
        size = exactly.norm() if exactly.numel() > 9 else max(exactly.norm(), 1.0)
        units = 1 if exactly.numel() >= 100 and dtype != torch.float64 else 8
        allowed = 2 * theirs + units * torch.finfo(got.dtype).eps * size
        assert error <= allowed, f"{name}: {error:.1e}, plain {theirs:.1e}, allowed {allowed:.1e}"
