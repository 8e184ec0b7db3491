"""surgery_head with its backward: three [rows, dim] matrices in, one gradient out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import dgs_kernels
from benchmarks import harness
from dgs_kernels import reference

HEADS = ("image", "teacher", "text")


def step(surgery_head):
    """One forward and backward, as in training; returns the gradient of the features."""

    def run(features: Tensor, teacher: Tensor, text: Tensor, labels: Tensor, *heads: Tensor) -> Tensor:
        leaf = features.detach().requires_grad_()
        heads = tuple(h.detach().requires_grad_(i not in (2, 3)) for i, h in enumerate(heads))
        out = surgery_head(leaf, teacher, text, labels, *heads)
        (out[0] + out[1] + 0.2 * out[2]).backward()
        return leaf.grad

    return run


def upcast(surgery_head):
    """The published graph knows one dtype: features are widened to the heads' type first."""

    def run(features: Tensor, teacher: Tensor, text: Tensor, labels: Tensor, *heads: Tensor):
        wide = (x.to(heads[0].dtype) for x in (features, teacher, text))
        return surgery_head(*wide, labels, *heads)

    return run


class ClosedForm(torch.autograd.Function):
    """`reference.surgery_head` and its backward, so that the compiler sees both."""

    @staticmethod
    def forward(ctx, features, teacher, text, labels, *heads):
        losses, _, residuals, head_grads, _ = reference.surgery_head(features, teacher, text, labels, *heads)
        ctx.dtype = features.dtype
        ctx.save_for_backward(*heads[::2], residuals, head_grads)
        return losses

    @staticmethod
    def backward(ctx, grad):
        *weights, residuals, head_grads = ctx.saved_tensors
        features = reference.surgery_head_backward(residuals, *weights, grad[0], grad[2], ctx.dtype)
        image, text = (head_grads * grad[:2, None]).unbind()
        none = (None, None, None)
        return features, *none, image[None, :-1], image[-1:], None, None, text[None, :-1], text[-1:]


class Hook(torch.autograd.Function):
    """The published graph's hook and alignment loss, so that the compiler sees their backward."""

    @staticmethod
    def forward(ctx, features, harmful, beneficial):
        ctx.save_for_backward(harmful, beneficial)
        return features.view_as(features), reference.alignment_loss(features, beneficial)

    @staticmethod
    def backward(ctx, grad, grad_loss):
        harmful, beneficial = ctx.saved_tensors
        weight = grad_loss / len(harmful)
        return reference.project_align(grad, harmful, beneficial, alignment=weight), None, None


def published(features, teacher, text, labels, *heads):
    """`reference.official_graph` in words that `torch.compile` can take whole.

    Compiled as it stands, that graph is cut in pieces at `autograd.grad`, and torch 2.15 leaves the hook on
    the features out: the result is wrong.
    """

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(F.linear(x, weight, bias).squeeze(1), labels)

    with torch.no_grad():
        harmful = torch.func.grad(loss)(text, *heads[4:])
        beneficial = torch.func.grad(loss)(teacher, *heads[2:4])
    seen, alignment = Hook.apply(features, harmful, beneficial)
    return loss(seen, *heads[:2]), loss(text, *heads[4:]), alignment


def inputs(rows: int, dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Features of three branches, labels, and weight and bias of the three heads."""
    wide = torch.promote_types(dtype, torch.float32)
    features = (torch.randn(rows, dim, device=device).to(dtype) for _ in range(3))
    labels = torch.randint(0, 2, (rows,), device=device).to(wide)
    heads = (
        torch.randn(shape, device=device).to(wide) / dim**0.5 for _ in HEADS for shape in ((1, dim), (1,))
    )
    return (*features, labels, *heads)


def case(rows: int, dim: int, dtype: torch.dtype, device: str) -> harness.Case:
    torch._dynamo.reset()
    official = upcast(reference.official_graph)

    def compiled(surgery_head):
        return step(torch.compile(surgery_head, fullgraph=True, dynamic=False))

    return harness.Case(
        operation="surgery_head",
        inputs=lambda: inputs(rows, dim, dtype, device),
        bytes_moved=4 * rows * dim * dtype.itemsize,
        variants={
            **harness.per_backend("surgery_head", device, step(dgs_kernels.surgery_head)),
            harness.EAGER: step(official),
            harness.COMPILED: compiled(upcast(published)),
            "closed form, eager": harness.through("eager", step(dgs_kernels.surgery_head)),
            "closed form, torch.compile": compiled(ClosedForm.apply),
        },
        exact=step(official),
    )
