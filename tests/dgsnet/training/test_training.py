"""Training end to end on a tiny model: it learns, is reproducible, survives SIGKILL, refuses wrong input."""

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from dgsnet import cli
from dgsnet.config import Config, DataConfig, ModelConfig, OptimConfig, PreprocessConfig, SurgeryConfig
from dgsnet.data.images import file_hash
from dgsnet.errors import UserError
from dgsnet.files import locked
from dgsnet.model import checkpoint
from dgsnet.training import log as training_log
from dgsnet.training import run as training_run
from dgsnet.training.log import METRICS_FILE, Progress
from dgsnet.training.plan import BRANCHES, StepPlan, dropout_seed
from dgsnet.training.run import STATE_FILE
from dgsnet.training.setup import accelerator_for, largest_batch
from dgsnet.training.step import Step, layer_surgery, named_parameters
from dgsnet.training.train import train
from PIL import Image
from safetensors.torch import load_file

from tests.support.fresh import FORKSERVER


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Noise is real, a chequerboard under the same noise is generated; <root>/{train,val} with captions."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    board = (np.indices((36, 36)).sum(0) % 2 * 90)[..., None]
    for split, count in (("train", 16), ("val", 8)):
        captions = {}
        for label, name in enumerate(("0_real", "1_fake")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (36, 36, 3)) + board * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
                captions[f"{name}/{i}.png"] = rng.choice(["a photo of noise", "some pattern", "noise"])
        (root / split / "captions.json").write_text(json.dumps(captions))
    return root


def settings(dataset, **changes):
    """A small run; changes are named as on the command line, with _ for the dot."""
    config = Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2, lora_dropout=0.3),
        preprocess=PreprocessConfig(mode="crop", image_size=32),
        data=DataConfig(train=str(dataset), val=str(dataset), workers=0),
        optim=OptimConfig(lr=2e-3, batch_size=8, head_epochs=1, epochs=2),
        log_every=3,
    )
    for name, value in changes.items():
        section, _, key = name.partition("_")
        if hasattr(config, name):
            config = dataclasses.replace(config, **{name: value})
        else:
            part = dataclasses.replace(getattr(config, section), **{key: value})
            config = dataclasses.replace(config, **{section: part})
    return config


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """An uninterrupted run to compare with."""
    return train(settings(dataset), tmp_path_factory.mktemp("runs") / "finished")


def image_hashes(dataset):
    return sorted(file_hash(path.read_bytes()) for path in (dataset / "train").rglob("*.png"))


