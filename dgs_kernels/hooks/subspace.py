"""Surgery with a low-rank basis of the reference gradients seen: A-GEM, OGD, cached subspaces."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dgs_kernels.arguments import WHOLE, check_choice
from dgs_kernels.hooks.capture import BeforeStep, Capture, check_keywords
from dgs_kernels.hooks.metrics import SubspaceMetrics
from dgs_kernels.hooks.places import Gradient, Part, distributed, inner_products, local, undistributed
from dgs_kernels.hooks.ranks import average
from dgs_kernels.ops.combine_ import combine_
from dgs_kernels.ops.gramian import KERNEL_OBJECTIVES

SUBSPACE_RULES = ("full", "conflict")
# Directions that a pass takes beside the gradient: of K lists gramian computes all K^2 / 2 inner products.
AT_ONCE = KERNEL_OBJECTIVES // 2 - 1
# Columns of a basis that turn at a time, in float64: on a CPU they shall stay in its cache.
COLUMNS = {"cpu": 2**12}
MORE_COLUMNS = 2**18


@dataclass
class _Layer:
    """What is known of the references in a layer, in coordinates of its n directions; on the CPU, float64.

    `factor` [n, n]: factor^T factor is the sum of the references' outer products. `total` [n]: their sum.
    """

    factor: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    total: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.total)

    def padded(self, rank: int) -> dict[str, Tensor]:
        """Its numbers, filled up with zeros to those of `rank` directions."""
        more = rank - len(self)
        pad = torch.nn.functional.pad
        return {"factor": pad(self.factor, (0, more, 0, more)), "total": pad(self.total, (0, more))}


class ReferenceSubspace(Capture):
    """Remove from all gradients, before every step, what lies in the span of reference gradients seen.

    Each reference's backward runs in a context, which adds the gradient to an orthonormal basis of every
    layer. The basis stays until it is cleared. Before the optimiser steps, one pass finds the inner products
    of the gradients with the basis (`gramian`), and one takes their part in its span away (`combine_`).

    With 1 direction, the rule "conflict" and a reference for every step it is A-GEM
    (https://arxiv.org/abs/1812.00420), with a direction for every kept example OGD
    (https://arxiv.org/abs/1910.07104), with few directions that are seldom refreshed a method of cached
    subspaces, as OGPSA (https://arxiv.org/abs/2602.07892).

    A reference adds a direction where it leaves the span by more than rounding, by Gram-Schmidt, done twice.
    Where there are `rank` directions already, a singular value decomposition of rank + 1 numbers squared says
    which one goes, and the basis turns: it holds nearly the `rank` directions in which the references seen so
    far have most energy (incremental SVD: https://doi.org/10.1016/j.laa.2005.07.021).

    Args:
        rank: most directions of a layer, 1 or more. The basis takes `rank` times the memory of the parameters
            that references reach, in float32 (float64 for float64 parameters). Of a layer with no more
            numbers than directions nothing is left.
        optimizer: any `torch.optim.Optimizer`; of a wrapper (accelerate, Lightning) the `.optimizer` inside.
        granularity: what a layer is, see `OptimizerSurgery`.
        rule: "full", or "conflict": only in layers where the inner product of the gradient with the sum of
            the references (as far as the basis has it) is negative.
        model, check_ranks: see `OptimizerSurgery`.
        scaler: the GradScaler of the loop, if there is one. Scale references with it too. One that overflows
            is left out and lowers the scale.
        process_group: average each reference over these ranks, for backwards that DDP does not reduce.

    Raises:
        ValueError, TypeError, RuntimeError: an option that does not exist or a combination that would be
            wrong, with the remedy.

    Example:
        >>> import torch
        >>> from dgs_kernels import ReferenceSubspace
        >>> w = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> subspace = ReferenceSubspace(2, optimizer)
        >>> for reference in (w[0], w[0] + 2 * w[1]):
        ...     with subspace.reference():
        ...         reference.backward()
        >>> w.sum().backward()
        >>> optimizer.step()
        >>> w.detach().abs()
        tensor([0., 0., 1.])
    """

    caller: ClassVar[str] = "ReferenceSubspace"

    def __init__(
        self,
        rank: int,
        optimizer: torch.optim.Optimizer,
        granularity: str = "tensor",
        *,
        rule: str = "full",
        **capture: Any,
    ) -> None:
        if isinstance(rank, bool) or not isinstance(rank, WHOLE):
            raise TypeError(f"ReferenceSubspace: rank must be an integer, got {type(rank).__name__}")
        if rank < 1:
            raise ValueError(f"ReferenceSubspace: rank must be 1 or more, got {rank}")
        check_choice(self.caller, "rule", rule, SUBSPACE_RULES)
        check_keywords(self.caller, Capture, capture)
        if capture.get("track_update"):
            raise ValueError("ReferenceSubspace: track_update is not supported: use OptimizerSurgery")
        self.rank, self.rule = int(rank), rule
        super().__init__(optimizer, granularity=granularity, **capture)
        # Each is [rank, numbers of a parameter on this process].
        self._basis: dict[Tensor, Tensor] = {}
        self._known: dict[str, _Layer] = {}
        self._small: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}
        self._scaled: list[list[Any]] = [[], []]
        self._last: SubspaceMetrics | None = None
        self._hook = weakref.ref(BeforeStep(self, self._edit))

    @property
    def captured(self) -> bool:
        """Whether there is a basis."""
        return bool(self._basis)

    def clear(self) -> None:
        """Forget all references."""
        super().clear()
        self._basis, self._known, self._small = {}, {}, {}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """A context: what `backward()` inside computes is one reference; `.grad` stays.

        Backwards of one context add up, as micro-batches do. Waits for the device. A reference of zeros adds
        nothing.

        Raises:
            ValueError: NaN or infinity in it, or a squared length beyond float32; the basis stays.
        """
        with self.capture("reference", "reference()"):
            yield
        gradient = self._captured.pop("reference")
        self.lasting.forget()
        if self._unscaled_alone(gradient):
            self._add(gradient)

    def metrics(self) -> SubspaceMetrics | None:
        """What the last step's surgery did to each layer; None if it had nothing to do. Waits for nothing."""
        return self._last

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The basis, to be saved with the optimiser's: a run that loads both goes on to the same bits.

        Parameters are told by their place in the optimiser, layers by name. Of sharded parameters (FSDP2) the
        basis is made of DTensors, sharded alike. What is in it does not depend on what was seen, so that
        `torch.distributed.checkpoint` can load into the state of a new subspace.
        """
        params = self.parameters()
        layers = {name: self._known.get(name) or _Layer() for name in map(self.layer, params)}
        return {
            "rank": self.rank,
            "layers": {name: its.padded(self.rank) for name, its in layers.items()},
            "directions": {name: len(its) for name, its in layers.items()},
            "basis": {i: self._saved(p) for i, p in enumerate(params) if p.requires_grad or p in self._basis},
            "reached": [i for i, p in enumerate(params) if p in self._basis],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the place of what there is. Nothing is loaded of a state that does not fit: ValueError.

        DTensors and whole tensors are loaded alike, whatever the parameters are.
        """
        if missing := {"rank", "layers", "basis"} - state_dict.keys():
            raise ValueError(f"ReferenceSubspace: the state has no {', '.join(sorted(missing))}")
        if state_dict["rank"] != self.rank:
            raise ValueError(
                f"ReferenceSubspace: the state is of rank {state_dict['rank']}, this one of rank {self.rank}"
            )
        params = self.parameters()
        layers = {self.layer(p) for p in params}
        if unknown := sorted(state_dict["layers"].keys() - layers):
            raise ValueError(
                f"ReferenceSubspace: the state has a layer {unknown[0]!r} and this optimizer none: give both "
                "the same granularity and names"
            )
        basis = {}
        # An older state has only what references reached.
        reached = state_dict.get("reached", state_dict["basis"])
        for place, of in state_dict["basis"].items():
            shape = tuple(params[place].shape) if place < len(params) else None
            if shape is None or tuple(of.shape) != (self.rank, *shape):
                raise ValueError(
                    f"ReferenceSubspace: the state's basis of parameter {place} is {tuple(of.shape)}, "
                    f"expected {'none' if shape is None else (self.rank, *shape)}"
                )
            if place in reached:
                p = params[place]
                mine = undistributed(of.detach(), p).to(local(p).device, _basis_dtype(p), copy=True)
                basis[p] = mine.reshape(self.rank, -1)
        known = {}
        for name, its in state_dict["layers"].items():
            n = state_dict["directions"][name] if "directions" in state_dict else len(its["total"])
            parts = {key: of.detach().to("cpu", torch.float64, copy=True) for key, of in its.items()}
            known[name] = _Layer(parts["factor"][:n, :n], parts["total"][:n])
        self.clear()
        self._basis, self._known = basis, known

    def _saved(self, p: Tensor) -> Tensor:
        """[rank, *p.shape], zeros where no reference reached it."""
        mine = self._basis[p] if p in self._basis else self._empty(p)
        return distributed(mine.view(self.rank, *local(p).shape), p)

    def _empty(self, p: Tensor) -> Tensor:
        mine = local(p)
        return torch.zeros(self.rank, mine.numel(), dtype=_basis_dtype(p), device=mine.device)

    # References ------------------------------------------------------------------------------------------

    def _unscaled_alone(self, gradient: Gradient) -> bool:
        """Divide a reference by the loss scale; False if it overflowed.

        Each is an optimiser of its own to the scaler, which knows it by id() until its next update.
        """
        self._unscaled = type(self._unscaled)()
        self._scaled[-1].append(self._unscaled)
        fine = self._unscale(list(gradient.values()))
        self._unscaled.param_groups = []
        return fine

    @torch.no_grad()
    def _add(self, gradient: Gradient) -> None:
        """Let a reference join the basis, layer by layer; its tensors are written over."""
        together = self.process_group is not None
        params = [
            p
            for p in self.parameters()
            if p in self._basis or p in gradient or (together and p.requires_grad)
        ]
        rest = {
            p: gradient[p].to(_basis_dtype(p))
            if p in gradient
            else torch.zeros_like(p, dtype=_basis_dtype(p))
            for p in params
        }
        basis = self._basis | {p: self._empty(p) for p in params if p not in self._basis}
        parts, layers = self._parts(rest, basis)
        if self.process_group is not None:
            self.meet_ranks()
            for part in parts:
                average(part.lists[0], self.process_group)
        square, inner = _with_the_first(parts, len(layers))
        lengths, first = square.double().cpu().sqrt(), inner.double().cpu()
        for name, length in zip(layers, lengths.tolist()):
            if not length < float("inf"):
                raise ValueError(
                    f"reference(): the gradient of {name} has NaN or infinity, or is too long for a square: "
                    "nothing was added to the basis"
                )
        _subtract(parts, inner)
        products = inner_products(parts, len(layers)).double().cpu()
        turns = []
        for i, name in enumerate(layers):
            its = self._known.get(name) or _Layer()
            rounding = max(_rounding(p) for part in parts for p, g in zip(part.params, part.groups) if g == i)
            self._known[name], turn = _grow(
                its, self.rank, products[i], first[i], float(lengths[i]) * rounding
            )
            turns.append(turn)
        for part in parts:
            for p, vector, group in zip(part.params, part.lists[0], part.groups):
                if (turn := turns[group]) is not None:
                    _turn(basis[p], vector.reshape(-1), turn)
        self._basis, self._small = basis, {}

    def _parts(self, first: Gradient, basis: dict[Tensor, Tensor]) -> tuple[list[Part], list[str]]:
        """A gradient and the directions that any layer has, 1 or more, as K lists."""
        used = max([1, *map(len, self._known.values())])
        shapes = {p: local(first[p]).shape for p in first}
        return self.parts([first, *({p: basis[p][k].view(shapes[p]) for p in first} for k in range(used))])

    # Operating -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _edit(self) -> None:
        self._last = None
        self._scaled = [self._scaled[-1], []]
        # This refuses a step inside reference().
        self.release()
        task = {p: grad for p, grad in self.task().items() if p in self._basis}
        if not task:
            return
        self._check_scaling()
        parts, layers = self._parts(task, self._basis)
        square, inner = _with_the_first(parts, len(layers))
        energy, total, ranks = self._of_layers(layers, inner)
        self.compare_ranks({"task": square, "captured": energy})
        conflict = (inner * total).sum(1) < 0
        part_taken = inner if self.rule == "full" else torch.where(conflict[:, None], inner, 0.0)
        _subtract(parts, part_taken)
        removed = torch.where(square == 0, 0.0, part_taken.square().sum(1) / square)
        self._last = SubspaceMetrics(layers, removed.clamp(max=1), conflict, ranks)

    def _of_layers(self, layers: list[str], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The references' energy [G], their sum [G, K] and the directions [G], copied once to the device."""
        key = (*layers, like.device)
        if key not in self._small:
            known = [self._known[name] for name in layers]
            total = torch.zeros(like.shape, dtype=torch.float64)
            for row, its in zip(total, known):
                row[: len(its)] = its.total
            energy = torch.stack([its.factor.square().sum() for its in known])
            ranks = torch.tensor(list(map(len, known)))
            self._small = {key: (energy.to(like), total.to(like), ranks.to(like.device))}
        return self._small[key]


@dataclass
class _Turn:
    """New directions, from the place `first` on: `weights` [m, n + 1] of the n there are and what is left."""

    first: int
    weights: Tensor


def _grow(
    its: _Layer, rank: int, products: Tensor, first: Tensor, rounding: float
) -> tuple[_Layer, _Turn | None]:
    """A layer that has seen one more reference g, and what becomes of its basis B.

    `products` are those of [left, B], left being g - first B; `rounding` is the length up to which what is
    left of g is rounding.
    """
    n = len(its)
    gram, overlap = products[1 : n + 1, 1 : n + 1], products[0, 1 : n + 1]
    # Gram-Schmidt runs once more, as rounding has bent the basis.
    again = torch.linalg.solve(gram, overlap)
    along = first[:n] + again
    height = (products[0, 0] - again @ overlap).clamp(min=0).sqrt()
    if height <= rounding:
        _, factor = torch.linalg.qr(torch.cat([its.factor, along[None]]))
        return _Layer(factor, its.total + along), None
    upward = torch.cat([-again, torch.ones(1, dtype=torch.float64)]) / height
    if n < rank:
        rows = _bordered(its.factor, along, height)
        total = torch.cat([its.total + along, height[None]])
        return _Layer(torch.linalg.qr(rows)[1], total), _Turn(n, upward[None])
    # B = bent (an orthonormal basis of the same span)
    bent = torch.linalg.cholesky(gram)
    straight = torch.linalg.solve_triangular(bent, torch.eye(n, dtype=torch.float64), upper=False)
    _, values, directions = torch.linalg.svd(_bordered(its.factor @ bent, along @ bent, height))
    kept = directions[:rank]
    total = kept @ torch.cat([(its.total + along) @ bent, height[None]])
    weights = kept @ torch.cat([torch.nn.functional.pad(straight, (0, 1)), upward[None]])
    return _Layer(values[:rank].diag(), total), _Turn(0, weights)


def _bordered(square: Tensor, below: Tensor, corner: Tensor) -> Tensor:
    """[[square, 0], [below, corner]]."""
    rows = torch.cat([square, below[None]])
    column = torch.zeros(len(rows), 1, dtype=rows.dtype)
    column[-1] = corner
    return torch.cat([rows, column], 1)


def _turn(basis: Tensor, left: Tensor, turn: _Turn) -> None:
    """Write new directions [m, D] over a basis [rank, D], a few columns at a time.

    In float64, which neither autocast nor TF32 makes coarser.
    """
    weights = turn.weights.to(basis.device)
    n = weights.shape[1] - 1
    count = COLUMNS.get(basis.device.type, MORE_COLUMNS)
    for columns, mine in zip(basis.split(count, 1), left.split(count)):
        new = torch.addr(weights[:, :n] @ columns[:n].double(), weights[:, n], mine.double())
        columns[turn.first : turn.first + len(weights)] = new


def _with_the_first(parts: list[Part], layers: int) -> tuple[Tensor, Tensor]:
    """Inner products of the first list with itself [G] and with each of the others [G, K - 1]."""
    found = []
    for start in range(1, len(parts[0].lists), AT_ONCE):
        each = [part.with_lists([part.lists[0], *part.lists[start : start + AT_ONCE]]) for part in parts]
        found.append(inner_products(each, layers)[:, 0])
    return found[0][:, 0], torch.cat([row[:, 1:] for row in found], 1)


def _subtract(parts: list[Part], weights: Tensor) -> None:
    """Take from the first list the others times [G, K - 1], in place."""
    for part in parts:
        mine = part.of(weights if len(parts) == 1 else weights[list(dict.fromkeys(part.groups))])
        first, others = part.lists[0], part.lists[1:]
        # A sum of more lists than a kernel takes is made beside them; half precision needs it.
        exact = all(t.dtype == part.sums_dtype for t in first)
        some = KERNEL_OBJECTIVES - 1 if exact else len(others)
        for start in range(0, len(others), some):
            its = torch.nn.functional.pad(-mine[:, start : start + some], (1, 0), value=1.0)
            combine_(first, [first, *others[start : start + some]], its, groups=part.groups)


def _basis_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _rounding(p: Tensor) -> float:
    """The share of a gradient's length that may be rounding: its own, and that of the arithmetic."""
    return max(2 * torch.finfo(p.dtype).eps, 32 * torch.finfo(_basis_dtype(p)).eps)
