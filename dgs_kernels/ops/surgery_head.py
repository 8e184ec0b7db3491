"""The three branches in closed form: `dgs::surgery_head`, its backward, and the module with the heads.

What an implementation has to do (`dgs_kernels.triton.surgery_head`; that of `dgs_kernels._native` fills
results it is given, and checks everything)::

    surgery_head(Tensor features, Tensor teacher_features, Tensor? text_features, Tensor labels,
                 Tensor image_weight, Tensor image_bias, Tensor teacher_weight, Tensor teacher_bias,
                 Tensor? text_weight, Tensor? text_bias, int? reference_batch_size, bool expert,
                 Tensor? offsets, float distillation)
        -> (Tensor losses, Tensor logits, Tensor residuals, Tensor head_grads, Tensor differences)
    surgery_head_backward(Tensor residuals, Tensor image_weight, Tensor teacher_weight, Tensor? text_weight,
                          Tensor image_scale, Tensor alignment_scale, Tensor(a!) out, float eps, int order,
                          int? reference_batch_size, Tensor? differences, Tensor? distillation_scale,
                          float distillation) -> ()

The formulas are those of the same names in `reference.py`. The feature matrices [B, D] have one dtype and
unit stride inside a row, the stride between rows is any (0 too). Everything else is contiguous; differences
are [B, D] in the features' type, or [0, D] where distillation is 0, all others of the computing type C:
float64 for float64 features, else float32. labels and offsets [B], weights [1, D], biases [1]; losses [4],
logits and residuals [3, B] in the order image, text, teacher, head_grads [2, D + 1]. Text features, weight
and bias are there or absent together. B may be 0: then all sums are 0. The backward fills `out` [B, D],
contiguous and of any of the four storage types, from residuals [3, B], weights and 0-dim scales of type C,
and from differences of its own type; order is the place in `reference.ORDERS`. Sums are in a fixed order,
without atomics, and nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from dgs_kernels import backends
from dgs_kernels.ops.arguments import (
    check_choice,
    check_eps,
    check_number,
    check_tensors,
    check_whole,
    refuse_forward_mode,
)
from dgs_kernels.ops.project_align import number
from dgs_kernels.reference import ORDERS, TEXT_ROLES, compute_dtype

_library = torch.library.Library("dgs", "FRAGMENT")
_library.define(
    "surgery_head(Tensor features, Tensor teacher_features, Tensor? text_features, Tensor labels, "
    "Tensor image_weight, Tensor image_bias, Tensor teacher_weight, Tensor teacher_bias, "
    "Tensor? text_weight, Tensor? text_bias, float eps, str order, int? reference_batch_size, "
    "str text, Tensor? offsets, float distillation) "
    "-> (Tensor losses, Tensor logits, Tensor residuals, Tensor head_grads, Tensor differences)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "surgery_head_backward(Tensor residuals, Tensor image_weight, Tensor teacher_weight, "
    "Tensor? text_weight, Tensor image_scale, Tensor alignment_scale, ScalarType out_dtype, "
    "float eps, str order, int? reference_batch_size, Tensor? differences, "
    "Tensor? distillation_scale, float distillation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
    heads = (image_weight, image_bias, teacher_weight, teacher_bias, text_weight, text_bias)
    options = (eps, order, reference_batch_size, text, offsets, distillation)
    inputs = (features, teacher_features, text_features, labels, *heads, *options)
    refuse_forward_mode("surgery_head", *inputs)
    if backends.watched() or torch._C._are_functorch_transforms_active():
        _checked(*inputs)
        losses, logits, *_ = _op(*inputs)
    else:
        losses, logits, *_ = _run(*inputs)
    image_loss, text_loss, alignment_loss, distillation_loss = losses.unbind()
    image_logits, text_logits, teacher_logits = logits.detach().unbind()
    return SurgeryHeadOutput(
        image_loss,
        text_loss,
        alignment_loss,
        image_logits,
        None if text_features is None else text_logits,
        teacher_logits,
        distillation_loss,
    )


def _check(
    features: Tensor,
    teacher_features: Tensor,
    text_features: Tensor | None,
    labels: Tensor,
    heads: dict[str, tuple[Tensor | None, Tensor | None]],
    offsets: Tensor | None,
    *options: Any,
) -> None:
    check_tensors("surgery_head", features=features)
    if features.dim() != 2 or features.shape[1] == 0:
        raise ValueError(f"surgery_head: features must be [B, D] with D >= 1, got {tuple(features.shape)}")
    batch, dim = features.shape
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("teacher_features", teacher_features, (batch, dim)),
        ("text_features", text_features, (batch, dim)),
        ("labels", labels, (batch,)),
    ]
    if offsets is not None:
        expected.append(("offsets", offsets, (batch,)))
    for name, (weight, bias) in heads.items():
        expected += [(f"{name}_weight", weight, (1, dim)), (f"{name}_bias", bias, (1,))]
    for name, tensor, shape in expected:
        if tensor is None and name.startswith("text"):
            if text_features is not None:
                raise ValueError(f"surgery_head: {name} is needed with text_features")
            continue
        check_tensors("surgery_head", **{name: tensor})
        assert tensor is not None
        if tuple(tensor.shape) != shape:
            raise ValueError(f"surgery_head: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != features.device:
            raise ValueError(f"surgery_head: {name} is on {tensor.device} and features on {features.device}")
        if name in ("labels", "offsets"):
            if tensor.dtype.is_complex:
                raise TypeError(f"surgery_head: {name} must be real, got {tensor.dtype}")
        elif not tensor.dtype.is_floating_point:
            raise TypeError(f"surgery_head: {name} must be a floating-point tensor, got {tensor.dtype}")
    if not features.dtype.is_floating_point:
        raise TypeError(f"surgery_head: features must be a floating-point tensor, got {features.dtype}")
    _check_options(*options)


def _check_options(eps: Any, order: Any, reference_batch_size: Any, text: Any, distillation: Any) -> None:
    check_choice("surgery_head", "order", order, ORDERS)
    check_eps("surgery_head", eps)
    if reference_batch_size is not None:
        check_whole("surgery_head", "reference_batch_size", reference_batch_size)
    check_choice("surgery_head", "text", text, TEXT_ROLES)
    check_number("surgery_head", "distillation", distillation)
    if not 0 <= distillation < math.inf:
        raise ValueError(f"surgery_head: distillation must be a finite number >= 0, got {distillation}")


def _refuse_labels(labels: Tensor) -> None:
    """Raise for labels outside [0, 1], where no device has to be waited for."""
    if labels.device.type == "cpu" and not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("surgery_head: labels must lie in 0 (real) to 1 (generated)")


def _checked(
    features: Tensor, teacher_features: Tensor, text_features: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Any, ...]:
    """The arguments of `reference.surgery_head`, from those of the operator."""
    image_w, image_b, teacher_w, teacher_b, text_w, text_b, *others = rest
    eps, order, reference_batch_size, text, offsets, distillation = others
    heads = {"image": (image_w, image_b), "teacher": (teacher_w, teacher_b), "text": (text_w, text_b)}
    options = (eps, order, reference_batch_size, text, distillation)
    _check(features, teacher_features, text_features, labels, heads, offsets, *options)
    if text_features is None:
        text_w = text_b = None
    matrices = (features, teacher_features, text_features)
    weights = (image_w, image_b, teacher_w, teacher_b, text_w, text_b)
    return *matrices, labels, *weights, reference_batch_size, text != "project", offsets, distillation


def _kernel(*inputs: Any) -> tuple[Tensor, ...]:
    results = _native(*inputs)
    if results is not None:
        return results
    *matrices, labels = (arguments := _checked(*inputs))[:4]
    *heads, reference_batch_size, expert, offsets, distillation = arguments[4:]
    dtype, storage = _types(*matrices, *heads)
    labels = backends.plain(labels.to(dtype).contiguous())
    offsets, *heads = (
        None if x is None else backends.plain(x.to(dtype).contiguous()) for x in (offsets, *heads)
    )
    matrices = [_rows(x, storage) for x in matrices]
    serve = backends.implementation("surgery_head", labels.device.type)
    if not backends.is_native(serve):
        _refuse_labels(labels)
        return serve(*matrices, labels, *heads, reference_batch_size, expert, offsets, distillation)
    results = _native(*matrices, labels, *heads, *inputs[10:14], offsets, distillation)
    if results is None:
        _refuse_labels(labels)
    assert results is not None, "a native function takes what has been checked and laid out"
    return results


def _types(
    features: Tensor, teacher_features: Tensor, text_features: Tensor | None, *heads: Tensor | None
) -> tuple[torch.dtype, torch.dtype]:
    """The computing type, and the one in which kernels read the feature matrices."""
    matrices = (features, teacher_features, text_features)
    dtype = compute_dtype(*matrices, *heads[::2])  # of the weights, not of the biases
    # Kernels read one storage type: mixed types, and heads wider than their features, meet in the widest.
    types = {x.dtype for x in matrices if x is not None}
    return dtype, types.pop() if len(types) == 1 and compute_dtype(features) == dtype else dtype


def _native(features: Tensor, *inputs: Any) -> tuple[Tensor, ...] | None:
    """The results of a native function; None if there is none, or it does not take these tensors."""
    *others, eps, order, reference_batch_size, text, offsets, distillation = inputs
    _check_options(eps, order, reference_batch_size, text, distillation)
    if not isinstance(features, Tensor) or features.dim() != 2:
        return None
    serve = backends.implementation("surgery_head", features.device.type)
    if not backends.is_native(serve):
        return None
        return None
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    results = _results(features, dtype, features.dtype, distillation)
    options = (float(reference_batch_size or 0), text != "project", offsets, float(distillation))
    return results if serve(features, *others, *results, *options) else None


def _results(
    features: Tensor, dtype: torch.dtype, storage: torch.dtype, distillation: float
) -> tuple[Tensor, ...]:
    """Memory for losses, logits, residuals, head_grads and differences."""
    batch, dim = features.shape
    shapes: tuple[tuple[int, ...], ...] = (
        (4,),
        (3, batch),
        (3, batch),
        (2, dim + 1),
        (batch if distillation else 0, dim),
    )
    types = (dtype, dtype, dtype, dtype, storage)
    return tuple(features.new_empty(shape, dtype=of) for shape, of in zip(shapes, types))


def _rows(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`x` of this dtype, with unit stride inside a row."""
    if x is None:
        return None
    x = x.to(dtype)
    return backends.plain(x if x.stride(1) == 1 else x.contiguous())


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    *matrices, _ = (arguments := _checked(*inputs))[:4]
    return _results(matrices[0], *_types(*matrices, *arguments[4:10]), distillation=arguments[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, _, text_features, _, image_w, _, teacher_w, _, text_w, _, *options = inputs
    ctx.eps, ctx.order, ctx.reference_batch_size, text, _, ctx.distillation = options
    ctx.dtype, ctx.projects = features.dtype, text_features is not None and text != "expert"
    ctx.text_dtype = None if text_features is None else text_features.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image_w, teacher_w, text_w, *output[2:])
    ctx.types = tuple(None if x is None else x.dtype for x in inputs[4:10])


def _backward(ctx: Any, losses_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 16
    if losses_grad is None:
        return tuple(grads)
    image_w, teacher_w, text_w, residuals, head_grads, differences = ctx.saved_tensors
    image_scale, text_scale, alignment_scale, distillation_scale = losses_grad.unbind()
    needs = ctx.needs_input_grad
    if needs[0]:
        run = _op_backward if torch.is_grad_enabled() or backends.watched() else _kernel_backward
        grads[0] = run(
            residuals,
            image_w,
            teacher_w,
            text_w if ctx.projects else None,
            image_scale,
            alignment_scale,
            ctx.dtype,
            ctx.eps,
            ctx.order,
            ctx.reference_batch_size,
            differences if ctx.distillation else None,
            distillation_scale if ctx.distillation else None,
            ctx.distillation,
        )
    if needs[2]:
        weight = text_w.to(residuals.dtype) * (text_scale / max(residuals.shape[1], 1))
        grads[2] = (residuals[1:2].T * weight).to(ctx.text_dtype)
    if any(needs[4:]):
        scaled = head_grads * losses_grad[:2, None]
        for head, at in ((0, 4), (1, 8)):
            if needs[at]:
                # With the strides that DDP expects of a contiguous [1, D].
                grads[at] = scaled[head, :-1][None].to(ctx.types[at - 4])
            if needs[at + 1]:
                grads[at + 1] = scaled[head, -1:].to(ctx.types[at - 3])
    return tuple(grads)


def _kernel_backward(
    residuals: Tensor,
    image_weight: Tensor,
    teacher_weight: Tensor,
    text_weight: Tensor | None,
    image_scale: Tensor,
    alignment_scale: Tensor,
    out_dtype: torch.dtype,
    eps: float,
    order: str,
    reference_batch_size: int | None,
    differences: Tensor | None,
    distillation_scale: Tensor | None,
    distillation: float,
) -> Tensor:
    dtype = residuals.dtype
    # Native kernels compute in the type that goes with what they write, and read differences of that type.
    storage = out_dtype if (out_dtype == torch.float64) == (dtype == torch.float64) else dtype
    storage = storage if differences is None else differences.dtype
    out = residuals.new_empty((residuals.shape[1], image_weight.shape[1]), dtype=storage)
    weights = (image_weight, teacher_weight, text_weight)
    laid_out: tuple[Any, ...] = (
        backends.plain(residuals.contiguous()),
        *(None if x is None else backends.plain(x.to(dtype).contiguous()) for x in weights),
        number(image_scale, dtype),
        number(alignment_scale, dtype),
        out,
        float(eps),
        ORDERS.index(order),
    )
    scale = None if distillation_scale is None else number(distillation_scale, dtype)
    pull = (None if differences is None else differences.contiguous(), scale, float(distillation))
    serve = backends.implementation("surgery_head_backward", residuals.device.type)
    if backends.is_native(serve):
        served = serve(*laid_out, float(reference_batch_size or 0), *pull)
        assert served, "a native function takes what has been checked and laid out"
    else:
        serve(*laid_out, reference_batch_size, *pull)
    return out if storage == out_dtype else out.to(out_dtype)


def _fake_backward(
    residuals: Tensor,
    image_weight: Tensor,
    teacher_weight: Tensor,
    text_weight: Tensor | None,
    image_scale: Tensor,
    alignment_scale: Tensor,
    dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    return residuals.new_empty((residuals.shape[1], image_weight.shape[1]), dtype=dtype)


def _refuse(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError("surgery_head cannot be differentiated twice: its gradient is edited, not derived")


class _Surgery(torch.autograd.Function):
    """What torch makes of the operator and its formula, in a fraction of the time."""

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _kernel(*inputs)


def _run(*inputs: Any) -> tuple[Tensor, ...]:
    """`dgs::surgery_head`, past torch's dispatcher."""
    return _Surgery.apply(*inputs) if torch.is_grad_enabled() else _kernel(*inputs)


_library.impl("surgery_head", _kernel, "CompositeExplicitAutograd")
_library.impl("surgery_head_backward", _kernel_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dgs::surgery_head", _fake, lib=_library)
torch.library.register_fake("dgs::surgery_head_backward", _fake_backward, lib=_library)
torch.library.register_autograd("dgs::surgery_head", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("dgs::surgery_head_backward", _refuse, lib=_library)
_op = torch.ops.dgs.surgery_head.default
_op_backward = torch.ops.dgs.surgery_head_backward.default
