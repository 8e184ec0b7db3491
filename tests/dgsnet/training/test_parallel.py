"""Training on two gloo processes: the weights of one, sharded or not, resumed on another number of them."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import webdataset
from dgsnet.config import AugmentConfig, OptimConfig
from dgsnet.data.captions import attach_captions
from dgsnet.data.images import file_hash
from dgsnet.data.items import find_samples
from dgsnet.model import checkpoint

from tests.support.runs import (
    STATE_FILE,
    STOPPED,
    assert_same_training,
    changed,
    settings,
    train_on,
    write_images,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """17 training images: the last step of an epoch has none for the second process; 9 to validate, of which
    the second process has a batch fewer.
    """
    root = tmp_path_factory.mktemp("data")
    write_images(root / "train", (9, 8), generated=None, seed=1)
    write_images(root / "val", (5, 4), generated=None, seed=2)
    return root


def config_of(dataset, world, **changes):
    """8 images a step over all processes. Dropout differs with their number, as with the seed."""
    common = {"model_lora_dropout": 0.0, "surgery_reference_batch_size": 6, "checkpoint_every": 2}
    return settings(dataset, optim_batch_size=8 // world, **common | changes)


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    """What one process makes, uninterrupted: 3 steps an epoch, of 8, 8 and 1 images."""
    out = tmp_path_factory.mktemp("runs") / "one"
    config = config_of(dataset, 1)
    assert train_on(1, out, config) == 0
    return out, config


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one_to_the_last_image(one, dataset, tmp_path, parallel):
    out = tmp_path / "two"
    assert train_on(2, out, config_of(dataset, 2), parallel=parallel) == 0
    assert_same_training(out, *one)
    hashes = {file_hash(path.read_bytes()) for path in (dataset / "train").rglob("*.png")}
    assert set(checkpoint.trained_on(out).tolist()) == hashes


def test_layer_wise_surgery_of_degraded_pairs_on_two_processes_is_that_of_one(dataset, tmp_path):
    changes = {"data_pairs": True, "augment": AugmentConfig("wang", ["noise:5"]), "optim_clip": 0.01}
    config = config_of(dataset, 1, surgery_mode="layer", optim_epochs=1, **changes)
    assert train_on(1, tmp_path / "one", config) == 0
    for parallel in ("ddp", "fsdp"):
        out = tmp_path / parallel
        assert train_on(2, out, changed(config, optim_batch_size=4), parallel=parallel) == 0
        assert_same_training(out, tmp_path / "one", config)


@pytest.fixture(scope="module")
def stopped(dataset, tmp_path_factory):
    """Runs that were stopped within an epoch of the second stage, by number of processes and kind."""
    found = {}
    for world, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        out = found[world, parallel] = tmp_path_factory.mktemp("stopped") / "run"
        assert train_on(world, out, config_of(dataset, world), states=4, parallel=parallel) == STOPPED
    return found


@pytest.mark.parametrize(
    ("first", "second"), [((2, "ddp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp")), ((2, "fsdp"), (2, "ddp"))]
)
def test_a_run_goes_on_with_another_number_of_processes(one, stopped, tmp_path, first, second):
    out = shutil.copytree(stopped[first], tmp_path / "run")
    world, parallel = second
    assert train_on(world, out, parallel=parallel) == 0
    assert_same_training(out, *one)


def test_the_state_does_not_tell_the_number_of_processes(stopped):
    known, *others = (checkpoint.load_state(out / STATE_FILE) for out in stopped.values())
    assert known["position"] == {"stage": 2, "epoch": 0, "seen": 8, "stage_step": 1, "step": 4}
    for state in others:
        assert state.keys() == known.keys()
        for name in ("position", "data", "backbone", "images_per_step", "scaler"):
            assert state[name] == known[name], name
        for name, tensor in known["model"].items():
            torch.testing.assert_close(state["model"][name], tensor, atol=1e-4, rtol=1e-3)
        entries, expected = (s["optimizer"]["state"] for s in (state, known))
        assert entries.keys() == expected.keys() and len(entries) > 10
        for key, entry in expected.items():
            for name, tensor in entry.items():
                assert type(entries[key][name]) is torch.Tensor
                torch.testing.assert_close(entries[key][name], tensor, atol=1e-6, rtol=1e-2)


def test_shards_train_the_same_weights_on_two_processes(one, dataset, tmp_path):
    """The order of shards is another than that of files, so they are compared with themselves."""
    samples = attach_captions(find_samples(dataset, "train"), "auto", dataset)
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"photos-{shard}.tar")) as writer:
            for i, sample in list(enumerate(samples))[shard::3]:
                image = Path(sample.path).read_bytes()
                writer.write(
                    {"__key__": f"{i}", "png": image, "cls": str(sample.label), "txt": sample.caption}
                )
    outs = []
    for world in (1, 2):
        config = config_of(dataset, world)
        data = dataclasses.replace(config.data, train=[str(tmp_path / "photos-{0..2}.tar")])
        config = dataclasses.replace(config, data=data)
        outs.append(tmp_path / f"run-{world}")
        assert train_on(world, outs[-1], config) == 0
    assert_same_training(*outs, config)


@pytest.mark.parametrize(("setting", "value"), [("precision", "fp16"), ("compile", "reduce-overhead")])
def test_what_does_not_go_with_sharded_weights_is_refused(setting, value):
    with pytest.raises(ValueError, match=f"optim.{setting}={value} goes with optim.parallel=ddp only"):
        OptimConfig(parallel="fsdp", **{setting: value})
