"""From the inner products of K gradients to the weights they are added with: the K x K part of each method.

Every method takes Gramians [G, K, K], one for each layer, and returns weights [G, K] in float64. It computes
on the Gramians' device and does not wait for it, except that `gem`, `mgda` and `upgrad` with three or more
objectives solve their quadratic programmes on the host, with `scipy.optimize.nnls`, where the gradients are
on a CPU, or more than 16.

What all promise: a Gramian that holds a NaN or an infinity gives NaN weights, for its layer. A zero gradient
gets no say, and takes none of the others'. Linearly dependent gradients are no error: where weights are not
unique, the sum that they make of the gradients is, and that is what is defined. For gradients that nearly
depend on each other, exact weights can be so large that their sum is rounding alone. So `gem`, `mgda` and
`upgrad` pay for large weights (RIDGE), and no sum is longer than the sum of the lengths (`gem`) or the
longest gradient (`mgda`, `upgrad`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dgs_kernels import backends
from dgs_kernels.ops.gramian import KERNEL_OBJECTIVES

Weighting = Callable[[Tensor], Tensor]
BISECTIONS = 40
# One of `dgs_kernels.triton.nonnegative`.
Kernel = Callable[[Tensor, Tensor], Tensor]
# What the square of a weight costs, gradients being of length one, by the Gramian's dtype. Weights stay below
# 1 / sqrt(RIDGE), and constraints are missed by at most sqrt(RIDGE) / 2 of the lengths.
RIDGE = {torch.float32: 1e-6, torch.float64: 1e-12}


def weigh(
    weighting: str | Weighting, gramian: Tensor, generator: torch.Generator, margin: float = 0.0
) -> Tensor:
    """Weights [G, K] by a method's name, or by a callable from [K, K] to [K] that is asked layer by layer.

    `margin` is that of "gem".
    """
    if isinstance(weighting, str):
        if weighting == "pcgrad":
            weights = pcgrad(gramian, generator)
        else:
            weights = gem(gramian, margin) if weighting == "gem" else METHODS[weighting](gramian)
        return weights.to(gramian.dtype)
    rows = [weighting(layer) for layer in gramian]
    for row in rows:
        if not isinstance(row, Tensor) or row.shape != gramian.shape[1:2]:
            got = list(row.shape) if isinstance(row, Tensor) else type(row).__name__
            raise ValueError(
                f"a weighting must return a tensor [{gramian.shape[1]}], a weight per objective, got {got}"
            )
    return torch.stack([row.detach() for row in rows]).to(gramian)


def mean(gramian: Tensor) -> Tensor:
    """The gradient of the mean of the losses: every weight 1 / K."""
    return _marked(gramian.new_full(gramian.shape[:2], 1 / gramian.shape[1], dtype=torch.float64), gramian)


def pcgrad(gramian: Tensor, generator: torch.Generator) -> Tensor:
    """PCGrad (Yu et al. 2020, arXiv 2001.06782, algorithm 1).

    For every objective i in turn the others j, in random order: where <v_i, g_j> < 0, v_i loses its part
    along g_j, v_i starting as g_i. The result is the sum of all v_i. `generator`, on the CPU, draws an order
    for each i, the same in all layers.
    """
    g, count = gramian.double(), gramian.shape[1]
    last = torch.rand(count, count, generator=generator, device=generator.device)
    # Each number stands in its own place.
    last.fill_diagonal_(2.0)
    orders = last.argsort(1)[:, :-1].to(g.device, non_blocking=True)
    energy, each = g.diagonal(dim1=1, dim2=2), torch.arange(count, device=g.device)
    # Row i is v_i.
    weights = torch.eye(count, dtype=g.dtype, device=g.device).repeat(len(g), 1, 1)
    for others in orders.unbind(1):
        inner = (weights * g[:, others]).sum(2)
        conflict = (inner < 0) & (energy[:, others] > 0)
        weights[:, each, others] -= torch.where(conflict, inner / energy[:, others], 0.0)
    return _marked(weights.sum(1), gramian)


def ogd(gramian: Tensor) -> Tensor:
    """The first gradient, made orthogonal to all others (Farajtabar et al. 2020, arXiv 1910.07104).

    By Gram-Schmidt, in terms of the gradients. What lies within the Gramian's rounding of the span of others
    counts as lying in it: such a gradient adds no direction, and as the first leaves zero.
    """
    cosines, norms = _cosines(gramian)
    count = gramian.shape[1]
    tolerance = count * torch.finfo(gramian.dtype).eps
    unit = torch.eye(count, dtype=cosines.dtype, device=cosines.device)
    basis = cosines.new_zeros(len(cosines), 0, count)
    for k in [*range(1, count), 0]:
        row = unit[k].repeat(len(cosines), 1, 1)
        row = row - (row @ cosines @ basis.mT) @ basis
        energy = (row @ cosines @ row.mT).clamp(min=0)
        row = torch.where(energy > tolerance, row if k == 0 else row / energy.sqrt(), 0.0)
        basis = torch.cat([basis, row], 1)
    return _marked(_of_gradients(basis[:, -1], norms[:, :1], norms), gramian)


def gem(gramian: Tensor, margin: float = 0.0) -> Tensor:
    """GEM (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, equation 11).

    The vector d nearest to the first gradient with <g_k, d> >= margin |g_k| |g_0| for all others k. At margin
    0: g_0 + sum_k v_k g_k with v >= 0 that minimises its norm. With a margin (ours, not the paper's, which is
    a lower bound of v) d is also no longer than S, the sum of all lengths: the nearest such vector; where
    there is none, the one that meets the largest common margin that one meets.
    """
    if margin:
        return (
            _gem_of_two(gramian, margin)
            if gramian.shape[1] == 2
            else _on_the_host(functools.partial(_gem_with_margin, margin), gramian)
        )
    if gramian.shape[1] == 2:
        g = gramian.double()
        conflict = (g[:, 0, 1] < 0) & (g[:, 1, 1] > 0)
        away = torch.where(conflict, -g[:, 0, 1] / g[:, 1, 1], 0.0)
        return _marked(torch.stack([torch.ones_like(away), away], 1), gramian)
    return _solved(_gem, _gem_on_device, gramian)


def mgda(gramian: Tensor) -> Tensor:
    """MGDA (Desideri 2012; Sener and Koltun 2018, arXiv 1810.04650): the shortest convex combination.

    Exact, where Sener and Koltun iterate. If gradients are zero, so is the result.
    """
    if gramian.shape[1] == 2:
        g = gramian.double()
        # This is ||g_0 - g_1||^2.
        apart = g[:, 0, 0] + g[:, 1, 1] - 2 * g[:, 0, 1]
        share = torch.where(apart > 0, (g[:, 1, 1] - g[:, 0, 1]) / apart, 0.5).clamp(0, 1)
        return _marked(torch.stack([share, 1 - share], 1), gramian)
    return _solved(_mgda, _mgda_on_device, gramian)


def upgrad(gramian: Tensor) -> Tensor:
    """UPGrad (Quinton and Rey 2024, arXiv 2406.16232): the mean of the gradients without their conflicts.

    Every gradient is replaced by the nearest vector that has no negative inner product with any gradient.
    """
    if gramian.shape[1] == 2:
        g = gramian.double()
        energy = g.diagonal(dim1=1, dim2=2)
        conflict = (g[:, :1, 1] < 0) & (energy > 0)
        away = torch.where(conflict, -g[:, :1, 1] / energy, 0.0)
        return _marked((1 + away) / 2, gramian)
    return _solved(_upgrad, _upgrad_on_device, gramian)


METHODS: dict[str, Weighting] = {"mean": mean, "ogd": ogd, "gem": gem, "mgda": mgda, "upgrad": upgrad}
NAMES = (*METHODS, "pcgrad")


def _cosines(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """The Gramian [G, K, K] of the gradients at length one (zero stays zero), and the lengths [G, K]."""
    g = gramian.double()
    norms = g.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return g * inverse[:, :, None] * inverse[:, None, :], norms


def _of_gradients(weights: Tensor, length: Tensor, norms: Tensor) -> Tensor:
    """Weights of the gradients, from those of the gradients at length one that make a vector of `length`."""
    return torch.where(norms > 0, weights * length / norms, 0.0)


def _marked(weights: Tensor, gramian: Tensor) -> Tensor:
    """NaN in every layer whose Gramian is not finite: comparisons may have let it pass."""
    return weights + (gramian * 0).sum((1, 2))[:, None]


def _gem_of_two(gramian: Tensor, margin: float) -> Tensor:
    """d = t g_0 + a u in the plane of g_0 and u, the other one's direction, on the device."""
    cosines, norms = _cosines(gramian)
    along, (first, other) = cosines[:, 0, 1], norms.unbind(1)
    # All in lengths of g_0.
    longest = 1 + other / first
    asked = longest.clamp(max=margin)
    across = (1 - along.square()).clamp(min=0).sqrt()
    keep = ((longest.square() - asked.square()).clamp(min=0).sqrt() / across).clamp(max=1)
    away = (asked - keep * along) * first / other
    binding = (along < asked) & (first > 0) & (other > 0)
    weights = torch.stack([torch.where(binding, keep, 1.0), torch.where(binding, away, 0.0)], 1)
    return _marked(weights, gramian)


