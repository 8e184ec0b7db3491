"""Every formula of the library in plain PyTorch: the specification, and the `eager` backend.

Any floating-point type goes in. Half types compute in float32 and round once, at the end; float64 stays
float64. The names are those of the operators that the fused kernels implement.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ORDERS = ("align_first", "project_first")
RULES = ("positive", "full", "conflict")
TEXT_ROLES = ("project", "expert", "both")
LUMA = (0.299, 0.587, 0.114)
ENTROPY_EPS = 1e-12


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The type that arithmetic on these tensors is done in: their common type, at least float32."""
    types = {t.dtype for t in tensors if t is not None}
    return functools.reduce(torch.promote_types, types, torch.float32)


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Keeps matrix products out of autocast's half precision."""
    device = x.device.type
    # Entering the context costs as much as ten small operations.
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def project_align(
    grad: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None = None,
    *,
    alignment: float | Tensor = 1.0,
    eps: float = 1e-6,
    order: str = "align_first",
    rule: str = "positive",
) -> Tensor:
    """Remove each row's harmful direction and add `alignment` times the negative part of `beneficial`.

    With h the harmful row (its positive part under `rule="positive"`) and u = h / (||h|| + eps)::

        align_first:    a = grad + alignment * min(beneficial, 0);   out = a - <a, u> u
        project_first:  out = grad - <grad, u> u + alignment * min(beneficial, 0)

    `rule="conflict"` projects only rows whose inner product is negative. Shapes and arguments are those of
    `dgs_kernels.project_align`.
    """
    dtype = compute_dtype(grad, harmful, beneficial)
    x, direction = grad.to(dtype), harmful.to(dtype)
    if rule == "positive":
        direction = direction.clamp(min=0)
    unit = direction / (torch.linalg.vector_norm(direction, dim=-1, keepdim=True) + eps)
    if beneficial is not None:
        pull = alignment * beneficial.to(dtype).clamp(max=0)
        if order == "align_first":
            x = x + pull
    inner = (x * unit).sum(-1, keepdim=True)
    if rule == "conflict":
        # Unlike a comparison, a clamp lets NaN through.
        inner = inner.clamp(max=0)
    out = x - inner * unit
    if beneficial is not None and order == "project_first":
        out = out + pull
    return out.to(grad.dtype)


def layers(groups: Sequence[int]) -> list[list[int]]:
    """The tensors of each group 0..G-1, by their place in the list."""
    members: list[list[int]] = [[] for _ in range(max(groups, default=-1) + 1)]
    for i, group in enumerate(groups):
        members[group].append(i)
    return members


def project_align_(
    grads: Sequence[Tensor],
    harmful: Sequence[Tensor],
    beneficial: Sequence[Tensor] | None,
    groups: Sequence[int],
    **options: Any,
) -> list[Tensor]:
    """`project_align` on layers: the tensors of a group, end to end, are one row. Returns the new gradients.

    `groups[i]` is tensor i's layer, 0..G-1; `options` are those of `project_align`.
    """
    out: list[Tensor] = list(grads)
    for layer in layers(groups):
        pull = None if beneficial is None else _row(beneficial, layer)
        row = project_align(_row(grads, layer), _row(harmful, layer), pull, **options)
        for i, part in zip(layer, row.split([grads[i].numel() for i in layer])):
            out[i] = part.view(grads[i].shape).to(grads[i].dtype)
    return out


def layer_sums(
    grads: Sequence[Tensor],
    harmful: Sequence[Tensor],
    beneficial: Sequence[Tensor] | None,
    groups: Sequence[int],
    rule: str = "positive",
) -> Tensor:
    """The inner products [G, 6] that a layer's surgery and its metrics are made of.

    <g, h>, <h, h>, <g, g>, <b, h>, <b, b>, <g, b> with the direction h of `rule` and b = min(beneficial, 0);
    the last three are 0 without `beneficial`. Arguments are those of `project_align_`.
    """
    dtype = compute_dtype(*grads, *harmful, *(beneficial or ()))
    rows = []
    for layer in layers(groups):
        g, h = _row(grads, layer).to(dtype), _row(harmful, layer).to(dtype)
        h = h.clamp(min=0) if rule == "positive" else h
        b = torch.zeros_like(g) if beneficial is None else _row(beneficial, layer).to(dtype).clamp(max=0)
        rows.append(torch.stack([x @ y for x, y in ((g, h), (h, h), (g, g), (b, h), (b, b), (g, b))]))
    return torch.stack(rows)


