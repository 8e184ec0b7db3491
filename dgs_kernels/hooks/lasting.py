"""Captured gradients that serve more than one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dgs_kernels.arguments import WHOLE
from dgs_kernels.hooks.metrics import cosine
from dgs_kernels.hooks.places import Gradient, Part, inner_products, local


@dataclass
class Lasting:
    """Which gradients go on serving, for how many steps, and how far they were from what replaced them."""

    cosines: dict[str, Tensor] = field(default_factory=dict)
    # For how many steps a direction serves, of those captured for the next.
    asked: dict[str, int] = field(default_factory=dict)
    _kept: dict[str, tuple[Gradient, int]] = field(default_factory=dict)
    _order: dict[str, int] = field(default_factory=dict)

    def ask(self, name: str, steps: int) -> None:
        """What was captured under `name` for the coming step shall serve so many."""
        self.asked[name] = steps
        self._order.setdefault(name, len(self._order))

    def forget(self) -> None:
        """The coming step will not have what was captured for it; what is kept stays."""
        self.asked.clear()

    @property
    def serving(self) -> list[str]:
        """Names of what is kept for the coming step."""
        return [name for name, (_, left) in self._kept.items() if left]

    @property
    def any(self) -> bool:
        """Whether anything serves, or shall serve, more than one step."""
        return bool(self.serving) or any(steps > 1 for steps in self.asked.values())

    def lasts(self, name: str) -> bool:
        """Whether a gradient of the present step is still needed after it, as it is."""
        return name in self._kept or self.asked.get(name, 1) > 1

    def joined(self, fresh: dict[str, Gradient]) -> dict[str, Gradient]:
        """What was captured for a step, and what is kept for it, in the order that names first came in."""
        if not self._kept:
            return fresh
        of = {name: self._kept[name][0] for name in self.serving} | fresh
        return {name: of[name] for name in sorted(of, key=lambda name: self._order[name])}

    def keep(
        self,
        fresh: dict[str, Gradient],
        parts: list[Part],
        layers: int,
        places: dict[str, int],
        averaged: bool,
    ) -> None:
        """The step has its gradients: count it, and keep those that shall serve more.

        `places` are the lists of parts in which gradients are; `averaged`: over ranks there, in place.
        """
        for name, (gradient, left) in self._kept.items():
            if name not in fresh:
                self._kept[name] = gradient, max(left - 1, 0)
        for name, gradient in fresh.items():
            if name in self._kept and name in places:
                self.cosines[name] = _cosines(parts, layers, places[name], self._kept.pop(name)[0])
            if (steps := self.asked.get(name, 1)) > 1:
                # This holds also where this rank had none.
                if averaged and name in places:
                    gradient = gradient | {
                        p: t for part in parts for p, t in zip(part.params, part.lists[places[name]])
                    }
                self._kept[name] = gradient, steps - 1
        self.asked.clear()


def _cosines(parts: list[Part], layers: int, place: int, old: Gradient) -> Tensor:
    pairs = []
    for part in parts:
        before = [local(old.get(p)) for p in part.params]
        zeros = [torch.zeros_like(t) if b is None else b for b, t in zip(before, part.lists[place])]
        pairs.append(part.with_lists([part.lists[place], zeros]))
    products = inner_products(pairs, layers)
    return cosine(products[:, 0, 1], products[:, 0, 0], products[:, 1, 1])


def check_steps(caller: str, steps: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, WHOLE):
        raise TypeError(f"{caller}: steps must be an integer, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"{caller}: steps must be 1 or more, got {steps}")
