"""Experts and distillation in training: what they learn, on two processes, killed, refused where unfit."""

import shutil
import signal

import numpy as np
import pytest
import torch
from dgsnet.config import SurgeryConfig
from dgsnet.data.items import find_samples
from dgsnet.data.nuisances import file_nuisances
from dgsnet.errors import UserError
from dgsnet.model import checkpoint
from dgsnet.training import experts
from dgsnet.training.experts import FileExpert
from dgsnet.training.train import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import (
    METRICS_FILE,
    STATE_FILE,
    STOPPED,
    assert_same_training,
    equal,
    launch,
    rows,
    settings,
    train_on,
    weights,
    write_config,
    write_images,
)

TRACKED = ("prior/drift", "prior/cka", "expert/residual_correlation", "distillation_loss", "nuisance_loss")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """17 images of noise: real ones are JPEG but for one, generated ones PNG but for one."""
    root = tmp_path_factory.mktemp("data")
    write_images(root / "train", (9, 8), generated=None, kinds=("jpg", "png"))
    return root


def config_of(dataset, world=1, **changes):
    """Expert, distillation and files' nuisances at once, on 8 images a step over all processes."""
    common = {
        "data_val": [],
        "data_nuisances": "files",
        "model_lora_dropout": 0.0,
        "optim_batch_size": 8 // world,
        "surgery_text": "expert",
        "surgery_distillation": 0.3,
        "surgery_reference_batch_size": 6,
        "checkpoint_every": 2,
    }
    return settings(dataset, **common | changes)


def expert_of(out):
    state = checkpoint.load_state(out / STATE_FILE)["expert"]
    return torch.cat([tensor.flatten() for _, tensor in sorted(state.items())])


def tracked(out):
    """What TensorBoard holds under the names in TRACKED, by step; of a step written twice the last."""
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    names = set(TRACKED) & set(events.Tags()["scalars"])
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    """An uninterrupted run of one process to compare with."""
    config = config_of(dataset)
    return train(config, tmp_path_factory.mktemp("runs") / "one"), config


# -- whole runs -------------------------------------------------------------------------------------------


def test_the_expert_learns_from_files_and_stays_out_of_the_detector(one, dataset):
    out, config = one
    expert = FileExpert()
    expert.load_state_dict(checkpoint.load_state(out / STATE_FILE)["expert"])
    samples = find_samples(dataset, "train")
    found = torch.from_numpy(np.stack([file_nuisances(s.read_bytes()) for s in samples]))
    png = torch.tensor([s.path.endswith("png") for s in samples])
    assert ((expert(found) > 0) == png).all()
    assert (
        weights(out).keys()
        == checkpoint.trained_state(checkpoint.build_model(config, with_text=False)).keys()
    )


def test_tensorboard_tells_how_far_the_features_have_moved(one):
    values = tracked(one[0])
    assert set(values) == set(TRACKED)
    # Only stage 2 has these values.
    assert all(set(steps) == {6, 9} for steps in values.values())
    assert 0 < values["prior/drift"][6] < values["prior/drift"][9]
    assert 0 < values["prior/cka"][9] < values["prior/cka"][6] <= 1
    assert all(-1 <= value <= 1 for value in values["expert/residual_correlation"].values())
    assert values["nuisance_loss"][9] < values["nuisance_loss"][6] < np.log(2)
    assert values["distillation_loss"][6] > 0


def test_accumulation_trains_as_one_batch(one, dataset, tmp_path):
    out = train(config_of(dataset, optim_batch_size=4, optim_accumulation=2), tmp_path / "run")
    assert_same_training(out, *one)
    torch.testing.assert_close(expert_of(out), expert_of(one[0]), rtol=1e-3, atol=1e-4)


def test_bf16_trains_nearly_as_fp32(one, dataset, tmp_path):
    out = train(config_of(dataset, optim_precision="bf16"), tmp_path / "run")
    # The expert sees no backbone.
    torch.testing.assert_close(expert_of(out), expert_of(one[0]))
    for low, full in zip(rows(out), rows(one[0]), strict=True):
        assert float(low["loss"]) == pytest.approx(float(full["loss"]), rel=0.05)
    assert 0 < tracked(out)["prior/drift"][9] < 2 * tracked(one[0])["prior/drift"][9]


