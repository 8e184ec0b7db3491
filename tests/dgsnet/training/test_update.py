"""`dgsnet update` on a tiny model: each rule's step, resumption, what is reported, what is refused."""

import csv
import dataclasses
import itertools
import json
import os
import shutil
import signal
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dgsnet import cli
from dgsnet.config import Config, DataConfig, ModelConfig, OptimConfig, PreprocessConfig, SurgeryConfig
from dgsnet.data.images import file_hash
from dgsnet.data.items import Item, find_samples
from dgsnet.data.loading import ImageDataset
from dgsnet.data.preprocess import Preprocessor
from dgsnet.detection.decisions import calibrate, load_calibration, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.evaluation.metrics import metrics
from dgsnet.exchange.model_card import _training
from dgsnet.model import checkpoint
from dgsnet.training import run as training_run
from dgsnet.training.replay import WEIGHTINGS, Update
from dgsnet.training.step import named_parameters
from dgsnet.training.train import train
from dgsnet.training.update import hold_out, update
from PIL import Image
from scipy.stats import binomtest

from tests.support.fresh import FORKSERVER

BATCH = 8


def write(root, count, seed, pattern):
    """Images of noise, on top of `pattern(label)`."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(("0_real", "1_fake")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 160, (36, 36, 3)) + pattern(label)[..., None]
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return str(root)


BOARD = np.indices((36, 36)).sum(0) % 2 * 90
STRIPES = np.indices((36, 36))[0] % 2 * 90


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Old generators leave a board or stripes; the new set's real images have the board: a conflict."""
    root = tmp_path_factory.mktemp("data")
    write(root / "old" / "board", 10, 0, lambda label: BOARD * label)
    write(root / "old" / "stripes", 10, 1, lambda label: STRIPES * label)
    write(root / "new", 10, 2, lambda label: BOARD * (1 - label))
    write(root / "test" / "board", 15, 3, lambda label: BOARD * label)
    write(root / "test" / "stripes", 15, 4, lambda label: STRIPES * label)
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A detector that knows the old generators."""
    config = Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2, lora_dropout=0.0),
        preprocess=PreprocessConfig(mode="crop", image_size=32),
        data=DataConfig(train=str(data / "old"), workers=0),
        optim=OptimConfig(lr=4e-3, batch_size=BATCH, epochs=10),
        surgery=SurgeryConfig(mode="none"),
        log_every=3,
    )
    return train(config, tmp_path_factory.mktemp("runs") / "trained")


@pytest.fixture(scope="module")
def model(trained, tmp_path_factory):
    """The same, whose updates are checkpointed after every step."""
    copy = shutil.copytree(trained, tmp_path_factory.mktemp("runs") / "model")
    config = dataclasses.replace(Config.load(copy / "best" / "config.json"), checkpoint_every=1)
    (copy / "best" / "config.json").write_text(config.to_json())
    return copy


@pytest.fixture
def options(data, model):
    """Of every update here, unless said otherwise."""
    return {
        "model": model,
        "data": [str(data / "new")],
        "replay": [str(data / "old")],
        "steps": 3,
        "lr": 2e-3,
    }


@pytest.fixture(scope="module")
def finished(data, model, tmp_path_factory):
    """An uninterrupted update, with its report on images kept out of it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return update(model, [str(data / "new")], [str(data / "old")], out, rule="gem", steps=3, lr=2e-3)


