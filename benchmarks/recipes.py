"""recipes: training images and what is done to them, measured on decoders and photographs that are new.

The built-in tiny CLIP learns the built-in images (docs/builtin.md), all PNG files: unrelated crops, twins by
the three training decoders, or twins by one of them; without degradations and with those of CNNDetection
(`augment.preset: wang`); without a pull to the frozen features and with one. All else is the demo's, but for
twice its steps. The detectors rank test images of 80 pixels by the mean logit of five crops, as they are and
after what pictures go through; and, with `--photographs DIR`, whole pictures of 256 pixels cut from one's own
photographs. With one seed all recipes start from the same weights and, but for the twins, see the same crops.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import torch
from dgsnet import builtin
from dgsnet.builtin.photographs import Photograph
from dgsnet.config import Config
from dgsnet.data.distortions import Distortion
from dgsnet.data.images import read_image
from dgsnet.data.preprocess import Preprocessor
from dgsnet.model.checkpoint import load_model
from dgsnet.processes import usable_cores
from dgsnet.training.train import train
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score
from torch import Tensor

NAME = "recipes"
SEEDS = range(6)
UNRELATED, TWINS, ONE = DATA = ("unrelated", "twins", "twins of one decoder")
ONE_DECODER = "transposed"
DEGRADED = "wang"
PULL = 0.3
# What test images go through, in the words of `dgsnet evaluate --robustness`.
CLEAN = "clean"
VARIANTS: dict[str, tuple[tuple[str, float], ...]] = {
    CLEAN: (),
    "JPEG 70": (("jpeg", 70),),
    "JPEG 50": (("jpeg", 50),),
    "resized 0.5": (("resize", 0.5),),
    "resized 2": (("resize", 2),),
}
# Images of each decoder, and as many real ones for each.
COUNT = 25
# Real whole pictures, and as many generated ones by all unseen decoders.
PICTURES, PICTURE_SIZE = 60, 256
# No run has this seed.
TEST_SEED = 10**6
BATCH = 256
KNOWN, UNSEEN = builtin.FAMILIES["train"], builtin.FAMILIES["test"]


class Recipe(NamedTuple):
    """What differs between runs.

    Attributes:
        data: of DATA.
    """

    data: str
    degraded: bool
    pull: bool

    def __str__(self) -> str:
        extras = [word for word, given in (("degradations", self.degraded), ("pull", self.pull)) if given]
        return " + ".join([self.data, *extras])


RECIPES = [Recipe(*chosen) for chosen in itertools.product(DATA, (False, True), (False, True))]
BASE = Recipe(UNRELATED, False, False)


@dataclass(frozen=True)
class Given(Photograph):
    """A photograph of the user's."""

    def pixels(self) -> np.ndarray:
        return _read(self.file)


@cache
def _read(file: str) -> np.ndarray:
    return read_image(file)


@dataclass
class Images:
    """Crops of images that are decided on by their mean logit.

    Attributes:
        crops: uint8 [M, 3, S, S].
        image: [M], whose crop it is.
        decoder: [N], "" of real images.
    """

    crops: Tensor
    image: np.ndarray
    decoder: np.ndarray

    def auc(self, logits: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Of each decoder against all real images."""
        found = torch.cat([logits(part) for part in self.crops.split(BATCH)]).double().numpy()
        means = np.bincount(self.image, found) / np.bincount(self.image)
        aucs = {}
        for name in dict.fromkeys(self.decoder[self.decoder != ""]):
            chosen = np.isin(self.decoder, ("", name))
            aucs[str(name)] = float(roc_auc_score(self.decoder[chosen] == name, means[chosen]))
        return aucs


def images(files: Sequence[tuple[str, bytes]], crops: Any, steps: tuple = ()) -> Images:
    """Of (decoder, file), after a chain of operations."""
    preprocess = Preprocessor(replace(builtin.demo_config("").preprocess, crops=crops))
    distortion = Distortion(steps)
    cut = [preprocess.crops(distortion(read_image(data)), normalised=False) for _, data in files]
    owners = np.repeat(np.arange(len(cut)), [len(part) for part in cut])
    return Images(torch.cat(cut), owners, np.array([decoder for decoder, _ in files]))


@cache
def exam(folder: str | None) -> dict[str, Images]:
    """What detectors are measured on: variants of test images, and pictures of a folder's photographs."""
    files = []
    for family in (*KNOWN, *UNSEEN):
        for label, decoder in enumerate(("", family)):
            made = builtin.make_files("test", family, label, COUNT, seed=TEST_SEED, compressed=0)
            files += [(decoder, data) for data, _ in made]
    found = {name: images(files, 5, steps) for name, steps in VARIANTS.items()}
    if folder:
        paths = sorted(
            str(path) for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".png")
        )
        photographs = [Given(path, "") for path in paths]
        files = []
        for decoder in ("", *UNSEEN):
            count = PICTURES // len(UNSEEN) if decoder else PICTURES
            rng = np.random.default_rng([TEST_SEED, *decoder.encode()])
            made = builtin.render(
                photographs, count, rng, size=PICTURE_SIZE, decoder=decoder or None, compressed=0
            )
            files += [(decoder, data) for data, _ in made]
        found["whole pictures"] = images(files, "tiles")
    return found