def weights(run, which="last"):
    return load_file(Path(run) / which / "adapters.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(run):
    with open(Path(run) / METRICS_FILE, newline="") as file:
        return list(csv.DictReader(file))


def val(run):
    return [row for row in rows(run) if row["val_ap"]]


def test_it_learns_and_writes_what_the_documentation_says(finished, dataset):
    assert sorted(os.listdir(finished)) == [
        "best",
        "config.json",
        "last",
        "metrics.csv",
        "state",
        "tensorboard",
    ]
    assert Config.load(finished / "config.json") == settings(dataset)
    steps = [int(row["step"]) for row in rows(finished)]
    assert steps == [3, 4, 4, 6, 8, 8, 9, 12, 12]  # 4 per epoch, each third, epochs' ends, then validation
    assert [row["stage"] for row in rows(finished)] == ["1"] * 3 + ["2"] * 6
    losses = [float(row["image_loss"]) for row in rows(finished) if row["image_loss"]]
    assert losses[-1] < 0.7 * losses[0]
    assert float(val(finished)[-1]["val_ap"]) > 0.95
    extra = checkpoint.read_extra(finished)
    assert extra["step"] in (8, 12)
    assert extra["val_ap"] == max(float(row["val_ap"]) for row in val(finished)[1:])
    assert (finished / "best" / "adapters.safetensors").stat().st_size < 100_000
    assert checkpoint.trained_on(finished).tolist() == image_hashes(dataset)


def test_the_saved_model_gives_the_validation_metrics(finished, dataset):
    from dgsnet.data.items import find_samples
    from dgsnet.data.loading import ImageDataset, collate
    from dgsnet.data.preprocess import Preprocessor
    from dgsnet.evaluation.metrics import metrics

    model, config = checkpoint.load_model(finished / "last")
    samples = find_samples(dataset, "val")
    images = ImageDataset(samples, Preprocessor(config.preprocess), train=False)
    batch = collate([images[i] for i in range(len(samples))])
    with torch.no_grad():
        probabilities = torch.sigmoid(model.logits(batch["pixels"]))
    result = metrics(batch["labels"].numpy(), probabilities.numpy())
    for name in ("accuracy", "ap", "auc"):
        assert result[name] == pytest.approx(float(val(finished)[-1][f"val_{name}"]), abs=1e-4)


def test_tensorboard_holds_what_metrics_csv_holds(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    for name in ("loss", "val_ap"):
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(int(row["step"]), float(row[name])) for row in rows(finished) if row[name]]
        assert [step for step, _ in seen] == [step for step, _ in expected]
        assert [value for _, value in seen] == pytest.approx([value for _, value in expected], rel=1e-4)


def test_the_seed_decides_the_result(finished, dataset, tmp_path):
    again = train(settings(dataset, data_workers=2), tmp_path / "again")
    assert equal(weights(again), weights(finished))
    assert (again / METRICS_FILE).read_bytes() == (finished / METRICS_FILE).read_bytes()
    other = train(settings(dataset, seed=1), tmp_path / "other")
    assert not equal(weights(other), weights(finished))


# -- killed and resumed ----------------------------------------------------------------------------------


def _train_until(arguments, fatal_call, started):
    """In a process of its own: run the command line; SIGKILL at the n-th change to the file system."""
    torch.set_num_threads(1)
    left = [fatal_call]

    def guard(original):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "truncate", "rmdir"):
        setattr(os, name, guard(getattr(os, name)))
    started.set()
    cli.main(arguments)


@pytest.fixture(scope="module")
def launch():
    """launch(arguments, fatal_call=0, seconds=None) -> exit code of a training process."""

    def run(arguments, fatal_call=0, seconds=None):
        started = FORKSERVER.Event()
        child = FORKSERVER.Process(target=_train_until, args=(arguments, fatal_call, started))
        child.start()
        if seconds is not None:
            started.wait()
            time.sleep(seconds)
            child.kill()
        child.join()
        return child.exitcode

    return run


def _train_as(rank, world, port, arguments):
    """In a process of its own: one rank of a data-parallel run on gloo, as torchrun starts it."""
    torch.set_num_threads(1)
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    if torch.cuda.is_available():
        place["ACCELERATE_USE_CPU"] = "true"
    os.environ.update({name: str(value) for name, value in place.items()})
    cli.main(arguments)


@pytest.mark.parametrize("mode", ["feature", "layer"])
def test_two_processes_train_as_one(dataset, tmp_path, mode):
    """To rounding, when the surgery's strength does not depend on the split of a batch."""
    results = []
    for world in (1, 2):
        config = settings(
            dataset,
            model_lora_dropout=0.0,
            surgery_mode=mode,
            surgery_reference_batch_size=8,
            optim_batch_size=8 // world,
            optim_epochs=1,
        )
        run, path = tmp_path / f"run-{world}", tmp_path / f"{world}.yaml"
        path.write_text(json.dumps(config.to_dict()))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        arguments = ["train", "--config", str(path), "--out", str(run)]
        ranks = [
            FORKSERVER.Process(target=_train_as, args=(rank, world, port, arguments)) for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [0] * world
        results.append((_update(run, dataset, config), rows(run)))
        assert checkpoint.trained_on(run).tolist() == image_hashes(dataset)
    (one, one_rows), (two, two_rows) = results
    assert (one - two).norm() < 1e-3 * one.norm()
    assert [row["step"] for row in one_rows] == [row["step"] for row in two_rows]
    for a, b in zip(one_rows, two_rows):
        assert all(float(a[name]) == pytest.approx(float(b[name]), rel=1e-3) for name in a if a[name])


@pytest.fixture
def command(dataset, tmp_path):
    """The command line of the finished run, for another folder."""
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings(dataset).to_dict()))  # JSON is YAML
    out = ["--out", str(tmp_path / "run"), "--resume"]
    return ["train", "--config", str(path), "--checkpoint_every", "2", *out]


