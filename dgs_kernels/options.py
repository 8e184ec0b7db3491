"""The options of gradient surgery: one value, checked once, which knows what kernels are told."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgs_kernels.arguments import NUMBER, check_choice, check_number, type_name
from dgs_kernels.reference import ORDERS, RULES


@dataclass(frozen=True)
class Surgery:
    """How gradients are operated on; the arguments of these names of every operation and hook.

    An `alignment` that is a tensor stays outside: kernels read it on the device, as a factor (`split`).
    """

    alignment: float = 1.0
    eps: float = 1e-6
    order: str = "align_first"
    rule: str = "positive"

    @functools.cached_property
    def codes(self) -> tuple[float, float, int, int]:
        """As kernels are told them, order and rule by their places in `reference.ORDERS` and `RULES`."""
        return self.alignment, self.eps, ORDERS.index(self.order), RULES.index(self.rule)

    @staticmethod
    def of(caller: str, alignment: Any, eps: Any, order: Any, rule: Any) -> Surgery:
        """Checked options; those of calls before are remembered, as looking at them takes a small call long.

        Raises:
            ValueError, TypeError: in the name of `caller`, if these are not what `project_align` documents.
        """
        try:
            return _checked(caller, alignment, eps, order, rule)
        except TypeError:  # of what cannot be looked up either
            check_options(caller, None, alignment, eps, order, rule)
            raise


@functools.lru_cache(maxsize=256, typed=True)
def _checked(caller: str, alignment: Any, eps: Any, order: Any, rule: Any) -> Surgery:
    check_options(caller, None, alignment, eps, order, rule)
    return Surgery(float(alignment), float(eps), order, rule)


def split(alignment: float | Tensor) -> tuple[Tensor | None, float]:
    """A factor that is read on the device, and one that is known: their product is `alignment`."""
    return (alignment, 1.0) if isinstance(alignment, Tensor) else (None, alignment)


def check_options(
    caller: str,
    device: torch.device | None,
    alignment: Any,
    eps: Any,
    order: object,
    rule: object,
) -> None:
    """Raise unless these are what `project_align` documents; of a tensor `alignment` no value is read."""
    check_choice(caller, "order", order, ORDERS)
    check_choice(caller, "rule", rule, RULES)
    check_eps(caller, eps)
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
        raise TypeError(f"{caller}: alignment must be a number or a 0-dim tensor, got {type_name(alignment)}")
    elif not -math.inf < alignment < math.inf:
        raise ValueError(f"{caller}: alignment must be finite, got {alignment}")


def check_eps(caller: str, eps: Any) -> None:
    check_number(caller, "eps", eps)
    if not eps > 0:
        raise ValueError(f"{caller}: eps must be > 0, got {eps}")
    if eps == math.inf:
        raise ValueError(f"{caller}: eps must be finite, got {eps}")