def configuration(recipe: Recipe, root: Path, seed: int) -> Config:
    """The demo's, but for what the recipe says."""
    config = builtin.demo_config(root, steps=150)
    pull: Any = {"mode": "feature", "distillation": PULL} if recipe.pull else {"mode": "none"}
    return replace(
        config,
        seed=seed,
        data=replace(config.data, captions="none", pairs=recipe.data != UNRELATED),
        augment=replace(config.augment, preset=DEGRADED if recipe.degraded else "none"),
        surgery=replace(config.surgery, alignment=0.0, **pull),
    )


def training_set(folder: Path, data: str, seed: int) -> Path:
    """Where the images of a recipe and seed are, written if they are not there."""
    root = folder / f"{data.replace(' ', '-')}-{seed}"
    if not root.exists():
        twins = {UNRELATED: False, TWINS: True, ONE: ONE_DECODER}[data]
        builtin.write_dataset(root, seed=seed, splits=("train",), compressed=(0, 0), twins=twins)
    return root


def measured(folder: Path, photographs: str | None, seed: int, recipes: Sequence[Recipe]) -> list[dict]:
    """A row for each recipe, trained with one seed."""
    torch.set_num_threads(1)
    rows = []
    for recipe in recipes:
        config = configuration(recipe, training_set(folder, recipe.data, seed), seed)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            run = train(config, folder / f"run-{recipe}-{seed}")
        model = load_model(run)[0].eval()
        preprocess = Preprocessor(config.preprocess)

        @torch.inference_mode()
        def logits(crops: Tensor, model: Any = model, preprocess: Preprocessor = preprocess) -> Tensor:
            return model.logits(preprocess.normalise(crops))

        aucs = {name: part.auc(logits) for name, part in exam(photographs).items()}
        rows.append({"seed": seed, **recipe._asdict(), "auc": aucs})
    return rows


def results(arguments: argparse.Namespace) -> Iterator[dict]:
    """The rows as they are made; then the table. What is in the result file is not measured again."""
    kept = json.loads(arguments.out.read_text())["results"] if arguments.out.is_file() else []
    kept = [row for row in kept if row.get("benchmark") == NAME]
    yield from kept
    done = {(row["seed"], *(row[name] for name in Recipe._fields)) for row in kept}
    found = list(kept)
    with tempfile.TemporaryDirectory() as folder:
        # One after the other of a seed and its data, so that no set is written twice at a time.
        jobs = [
            joblib.delayed(measured)(Path(folder), arguments.photographs, seed, left)
            for seed, data in itertools.product(SEEDS, DATA)
            if (left := [r for r in RECIPES if r.data == data and (seed, *r) not in done])
        ]
        parallel = joblib.Parallel(n_jobs=usable_cores(), return_as="generator_unordered")
        for rows in parallel(jobs):
            for row in rows:
                found.append({"benchmark": NAME, "device": "cpu", **row})
                yield found[-1]
                name = Recipe(*(row[key] for key in Recipe._fields))
                means = (f"{title} {values([row], name, *of)[0]:.1f}" for title, of in columns([row]).items())
                print(f"seed {row['seed']}, {name}: {', '.join(means)}", flush=True)
    print(f"\n{table(found)}")


def values(rows: list[dict], recipe: Recipe, variant: str, decoders: Sequence[str]) -> np.ndarray:
    """Mean AUC over decoders in percent, by seed."""
    members = sorted(
        (row for row in rows if tuple(row[name] for name in Recipe._fields) == recipe),
        key=lambda row: row["seed"],
    )
    return np.array([100 * np.mean([row["auc"][variant][name] for name in decoders]) for row in members])


def columns(rows: list[dict]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Title to variant and decoders."""
    variants = list(rows[0]["auc"])
    return {"clean, known decoders": (CLEAN, KNOWN)} | {name: (name, UNSEEN) for name in variants}


def gain(rows: list[dict], recipe: Recipe, base: Recipe, column: tuple[str, tuple[str, ...]]) -> str:
    """Paired difference: mean ± standard error (seeds in which it is higher), in bold if its 95% interval,
    by Student's t, leaves out 0."""
    difference = values(rows, recipe, *column) - values(rows, base, *column)
    n = len(difference)
    error = difference.std(ddof=1) / n**0.5 if n > 1 else np.nan
    text = f"{difference.mean():+.1f} ± {error:.1f} ({(difference > 0).sum()}/{n})"
    text = text.replace("-", "\N{MINUS SIGN}")
    sure = n > 1 and abs(difference.mean()) > student.ppf(0.975, n - 1) * error
    return f"**{text}**" if sure else text


def table(rows: list[dict]) -> str:
    """Markdown: AUC of the base in percent, then what each recipe has more."""
    named = columns(rows)
    lines = [["training", *named], ["---"] * (1 + len(named))]
    lines.append([str(BASE), *(f"{values(rows, BASE, *column).mean():.1f}" for column in named.values())])
    for recipe in RECIPES:
        if recipe != BASE:
            lines.append([str(recipe), *(gain(rows, recipe, BASE, column) for column in named.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