def _assert_as_uninterrupted(run, finished):
    for which in ("best", "last"):
        assert equal(weights(run, which), weights(finished, which))
        assert checkpoint.read_extra(run / which) == checkpoint.read_extra(finished / which)
        assert checkpoint.trained_on(run / which).tolist() == checkpoint.trained_on(finished / which).tolist()
    assert (run / METRICS_FILE).read_bytes() == (finished / METRICS_FILE).read_bytes()
    assert not [path for path in run.rglob(".*")]


def test_killed_while_writing_and_resumed_it_ends_with_the_same_weights(command, launch, finished, tmp_path):
    """Each life of the run ends at another change to the file system: within checkpoints, models, renames."""
    rng = random.Random(0)
    lives, code = 0, None
    while code != 0:
        # A life gets further than the one before unless it dies before its first checkpoint.
        code = launch(command, fatal_call=rng.randint(1, 30) if lives < 6 else 0)
        assert code in (0, -signal.SIGKILL)
        lives += 1
    assert lives > 3
    _assert_as_uninterrupted(tmp_path / "run", finished)


def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_weights(command, launch, finished, tmp_path):
    clock = time.monotonic()
    assert launch([*command[:-2], str(tmp_path / "timed")]) == 0
    whole = time.monotonic() - clock
    for _ in range(3):
        moment = random.uniform(0.2, 0.9) * whole
        print(f"killed after {moment:.3f} of {whole:.3f} s")
        assert launch(command, seconds=moment) in (0, -signal.SIGKILL)
    assert launch(command) == 0
    _assert_as_uninterrupted(tmp_path / "run", finished)
    assert launch(command) == 0  # nothing left to do
    _assert_as_uninterrupted(tmp_path / "run", finished)


@pytest.fixture
def validated(monkeypatch):
    """validated([(ap, loss), ...]): what validations find in place of the truth; then the run is stopped."""

    def script(results):
        left = iter(results)

        def validate(run):
            try:
                ap, loss = next(left)
            except StopIteration:
                raise KeyboardInterrupt from None
            return {"val_loss": loss, "val_accuracy": 0.5, "val_ap": ap, "val_auc": 0.5}

        monkeypatch.setattr(training_run._Run, "_validate", validate)

    return script


def test_best_is_the_highest_ap_then_the_lowest_loss_over_interruptions(dataset, tmp_path, validated):
    plain = settings(dataset, surgery_mode="none", optim_batch_size=32, optim_epochs=7)  # a step an epoch
    kept, run = [], tmp_path / "run"

    def lives(*results):
        validated(results)
        with contextlib.suppress(KeyboardInterrupt):
            train(plain, run, resume=True)
        kept.append(checkpoint.read_extra(run)["step"])

    lives((0.6, 0.9), (0.8, 0.9), (0.7, 0.1))  # higher; lower, if surer
    lives((0.8, 0.5), (0.8, 0.7))  # as high, and surer; as high, and less sure
    lives((0.7, 0.1), (float("nan"), 0.1))  # what was best is remembered
    assert kept == [2, 4, 4]
    assert (run / "last").is_dir() and checkpoint.load_state(run / STATE_FILE)["position"]["stage"] == 3


