"""`dgsnet update` on a tiny model: what it learns, resumption, what is reported, what is refused."""

import csv
import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dgsnet import cli
from dgsnet.config import Config
from dgsnet.data.images import file_hash
from dgsnet.data.items import find_samples
from dgsnet.detection.decisions import calibrate, load_calibration, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.evaluation.metrics import metrics
from dgsnet.exchange.model_card import _training
from dgsnet.model import checkpoint
from dgsnet.training.train import train
from dgsnet.training.update import hold_out, update
from scipy.stats import binomtest

from tests.support.fresh import FORKSERVER
from tests.support.runs import changed, equal, fails, weights


@pytest.fixture(scope="module")
def finished(generators, detector, tmp_path_factory):
    """An uninterrupted update, with its report on images kept out of it."""
    out = tmp_path_factory.mktemp("runs") / "updated"
    new, old = [str(generators / "new")], [str(generators / "old")]
    return update(detector, new, old, out, rule="gem", steps=3, lr=2e-3)


def command(options, out, **more):
    words = ["update", "--out", str(out)]
    for name, value in (options | more).items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def test_only_adapters_and_the_students_head_are_trained(finished, detector):
    before, after = weights(detector, "best"), weights(finished)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name or "image_head" in name}


def test_gem_holds_where_new_images_alone_forget(options, known, generators, tmp_path):
    """The new real images look like an old generator's, so that learning them is forgetting it."""
    lost = {}
    longer = options | {"model": known, "steps": 20, "lr": 4e-3}
    for rule in ("none", "gem"):
        out = update(out=tmp_path / rule, rule=rule, test=[str(generators / "test")], **longer)
        found = json.loads((out / "changes.json").read_text())
        (lost[rule],) = (group for group in found["groups"] if group["generator"] == "all")
        assert lost[rule]["accuracy_before"] > 0.9
    assert lost["none"]["difference_high"] < -0.4 and lost["none"]["mcnemar_p"] < 1e-3
    assert lost["gem"]["difference_low"] > lost["none"]["difference_high"] + 0.1


def test_a_fifth_is_held_out_of_every_generator_and_class(generators):
    samples = find_samples(generators / "old", "train")
    kept, out = hold_out(samples, seed=3)
    assert sorted([*kept, *out], key=lambda s: s.path) == samples
    cells = [(sample.generator, sample.label) for sample in out]
    assert Counter(cells) == {("board", 0): 2, ("board", 1): 2, ("stripes", 0): 3, ("stripes", 1): 2}
    assert hold_out(samples, seed=3) == (kept, out) and hold_out(samples, seed=4) != (kept, out)
    assert hold_out(samples[:4], seed=3) == (samples[:4], [])
    # One that is kept was made from one held out, another is what one held out was made from.
    twins = {kept[0]: {"twin": out[0].path}, out[1]: {"twin": kept[1].path}, kept[2]: {"twin": kept[3].path}}
    paired = [replace(sample, **twins.get(sample, {})) for sample in samples]
    paths = {sample.path for sample in hold_out(paired, seed=3)[1]}
    assert paths == {sample.path for sample in [*out, *kept[:2]]}


# -- deterministic, resumable ----------------------------------------------------------------------------