def command(options, out, **more):
    words = ["update", "--out", str(out)]
    for name, value in (options | more).items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def state(run, which="last"):
    return checkpoint._read_weights(run / which / "adapters.safetensors")[1]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fails(words, capsys):
    """The line that a command line ends with."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert len(lines) == 1
    return lines[0]


# -- a step ----------------------------------------------------------------------------------------------


def naive_gem(g, others):
    """The vector nearest to g without a negative product with any of the others: the best active set."""
    best = None
    for count in range(len(others) + 1):
        for active in itertools.combinations(others, count):
            d = g
            if active:
                a = torch.stack(active)
                d = g - a.T @ torch.linalg.solve(a @ a.T, a @ g)
            allowed = all(d @ other > -1e-12 * g.norm() * other.norm() for other in others)
            if allowed and (best is None or (d - g).norm() < (best - g).norm()):
                best = d
    return best


def naive(rule, g, others):
    if rule == "gem":
        return naive_gem(g, others)
    if rule == "none":
        return g
    (o,) = others
    if rule == "replay":
        return (g + o) / 2
    c = min(g @ o, 0)
    return g - c / (o @ o) * o + o - c / (g @ g) * g


@pytest.mark.parametrize("rule", [*WEIGHTINGS, "none"])
def test_a_step_has_the_rules_gradient(rule, options, tmp_path, monkeypatch):
    """Adam's first moment after one step is a tenth of its gradient; the formulas are redone in float64."""
    states = []
    monkeypatch.setattr(training_run, "save_state", lambda path, content: states.append(deepcopy(content)))
    out = update(out=tmp_path / "run", rule=rule, test=[], **options | {"steps": 2})
    found = states[0]["optimizer"]
    moments = [entry["exp_avg"] for entry in found["state"].values()]

    config = Config.load(out / "config.json")
    new, old = (find_samples(root, "train") for root in (options["data"][0], options["replay"][0]))
    network = checkpoint.load_model(options["model"])[0].double()
    images = ImageDataset([*new, *old], Preprocessor(config.preprocess), train=True, seed=config.seed)
    epoch = config.optim.head_epochs  # stage 2 counts from there
    images.set_epoch(epoch)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name or "image_head" in name)
    names, trained = zip(*named_parameters(network))
    assert found["param_groups"][0]["param_names"] == list(names)

    def gradient(places):
        items = [images[i] for i in places]
        labels = torch.tensor([item["label"] for item in items], dtype=torch.float64)
        logits = network.logits(torch.stack([item["pixels"] for item in items]).double())
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, trained)]), loss.item()

    order = np.random.default_rng((config.seed, epoch)).permutation(len(new))[:BATCH]
    drawn = Update({}, np.empty(0), old, rule, 1.0, config.seed, {}).draw(0, BATCH)
    g, loss = gradient(order)
    others = [gradient([len(new) + i for i in places])[0] for places in drawn.values()]
    logged = states[0]["sums"]
    assert (logged[0].item(), logged[-1].item()) == (pytest.approx(loss, rel=1e-5), 1)  # of new images alone
    assert len(others) == (2 if rule == "gem" else 1)
    assert min(g @ o for o in others) < 0  # else nothing is tested
    if rule == "none":
        others = []
    expected = naive(rule, g, others)
    actual = torch.cat([moment.flatten() for moment in moments]).double() / (1 - config.optim.betas[0])
    assert (actual - expected).norm() < 5e-5 * g.norm()
    if rule != "none":
        assert (expected - g).norm() > 1e-2 * g.norm()


def test_only_adapters_and_the_students_head_are_trained(finished, model):
    before, after = state(model, "best"), state(finished)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name or "image_head" in name}


def test_gem_holds_where_new_images_alone_forget(options, trained, data, tmp_path):
    """The new real images look like an old generator's, so that learning them is forgetting it."""
    lost = {}
    longer = options | {"model": trained, "steps": 20, "lr": 4e-3}
    for rule in ("none", "gem"):
        out = update(out=tmp_path / rule, rule=rule, test=[str(data / "test")], **longer)
        found = json.loads((out / "changes.json").read_text())
        (lost[rule],) = (group for group in found["groups"] if group["generator"] == "all")
        assert lost[rule]["accuracy_before"] > 0.9
    assert lost["none"]["difference_high"] < -0.4 and lost["none"]["mcnemar_p"] < 1e-3
    assert lost["gem"]["difference_low"] > lost["none"]["difference_high"] + 0.1


# -- what is replayed ------------------------------------------------------------------------------------


def replayed(generators, rule, per_cell=4):
    samples = [
        Item(f"{generator}-{label}-{i}", label, f"g{generator:02d}")
        for generator in range(generators)
        for label in (0, 1)
        for i in range(per_cell)
    ]
    return Update({}, np.empty(0), samples, rule, 2.0, 5, {})