def test_a_run_is_not_resumed_on_another_backbone(finished, dataset, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    state = checkpoint.load_state(run / STATE_FILE)
    assert state["backbone"] == checkpoint.fingerprint(checkpoint.build_model(settings(dataset)))
    checkpoint.save_state(run / STATE_FILE, state | {"backbone": "of others"})
    with pytest.raises(UserError, match="the weights of dgsnet-tiny have changed"):
        train(settings(dataset), run, resume=True)


def test_dropout_differs_with_seed_step_and_process():
    keys = list(itertools.product(range(4), repeat=3))
    assert len({dropout_seed(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_in_use_is_refused_by_the_name_of_its_process(dataset, tmp_path, capsys, resume):
    path, run = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(json.dumps(settings(dataset).to_dict()))
    with locked(run):
        line = _fails(["train", "--config", str(path), "--out", str(run), *resume], capsys)
        assert os.listdir(run) == [".lock"]
    assert f"run is in use by process {os.getpid()} on " in line


def test_processes_that_are_in_no_group_are_refused(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # one without groups
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    refused = pytest.raises(UserError, match="2 processes were started, but this one is in a group of 1")
    with refused, accelerator_for(settings(dataset), tmp_path):
        pass


# -- progress --------------------------------------------------------------------------------------------


def test_a_log_has_a_line_for_every_log_step_and_no_bar(dataset, tmp_path, capsys):
    train(settings(dataset, data_val=[], optim_epochs=1), tmp_path / "run")
    told = capsys.readouterr().err
    pattern = r"stage (\d) epoch 1/1: step (\d)/4, loss \d\.\d{4}, [\d.]+ images/s, (\d\d:\d\d) left"
    lines = [re.fullmatch(pattern, line) for line in told.splitlines() if "warning" not in line]
    assert [line.group(1, 2) for line in lines] == [("1", "3"), ("1", "4"), ("2", "2"), ("2", "4")]
    assert lines[-1][3] == "00:00" and "\r" not in told


def test_a_terminal_has_a_bar_and_other_processes_say_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("stage 2 epoch 1/1", 2, 10) as progress:
        progress.step(32)
        progress.tell(0.25)
    told = capsys.readouterr().err
    assert "3/10" in told and "loss 0.2500" in told and "images/s" in told and "\r" in told
    assert re.search(r"<\d\d:\d\d", told)  # the time that is left
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with Progress("stage 2 epoch 1/1", 0, 1, silent=True) as progress:
            progress.step(32)
            progress.tell(0.25)
    assert capsys.readouterr().err == ""


def test_the_time_that_is_left_counts_from_where_an_epoch_was_gone_on_with(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: clock[0])
    progress = Progress("stage 2 epoch 1/1", 8, 12)
    progress.step(30)
    progress.step(30)
    clock[0] += 20
    progress.tell(0.5)
    assert "step 10/12, loss 0.5000, 3.0 images/s, 00:20 left" in capsys.readouterr().err


# -- what is trained -------------------------------------------------------------------------------------


def _update(run, dataset, config):
    """What training added to every adapter and student head weight, as one vector."""
    before = checkpoint.trained_state(checkpoint.build_model(config, with_text=False))
    after = weights(run)
    names = sorted(name for name in before if "lora_" in name or "image_head" in name)
    return torch.cat([(after[name] - before[name]).flatten() for name in names])


def test_surgery_changes_what_is_learned(dataset, tmp_path):
    updates = {}
    for name, changes in {
        "feature": {},
        "layer": {"surgery_mode": "layer"},
        "none": {"surgery_mode": "none"},
        "no captions": {"data_captions": "none"},
        "other order": {"surgery_order": "project_first"},
        "no alignment": {"surgery_alignment": 0.0},
    }.items():
        config = settings(dataset, model_lora_dropout=0.0, data_val=[], optim_max_steps=2, **changes)
        updates[name] = _update(train(config, tmp_path / name), dataset, config)
    for name in updates:
        for other in updates:
            assert torch.equal(updates[name], updates[other]) == (name == other), (name, other)


def _naive_layer_step(model, pixels, labels, captions, alignment, reference, eps):
    """Gradients of one layer-wise step by the book: explicit reference gradients, layer after layer."""
    head, layers = model.head, {}
    for name, parameter in model.visual.named_parameters():
        if "lora_" in name:
            layers.setdefault(name.split(".lora_")[0], []).append(parameter)
    features = model.student_features(pixels)
    teacher = model.teacher_features(pixels).requires_grad_()
    text = model.text_features(captions).requires_grad_()

    def loss(branch, x):
        logits = getattr(head, f"{branch}_head")(x).squeeze(1)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)

    (g_text,) = torch.autograd.grad(loss("text", text), text)
    (g_img,) = torch.autograd.grad(loss("teacher", teacher), teacher)
    beneficial = (g_img * len(labels) / reference).clamp(max=0)
    task = loss("image", features) + alignment * (features * beneficial).sum(1).mean()
    gradients = {}
    for tensors in layers.values():
        harmful = torch.autograd.grad(features, tensors, g_text.clamp(min=0), retain_graph=True)
        harmful = torch.cat([h.flatten() for h in harmful])
        direction = harmful / (harmful.norm() + eps)
        grads = torch.autograd.grad(task, tensors, retain_graph=True)
        whole = torch.cat([g.flatten() for g in grads])
        whole = whole - (whole @ direction) * direction
        gradients |= zip(tensors, whole.split([t.numel() for t in tensors]))
    for branch, x in (("image", features), ("text", text)):
        own = list(getattr(head, f"{branch}_head").parameters())
        gradients |= zip(own, torch.autograd.grad(loss(branch, x), own, retain_graph=True))
    return gradients


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=2.0**10)])
@pytest.mark.parametrize("parts", [[8], [5, 3]])
def test_a_layer_wise_step_equals_the_naive_computation(parts, scaler):
    torch.manual_seed(0)
    model = checkpoint.DGSNet(ModelConfig(name="dgsnet-tiny", pretrained="", lora_dropout=0.0)).double()
    for name, tensor in model.adapter_state().items():
        if "lora_B" in name:  # at zero A has no gradient
            tensor.normal_(std=0.05)
    surgery = SurgeryConfig(mode="layer", reference_batch_size=4, eps=1e-3)
    step = Step(model, BRANCHES, surgery)
    optimizer = torch.optim.SGD(named_parameters(model), lr=1e-3)
    operator = layer_surgery(optimizer, surgery, scaler)
    pixels, labels = torch.randn(8, 3, 32, 32).double(), (torch.arange(8) % 2).double()
    captions = [f"photo {'of grass ' * i}" for i in range(8)]
    expected = _naive_layer_step(model, pixels, labels, captions, 0.2, 4, 1e-3)

    scale = scaler.scale if scaler else lambda loss: loss
    start = 0
    for size in parts:
        end = start + size
        text = model.text_features(captions[start:end])
        loss, _, harmful, _ = step(pixels[start:end], labels[start:end], text)
        scale(loss * size / 8).backward(retain_graph=True)
        with operator.harmful():
            scale(harmful * size / 8).backward()
        start = end
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    assert set(expected) == set(model.trainable_parameters())
    for parameter, gradient in expected.items():
        assert (parameter.grad.flatten() - gradient.flatten()).norm() <= 1e-10 * gradient.norm() + 1e-15
    metrics = operator.metrics()
    assert len(metrics.layers) == 3 * 4 and all(name.endswith("_proj") for name in metrics.layers)
    assert metrics.removed.max() > 1e-3  # there was something to remove


def test_layer_wise_surgery_has_a_short_spelling(dataset, tmp_path):
    config = settings(dataset, data_val=[], optim_max_steps=1)
    (tmp_path / "run.yaml").write_text(json.dumps(config.to_dict()))
    for words in (["--surgery", "layer"], ["--surgery=layer"]):
        run = tmp_path / str(len(words))
        cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(run), *words])
        assert Config.load(run / "config.json") == dataclasses.replace(
            config, surgery=SurgeryConfig(mode="layer")
        )


