"""The three branches in closed form: `dgs::surgery_head`, and its gradient.

What an implementation has to do with the operator's arguments and its results; the schema is below.

The formulas are those of the same name in `reference.py`. The feature matrices [B, D] have one dtype and
unit stride inside a row, the stride between rows is any (0 too). Everything else is contiguous; differences
are [B, D] in the features' type, or [0, D] where distillation is 0, all others of the computing type:
float64 for float64 features, else float32. labels and offsets [B], weights [1, D], biases [1]; losses [4],
logits and residuals [3, B] in the order image, text, teacher, head_grads [2, D + 1]. Without text features,
text_weight and text_bias are None, or a native function's, which does not look at them. Without a
reference_batch_size it is the batch's own. eps and order are the backward's. B may be 0: then all sums are 0.
Sums are in a fixed order, without atomics, and nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgs_kernels.arguments import (
    check_choice,
    check_number,
    check_tensors,
    check_whole,
)
from dgs_kernels.operation import Named, Operation
from dgs_kernels.ops import surgery_head_backward
from dgs_kernels.options import check_eps
from dgs_kernels.reference import ORDERS, TEXT_ROLES, compute_dtype
from dgs_kernels.tensors import numbers, rows_of, sums_dtype


class SurgeryHeadOutput(NamedTuple):
    """What the three branches say about a batch of B samples.

    The losses are 0-dim means over the batch, to be summed as
    `image_loss + text_loss + weight * alignment_loss + distillation_loss`; the last carries its weight
    already and is 0 without distillation. The logits [B] are those of each head alone, and detached: the
    losses carry every gradient. Without text features `text_loss` is 0 and `text_logits` is None.
    """

    image_loss: Tensor
    text_loss: Tensor
    alignment_loss: Tensor
    image_logits: Tensor
    text_logits: Tensor | None
    teacher_logits: Tensor
    distillation_loss: Tensor


def surgery_head(
    features: Tensor,
    teacher_features: Tensor,
    text_features: Tensor | None,
    labels: Tensor,
    image_weight: Tensor,
    image_bias: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor,
    text_weight: Tensor | None,
    text_bias: Tensor | None,
    *,
    order: str = "align_first",
    eps: float = 1e-6,
    reference_batch_size: int | None = None,
    text: str = "project",
    offsets: Tensor | None = None,
    distillation: float = 0.0,
) -> SurgeryHeadOutput:
    """DGS-Net's student, teacher and text branch on linear heads, with the gradient surgery in closed form.

    With linear heads both reference gradients of a sample are multiples of a head's weight, so no
    `autograd.grad` and no [B, D] reference gradients are needed: the features are read once, forward, and
    their surgered gradient is written once, backward, from three scalars per sample. Results equal those of
    `reference.official_graph`, which is arXiv 2511.13108 as published. What `text`, `offsets` and
    `distillation` add is not in that paper; docs/method.md derives it.

    Args:
        features: [B, D] student features, not normalised. They receive the surgered gradient.
        teacher_features: [B, D], constant. Only the teacher's gradient is used, as the beneficial direction.
        text_features: [B, D] caption features, which may require grad; None (no captions): the text loss is
            0 and nothing is projected, the alignment stays.
        labels: [B], 0 real and 1 generated, any real dtype; values between are soft labels. Others are
            refused on the CPU and make the losses NaN on a GPU, where looking would wait for the device.
        image_weight, teacher_weight, text_weight: [1, D], as `nn.Linear(D, 1)` holds them.
        image_bias, teacher_bias, text_bias: [1]. The teacher's head receives no gradient.
        order: "align_first" (the published code) or "project_first" (the paper's formula).
        eps: added to the norm of the harmful gradient, > 0.
        reference_batch_size: R takes the two reference gradients as if the batch were R, which makes the
            strength of the surgery independent of batch size, ranks and accumulation. None is the official
            formula, whose alignment fades as 1/B. R = 32 is the official strength at its batch of 32.
        text: what the text branch does to the image branch. "project", the published method: its harmful
            direction is projected out. "expert": its logit is added, as a constant, to the image's logit in
            the image loss (a product of experts), and nothing is projected. "both" does both.
        offsets: [B], any real dtype, further constants added to the image's logit in the image loss.
        distillation: weight >= 0 of a loss that pulls the features to the teacher's,
            distillation / (2 D) * mean over the batch of ||f - f_teacher||^2. Its gradient is added after
            the surgery. Above 0 a matrix [B, D] is kept for the backward.

    Returns:
        SurgeryHeadOutput. Losses and logits are float32 (float64 if any input is) also under autocast.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit, saying what was expected.
        RuntimeError: a second differentiation; the edited gradient is not the gradient of any loss.

    Example:
        >>> import torch
        >>> from dgs_kernels import surgery_head
        >>> f, t, c = torch.randn(3, 8, 16).unbind()
        >>> w, b = torch.randn(3, 1, 16).unbind(), torch.zeros(3, 1).unbind()
        >>> y = torch.arange(8) % 2
        >>> out = surgery_head(f.requires_grad_(), t, c, y, w[0], b[0], w[1], b[1], w[2], b[2])
        >>> (out.image_loss + out.text_loss + 0.2 * out.alignment_loss).backward()
        >>> f.grad.shape
        torch.Size([8, 16])
    """
    matrices = (features, teacher_features, text_features)
    heads = (image_weight, image_bias, teacher_weight, teacher_bias, text_weight, text_bias)
    options = (eps, order, reference_batch_size, text, offsets, distillation)
    losses, logits, *_ = _operation(*matrices, labels, *heads, *options)
    image_loss, text_loss, alignment_loss, distillation_loss = losses.unbind()
    image_logits, text_logits, teacher_logits = logits.detach().unbind()
    text_logits = None if text_features is None else text_logits
    logits = (image_logits, text_logits, teacher_logits)
    return SurgeryHeadOutput(image_loss, text_loss, alignment_loss, *logits, distillation_loss)


HEADS = ("image", "teacher", "text")


def _check(a: Named) -> None:
    check_tensors("surgery_head", features=a.features)
    if a.features.dim() != 2 or a.features.shape[1] == 0:
        raise ValueError(f"surgery_head: features must be [B, D] with D >= 1, got {tuple(a.features.shape)}")
    batch, dim = a.features.shape
    shapes = dict.fromkeys(("teacher_features", "text_features"), (batch, dim)) | {"labels": (batch,)}
    if a.offsets is not None:
        shapes["offsets"] = (batch,)
    for head in HEADS:
        shapes |= {f"{head}_weight": (1, dim), f"{head}_bias": (1,)}
    for name, shape in shapes.items():
        tensor = getattr(a, name)
        if tensor is None and name.startswith("text"):
            if a.text_features is not None:
                raise ValueError(f"surgery_head: {name} is needed with text_features")
            continue
        check_tensors("surgery_head", **{name: tensor})
        if tuple(tensor.shape) != shape:
            raise ValueError(f"surgery_head: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != a.features.device:
            raise ValueError(
                f"surgery_head: {name} is on {tensor.device} and features on {a.features.device}"
            )
        if name in ("labels", "offsets"):
            if tensor.dtype.is_complex:
                raise TypeError(f"surgery_head: {name} must be real, got {tensor.dtype}")
        elif not tensor.dtype.is_floating_point:
            raise TypeError(f"surgery_head: {name} must be a floating-point tensor, got {tensor.dtype}")
    if not a.features.dtype.is_floating_point:
        raise TypeError(f"surgery_head: features must be a floating-point tensor, got {a.features.dtype}")
    check_choice("surgery_head", "order", a.order, ORDERS)
    check_eps("surgery_head", a.eps)
    if a.reference_batch_size is not None:
        check_whole("surgery_head", "reference_batch_size", a.reference_batch_size)
    check_choice("surgery_head", "text", a.text, TEXT_ROLES)
    check_number("surgery_head", "distillation", a.distillation)
    if not 0 <= a.distillation < math.inf:
        raise ValueError(f"surgery_head: distillation must be a finite number >= 0, got {a.distillation}")


def _results(a: Named) -> tuple[Tensor, ...] | None:
    return _empty(a, sums_dtype([a.features]), a.features.dtype) if a.features.dim() == 2 else None


def _empty(a: Named, dtype: torch.dtype, storage: torch.dtype) -> tuple[Tensor, ...]:
    """Memory for losses, logits, residuals, head_grads and differences."""
    (batch, dim), new = a.features.shape, a.features.new_empty
    per_sample = (new((3, batch), dtype=dtype) for _ in range(2))
    differences = new((batch if a.distillation else 0, dim), dtype=storage)
    return new(4, dtype=dtype), *per_sample, new((2, dim + 1), dtype=dtype), differences


def _types(a: Named) -> tuple[torch.dtype, torch.dtype]:
    """The computing type, and the one in which kernels read the feature matrices."""
    matrices = [x for x in (a.features, a.teacher_features, a.text_features) if x is not None]
    weights = (a.image_weight, a.teacher_weight, None if a.text_features is None else a.text_weight)
    dtype = compute_dtype(*matrices, *weights)
    # Kernels read one storage type: mixed types, and heads wider than their features, meet in the widest.
    types = {x.dtype for x in matrices}
    return dtype, types.pop() if len(types) == 1 and compute_dtype(a.features) == dtype else dtype


def _lay_out(a: Named) -> Named:
    dtype, storage = _types(a)
    if a.labels.device.type == "cpu" and not ((a.labels >= 0) & (a.labels <= 1)).all():
        raise ValueError("surgery_head: labels must lie in 0 (real) to 1 (generated)")
    matrices = ("features", "teacher_features", "text_features")
    vectors = ["labels", "offsets", *(f"{head}_{part}" for head in HEADS for part in ("weight", "bias"))]
    laid_out = {name: rows_of(getattr(a, name), storage) for name in matrices}
    laid_out |= {name: numbers(getattr(a, name), dtype) for name in vectors}
    if a.text_features is None:
        laid_out |= {"text_weight": None, "text_bias": None}
    return a._replace(**laid_out)


def _setup_context(ctx: Any, a: Named, output: tuple[Tensor, ...]) -> None:
    _, _, residuals, head_grads, differences = output
    ctx.eps, ctx.order = a.eps, a.order
    ctx.reference_batch_size, ctx.distillation = a.reference_batch_size, a.distillation
    ctx.projects = a.text_features is not None and a.text != "expert"
    ctx.types = a._make(getattr(x, "dtype", None) for x in a)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a.image_weight, a.teacher_weight, a.text_weight, residuals, head_grads, differences)


def _backward(ctx: Any, losses_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if losses_grad is None:
        return _operation.gradients()
    image_w, teacher_w, text_w, residuals, head_grads, differences = ctx.saved_tensors
    image_scale, text_scale, alignment_scale, distillation_scale = losses_grad.unbind()
    wants, types, grads = _operation.arguments(*ctx.needs_input_grad), ctx.types, {}
    if wants.features:
        pull = (differences, distillation_scale) if ctx.distillation else (None, None)
        grads["features"] = surgery_head_backward.run(
            *(residuals, image_w, teacher_w, text_w if ctx.projects else None),
            *(image_scale, alignment_scale, types.features),
            *(ctx.eps, ctx.order, ctx.reference_batch_size, *pull, ctx.distillation),
        )
    if wants.text_features:
        weight = text_w.to(residuals.dtype) * (text_scale / max(residuals.shape[1], 1))
        grads["text_features"] = (residuals[1:2].T * weight).to(types.text_features)
    if any(wants[4:]):
        for head, scaled in zip(("image", "text"), head_grads * losses_grad[:2, None]):
            if getattr(wants, f"{head}_weight"):
                # With the strides that DDP expects of a contiguous [1, D].
                grads[f"{head}_weight"] = scaled[:-1][None].to(getattr(types, f"{head}_weight"))
            if getattr(wants, f"{head}_bias"):
                grads[f"{head}_bias"] = scaled[-1:].to(getattr(types, f"{head}_bias"))
    return _operation.gradients(**grads)


_operation = Operation(
    "surgery_head(Tensor features, Tensor teacher_features, Tensor? text_features, Tensor labels, "
    "Tensor image_weight, Tensor image_bias, Tensor teacher_weight, Tensor teacher_bias, "
    "Tensor? text_weight, Tensor? text_bias, float eps, str order, int? reference_batch_size, "
    "str text, Tensor? offsets, float distillation) "
    "-> (Tensor losses, Tensor logits, Tensor residuals, Tensor head_grads, Tensor differences)",
    kinds=_check,
    lay_out=_lay_out,
    results=_results,
    fake=lambda a: _empty(a, *_types(a)),
    gradient=(_setup_context, _backward),
    differentiable=(
        "features",
        "text_features",
        *(f"{head}_{part}" for head in ("image", "text") for part in ("weight", "bias")),
    ),
)