def _solved(on_host: Callable, on_device: Callable, gramian: Tensor) -> Tensor:
    """Of three and more objectives: where the Gramians are, if a kernel serves there."""
    kernel = _kernel(gramian)
    return _on_the_host(on_host, gramian) if kernel is None else _on_the_device(on_device, kernel, gramian)


# With three or more objectives: quadratic programmes on the device ------------------------------------------


def _kernel(gramian: Tensor) -> Kernel | None:
    """The kernel that solves quadratic programmes, unless the host has to."""
    device = gramian.device.type
    chosen = os.environ.get(backends.VARIABLE) or backends.PREFERENCE.get(device, ("eager",))[0]
    if chosen in ("cpu", "eager") or gramian.shape[1] > KERNEL_OBJECTIVES:
        return None
    if backends.obstacle("triton", "nonnegative", device):
        return None
    from dgs_kernels.triton.nonnegative import nonnegative

    return nonnegative


def _on_the_device(solve: Callable, kernel: Kernel, gramian: Tensor) -> Tensor:
    """What `_on_the_host` does, layers at once; the Gramian's rounding is paid for with the ridge."""
    cosines, norms = _cosines(gramian)
    count = gramian.shape[1]
    rounding = count * torch.finfo(gramian.dtype).eps
    ridge = (RIDGE[gramian.dtype] + rounding) * torch.eye(count, dtype=cosines.dtype, device=cosines.device)
    weights, longest = solve(kernel, cosines, cosines + ridge, norms)
    parts = weights * norms
    inner = ((parts[:, None] @ cosines)[:, 0] * parts).sum(1).clamp(min=0)
    length = (inner + rounding * parts.square().sum(1)).sqrt()
    shorter = torch.where(length > (1 + rounding) * longest, longest / length, 1.0)
    return _marked(weights * shorter[:, None], gramian)