def test_the_stages_train_their_own_parts(dataset, tmp_path):
    start = checkpoint.trained_state(checkpoint.build_model(settings(dataset)))
    heads = {}
    for epochs in (1, 2):
        run = train(settings(dataset, data_val=[], optim_epochs=epochs), tmp_path / f"{epochs}")
        state = heads[epochs] = weights(run)
        assert equal(state, weights(run, "best"))  # without validation the last is the best
        assert all(not torch.equal(state[name], start[name]) for name in state)
    for name in ("weight", "bias"):
        assert torch.equal(heads[1][f"head.teacher_head.{name}"], heads[2][f"head.teacher_head.{name}"])
        assert not torch.equal(heads[1][f"head.text_head.{name}"], heads[2][f"head.text_head.{name}"])


def test_without_adapters_it_is_a_linear_probe(dataset, tmp_path):
    config = settings(dataset, model_lora_rank=0, optim_lr=1e-2)
    run = train(config, tmp_path / "probe")
    start, state = checkpoint.trained_state(checkpoint.build_model(config)), weights(run)
    changed = {name for name in state if not torch.equal(state[name], start[name])}
    assert changed == {"head.image_head.weight", "head.image_head.bias"}
    assert {row["stage"] for row in rows(run)} == {"2"}
    losses = [float(row["loss"]) for row in rows(run) if row["loss"]]
    assert losses[-1] < losses[0]


