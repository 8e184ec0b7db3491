"""What an optimiser made of an edited gradient: the parameters' change against what was captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dgs_kernels.hooks.metrics import cosine
from dgs_kernels.hooks.places import Part, local

# A promise holds up to this cosine: rounding leaves a step on the boundary on either side of it.
TOLERANCE = 0.01

# From each part's change, T tensors negated: <change, change> [G], <change, d_k> and <d_k, d_k> [G, K].
Measure = Callable[[list[list[Tensor]]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Promise:
    """What a surgery promises of an edited gradient: which captured losses do not rise, or do not change.

    It is of those from the place `first` on, to first order.
    """

    first: int = 0
    last: int | None = None
    unchanged: bool = False

    def held(self, cosines: Tensor) -> Tensor:
        """[G] bool, of the cosines [G, K] between the parameters' change and the captured gradients."""
        mine = cosines[:, self.first : self.last]
        return ((mine.abs() if self.unchanged else mine) <= TOLERANCE).all(1)


@dataclass
class Updates:
    """Measures, from before each step to after it, what became of the surgery. Waits for nothing.

    A step with surgery costs 5 streams of the parameters and as many as there are captured gradients, plus
    one; and one more copy of the parameters.
    """

    _before: dict[Tensor, Tensor] = field(default_factory=dict)
    _due: tuple[list[str], list[Part], list[Promise], Measure] | None = None
    _last: tuple[Tensor, list[str]] | None = None
    # Of each set of layers that steps had: in how many steps, and in how many of them the promise held [G].
    _tally: dict[tuple[str, ...], tuple[int, Tensor]] = field(default_factory=dict)

    def expect(self, layers: list[str], parts: list[Part], promises: list[Promise], measure: Measure) -> None:
        """A surgery was done, for the step to come; `promises` are one of all layers, or one of each."""
        self._due = layers, parts, promises, measure

    def drop(self) -> None:
        """The step that a surgery was done for will not come."""
        self._due = None

    def begin(self, params: Iterable[Tensor] | None = None) -> None:
        """Keep parameters as they are before the step: these, or those of the surgery that was done."""
        if params is None:
            params = [p for part in self._due[1] for p in part.params] if self._due else ()
        self._before = {p: local(p.detach()).clone() for p in params}

    @torch.no_grad()
    def end(self) -> None:
        """The step is done."""
        before, due = self._before, self._due
        self._before, self._due, self._last = {}, None, None
        if due is None:
            return
        layers, parts, promises, measure = due
        changes = [[before[p] for p in part.params] for part in parts]
        for change, part in zip(changes, parts):
            torch._foreach_sub_(change, [local(p.detach()) for p in part.params])
        square, inner, squares = measure(changes)
        cosines = cosine(-inner, square[:, None], squares)
        each = cosines.split(1) if promises[1:] else [cosines]
        held = torch.cat([promise.held(some) for promise, some in zip(promises, each)])
        count, kept = self._tally.get(tuple(layers), (0, torch.zeros_like(square)))
        self._tally[tuple(layers)] = count + 1, kept + held
        self._last = cosines, layers

    def found(self) -> dict[str, Any]:
        """The fields of the last step's metrics; {} of a step without surgery."""
        if self._last is None:
            return {}
        cosines, layers = self._last
        shares = []
        for layer in layers:
            seen = [
                (count, held[names.index(layer)])
                for names, (count, held) in self._tally.items()
                if layer in names
            ]
            shares.append(torch.stack([held for _, held in seen]).sum() / sum(count for count, _ in seen))
        return {"update_cosine": cosines, "promise_held": torch.stack(shares)}
