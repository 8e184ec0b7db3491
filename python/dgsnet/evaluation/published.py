"""Published results to put beside one's own: what others measured, on their machines, with their data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

AUTHORS_LOG = "log_test.log of the authors' code (github.com/HorizonTEL/DGS-Net, commit 1aed871)"
OFFICIAL = "DGS-Net"


@dataclass(frozen=True)
class Published:
    """A suite's published results in percent, at the threshold 0.5, as published.yaml has them.

    Attributes:
        note: what to know before comparing.
        methods: accuracy and AP, means over the suite's generators.
        generators: DGS-Net's accuracy, AP, accuracy on real and on generated images.
        others: further names it goes by.
    """

    name: str
    note: str
    methods: dict[str, list[float]]
    generators: dict[str, list[float]]
    others: Sequence[str] = ()

    def generator(self, name: str) -> list[float] | None:
        """Figures of a generator by its name, whatever its case and punctuation; None: not among them."""
        return {_plain(known): figures for known, figures in self.generators.items()}.get(_plain(name))


SUITES = tuple(
    Published(**suite) for suite in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
)


def find(suite: str) -> Published | None:
    """The published results of a suite by its name, whatever its case and punctuation; None: there are none.

    >>> find("aigi-bench").methods["DGS-Net"]
    [82.3, 87.8]
    """
    names = {_plain(name): entry for entry in SUITES for name in (entry.name, *entry.others)}
    return names.get(_plain(suite))


@dataclass(frozen=True)
class Comparison:
    """One's own figures of a suite beside the published ones, all in percent.

    Attributes:
        missing: published generators that one's own suite lacks.
        own: accuracy and AP, means over `generators`.
        official: the authors', over the same generators.
    """

    published: Published
    # Generator, own accuracy, own AP, published accuracy, published AP, of those in both.
    generators: list[tuple[str, float, float, float, float]]
    missing: list[str]
    own: tuple[float, float]
    official: tuple[float, float]


def compare(suite: str, measured: Mapping[str, Mapping[str, float]]) -> Comparison | None:
    """Results, generator to `accuracy` and `ap` as fractions, beside those published under the suite's name.

    None where there are none, or for none of these generators.
    """
    published = find(suite)
    if published is None:
        return None
    rows = [
        (name, 100 * values["accuracy"], 100 * values["ap"], figures[0], figures[1])
        for name, values in measured.items()
        if (figures := published.generator(name))
    ]
    if not rows:
        return None
    have = {_plain(row[0]) for row in rows}
    accuracy, ap, official_accuracy, official_ap = (
        math.fsum(column) / len(rows) for column in list(zip(*rows))[1:]
    )
    return Comparison(
        published,
        sorted(rows, key=lambda row: row[0].lower()),
        [name for name in published.generators if _plain(name) not in have],
        (accuracy, ap),
        (official_accuracy, official_ap),
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