def test_the_same_update_twice_has_the_same_weights(finished, options, tmp_path):
    again = update(out=tmp_path / "again", rule="gem", **options)
    assert equal(weights(again), weights(finished))
    assert (again / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()
    assert (again / "changes.json").read_text() == (finished / "changes.json").read_text()
    other = update(out=tmp_path / "other", rule="gem", seed=6, **options)
    assert not equal(weights(other), weights(finished))


def _update_until(words, fatal):
    """In a process of its own: SIGKILL once something has got the name `fatal`."""
    torch.set_num_threads(1)

    def guard(original):
        def call(source, target):
            original(source, target)
            if os.path.basename(target) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    os.rename, os.replace = guard(os.rename), guard(os.replace)
    cli.main(words)


def test_killed_and_resumed_it_ends_as_if_it_had_not_been(finished, options, tmp_path):
    """While a model takes the place of the one before, and between the files of the report."""
    run = tmp_path / "run"
    words = [*command(options, run, rule="gem"), "--resume"]
    for fatal in (".last.old", "changes.csv", ""):
        child = FORKSERVER.Process(target=_update_until, args=(words, fatal))
        child.start()
        child.join()
        assert child.exitcode == (-signal.SIGKILL if fatal else 0)
        assert (run / "changes.json").exists() == (not fatal)
    for which in ("best", "last"):
        assert equal(weights(run, which), weights(finished, which))
    for name in ("metrics.csv", "changes.csv", "changes.json"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    assert not [path for path in run.rglob(".*")]


# -- the report ------------------------------------------------------------------------------------------


def test_the_report_is_what_both_detectors_say(finished, detector, generators):
    """Counted anew from scores of the images that it lists, none of which was trained on."""
    content = json.loads((finished / "changes.json").read_text())
    rows = list(csv.DictReader((finished / "changes.csv").open()))
    assert len(rows) == 13 and content["threshold"] == 0.5 and not content["calibrated"]
    assert {(row["suite"], row["generator"]) for row in rows} == {
        ("new", "new"),
        ("old", "board"),
        ("old", "stripes"),
    }
    paths, labels = [row["path"] for row in rows], np.array([int(row["label"]) for row in rows])
    before, after = (Detector.load(run, "cpu").predict(paths, workers=0) for run in (detector, finished))
    assert [float(row["before"]) for row in rows] == pytest.approx(before.tolist(), abs=1e-6)
    was, now = ((p > 0.5) == labels for p in (before, after))
    groups = {(group["suite"], group["generator"]): group for group in content["groups"]}
    old = np.array([row["suite"] == "old" for row in rows])
    gained, lost = int((~was & now)[old].sum()), int((was & ~now)[old].sum())
    found = groups["old", "all"]
    assert (found["n"], found["gained"], found["lost"]) == (9, gained, lost)
    assert found["accuracy_after"] == metrics(labels[old], after[old])["accuracy"]
    assert found["mcnemar_p"] == pytest.approx(
        binomtest(gained, gained + lost).pvalue if gained + lost else 1
    )
    new_in_training = {file_hash(path.read_bytes()) for path in (generators / "new").rglob("*.png")}
    held = {file_hash(Path(row["path"]).read_bytes()) for row in rows if row["suite"] == "new"}
    known = set(checkpoint.trained_on(finished).tolist())
    assert held and not held & known and known & new_in_training
    assert set(checkpoint.trained_on(detector).tolist()) < known


def test_it_decides_at_the_first_models_threshold_and_carries_no_calibration(
    finished, options, tmp_path, capsys
):
    run = shutil.copytree(options["model"], tmp_path / "calibrated")
    rng = np.random.default_rng(0)
    made = calibrate(rng.normal(-2, 1, 400), rng.normal(2, 1, 400), fpr=0.05)
    save_calibration(run, made)
    out = update(out=tmp_path / "run", **options | {"model": run, "steps": 1})
    content = json.loads((out / "changes.json").read_text())
    assert (content["threshold"], content["calibrated"]) == (made.threshold, True)
    assert load_calibration(out) is None
    out_text = capsys.readouterr().out
    assert (
        f"dgsnet calibrate --model {out}" in out_text
        and f"{made.threshold:g}, the threshold of {run}" in out_text
    )


def test_what_it_writes_is_a_run(finished, options, tmp_path):
    """It is scored, out_text of in its model, and updated again."""
    config = Config.load(finished / "config.json")
    assert config.data.train == [*options["data"], *options["replay"]] and config.optim.lr == 2e-3
    extra = checkpoint.read_extra(finished)
    assert extra["step"] == 3 and extra["update"]["rule"] == "gem"
    assert extra["update"]["model"] == str(options["model"])
    # A model card has these words.
    assert "an update, rule gem, of the detector `detector`" in _training(config, extra)
    again = update(out=tmp_path / "again", rule="replay", test=[], **options | {"model": finished})
    assert not equal(weights(again), weights(finished))
    assert not (again / "changes.json").exists()


def test_a_linear_probe_with_fixed_views_is_updated_too(options, generators, tmp_path):
    config = Config.load(options["model"] / "config.json")
    config = changed(config, model_lora_rank=0, data_views=1, optim_epochs=1)
    probe = train(config, tmp_path / "probe")
    out = update(out=tmp_path / "run", rule="conflict", test=[], **options | {"model": probe})
    before, after = weights(probe, "best"), weights(out)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "head.image_head.weight",
        "head.image_head.bias",
    }


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, expected",
    [
        ({"model": "nowhere"}, "no model at nowhere"),
        ({"data": "nowhere"}, "nowhere: no such file or folder"),
        ({"replay": "{old}/board/1_fake", "data": "{new}"}, "no labelled images of split train found"),
        ({"data": "{old}/board"}, "22 images are in --data and in --replay"),
        ({"out": "{model}/best/next"}, "lies in the model's own folder"),
        ({"out": "{model}"}, "lies in the model's own folder"),
        ({"out": "{old}"}, "is not empty"),
        ({"out": "{old}/board/0_real/0.png"}, "is a file"),
        ({"rule": "best"}, "rule"),
        ({"replay_share": 1}, "replay_share is 1; it must lie between 0 and 1"),
        ({"margin": -0.5, "rule": "gem"}, "margin is -0.5; it must be 0 or more"),
        ({"margin": 0.5, "rule": "conflict"}, "margin is of --rule gem; the rule is conflict"),
        ({"steps": 0}, "steps is 0; it must be 1 or more"),
        ({"lr": -1}, "lr=-1.0 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_wrong_input_ends_in_one_line(more, expected, options, generators, tmp_path, capsys):
    places = {"old": generators / "old", "new": generators / "new", "model": options["model"]}
    more = {name: str(value).format(**places) for name, value in more.items()}
    out = more.pop("out", tmp_path / "run")
    assert expected in fails(command(options, out, **more), capsys)
    assert not (tmp_path / "run").exists()


def test_an_empty_file_of_weights_is_one_line(options, tmp_path, capsys):
    model = shutil.copytree(options["model"], tmp_path / "model")
    (path,) = model.glob(f"best/{checkpoint.WEIGHTS_FILE}")
    path.write_bytes(b"")
    assert str(path) in fails(command(options, tmp_path / "run", model=model), capsys)


@pytest.mark.parametrize("rule, option", [("gem", "replay"), ("none", "data")])
def test_one_class_is_refused_where_nothing_holds_the_other(
    rule, option, options, generators, tmp_path, capsys
):
    shutil.copytree(generators / "test" / "board" / "1_fake", tmp_path / "one" / "1_fake")
    line = fails(command(options, tmp_path / "run", rule=rule, **{option: tmp_path / "one"}), capsys)
    assert "all training images are generated; training needs both classes" in line


def test_new_images_of_one_class_are_learned_beside_replayed_ones(options, generators, tmp_path):
    shutil.copytree(generators / "new" / "1_fake", tmp_path / "one" / "1_fake")
    out = update(out=tmp_path / "run", test=[], **options | {"data": [str(tmp_path / "one")]})
    assert (out / "best").is_dir()


def test_only_the_same_update_is_resumed(finished, options, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    options["rule"] = "gem"
    for more, expected in (
        ({"rule": "replay"}, "cannot resume"),
        ({"replay_share": 0.4}, "with replay_share=0.4, it was started with 0.5"),
        ({"margin": 0.5}, "with margin=0.5, it was started with 0"),
        ({"lr": 1e-3}, "with optim.lr=0.001, it was started with 0.002"),
        ({"model": finished}, "with weights="),
        ({"data": options["data"][0] + "/"}, "with data.train="),
    ):
        assert expected in fails([*command(options, run, **more), "--resume"], capsys)
    assert "is not empty" in fails(command(options, run), capsys)
    # As updates wrote it before there were margins.
    (run / "update.json").write_text((run / "update.json").read_text().replace(',\n  "margin": "0"', ""))
    assert "with margin=0.5" in fails([*command(options, run, margin=0.5), "--resume"], capsys)
    plain = shutil.copytree(options["model"], tmp_path / "plain")
    assert "holds a run that is no update" in fails([*command(options, plain), "--resume"], capsys)
    assert "is an update" in fails(["train", "--out", run, "--resume"], capsys)
    (run / "update.json").write_text("{")
    assert "update.json is damaged" in fails([*command(options, run), "--resume"], capsys)


def test_several_processes_are_refused(options, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="runs in a single process"):
        update(out=tmp_path / "run", **options)
