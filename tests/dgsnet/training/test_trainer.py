"""Training end to end on a tiny model: what each stage learns, what it leaves, which model is the best."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dgsnet.config import AugmentConfig, Config, OptimConfig
from dgsnet.data.images import file_hash, read_image
from dgsnet.data.items import find_samples
from dgsnet.data.preprocess import Preprocessor
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.evaluation.metrics import metrics
from dgsnet.model import checkpoint
from dgsnet.model.averages import average
from dgsnet.training.plan import lr_factor
from dgsnet.training.train import train

from tests.support.runs import (
    CLASSES,
    METRICS_FILE,
    STATE_FILE,
    board,
    changed,
    equal,
    interrupted_after,
    learned,
    rows,
    settings,
    validations,
    weights,
    write_images,
)


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
    # An epoch has 4 steps. Each third step has a row, and so have the epochs' ends, and then the validation.
    assert steps == [3, 4, 4, 6, 8, 8, 9, 12, 12]
    assert [row["stage"] for row in rows(finished)] == ["1"] * 3 + ["2"] * 6
    losses = [float(row["image_loss"]) for row in rows(finished) if row["image_loss"]]
    assert losses[-1] < 0.7 * losses[0]
    assert float(validations(finished)[-1]["val_ap"]) > 0.95
    extra = checkpoint.read_extra(finished)
    assert extra["step"] in (8, 12)
    assert extra["val_ap"] == max(float(row["val_ap"]) for row in validations(finished)[1:])
    assert (finished / "best" / "adapters.safetensors").stat().st_size < 100_000
    images = [path.read_bytes() for path in (dataset / "train").rglob("*.png")]
    assert checkpoint.trained_on(finished).tolist() == sorted(map(file_hash, images))


def test_the_saved_model_gives_the_validation_metrics(finished, dataset):
    """All validation images count; those of stage 1 are of the teacher's head, which stage 2 leaves."""
    model, config = checkpoint.load_model(finished / "last")
    preprocess = Preprocessor(config.preprocess)
    paths = {label: sorted((dataset / "val" / name).iterdir()) for label, name in enumerate(CLASSES)}
    labels = np.repeat([0, 1], [len(paths[0]), len(paths[1])])
    pixels = torch.stack([preprocess(read_image(path)) for path in paths[0] + paths[1]])
    # The last validation of each stage counts.
    by_stage = {row["stage"]: row for row in validations(finished)}
    for stage, score in (("1", model.teacher_logits), ("2", model.logits)):
        with torch.no_grad():
            logits = score(pixels).double()
        expected = metrics(labels, torch.sigmoid(logits).numpy())
        expected["loss"] = F.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(labels).double()
        ).item()
        for name in ("loss", "accuracy", "ap", "auc"):
            assert float(by_stage[stage][f"val_{name}"]) == pytest.approx(expected[name], abs=1e-5), name


def test_degraded_pairs_are_trained_on_and_drawn_alike_after_an_interruption(dataset, tmp_path):
    short = {"data_val": [], "optim_head_epochs": 1, "checkpoint_every": 1}
    config = settings(dataset, augment=AugmentConfig("wang", ["noise:5"]), data_pairs=True, **short)
    whole = train(config, tmp_path / "whole")
    with interrupted_after(3):
        train(config, tmp_path / "run")
    assert equal(weights(train(config, tmp_path / "run", resume=True)), weights(whole))
    assert not equal(weights(train(settings(dataset, **short), tmp_path / "plain")), weights(whole))
    with pytest.raises(UserError, match=r"with augment\.preset=none, it was started with wang"):
        train(settings(dataset, data_pairs=True, **short), tmp_path / "run", resume=True)


def test_the_seed_decides_the_result(finished, dataset, tmp_path):
    again = train(settings(dataset, data_workers=2), tmp_path / "again")
    assert equal(weights(again), weights(finished))
    assert (again / METRICS_FILE).read_bytes() == (finished / METRICS_FILE).read_bytes()
    other = train(settings(dataset, seed=6), tmp_path / "other")
    assert not equal(weights(other), weights(finished))