def test_draws_are_balanced_functions_of_seed_and_step():
    one = replayed(3, "replay")
    (drawn,) = one.draw(7, 6).values()
    assert len(drawn) == 12 and drawn == replayed(3, "conflict").draw(7, 6)["replayed"]
    cells = [(one.samples[i].generator, one.samples[i].label) for i in drawn]
    assert all(cells.count(cell) == 2 for cell in cells)
    assert drawn != one.draw(8, 6)["replayed"]
    assert drawn != dataclasses.replace(one, seed=6).draw(7, 6)["replayed"]
    assert {i for step in range(40) for i in one.draw(step, 6)["replayed"]} == set(range(24))


def test_gem_has_a_constraint_for_each_old_generator_as_far_as_there_may_be():
    three = replayed(3, "gem")
    drawn = three.draw(0, 6)
    assert sorted(drawn) == ["replayed/g00", "replayed/g01", "replayed/g02"]
    for name, places in drawn.items():
        assert {three.samples[i].generator for i in places} == {name[-3:]}
    assert sorted(i for places in drawn.values() for i in places) == sorted(
        replayed(3, "replay").draw(0, 6)["replayed"]
    )
    many = replayed(32, "gem").draw(0, 32)
    assert len(many) == 15 and "replayed/g00, g15, g30" in many


def test_a_fifth_is_held_out_of_every_generator_and_class(data):
    samples = find_samples(data / "old", "train")
    kept, out = hold_out(samples, seed=3)
    assert sorted([*kept, *out], key=lambda s: s.path) == samples
    cells = [(sample.generator, sample.label) for sample in out]
    assert len(cells) == 8 and all(cells.count(cell) == 2 for cell in cells)
    assert hold_out(samples, seed=3) == (kept, out) and hold_out(samples, seed=4) != (kept, out)
    assert hold_out(samples[:4], seed=3) == (samples[:4], [])


# -- deterministic, resumable ----------------------------------------------------------------------------