def gramian(objectives: Sequence[Sequence[Tensor]], groups: Sequence[int]) -> Tensor:
    """Inner products [G, K, K] of K gradients of the same T tensors, layer by layer.

    The tensors of a group, end to end, are one row of a matrix X [K, D], and the result is X X^T. `groups[i]`
    is tensor i's layer, 0..G-1.
    """
    tensors = [t for tensors in objectives for t in tensors]
    dtype, count = compute_dtype(*tensors), len(objectives)
    device = tensors[0].device if tensors else None
    out = torch.zeros(max(groups, default=-1) + 1, count, count, dtype=dtype, device=device)
    for products, layer in zip(out, layers(groups)):
        rows = [_row(tensors, layer).to(dtype) for tensors in objectives]
        for i, j in itertools.product(range(count), repeat=2):
            products[i, j] = torch.dot(rows[i], rows[j])
    return out


def combine_(
    grads: Sequence[Tensor], objectives: Sequence[Sequence[Tensor]], weights: Tensor, groups: Sequence[int]
) -> list[Tensor]:
    """Weighted sums of K gradients of the same T tensors: `sum_k weights[g(t), k] * objectives[k][t]`.

    `weights` is [G, K], or [K] for all layers. Returns the new gradients, in the dtypes of `grads`.
    """
    dtype = compute_dtype(weights, *(t for tensors in objectives for t in tensors))
    weights = weights.to(dtype).expand(max(groups, default=-1) + 1, len(objectives))
    sums = [
        sum(w * tensors[i].to(dtype) for w, tensors in zip(weights[group], objectives))
        for i, group in enumerate(groups)
    ]
    return [x.to(grad.dtype) for x, grad in zip(sums, grads)]


def _row(tensors: Sequence[Tensor], layer: list[int]) -> Tensor:
    return torch.cat([tensors[i].reshape(-1) for i in layer])


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), the operations in PyTorch's order.

    `step` counts from 1. Returns the new (param, exp_avg, exp_avg_sq).
    """
    grad = -grad if maximize else grad
    param = param * (1 - lr * weight_decay)
    exp_avg = exp_avg.lerp(grad, 1 - betas[0])
    exp_avg_sq = (exp_avg_sq * betas[1]).addcmul(grad, grad, value=1 - betas[1])
    denominator = exp_avg_sq.sqrt() / (1 - betas[1] ** step) ** 0.5 + eps
    return param.addcdiv(exp_avg, denominator, value=-lr / (1 - betas[0] ** step)), exp_avg, exp_avg_sq


def alignment_loss(features: Tensor, beneficial: Tensor | None) -> Tensor:
    """Mean over the rows of <features, min(beneficial, 0)>; 0 without rows or without `beneficial`."""
    dtype = compute_dtype(features, beneficial)
    if beneficial is None:
        return torch.zeros((), dtype=dtype, device=features.device)
    rows = features.numel() // features.shape[-1]
    return (features.to(dtype) * beneficial.to(dtype).clamp(max=0)).sum() / max(rows, 1)


def gradient_surgery(
    features: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None = None,
    *,
    eps: float = 1e-6,
    order: str = "align_first",
    rule: str = "positive",
) -> tuple[Tensor, Tensor]:
    """The feature hook, as an ordinary tensor hook.

    The order is decided by where the alignment loss is attached: behind the hook, its gradient is projected
    with the task's; before the hook, it is added afterwards.
    """
    seen = features.view_as(features)
    if seen.requires_grad:
        seen.register_hook(lambda grad: project_align(grad, harmful, eps=eps, rule=rule))
    aligned = seen if order == "align_first" else features
    return seen, alignment_loss(aligned, None if beneficial is None else beneficial.detach())


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
    reference_batch_size: int | None = None,
    expert: bool = False,
    offsets: Tensor | None = None,
    distillation: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward of the three branches: everything that needs the feature matrices, in one reading of them.

    Returns, in the computing type and each stacked in the order image, text, teacher:

    - losses [4]: image loss, text loss, alignment loss, distillation loss (means over the batch);
    - logits [3, B];
    - residuals [3, B]: sigmoid(logit) - label, all that the backward needs to know of a sample. The image's
      logit is taken with `offsets` [B] added to it and, of an expert, the text's logit;
    - head_grads [2, D + 1]: gradient of image and text loss with respect to weight and bias of their head;
    - differences [B, D] in the features' type: features - teacher_features, which are the distillation
      loss's gradient but for a factor; [0, D] where `distillation`, the weight in that loss, is 0.

    A gradient of the mean loss with respect to a feature row is residual / B * weight, so the beneficial row
    is |residual / R| * min(+-teacher_weight, 0), with R the reference batch size (B if None).
    Without text features the text rows are zeros. A label outside 0 to 1 makes NaN of what depends on it.
    """
    heads = (image_weight, teacher_weight, text_weight)
    dtype = compute_dtype(features, teacher_features, text_features, *heads)
    batch = features.shape[0]
    mean = 1 / max(batch, 1)
    y, f, t, w = (x.to(dtype) for x in (labels, features, teacher_features, teacher_weight))
    y = y.where((y >= 0) & (y <= 1), torch.nan)

    with _full_precision(features):
        vectors = torch.cat([image_weight.to(dtype), w.clamp(max=0), (-w).clamp(max=0)])
        image, rises, falls = (vectors @ f.T).unbind()
        image_logits = image + image_bias.to(dtype)
        teacher_logits = t @ w[0] + teacher_bias.to(dtype)
        x = None if text_features is None else text_features.to(dtype)
        if x is None or text_weight is None or text_bias is None:
            text_logits = torch.zeros_like(image)
        else:
            text_logits = x @ text_weight.to(dtype)[0] + text_bias.to(dtype)
        logits = torch.stack([image_logits, text_logits, teacher_logits])
        seen = image_logits + text_logits if expert else image_logits
        seen = seen if offsets is None else seen + offsets.to(dtype)
        judged = torch.stack([seen, text_logits, teacher_logits])
        residuals = judged.sigmoid() - y
        image_loss, text_loss, _ = F.binary_cross_entropy_with_logits(
            judged, y.expand_as(judged), reduction="none"
        ).sum(1)
        dots = torch.where(residuals[2] > 0, rises, falls)
        alignment_loss = residuals[2].abs() @ dots / (reference_batch_size or max(batch, 1))

        biases = residuals.sum(1)
        image_grad = torch.cat([residuals[0] @ f, biases[:1]])
        if x is None:
            residuals[1], text_loss, text_grad = 0, torch.zeros_like(image_loss), torch.zeros_like(image_grad)
        else:
            text_grad = torch.cat([residuals[1] @ x, biases[1:2]])
    differences, distillation_loss = f.new_empty(0, f.shape[1]), torch.zeros_like(image_loss)
    if distillation:
        differences = f - t
        distillation_loss = differences.square().sum() * (distillation / (2 * f.shape[1]))
    losses = torch.stack([image_loss, text_loss, alignment_loss, distillation_loss]) * mean
    head_grads = torch.stack([image_grad, text_grad]) * mean
    return losses, logits, residuals, head_grads, differences.to(features.dtype)