def test_max_steps_ends_the_second_stage(dataset, tmp_path):
    run = train(settings(dataset, optim_max_steps=5, optim_epochs=9), tmp_path / "run")
    assert [int(row["step"]) for row in val(run)] == [4, 8, 9]  # stage 1 has 4 steps


@pytest.mark.parametrize("mode", ["feature", "layer"])
def test_accumulation_equals_a_large_batch(dataset, tmp_path, mode):
    """With reference_batch_size; the official formula weakens the surgery as the batch grows."""
    errors = {}
    for reference in (8, None):
        updates = []
        for batch_size, accumulation in ((16, 1), (4, 4)):
            config = settings(
                dataset,
                model_lora_dropout=0.0,
                data_val=[],
                optim_max_steps=3,
                surgery_mode=mode,
                surgery_reference_batch_size=reference,
                optim_batch_size=batch_size,
                optim_accumulation=accumulation,
            )
            run = train(config, tmp_path / f"{reference}-{batch_size}")
            assert int(rows(run)[-1]["step"]) == 5
            updates.append(_update(run, dataset, config))
        errors[reference] = ((updates[0] - updates[1]).norm() / updates[0].norm()).item()
    assert errors[8] < 1e-3
    assert errors[None] > 10 * errors[8]


def test_bf16_keeps_heads_and_weights_in_fp32(dataset, tmp_path, finished):
    run = train(settings(dataset, optim_precision="bf16"), tmp_path / "run")
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}
    assert not equal(weights(run), weights(finished))
    pairs = [(float(row["val_loss"]), float(full["val_loss"])) for row, full in zip(val(run), val(finished))]
    assert all(low == pytest.approx(full, rel=0.1) for low, full in pairs)


@pytest.mark.parametrize(
    ("images", "batch_size", "accumulation", "world"),
    [(32, 8, 1, 1), (33, 8, 1, 1), (33, 4, 2, 3), (50, 8, 2, 2), (7, 32, 4, 2), (1, 8, 1, 1)],
)
def test_a_step_is_the_mean_over_its_images(images, batch_size, accumulation, world):
    order = list(np.random.default_rng(0).permutation(images))
    per_step = batch_size * accumulation * world
    plans = [StepPlan(per_step, batch_size, rank, world) for rank in range(world)]
    for plan in plans:
        plan.set(order)
    steps = len(plans[0].steps)
    assert all(len(plan.steps) == steps for plan in plans)
    seen = 0
    for number in range(steps):
        size = plans[0].steps[number][0]
        micro = [plan.steps[number][1] for plan in plans]
        assert len({len(batches) for batches in micro}) == 1  # processes run in step
        weight = {i: m.weight / len(m.indices) / world for ms in micro for m in ms for i in m.indices}
        assert sorted(weight) == sorted(order[seen : seen + size])
        assert list(weight.values()) == pytest.approx([1 / size] * size)
        assert max(len(m.indices) for ms in micro for m in ms) <= batch_size
        shares = [sum(len(m.indices) for m in ms) for ms in micro]
        assert max(shares) - min(shares) <= 1
        seen += size
    assert seen == images
    for plan in plans:
        assert [m.indices for _, ms in plan.steps for m in ms] == list(plan)
        plan.set(order, limit=1)
        assert len(plan.steps) == 1


# -- damage and wrong input ------------------------------------------------------------------------------


def _damaged_copy(dataset, folder, which):
    for split in ("train", "val"):
        for path in (dataset / split).rglob("*.*"):
            target = folder / path.relative_to(dataset)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"no image" if which(path) else path.read_bytes())
    return folder


