"""Published results to put beside one's own: what others measured, on their machines, with their data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

AUTHORS_LOG = "log_test.log of the authors' code (github.com/HorizonTEL/DGS-Net, commit 1aed871)"
OFFICIAL = "DGS-Net"


@dataclass(frozen=True)
class Published:
    """A suite's published results in percent, at the threshold 0.5.

    Attributes:
        name: the suite.
        others: further names it goes by.
        note: what to know before comparing.
        methods: method to (accuracy, AP), means over the suite's generators.
        generators: generator to DGS-Net's (accuracy, AP, accuracy on real, accuracy on generated).
    """

    name: str
    others: tuple[str, ...] = ()
    note: str = ""
    methods: dict[str, tuple[float, float]] = field(default_factory=dict)
    generators: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)

    def generator(self, name: str) -> tuple[float, float, float, float] | None:
        """Figures of a generator by its name, whatever its case and punctuation; None: not among them."""
        return {_plain(known): figures for known, figures in self.generators.items()}.get(_plain(name))


SUITES = (
    Published(
        "UniversalFakeDetect",
        note="the 8 diffusion sets",
        methods={OFFICIAL: (99.0, 100.0)},
        generators={
            "dalle": (99.6, 100.0, 99.1, 100.0),
            "glide_100_10": (99.0, 100.0, 99.0, 99.0),
            "glide_100_27": (98.5, 99.9, 98.7, 98.2),
            "glide_50_27": (98.7, 99.9, 98.8, 98.6),
            "guided": (98.0, 99.9, 99.5, 96.5),
            "ldm_100": (99.5, 100.0, 99.0, 100.0),
            "ldm_200": (99.4, 100.0, 98.8, 100.0),
            "ldm_200_cfg": (99.5, 100.0, 99.0, 100.0),
        },
    ),
    Published(
        "GenImage",
        ("AIGCDetectBench", "AIGCDetectBenchmark", "AIGCDetectionBenchmark"),
        note="16 sets under that name, GANs among them: AIGCDetectBench's, not GenImage's own 8",
        methods={OFFICIAL: (96.4, 99.9)},
        generators={
            "ADM": (97.5, 99.8, 99.6, 95.3),
            "biggan": (84.6, 99.9, 69.2, 100.0),
            "cyclegan": (98.9, 100.0, 97.7, 100.0),
            "DALLE2": (99.8, 100.0, 99.7, 99.9),
            "gaugan": (79.4, 98.8, 58.8, 100.0),
            "Glide": (99.2, 100.0, 99.5, 99.0),
            "Midjourney": (93.5, 99.6, 99.5, 87.5),
            "progan": (99.7, 100.0, 99.5, 100.0),
            "stable_diffusion_v_1_4": (99.8, 100.0, 99.6, 100.0),
            "stable_diffusion_v_1_5": (99.6, 100.0, 99.3, 99.9),
            "stargan": (99.7, 100.0, 99.4, 100.0),
            "stylegan": (99.6, 100.0, 99.8, 99.4),
            "stylegan2": (99.8, 100.0, 99.8, 99.8),
            "VQDM": (99.5, 100.0, 99.4, 99.7),
            "whichfaceisreal": (92.3, 99.8, 100.0, 84.6),
            "wukong": (99.8, 100.0, 99.6, 100.0),
        },
    ),
    Published(
        "AIGIBench",
        note="25 sets; the peers were retrained on the same data",
        methods={
            OFFICIAL: (82.3, 87.8),
            "FerretNet": (79.4, 85.8),
            "SAFE": (78.1, 83.6),
            "AIDE": (77.6, 82.7),
            "Effort": (77.1, 87.2),
            "UnivFD": (72.5, 75.6),
            "C2P-CLIP": (71.8, 82.2),
            "NPR": (67.9, 73.9),
            "CNNDet": (54.9, 67.0),
        },
        generators={
            "BLIP": (98.5, 100.0, 97.0, 100.0),
            "BlendFace": (68.1, 65.4, 66.2, 70.0),
            "CommunityAI": (54.6, 52.0, 99.9, 9.2),
            "DALLE-3": (41.5, 40.8, 79.8, 3.1),
            "E4S": (56.9, 56.7, 69.7, 44.0),
            "FLUX1-dev": (88.9, 96.6, 79.4, 98.5),
            "FaceSwap": (76.4, 79.6, 85.9, 66.6),
            "GLIDE": (92.5, 97.4, 86.3, 98.8),
            "IP-Adapter": (90.2, 99.1, 80.6, 99.9),
            "Imagen3": (89.9, 94.3, 80.1, 99.6),
            "InSwap": (78.7, 82.8, 86.5, 70.7),
            "Infinite-ID": (90.7, 97.8, 81.6, 99.8),
            "InstantID": (89.5, 97.3, 80.2, 98.9),
            "Midjourney": (73.0, 93.0, 48.4, 97.6),
            "PhotoMaker": (87.9, 94.1, 79.3, 96.4),
            "ProGAN": (99.7, 100.0, 99.5, 100.0),
            "R3GAN": (90.5, 97.0, 81.0, 99.9),
            "SD3": (91.8, 99.0, 83.7, 99.8),
            "SDXL": (92.0, 99.1, 84.0, 100.0),
            "SimSwap": (83.8, 86.1, 85.7, 81.9),
            "SocialRF": (59.3, 71.2, 99.4, 19.2),
            "StyleGAN-XL": (89.6, 97.8, 79.6, 99.5),
            "StyleGAN3": (90.7, 98.3, 81.8, 99.7),
            "StyleSwim": (89.8, 99.6, 79.7, 99.8),
            "WFIR": (92.3, 99.8, 100.0, 84.6),
        },
    ),
)


def find(suite: str) -> Published | None:
    """The published results of a suite by its name, whatever its case and punctuation; None: there are none.

    >>> find("aigi-bench").methods["DGS-Net"]
    (82.3, 87.8)
    """
    names = {_plain(name): entry for entry in SUITES for name in (entry.name, *entry.others)}
    return names.get(_plain(suite))


@dataclass(frozen=True)
class Comparison:
    """One's own figures of a suite beside the published ones, all in percent.

    Attributes:
        published: the suite's published results.
        generators: (generator, own accuracy, own AP, published accuracy, published AP) of those in both.
        missing: published generators that one's own suite lacks.
        own: own (accuracy, AP), means over `generators`.
        official: the authors' (accuracy, AP) over the same generators.
    """

    published: Published
    generators: list[tuple[str, float, float, float, float]]
    missing: list[str]
    own: tuple[float, float]
    official: tuple[float, float]


def compare(suite: str, measured: Mapping[str, Mapping[str, float]]) -> Comparison | None:
    """Put results beside the published ones.

    Args:
        suite: the suite's name.
        measured: generator to its `accuracy` and `ap`, as fractions.

    Returns:
        None where nothing is published under this name, or for none of these generators.
    """
    published = find(suite)
    if published is None:
        return None
    rows = [
        (name, 100 * values["accuracy"], 100 * values["ap"], *figures[:2])
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