@pytest.fixture(scope="module")
def faint(tmp_path_factory):
    """Data on which validation goes up and down: the chequerboard is hardly there."""
    root = tmp_path_factory.mktemp("faint")
    for seed, (split, counts) in enumerate({"train": (17, 14), "val": (6, 5)}.items(), 1):
        write_images(root / split, counts, lambda h, w: board(h, w) * 0.1, seed=seed)
    return settings(
        root,
        data_captions="none",
        surgery_mode="none",
        # An epoch is one step.
        optim_batch_size=31,
        optim_epochs=9,
        optim_lr=3e-2,
        seed=1,
    )


def best_of(found):
    """The step with the highest AP, and of those the lowest loss, as metrics.csv has them."""
    return int(max(found, key=lambda row: (float(row["val_ap"]), -float(row["val_loss"])))["step"])


def test_best_is_the_highest_ap_then_the_lowest_loss_over_interruptions(faint, tmp_path):
    for epochs in (4, 2):
        with interrupted_after(epochs):
            train(faint, tmp_path, resume=True)
        assert checkpoint.read_extra(tmp_path)["step"] == best_of(validations(tmp_path))
    train(faint, tmp_path, resume=True)
    found = validations(tmp_path)
    assert checkpoint.read_extra(tmp_path)["step"] == best_of(found)
    assert checkpoint.read_extra(tmp_path / "last")["step"] == len(found) == 9
    # Neither the last, nor the surest, nor the first with that AP, nor one of the last life alone.
    surest = min(found, key=lambda row: float(row["val_loss"]))
    first = max(found, key=lambda row: float(row["val_ap"]))
    assert best_of(found) not in (9, int(surest["step"]), int(first["step"]))