def test_two_processes_train_as_one(one, dataset, tmp_path):
    """The last step of an epoch has one image, so the second process has neither pixels nor nuisances."""
    assert train_on(2, tmp_path / "two", config_of(dataset, 2)) == 0
    assert_as_one(tmp_path / "two", one)


def test_sharded_and_stopped_they_go_on_as_two_and_as_one(one, dataset, tmp_path):
    out = tmp_path / "two"
    assert train_on(2, out, config_of(dataset, 2), states=4, parallel="fsdp") == STOPPED
    alone = shutil.copytree(out, tmp_path / "alone")
    assert train_on(2, out, parallel="fsdp") == train_on(1, alone) == 0
    assert_as_one(out, one)
    assert_as_one(alone, one)


def assert_as_one(out, one):
    assert_same_training(out, *one)
    torch.testing.assert_close(expert_of(out), expert_of(one[0]), rtol=1e-3, atol=1e-4)
    for name, steps in tracked(one[0]).items():
        if name != "prior/cka":
            # Every micro-batch has an unbiased estimate, but another one.
            assert tracked(out)[name] == pytest.approx(steps, rel=5e-3, abs=1e-5), name


def test_killed_and_resumed_it_ends_with_the_same_weights_and_log(one, tmp_path):
    out = tmp_path / "run"
    path = write_config(tmp_path / "run.yaml", one[1])
    command = ["train", "--config", path, "--out", str(out), "--resume"]
    # Within the first checkpoint of stage 2, then in the next one, then never.
    codes = [launch(command, fatal_call) for fatal_call in (45, 20, 0)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert equal(weights(out), weights(one[0]))
    assert (out / METRICS_FILE).read_bytes() == (one[0] / METRICS_FILE).read_bytes()
    assert torch.equal(expert_of(out), expert_of(one[0]))
    assert tracked(out) == tracked(one[0])


def test_files_alone_are_an_expert(dataset, tmp_path):
    """Without captions; what the student learns is another than without the expert."""
    updates = []
    for nuisances in ("none", "files"):
        config = config_of(
            dataset,
            data_captions="none",
            data_nuisances=nuisances,
            surgery_text="project" if nuisances == "none" else "expert",
            optim_max_steps=2,
        )
        updates.append(weights(train(config, tmp_path / nuisances)))
    name = "head.image_head.weight"
    assert not torch.equal(updates[0][name], updates[1][name])


# -- the expert and its statistics ------------------------------------------------------------------------


def test_nuisances_are_standardised_over_the_training_files(dataset, tmp_path, monkeypatch):
    shutil.copytree(dataset / "train", tmp_path / "train")
    (tmp_path / "train" / "0_real" / "damaged.png").write_bytes(b"no image")
    samples = find_samples(tmp_path, "train")
    good = [s for s in samples if "damaged" not in s.path]
    expert = FileExpert()
    expert.standardise(samples)
    found = np.stack([file_nuisances(s.read_bytes()) for s in good]).astype(np.float64)
    np.testing.assert_allclose(expert.mean, found.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        expert.deviation, np.maximum(found.std(axis=0), experts.LEAST_DEVIATION), rtol=1e-6
    )
    monkeypatch.setattr(experts, "MOST_FILES", 6)
    expert.standardise(good)
    np.testing.assert_allclose(expert.mean, found[::3].mean(axis=0), rtol=1e-6)


# -- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_captions": "none", "data_nuisances": "none"}, "text=expert has no expert .*nuisances=files"),
        ({"surgery_mode": "none"}, "surgery.text=expert needs the three branches"),
        ({"model_lora_rank": 0, "surgery_text": "project"}, "distillation=0.3 needs the three branches"),
        (
            {"surgery_mode": "none", "surgery_text": "project", "surgery_distillation": 0.0},
            "data.nuisances=files needs the three branches",
        ),
    ],
)
def test_experts_that_nothing_makes_or_uses_are_refused(dataset, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train(config_of(dataset, **changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"mode": "layer", "distillation": 0.1},
            "surgery.distillation=0.1 goes with surgery.mode=feature only",
        ),
        ({"mode": "layer", "text": "expert"}, "surgery.text=expert leaves nothing .* text=both"),
        ({"distillation": -1.0}, "distillation=-1.0 must be at least 0"),
        ({"distillation": float("inf")}, "distillation=inf must be finite"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        SurgeryConfig(**setting)