def _gem_on_device(kernel: Kernel, cosines: Tensor, matrix: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    # The first one's weight is given: in the programme it is zero.
    matrix, linear = matrix.clone(), cosines[:, 0].clone()
    matrix[:, 0] = matrix[:, :, 0] = 0.0
    matrix[:, 0, 0] = linear[:, 0] = 1.0
    away = _of_gradients(kernel(matrix, linear), norms[:, :1], norms)
    return torch.cat([torch.ones_like(away[:, :1]), away[:, 1:]], 1), norms.sum(1)


def _mgda_on_device(kernel: Kernel, cosines: Tensor, matrix: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    zero = (norms == 0).double()
    sums = norms.amin(1, keepdim=True) / norms
    found = kernel(matrix + sums[:, :, None] * sums[:, None], -sums) / norms
    found = found / found.sum(1, keepdim=True)
    count = zero.sum(1, keepdim=True)
    return torch.where(count > 0, zero / count, found), norms.amax(1)


def _upgrad_on_device(
    kernel: Kernel, cosines: Tensor, matrix: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    count = norms.shape[1]
    each = matrix[:, None].expand(-1, count, -1, -1).flatten(0, 1).contiguous()
    away = kernel(each, cosines.flatten(0, 1).contiguous()).unflatten(0, (-1, count))
    away = torch.where(norms[:, None] > 0, away * norms[:, :, None] / norms[:, None], 0.0)
    return (away.sum(1) + 1) / count, norms.amax(1)


# With three or more objectives: quadratic programmes on the host --------------------------------------------


def _on_the_host(solve: Callable, gramian: Tensor) -> Tensor:
    """`solve(root, norms)` for every layer that can be solved: root.T @ root is the Gramian at length one.

    Below the root's K rows there are K more, the ridge: what is solved with them by least squares pays for
    its weights.
    """
    # Nothing else waits for the device.
    host = gramian.cpu()
    cosines, norms = (x.numpy() for x in _cosines(host))
    count = gramian.shape[1]
    rounding = count * torch.finfo(gramian.dtype).eps
    ridge = np.sqrt(RIDGE[gramian.dtype]) * np.eye(count)
    weights = np.full(norms.shape, np.nan)
    for g in np.flatnonzero(host.isfinite().all(2).all(1).numpy()):
        values, vectors = np.linalg.eigh(cosines[g])
        values[values <= rounding * values[-1]] = 0
        weights[g], longest = solve(np.vstack([np.sqrt(values)[:, None] * vectors.T, ridge]), norms[g])
        parts = weights[g] * norms[g]
        # At most so long is the sum: what rounding hides grows with the weights.
        length = np.sqrt(max(parts @ cosines[g] @ parts, 0.0) + rounding * (parts @ parts))
        if length > (1 + rounding) * longest:
            weights[g] *= longest / length
    return torch.from_numpy(weights).to(gramian.device)


def _nnls(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises ||matrix @ x - vector||, of which the ridge's zeros are left out."""
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise ImportError(
            'the weightings "gem", "mgda" and "upgrad" solve three and more objectives with scipy: '
            "pip install scipy"
        ) from error
    return nnls(matrix, np.pad(vector, (0, len(matrix) - len(vector))))[0]


def _per_norm(x: np.ndarray, norms: np.ndarray) -> np.ndarray:
    return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)


def _gem(root: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, float]:
    away = _nnls(root[:, 1:], -root[: len(norms), 0]) * norms[0]
    return np.concatenate([[1.0], _per_norm(away, norms[1:])]), norms.sum()


def _gem_with_margin(margin: float, root: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, float]:
    """As `_gem`; all in lengths of g_0, and of the others' directions u_k."""
    count, longest = len(norms), norms.sum()
    others = np.flatnonzero(norms[1:]) + 1
    if not norms[0] or not len(others):
        return np.eye(count)[0], longest
    limit, ridge = longest / norms[0], root[-1, -1]
    directions = root[:, others]

    def nearest(share: float) -> np.ndarray:
        """The weights of the u_k in what is nearest to share * g_0 and keeps the margin."""
        # The constraints' bounds, as what the ridge's rows aim at: the dual's linear term.
        aims = np.zeros(count)
        aims[others] = margin / ridge
        return _nnls(directions, np.concatenate([-share * root[:count, 0], aims]))

    def made(share: float, away: np.ndarray) -> tuple[np.ndarray, float]:
        weights = np.zeros(count)
        weights[0], weights[others] = share, away * norms[0] / norms[others]
        return weights, longest

    def length(share: float, away: np.ndarray) -> float:
        return float(np.linalg.norm(share * root[:count, 0] + directions[:count] @ away))

    # The shortest convex combination of the u_k: where it points, all inner products are its length.
    common = _nnls(np.vstack([np.ones(len(others)), directions]), np.ones(1))
    common /= common.sum()
    most = length(0.0, common)
    if most <= ridge:
        return _gem(root, norms)
    if limit * most <= margin:
        return made(0.0, common * limit / most)
    share, away = 1.0, nearest(1.0)
    if length(share, away) > limit:
        low = 0.0
        for _ in range(BISECTIONS):
            middle = (low + share) / 2
            low, share = (low, middle) if length(middle, nearest(middle)) > limit else (middle, share)
        share, away = low, nearest(low)
    return made(share, away)


def _mgda(root: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, float]:
    if not norms.all():
        return (norms == 0) / np.count_nonzero(norms == 0), norms.max()
    # The sum of the weights joins the squares: their optimum is a multiple of the one where the sum is one.
    sums = norms.min() / norms
    weights = _nnls(np.vstack([sums, root]), np.ones(1)) / norms
    return weights / weights.sum(), norms.max()


def _upgrad(root: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, float]:
    count = len(norms)
    weights = np.eye(count)
    for i in range(count):
        weights[i] += _per_norm(_nnls(root, -root[:count, i]) * norms[i], norms)
    return weights.mean(0), norms.max()