@pytest.mark.filterwarnings("ignore:left out")
def test_damaged_images_are_left_out_and_told(dataset, tmp_path, capsys):
    root = _damaged_copy(dataset, tmp_path / "data", lambda path: path.name in ("1.png", "2.png"))
    run = train(settings(root, optim_batch_size=2, optim_accumulation=2), tmp_path / "run")
    told = capsys.readouterr().err
    assert "4 of 32 images could not be read" in told
    assert "4 of 16 images could not be read" in told
    assert all(np.isfinite(float(row["loss"])) for row in rows(run) if row["loss"])


@pytest.mark.filterwarnings("ignore:left out")
def test_nothing_readable_is_an_error(dataset, tmp_path):
    for split in ("train", "val"):
        unreadable = _damaged_copy(
            dataset, tmp_path / split, lambda path, s=split: path.suffix == ".png" and s in path.parts[-3]
        )
        name = {"train": "training", "val": "validation"}[split]
        with pytest.raises(UserError, match=f"none of the {name} images could be read"):
            train(settings(unreadable), tmp_path / f"run-{split}")


def _fails(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    told = capsys.readouterr().err
    assert exit.value.code == 2
    lines = [line for line in told.splitlines() if line.startswith("dgsnet: ") and "warning: " not in line]
    assert len(lines) == 1
    assert "Traceback" not in told
    return lines[0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "not empty"),
        (["--out", "{broken}"], "is a file"),
        (["--out", "{new}", "--data.train", "/nowhere"], "/nowhere: no such file or folder"),
        (["--out", "{new}", "--data.train", "[]"], "no training images"),
        (["--out", "{new}", "--data.train", "{data}/train/0_real"], "no labelled images"),
        (["--out", "{new}", "--data.captions", "/no.json"], "/no.json"),
        (["--out", "{new}", "--model.name", "ViT-X"], "unknown model 'ViT-X'"),
        (["--out", "{new}", "--model.pretrained", "/no.pt"], "/no.pt"),
        (["--out", "{new}", "--model.lora_rank", "-1"], "lora_rank=-1"),
        (["--out", "{new}", "--preprocess.image_size", "64"], "takes images of 32 pixels"),
        (["--out", "{new}", "--preprocess.mode", "patches"], "num_patches"),
        (["--out", "{new}", "--optim.batch_size", "0"], "batch_size=0 must be at least 1"),
        (["--out", "{new}", "--optim.lr", "fast"], 'setting "optim.lr"'),
        (["--out", "{new}", "--optim.lr", "1e9"], "training diverged"),
        (["--out", "{new}", "--surgery.mode", "magic"], 'setting "surgery.mode"'),
        (["--out", "{new}", "--surgery", "magic"], 'setting "surgery.mode"'),
        (["--out", "{new}", "--surgery", "layer", "--surgery.order", "project_first"], "feature only"),
        (["--out", "{new}", "--config", "/no.yaml"], "/no.yaml"),
        (["--out", "{new}", "--config", "{broken}"], "broken.yaml"),
        (["--out", "{new}", "--config", "{unknown}"], "optim.speed"),
        (["--out", "{new}", "--unknown", "3"], "--unknown"),
        (["--resume", "--optim.lr", "5e-5"], "cannot resume"),
    ],
)
def test_wrong_input_ends_in_one_line(extra, message, finished, dataset, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("optim: [")
    (tmp_path / "unknown.yaml").write_text("optim: {speed: 3}")
    names = {
        "new": tmp_path / "new",
        "data": dataset,
        "broken": tmp_path / "broken.yaml",
        "unknown": tmp_path / "unknown.yaml",
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings(dataset).to_dict()))
    arguments = ["train", "--config", str(path), "--out", str(finished)]
    line = _fails([*arguments, *(word.format(**names) for word in extra)], capsys)
    assert message in line
    if message != "training diverged":
        assert not (tmp_path / "new").exists()  # so that the corrected command runs


def test_activation_checkpointing_trains_the_same_weights(dataset, tmp_path, finished):
    run = train(settings(dataset, optim_checkpointing=True), tmp_path / "run")
    assert equal(weights(run), weights(finished))


@pytest.mark.slow
def test_compiled_blocks_train_the_same_model(dataset, tmp_path):
    updates = []
    for compiled in ("no", "default"):
        config = settings(
            dataset, model_lora_dropout=0.0, optim_compile=compiled, optim_max_steps=4, data_val=[]
        )
        updates.append(_update(train(config, tmp_path / compiled), dataset, config))
    assert (updates[0] - updates[1]).norm() < 1e-3 * updates[0].norm()


