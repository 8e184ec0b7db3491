"""How images of each category fare at a threshold: what holds for all may be far off for screenshots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dgsnet.config import check_types

# Of all intervals of rates and measures.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class CategoryRate:
    """The images of one category and class.

    Attributes:
        name: of the category, as a list's column `category` has it.
        label: 0 real, 1 generated.
        n: images.
        called: those called generated.
        low, high: Clopper and Pearson's interval of their share.
    """

    name: str
    label: int
    n: int
    called: int
    low: float
    high: float

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def rate(self) -> float:
        return self.called / self.n


def rate_interval(found: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Clopper and Pearson's two-sided interval of a rate that was observed as found / n."""
    from scipy.stats import binomtest

    interval = binomtest(found, n).proportion_ci(confidence, "exact")
    return float(interval.low), float(interval.high)


def category_rates(
    categories: Sequence[str], labels: Sequence[int], called: Sequence[bool]
) -> tuple[CategoryRate, ...]:
    """Of every category that is named, its real and its generated images, by name.

    Args:
        categories, labels, called: of N images, "" where none is known; 0 real, 1 generated; whether it is
            called generated.

    >>> [(r.name, r.label, r.n, r.rate) for r in category_rates(["night", "", "night"], [0, 0, 0], [1, 1, 0])]
    [('night', 0, 2, 0.5)]
    """
    counts: dict[tuple[str, int], list[int]] = {}
    for name, label, wrong in zip(categories, labels, called, strict=True):
        if name:
            count = counts.setdefault((name, label), [0, 0])
            count[0] += 1
            count[1] += bool(wrong)
    return tuple(
        CategoryRate(name, label, n, found, *rate_interval(found, n))
        for (name, label), (n, found) in sorted(counts.items())
    )
