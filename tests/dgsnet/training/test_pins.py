"""`dgsnet update --pinned`: images whose decision may not change for the worse, at every checkpoint."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from dgsnet import cli
from dgsnet.data.items import find_samples
from dgsnet.detection.decisions import calibrate, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.model.checkpoint import load_model
from dgsnet.training.pins import Pins, PinsLost
from dgsnet.training.update import update

from tests.support.runs import equal, fails, weights


@pytest.fixture(scope="module")
def pinned(generators, tmp_path_factory):
    """All test images of the old generators, as a list."""
    path = tmp_path_factory.mktemp("pins") / "pins.csv"
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        rows.writerows((item.path, item.label) for item in find_samples(generators / "test"))
    return str(path)


def right(run, items):
    calls = Detector.load(run, "cpu").decide(Detector.load(run, "cpu").predict(items, workers=0))
    return np.array([call == ("real", "generated")[item.label] for call, item in zip(calls, items)])


@pytest.fixture(scope="module")
def forgetful(detector, generators, pinned, tmp_path_factory):
    """An update that forgets, in three checkpoints and one more at its end."""
    out, new = tmp_path_factory.mktemp("runs") / "forgetful", [str(generators / "new")]
    with pytest.raises(PinsLost) as error:
        old = [str(generators / "old")]
        update(detector, new, old, out, rule="none", steps=4, lr=2e-2, test=[], pinned=pinned)
    return out, str(error.value)


def test_an_update_that_loses_pins_says_which(forgetful, detector, generators, pinned):
    out, said = forgetful
    items = find_samples(generators / "test")
    lost = [
        i.path for i, was, now in zip(items, right(detector, items), right(out, items)) if was and not now
    ]
    found = json.loads((out / "pins.json").read_text())
    assert 3 < len(lost) < len(items) and found["lost"] == lost and found["images"] == len(items)
    assert found["not_right_before"] == [
        item.path for item, is_right in zip(items, right(detector, items)) if not is_right
    ]
    assert (
        all(path in said for path in lost[:3]) and f"{len(lost) - 3} more" in said and "--allow-lost" in said
    )
    assert [each["step"] for each in found["checkpoints"]] == [1, 2, 3, 4]
    assert found["checkpoints"][-1]["lost"] == lost != found["checkpoints"][0]["lost"]


def test_the_exit_code_is_3_unless_losses_are_allowed(forgetful, detector, generators, pinned, capsys):
    """A resumed update that is done is tested again; its weights are those of one without pins."""
    out, _ = forgetful
    words = ["update", "--model", detector, "--data", generators / "new", "--replay", generators / "old"]
    words += ["--rule", "none", "--steps", "4", "--lr", "2e-2", "--test", generators / "test"]
    words = [*map(str, words), "--out", str(out), "--pinned", pinned, "--resume"]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    printed = capsys.readouterr()
    assert stop.value.code == 3 and printed.err.count("\n") == 1 and "pinned images" in printed.err
    assert (out / "changes.json").is_file()
    cli.main([*words, "--allow-lost"])
    assert "pinned images" in capsys.readouterr().out
    plain = [*words[: words.index("--pinned")], "--resume"]
    plain[plain.index("--out") + 1] = str(out.parent / "plain")
    cli.main(plain)
    assert equal(weights(out), weights(out.parent / "plain"))
    assert not (out.parent / "plain" / "pins.json").exists()


@pytest.fixture
def pins(detector, generators, tmp_path):
    """Of a detector with a band around the median, in which it is unsure of a third."""
    run, items = shutil.copytree(detector, tmp_path / "run"), find_samples(generators / "test")
    scores = Detector.load(run, "cpu").predict(items, workers=0)
    made = calibrate(np.random.default_rng(0).normal(size=99), fpr=0.2)
    low, high = np.quantile(scores, [0.33, 0.67]).tolist()
    save_calibration(run, replace(made, low=low, threshold=high, views=1, batch=1))
    return Pins(items, Detector.load(run, "cpu"), tmp_path)


@pytest.mark.parametrize("shift", [-1.5, 1.5])
def test_unsure_is_worse_than_right_and_better_than_wrong(pins, shift):
    detector, order = pins.before, {0: ("generated", "unsure", "real"), 1: ("real", "unsure", "generated")}
    before = detector.decide(detector.predict(pins.items, workers=0))
    moved, config = load_model(detector.folder)
    with torch.no_grad():
        moved.head.image_head.bias += shift
    after = Detector(moved, config, detector.calibration)
    pairs = zip(pins.items, before, after.decide(after.predict(pins.items, workers=0)))
    worse = [i.path for i, was, now in pairs if order[i.label].index(now) < order[i.label].index(was)]
    assert len({*before}) == 3 and 0 < len(worse) < len(pins.items)
    moved.train()
    assert pins.check(moved, config, 7) == worse and moved.training
    assert pins.check(detector.model, config, 5) == []
    found = json.loads((pins.out / "pins.json").read_text())
    # Of step 7 nothing is left, as when a killed run goes on from before it.
    assert found["checkpoints"] == [{"step": 5, "lost": []}]
    assert found["threshold"] == detector.calibration.threshold
    (pins.out / "pins.json").write_text("[]")
    with pytest.raises(UserError, match=r"pins\.json is damaged"):
        pins.check(moved, config, 9)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("path,label\ngone.png,0\n", "gone.png"),
        ("path\na.png\n", "path and label"),
        ("path,label\n", "the list is empty"),
    ],
)
def test_pins_that_cannot_be_tested_are_refused_before_anything_is_done(
    text, why, options, tmp_path, capsys, generators
):
    (tmp_path / "pins.csv").write_text(text)
    words = ["update", "--model", options["model"], "--data", generators / "new", "--out", tmp_path / "run"]
    words += ["--replay", generators / "old", "--pinned", tmp_path / "pins.csv"]
    assert why in fails(words, capsys)
    assert not (tmp_path / "run" / "config.json").exists()