def surgery_head_backward(
    residuals: Tensor,
    image_weight: Tensor,
    teacher_weight: Tensor,
    text_weight: Tensor | None,
    image_scale: Tensor,
    alignment_scale: Tensor,
    out_dtype: torch.dtype,
    eps: float = 1e-6,
    order: str = "align_first",
    reference_batch_size: int | None = None,
    differences: Tensor | None = None,
    distillation_scale: Tensor | None = None,
    distillation: float = 0.0,
) -> Tensor:
    """Gradient with respect to the features [B, D], after the surgery, from three scalars per row.

    `image_scale`, `alignment_scale` and `distillation_scale` (0-dim) are the gradients that arrive at the
    losses. Every row of the result is a combination of three of five vectors::

        image * w_image + pull * min(+-w_teacher, 0) - push * relu(+-w_text)

    The signs are those of the row's residuals. The harmful unit vector is k * relu(+-w_text) with
    k = |c| / (|c| * ||relu(+-w_text)|| + eps) and c = text residual / R. Without `text_weight` nothing is
    projected. `differences` [B, D] add their share of the distillation loss, whose weight is `distillation`.
    """
    dtype = residuals.dtype
    batch = max(residuals.shape[1], 1)
    reference = reference_batch_size or batch
    image_residual, text_residual, teacher_residual = residuals.unbind()
    image = image_residual * (image_scale.to(dtype) / batch)
    pull = teacher_residual.abs() * (alignment_scale.to(dtype) / (reference * batch))

    with _full_precision(residuals):
        w = teacher_weight.to(dtype)
        vectors = [image_weight.to(dtype), w.clamp(max=0), (-w).clamp(max=0)]
        shares = [image, *_by_sign(teacher_residual, pull)]
        if text_weight is not None:
            w = text_weight.to(dtype)
            vectors += [w.clamp(min=0), (-w).clamp(min=0)]
        stacked = torch.cat(vectors)
        if text_weight is not None:
            products = stacked @ stacked[3:].T
            projected = 3 if order == "align_first" else 1
            inner = products[:projected].T @ torch.stack(shares[:projected])
            positive = text_residual > 0
            c = text_residual.abs() / reference
            norms = torch.stack([products[3, 0], products[4, 1]]).sqrt()
            k = c / (c * torch.where(positive, norms[0], norms[1]) + eps)
            shares += _by_sign(text_residual, -torch.where(positive, inner[0], inner[1]) * k * k)
        rows = torch.stack(shares).T @ stacked
        if differences is not None and distillation_scale is not None:
            weight = distillation_scale.to(dtype) * (distillation / (rows.shape[1] * batch))
            rows = rows + weight * differences.to(dtype)
        return rows.to(out_dtype)