def test_best_is_the_lowest_loss_where_one_class_alone_has_no_ap(faint, tmp_path):
    shutil.copytree(Path(faint.data.train[0]) / "val" / "1_fake", tmp_path / "val" / "1_fake")
    run = train(changed(faint, data_val=[str(tmp_path / "val")]), tmp_path / "run")
    found = validations(run)
    losses = [float(row["val_loss"]) for row in found]
    assert {row["val_ap"] for row in found} == {"nan"} and int(np.argmin(losses)) not in (0, 8)
    extra = checkpoint.read_extra(run)
    assert extra["step"] == np.argmin(losses) + 1 and "val_ap" not in extra
    assert extra["val_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_best_is_what_the_settings_say(faint, tmp_path):
    """The measure is not the AP; the worst AUC is of the generator that leaves nothing."""
    for name, strength, counts in (("strong", 0.4, (4, 15)), ("weak", 0.0, (6, 2))):
        seed = len(name)
        write_images(tmp_path / "val" / name, counts, lambda h, w, s=strength: board(h, w) * s, seed=seed)
    run = train(changed(faint, data_val=[str(tmp_path / "val")], optim_best="accuracy"), tmp_path / "run")
    found = validations(run)
    best = max(found, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    assert checkpoint.read_extra(run)["step"] == int(best["step"]) != best_of(found)
    # The worst of them, against all real images.
    samples, aucs = find_samples(tmp_path / "val"), {}
    probabilities = Detector.load(run / "last").predict([sample.path for sample in samples])
    for generator in ("strong", "weak"):
        kept = [i for i, sample in enumerate(samples) if not sample.label or sample.generator == generator]
        labels = np.array([samples[i].label for i in kept])
        aucs[generator] = metrics(labels, probabilities[kept])["auc"]
    assert float(found[-1]["val_worst_auc"]) == pytest.approx(aucs["weak"], abs=1e-6)
    assert aucs["weak"] < aucs["strong"]


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
        updates[name] = learned(train(config, tmp_path / name), config)
    for name in updates:
        for other in updates:
            assert torch.equal(updates[name], updates[other]) == (name == other), (name, other)


def test_the_optimiser_is_that_of_the_settings(dataset, tmp_path):
    config = settings(
        dataset, optim_lr=3e-3, optim_betas=(0.8, 0.95), optim_weight_decay=0.125, checkpoint_every=1
    )
    with interrupted_after(1):
        train(config, tmp_path / "run")
    (group,) = checkpoint.load_state(tmp_path / "run" / STATE_FILE)["optimizer"]["param_groups"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-3, (0.8, 0.95), 0.125)


def test_steps_follow_the_schedule_and_are_clipped_after_surgery(dataset, tmp_path, monkeypatch):
    """A step of plain SGD in Adam's place is as long as its rate times the gradient's norm."""
    lengths = []

    class Noted(torch.optim.SGD):
        def __init__(self, groups, lr, **_):
            super().__init__(groups, lr=lr)

        def step(self, closure=None):
            trained = [p for group in self.param_groups for p in group["params"]]
            before = [p.detach().clone() for p in trained]
            super().step(closure)
            lengths.append(sum((p - b).square().sum() for p, b in zip(trained, before)).sqrt().item())

    monkeypatch.setattr(torch.optim, "AdamW", Noted)
    optim = {"optim_clip": 1e-2, "optim_schedule": "cosine", "optim_warmup": 0.3, "optim_lr": 0.5}
    train(settings(dataset, data_val=[], surgery_mode="layer", **optim), tmp_path / "run")
    config = OptimConfig(schedule="cosine", warmup=0.3)
    factors = [lr_factor(config, step, steps) for steps in (4, 8) for step in range(steps)]
    assert lengths == pytest.approx([0.5 * 1e-2 * factor for factor in factors], rel=1e-3)


def test_the_mean_of_the_last_checkpoints_is_kept_over_an_interruption(dataset, tmp_path):
    short = {"data_val": [], "optim_head_epochs": 0, "checkpoint_every": 1, "optim_average": 2}
    states = []
    for steps in (2, 3):
        config = settings(dataset, optim_max_steps=steps, **short)
        if steps == 3:
            with interrupted_after(2):
                train(config, tmp_path / "3")
        states.append(weights(train(config, tmp_path / f"{steps}", resume=True)))
    found, model = average(states, [config.model] * 2)
    mean, read = checkpoint.load_model(tmp_path / "3" / "average")
    assert read.model == model and model.lora_rank == 2 * config.model.lora_rank
    for name, tensor in checkpoint.trained_state(mean).items():
        torch.testing.assert_close(tensor, found[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_stages_train_their_own_parts(dataset, tmp_path):
    start = checkpoint.trained_state(checkpoint.build_model(settings(dataset)))
    heads = {}
    for epochs in (1, 2):
        run = train(settings(dataset, data_val=[], optim_epochs=epochs), tmp_path / f"{epochs}")
        state = heads[epochs] = weights(run)
        # Without validation the last model is the best.
        assert equal(state, weights(run, "best"))
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
    # Stage 1 has 4 steps.
    assert [int(row["step"]) for row in validations(run)] == [4, 8, 9]


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
            updates.append(learned(run, config))
        errors[reference] = ((updates[0] - updates[1]).norm() / updates[0].norm()).item()
    assert errors[8] < 1e-3
    assert errors[None] > 10 * errors[8]


def test_bf16_keeps_heads_and_weights_in_fp32(dataset, tmp_path, finished):
    run = train(settings(dataset, optim_precision="bf16"), tmp_path / "run")
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}
    assert not equal(weights(run), weights(finished))
    pairs = [
        (float(row["val_loss"]), float(full["val_loss"]))
        for row, full in zip(validations(run), validations(finished))
    ]
    assert all(low == pytest.approx(full, rel=0.1) for low, full in pairs)


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
        updates.append(learned(train(config, tmp_path / compiled), config))
    assert (updates[0] - updates[1]).norm() < 1e-3 * updates[0].norm()


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_what_recipes_set_goes_together_and_through_an_interruption(precision, dataset, tmp_path):
    """Warm-up, cosine, clipping, smoothing, the mean of checkpoints and half precision, in one run."""
    optim = {"schedule": "cosine", "warmup": 0.3, "clip": 0.05, "label_smoothing": 0.2, "average": 3}
    how = {f"optim_{name}": value for name, value in optim.items()} | {"optim_precision": precision}
    config = settings(dataset, data_val=[], checkpoint_every=1, optim_head_epochs=0, optim_epochs=1, **how)
    whole = train(config, tmp_path / "whole")
    with interrupted_after(3):
        train(config, tmp_path / "run")
    run = train(config, tmp_path / "run", resume=True)
    for which in ("last", "average"):
        assert equal(weights(run, which), weights(whole, which))
        assert all(tensor.isfinite().all() for tensor in weights(run, which).values())
    assert not equal(weights(run), weights(run, "average"))
    assert (run / METRICS_FILE).read_bytes() == (whole / METRICS_FILE).read_bytes()
