"""What a step's surgery did to each layer, from inner products alone, and its plots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Solvers and rounding may miss a margin by this much.
SLACK = 1e-3


@dataclass(frozen=True)
class SurgeryMetrics:
    """What a step's surgery did to each of G layers; tensors on the layers' device, computed without a sync.

    Inner products are float32's, float64's of float64 gradients: of a gradient whose squared length that type
    cannot hold (float32: shorter than 1.1e-19, longer than 1.8e19) what depends on the length is NaN, or 0
    where the inner products are 0 too.

    Attributes:
        layers: G names.
        cosine: [G], between the task gradient and the direction h that `rule` makes of the harmful one.
        removed: [G], share of the energy ||x||^2 that the projection took, x being what it was applied to.
        conflict: [G] bool, whether that cosine is negative.
        alignment: [G], ||alignment * min(beneficial, 0)|| / ||task gradient||.
        update_cosine: [G, 2], between what the optimiser did to the parameters and the directions h and
            min(beneficial, 0), 0 of one that was not captured; None without `track_update=True`.
        promise_held: [G], share of the steps so far in which the layer's update kept what surgery promises of
            the gradient; None without `track_update=True`. docs/hooks.md says what that is.
        refresh_cosine: of each kind that was captured anew after it had served several steps: [G], between
            the new gradient and the one that it replaced, at the last time.
        margin_met: [G] bool, whether what the projection left has the `margin` with h; true without one.
    """

    layers: list[str]
    cosine: Tensor
    removed: Tensor
    conflict: Tensor
    alignment: Tensor
    update_cosine: Tensor | None = None
    promise_held: Tensor | None = None
    margin_met: Tensor | None = None
    refresh_cosine: dict[str, Tensor] = field(default_factory=dict)

    @property
    def conflict_rate(self) -> Tensor:
        """Share of the layers whose task and harmful gradient conflict, 0-dim."""
        return self.conflict.float().mean()

    def scalars(self, prefix: str = "surgery") -> dict[str, float]:
        """Every number under the name of its plot, as TensorBoard takes them; waits for the device once."""
        rows = {name: getattr(self, name) for name in ("cosine", "removed", "conflict", "alignment")}
        rows |= _of_updates(("harmful", "beneficial"), self.update_cosine, self.promise_held)
        return _plots(prefix, self.layers, self.conflict_rate, rows)


@dataclass(frozen=True)
class ObjectiveMetrics:
    """What a step's surgery found in each of G layers; tensors on the layers' device, made without a sync.

    Attributes:
        layers: G names. With `mode="running"` an entry for each objective and layer, "objective/layer".
        objectives: K names. With `mode="running"` K is 2: the sum so far and the objective that joins it.
        gramian: [G, K, K], inner products of the gradients.
        weights: [G, K], what they were added with.
        update_cosine: [G, K], between what the optimiser did to the parameters and each gradient; None
            without `track_update=True`.
        promise_held: see `SurgeryMetrics`.
        margin: the one asked for.
        refresh_cosine: see `SurgeryMetrics`, by objective.
    """

    layers: list[str]
    objectives: list[str]
    gramian: Tensor
    weights: Tensor
    update_cosine: Tensor | None = None
    promise_held: Tensor | None = None
    margin: float = 0.0
    refresh_cosine: dict[str, Tensor] = field(default_factory=dict)

    @property
    def margin_met(self) -> Tensor:
        """[G] bool, whether the constraints hold with that margin, to 0.1% of all lengths."""
        lengths = self.gramian.diagonal(dim1=1, dim2=2).sqrt()
        inner = (self.gramian @ self.weights[:, :, None])[:, 1:, 0]
        wanted = self.margin * lengths[:, :1] - SLACK * lengths.sum(1, keepdim=True)
        return (inner >= wanted * lengths[:, 1:]).all(1)

    @property
    def cosine(self) -> Tensor:
        """[G, K, K], between every two gradients; 0 where one is zero."""
        squares = self.gramian.diagonal(dim1=1, dim2=2)
        return cosine(self.gramian, squares[:, :, None], squares[:, None, :])

    @property
    def conflict(self) -> Tensor:
        """[G, K, K] bool, which pairs have a negative inner product."""
        return self.gramian < 0

    @property
    def conflict_rate(self) -> Tensor:
        """Share of the pairs that conflict, over all layers, 0-dim."""
        count = len(self.objectives)
        return self.conflict.float().mean() * count / (count - 1)

    def scalars(self, prefix: str = "objectives") -> dict[str, float]:
        """Every number under the name of its plot, as TensorBoard takes them; waits for the device once."""
        rows = {
            f"cosine/{one}, {other}": self.cosine[:, i, j]
            for (i, one), (j, other) in itertools.combinations(enumerate(self.objectives), 2)
        }
        rows |= {f"weight/{name}": self.weights[:, k] for k, name in enumerate(self.objectives)}
        rows |= _of_updates(self.objectives, self.update_cosine, self.promise_held)
        return _plots(prefix, self.layers, self.conflict_rate, rows)


@dataclass(frozen=True)
class SubspaceMetrics:
    """What a step's `ReferenceSubspace` did to each of G layers; tensors on their device, without a sync.

    Attributes:
        layers: G names.
        removed: [G], share of the gradient's energy that was taken away.
        conflict: [G] bool, whether its inner product with the sum of the references is negative.
        rank: [G] integers, the directions of the basis.
    """

    layers: list[str]
    removed: Tensor
    conflict: Tensor
    rank: Tensor

    @property
    def conflict_rate(self) -> Tensor:
        """Share of the layers that conflict, 0-dim."""
        return self.conflict.float().mean()

    def scalars(self, prefix: str = "subspace") -> dict[str, float]:
        """Every number under the name of its plot, as TensorBoard takes them; waits for the device once."""
        rows = {name: getattr(self, name) for name in ("removed", "conflict", "rank")}
        return _plots(prefix, self.layers, self.conflict_rate, rows)


def length(square: Tensor) -> Tensor:
    """The length of a vector from its square; NaN where that is not in the normal range of its type."""
    known = (square >= torch.finfo(square.dtype).tiny) & (square < torch.inf)
    return torch.where(known, square.sqrt(), torch.nan)


def cosine(inner: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Of two vectors, from their inner product and squared lengths, in -1..1; 0 where one is zero."""
    nothing = (inner == 0) & ((first == 0) | (second == 0))
    return torch.where(nothing, 0.0, (inner / length(first) / length(second)).clamp(-1, 1))


def _of_updates(directions: Sequence[str], cosines: Tensor | None, held: Tensor | None) -> dict[str, Tensor]:
    """Rows of plots of what was tracked, {} if nothing was."""
    if cosines is None or held is None:
        return {}
    each = zip(directions, cosines.unbind(1))
    return {"promise_held": held} | {f"update_cosine/{name}": row for name, row in each}


def _plots(prefix: str, layers: list[str], rate: Tensor, rows: dict[str, Tensor]) -> dict[str, float]:
    """Numbers [G] of the layers under the names of their plots."""
    names = ["conflict_rate", *(f"{name}/{layer}" for name in rows for layer in layers)]
    values = torch.cat([rate[None], *rows.values()]).tolist()
    return {f"{prefix}/{name}": value for name, value in zip(names, values)}