def test_the_same_update_twice_has_the_same_weights(finished, options, tmp_path):
    again = update(out=tmp_path / "again", rule="gem", **options)
    assert equal(state(again), state(finished))
    assert (again / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()
    assert (again / "changes.json").read_text() == (finished / "changes.json").read_text()
    other = update(out=tmp_path / "other", rule="gem", seed=1, **options)
    assert not equal(state(other), state(finished))


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
        assert equal(state(run, which), state(finished, which))
    for name in ("metrics.csv", "changes.csv", "changes.json"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    assert not [path for path in run.rglob(".*")]


# -- the report ------------------------------------------------------------------------------------------


def test_the_report_is_what_both_detectors_say(finished, model, data):
    """Counted anew from scores of the images that it lists, none of which was trained on."""
    content = json.loads((finished / "changes.json").read_text())
    rows = list(csv.DictReader((finished / "changes.csv").open()))
    assert len(rows) == 12 and content["threshold"] == 0.5 and not content["calibrated"]
    assert {(row["suite"], row["generator"]) for row in rows} == {
        ("new", "new"),
        ("old", "board"),
        ("old", "stripes"),
    }
    paths, labels = [row["path"] for row in rows], np.array([int(row["label"]) for row in rows])
    before, after = (Detector.load(run, "cpu").predict(paths, workers=0) for run in (model, finished))
    assert [float(row["before"]) for row in rows] == pytest.approx(before.tolist(), abs=1e-6)
    was, now = ((p > 0.5) == labels for p in (before, after))
    groups = {(group["suite"], group["generator"]): group for group in content["groups"]}
    old = np.array([row["suite"] == "old" for row in rows])
    gained, lost = int((~was & now)[old].sum()), int((was & ~now)[old].sum())
    found = groups["old", "all"]
    assert (found["n"], found["gained"], found["lost"]) == (8, gained, lost)
    assert found["accuracy_after"] == metrics(labels[old], after[old])["accuracy"]
    assert found["mcnemar_p"] == pytest.approx(
        binomtest(gained, gained + lost).pvalue if gained + lost else 1
    )
    new_in_training = {file_hash(path.read_bytes()) for path in (data / "new").rglob("*.png")}
    held = {file_hash(Path(row["path"]).read_bytes()) for row in rows if row["suite"] == "new"}
    known = set(checkpoint.trained_on(finished).tolist())
    assert held and not held & known and known & new_in_training
    assert set(checkpoint.trained_on(model).tolist()) < known


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
    told = capsys.readouterr().out
    assert f"dgsnet calibrate --model {out}" in told and f"{made.threshold:g}, the threshold of {run}" in told


def test_what_it_writes_is_a_run(finished, options, tmp_path):
    """It is scored, told of in its model, and updated again."""
    config = Config.load(finished / "config.json")
    assert config.data.train == [*options["data"], *options["replay"]] and config.optim.lr == 2e-3
    extra = checkpoint.read_extra(finished)
    assert extra["step"] == 3 and extra["update"]["rule"] == "gem"
    assert extra["update"]["model"] == str(options["model"])
    assert "an update, rule gem, of the detector `model`" in _training(config, extra)  # of a model card
    again = update(out=tmp_path / "again", rule="replay", test=[], **options | {"model": finished})
    assert not equal(state(again), state(finished))
    assert not (again / "changes.json").exists()


def test_a_linear_probe_with_fixed_views_is_updated_too(options, data, tmp_path):
    config = Config.load(options["model"] / "config.json")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, lora_rank=0),
        data=dataclasses.replace(config.data, views=1),
        optim=dataclasses.replace(config.optim, epochs=1),
    )
    probe = train(config, tmp_path / "probe")
    out = update(out=tmp_path / "run", rule="conflict", test=[], **options | {"model": probe})
    before, after = state(probe, "best"), state(out)
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
        ({"data": "{old}/board"}, "20 images are in --data and in --replay"),
        ({"out": "{model}/best/next"}, "lies in the model's own folder"),
        ({"out": "{model}"}, "lies in the model's own folder"),
        ({"out": "{old}"}, "is not empty"),
        ({"out": "{old}/board/0_real/0.png"}, "is a file"),
        ({"rule": "best"}, "rule"),
        ({"replay_share": 1}, "replay_share is 1; it must lie between 0 and 1"),
        ({"steps": 0}, "steps is 0; it must be 1 or more"),
        ({"lr": -1}, "lr=-1.0 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_wrong_input_ends_in_one_line(more, expected, options, data, tmp_path, capsys):
    places = {"old": data / "old", "new": data / "new", "model": options["model"]}
    more = {name: str(value).format(**places) for name, value in more.items()}
    out = more.pop("out", tmp_path / "run")
    assert expected in fails(command(options, out, **more), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rule, option", [("gem", "replay"), ("none", "data")])
def test_one_class_is_refused_where_nothing_holds_the_other(rule, option, options, data, tmp_path, capsys):
    shutil.copytree(data / "test" / "board" / "1_fake", tmp_path / "one" / "1_fake")
    line = fails(command(options, tmp_path / "run", rule=rule, **{option: tmp_path / "one"}), capsys)
    assert "all training images are generated; training needs both classes" in line


def test_new_images_of_one_class_are_learned_beside_replayed_ones(options, data, tmp_path):
    shutil.copytree(data / "new" / "1_fake", tmp_path / "one" / "1_fake")
    out = update(out=tmp_path / "run", test=[], **options | {"data": [str(tmp_path / "one")]})
    assert (out / "best").is_dir()


def test_only_the_same_update_is_resumed(finished, options, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    options["rule"] = "gem"
    for more, expected in (
        ({"rule": "replay"}, "cannot resume"),
        ({"replay_share": 0.4}, "with replay_share=0.4, it was started with 0.5"),
        ({"lr": 1e-3}, "with optim.lr=0.001, it was started with 0.002"),
        ({"model": finished}, "with weights="),
        ({"data": options["data"][0] + "/"}, "with data.train="),
    ):
        assert expected in fails([*command(options, run, **more), "--resume"], capsys)
    assert "is not empty" in fails(command(options, run), capsys)
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
