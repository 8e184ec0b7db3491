"""The options of gradient surgery: one value, which every operation and hook hands on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgs_kernels.arguments import NUMBER, check_choice, check_number, type_name
from dgs_kernels.reference import ORDERS, RULES


class Surgery(NamedTuple):
    """How gradients are operated on, as the operators take it: one argument after the other.

    The weight of the alignment is `alignment`, or where it is a tensor, `scale`: kernels read that on the
    device, as a factor.
    """

    scale: Tensor | None
    alignment: float
    eps: float
    order: str
    rule: str

    @staticmethod
    def of(alignment: float | Tensor, eps: float, order: str, rule: str) -> Surgery:
        """The arguments of these names of every operation and hook."""
        if isinstance(alignment, Tensor):
            return Surgery(alignment, 1.0, eps, order, rule)
        return Surgery(None, alignment, eps, order, rule)

    @staticmethod
    def among(arguments: Any) -> Surgery:
        """Of an operator's arguments by name."""
        a = arguments
        return Surgery(a.scale, a.alignment, a.eps, a.order, a.rule)

    @property
    def weight(self) -> Any:
        """Of the alignment."""
        return self.alignment if self.scale is None else self.scale

    def check(self, caller: str, device: torch.device | None = None) -> None:
        """Raise unless this is what `project_align` documents; of a tensor `alignment` no value is read."""
        check_choice(caller, "order", self.order, ORDERS)
        check_choice(caller, "rule", self.rule, RULES)
        check_eps(caller, self.eps)
        alignment: Any = self.weight
        if isinstance(alignment, Tensor):
            if alignment.dim() or device not in (None, alignment.device):
                where = "" if device is None else f" on {device}"
                raise ValueError(
                    f"{caller}: alignment must be a number or a 0-dim tensor{where}, "
                    f"got shape {tuple(alignment.shape)} on {alignment.device}"
                )
            if alignment.is_complex():
                raise TypeError(f"{caller}: alignment must be real, got {alignment.dtype}")
        elif not isinstance(alignment, NUMBER):
            got = type_name(alignment)
            raise TypeError(f"{caller}: alignment must be a number or a 0-dim tensor, got {got}")
        elif not -math.inf < alignment < math.inf:
            raise ValueError(f"{caller}: alignment must be finite, got {alignment}")


def check_eps(caller: str, eps: Any) -> None:
    check_number(caller, "eps", eps)
    if not eps > 0:
        raise ValueError(f"{caller}: eps must be > 0, got {eps}")
    if eps == math.inf:
        raise ValueError(f"{caller}: eps must be finite, got {eps}")