def _by_sign(sign: Tensor, share: Tensor) -> list[Tensor]:
    """`share` where the sign is positive and 0 elsewhere, and the other way round; NaN counts as negative."""
    none = torch.zeros_like(share)
    positive = sign > 0
    return [torch.where(positive, share, none), torch.where(positive, none, share)]


def official_graph(
    features: Tensor,
    teacher_features: Tensor,
    text_features: Tensor | None,
    labels: Tensor,
    image_weight: Tensor,
    image_bias: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor,
    text_weight: Tensor,
    text_bias: Tensor,
    *,
    order: str = "align_first",
    eps: float = 1e-6,
    reference_batch_size: int | None = None,
    text: str = "project",
    offsets: Tensor | None = None,
    distillation: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The published algorithm written naively: two `autograd.grad` calls and a hook on the features.

    What `surgery_head` computes in closed form; arguments and results are those of
    `dgs_kernels.surgery_head`. Kept for the tests and benchmarks to compare with.
    """
    y = labels.to(features.dtype)
    teacher = teacher_features.detach().requires_grad_()
    teacher_logits = F.linear(teacher, teacher_weight, teacher_bias).squeeze(1)
    teacher_loss = F.binary_cross_entropy_with_logits(teacher_logits, y)
    (beneficial,) = torch.autograd.grad(teacher_loss, teacher)
    harmful, text_loss, text_logits = torch.zeros_like(features), features.new_zeros(()), torch.zeros_like(y)
    if text_features is not None:
        seen = text_features if text_features.requires_grad else text_features.detach().requires_grad_()
        text_logits = F.linear(seen, text_weight, text_bias).squeeze(1)
        text_loss = F.binary_cross_entropy_with_logits(text_logits, y)
        if text != "expert":
            (harmful,) = torch.autograd.grad(text_loss, seen, retain_graph=True)
    rescale = 1.0 if reference_batch_size is None else len(y) / reference_batch_size

    seen, alignment = gradient_surgery(
        features, harmful * rescale, beneficial * rescale, eps=eps, order=order
    )
    image_logits = F.linear(seen, image_weight, image_bias).squeeze(1)
    judged = image_logits if text == "project" else image_logits + text_logits.detach()
    judged = judged if offsets is None else judged + offsets
    image_loss = F.binary_cross_entropy_with_logits(judged, y)
    distances = (features - teacher_features.detach()).square().sum(1)
    distillation_loss = distillation / (2 * features.shape[1]) * distances.mean()
    return image_loss, text_loss, alignment, image_logits, text_logits, teacher_logits, distillation_loss


def luma(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, H, W] in 0..1, float32 (float64 for float64 images)."""
    dtype, scale = compute_dtype(images), 1.0 if images.is_floating_point() else 1 / 255
    # A decoded image's channels alternate byte by byte: parting them before converting is faster.
    channels = images.contiguous().unbind(1)
    red, green, blue = (x.to(dtype) * (weight * scale) for x, weight in zip(channels, LUMA))
    return red + green + blue


def spectral_entropy(images: Tensor, patch_size: int = 32) -> Tensor:
    """Entropy in bits of the normalised power spectrum of every patch's luma, [B, rows * columns].

    Arguments are those of `dgs_kernels.spectral_entropy`.
    """
    rows, columns = (side // patch_size for side in images.shape[2:])
    cut = luma(images[:, :, : rows * patch_size, : columns * patch_size])
    patches = cut.reshape(len(images), rows, patch_size, columns, patch_size).transpose(2, 3)
    energy = torch.fft.fft2(patches).abs().square()
    share = energy / (energy.sum((-2, -1), keepdim=True) + ENTROPY_EPS)
    return -(share * torch.log2(share + ENTROPY_EPS)).sum((-2, -1)).flatten(1)
