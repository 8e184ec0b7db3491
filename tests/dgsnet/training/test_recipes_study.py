"""benchmarks/recipes.py: recipes differ in what they say, and what is measured is what it is called."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dgsnet import builtin
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks import plots, recipes
from benchmarks.__main__ import write
from benchmarks.recipes import BASE, ONE, TWINS, UNRELATED, Recipe


@pytest.fixture
def small(monkeypatch):
    """One seed, two recipes, one step, a few images."""
    monkeypatch.setattr(builtin, "COUNTS", {"train": 4})
    for name, value in {"COUNT": 2, "PICTURES": 5, "SEEDS": (0,)}.items():
        monkeypatch.setattr(recipes, name, value)
    monkeypatch.setattr(recipes, "RECIPES", [BASE, Recipe(TWINS, True, True)])
    config = builtin.demo_config

    def short(root, steps=1):
        made = config(root)
        return replace(made, optim=replace(made.optim, head_epochs=1, max_steps=1))

    monkeypatch.setattr(builtin, "demo_config", short)
    recipes.exam.cache_clear()
    yield
    recipes.exam.cache_clear()


def test_recipes_differ_in_what_they_say():
    root = Path("data")
    plain = recipes.configuration(BASE, root, 3).flat()
    assert (plain["surgery.mode"], plain["data.captions"], plain["seed"]) == ("none", "none", 3)
    changes = {}
    for recipe in recipes.RECIPES:
        found = recipes.configuration(recipe, root, 3).flat()
        changes[recipe] = {name for name, value in found.items() if value != plain[name]}
    assert len(changes) == 12 and changes[BASE] == set()
    pull, augment, pairs = {"surgery.mode", "surgery.distillation"}, {"augment.preset"}, {"data.pairs"}
    for recipe, names in changes.items():
        wanted = pull if recipe.pull else set()
        wanted = wanted | (augment if recipe.degraded else set())
        assert names == wanted | (pairs if recipe.data != UNRELATED else set())


def test_training_sets_have_the_same_real_images(small, tmp_path):
    roots = {data: recipes.training_set(tmp_path, data, 0) for data in recipes.DATA}
    reals = {
        data: [path.read_bytes() for path in sorted(root.glob("train/*/0_real/*"))]
        for data, root in roots.items()
    }
    generated = {
        data: [path.read_bytes() for path in sorted(root.glob("train/*/1_fake/*"))]
        for data, root in roots.items()
    }
    assert reals[UNRELATED] == reals[TWINS] == reals[ONE] and len(reals[ONE]) == 12
    assert generated[UNRELATED] != generated[TWINS] != generated[ONE]
    # The folder of that decoder alone is the same.
    place = sorted(recipes.KNOWN).index(recipes.ONE_DECODER)
    same = [a == b for a, b in zip(generated[TWINS], generated[ONE])]
    assert same == [4 * place <= i < 4 * place + 4 for i in range(12)]


def test_an_image_is_ranked_by_the_mean_of_its_crops():
    rng = np.random.default_rng(0)
    owner, decoder = np.repeat(np.arange(8), 3), np.array([""] * 4 + ["a", "a", "b", "b"])
    logits = torch.from_numpy(rng.normal(size=24))
    found = recipes.Images(torch.zeros(24, 3, 2, 2), owner, decoder).auc(lambda part: logits[: len(part)])
    means = logits.numpy().reshape(8, 3).mean(1)
    for name, of in (("a", [0, 1, 2, 3, 4, 5]), ("b", [0, 1, 2, 3, 6, 7])):
        assert found[name] == pytest.approx(roc_auc_score(decoder[of] == name, means[of]))


def test_a_study_of_two_recipes(small, tmp_path, capsys):
    """Trained for real, in this process; what the file holds is not measured again; and drawn."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 320, 3), np.uint8)
    Image.fromarray(pixels).save(photographs / "a.jpg")
    rows = recipes.measured(tmp_path, str(photographs), 0, recipes.RECIPES)
    assert [Recipe(row["data"], row["degraded"], row["pull"]) for row in rows] == recipes.RECIPES
    for row in rows:
        assert list(row["auc"]) == [*recipes.VARIANTS, "whole pictures"]
        assert set(row["auc"]["clean"]) == {*recipes.KNOWN, *recipes.UNSEEN}
        assert set(row["auc"]["whole pictures"]) == set(recipes.UNSEEN)
    exam = recipes.exam(str(photographs))
    assert len(exam["clean"].crops) == 8 * 2 * 2 * 5 and len(exam["whole pictures"].crops) == 10 * 64
    out = tmp_path / "out.json"
    rows = [{"benchmark": recipes.NAME, "device": "cpu", **row} for row in rows]
    write(Namespace(out=out), {}, rows)
    assert list(recipes.results(Namespace(out=out, photographs=None))) == rows
    assert "| twins + degradations + pull | " in capsys.readouterr().out
    plots.plot_recipes(rows, "title", tmp_path / "recipes.png")
    assert Image.open(tmp_path / "recipes.png").width > 500


def test_gains_are_paired_and_bold_where_sure():
    rows = [
        {"seed": seed, **recipe._asdict(), "auc": {"clean": dict.fromkeys(recipes.UNSEEN, value)}}
        for recipe, values in ((BASE, (0.5, 0.6, 0.7)), (Recipe(TWINS, False, False), (0.61, 0.72, 0.8)))
        for seed, value in enumerate(values)
    ]
    column = ("clean", recipes.UNSEEN)
    twins = Recipe(TWINS, False, False)
    assert recipes.gain(rows[::-1], twins, BASE, column) == "**+11.0 ± 0.6 (3/3)**"
    rows[-1]["auc"]["clean"] = dict.fromkeys(recipes.UNSEEN, 0.3)
    assert recipes.gain(rows, twins, BASE, column) == "\N{MINUS SIGN}5.7 ± 17.2 (2/3)"