def test_no_text_encoder_runs_in_a_step(dataset, tmp_path, monkeypatch):
    """Nor at all in a second run on the same captions."""
    calls = []
    original = checkpoint.DGSNet.text_features
    monkeypatch.setattr(
        checkpoint.DGSNet, "text_features", lambda *a: calls.append(len(a[1])) or original(*a)
    )
    cache = str(tmp_path / "cache")
    for run in ("a", "b"):
        train(settings(dataset, data_val=[], data_cache=cache), tmp_path / run)
    assert calls == [3]  # the data has three different captions
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_the_largest_batch_is_searched_downwards(dataset, monkeypatch):
    device = torch.device("cpu")
    assert largest_batch(settings(dataset), device, start=16) == 16
    forward = Step.forward

    def with_little_memory(self, pixels, labels, *others):
        if len(pixels) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, pixels, labels, *others)

    monkeypatch.setattr(Step, "forward", with_little_memory)
    for mode in ("feature", "layer", "none"):
        assert largest_batch(settings(dataset, surgery_mode=mode), device, start=16) == 12


def test_batch_size_auto_needs_a_gpu_and_is_kept_by_a_resumed_run(dataset, tmp_path, finished, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = settings(dataset, optim_batch_size="auto")
    with pytest.raises(UserError, match=r"batch_size=auto .* no GPU"):
        train(config, tmp_path / "run")
    assert train(config, finished, resume=True) == finished
    assert Config.load(finished / "config.json").optim.batch_size == 8


def test_fp16_without_a_gpu_is_refused(dataset, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="precision=fp16 needs a GPU"):
        train(settings(dataset, optim_precision="fp16"), tmp_path / "run")


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "--out"]])
def test_an_incomplete_command_line_ends_in_one_line(arguments, capsys):
    assert "--help" in _fails(arguments, capsys)


def test_training_on_one_class_is_refused(dataset, tmp_path):
    rows = [f"{path},real" for path in (dataset / "train" / "0_real").iterdir()]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    with pytest.raises(UserError, match="all training images are real"):
        train(settings(dataset, data_train=[str(tmp_path / "list.csv")]), tmp_path / "run")


def test_a_run_is_not_resumed_on_other_data(dataset, tmp_path):
    root = _damaged_copy(dataset, tmp_path / "data", lambda path: False)
    config = settings(root, optim_epochs=1, data_val=[])
    run = train(config, tmp_path / "run")
    state = checkpoint.load_state(run / STATE_FILE)
    state["position"]["stage"] = 2  # as if stopped at the beginning of stage 2
    checkpoint.save_state(run / STATE_FILE, state)
    (root / "train" / "0_real" / "0.png").rename(root / "train" / "1_fake" / "moved.png")
    (root / "train" / "captions.json").unlink()
    captioned = dataclasses.replace(config, data=dataclasses.replace(config.data, captions="auto"))
    with pytest.raises(UserError, match="have no caption"):
        train(captioned, run, resume=True)
    names = [str(p.relative_to(root / "train")) for p in (root / "train").rglob("*.png")]
    (root / "train" / "captions.json").write_text(json.dumps({name: "noise" for name in names}))
    with pytest.raises(UserError, match="the training images, their labels or captions have changed"):
        train(config, run, resume=True)


def test_resume_takes_the_runs_own_settings(finished, dataset, capsys):
    cli.main(["train", "--out", str(finished), "--resume", "--data.workers", "1"])
    assert "is already trained" in capsys.readouterr().out
    assert Config.load(finished / "config.json") == settings(dataset)


def test_resume_without_a_run_starts_one_or_says_what_is_missing(dataset, tmp_path, capsys):
    line = _fails(["train", "--out", str(tmp_path / "run"), "--resume"], capsys)
    assert "no training images" in line
    assert "holds no run to resume" in line
    run = train(settings(dataset, optim_epochs=1, data_val=[]), tmp_path / "run", resume=True)
    assert (run / "best").is_dir()
