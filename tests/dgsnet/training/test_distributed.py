"""Training on two gloo processes: the weights of one, sharded or not, resumed on another number of them."""

import csv
import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from dgsnet import cli
from dgsnet.config import Config, DataConfig, ModelConfig, OptimConfig, PreprocessConfig, SurgeryConfig
from dgsnet.data.captions import attach_captions
from dgsnet.data.items import find_samples
from dgsnet.model import checkpoint
from dgsnet.training import run as training_run
from dgsnet.training.log import METRICS_FILE
from dgsnet.training.train import train
from PIL import Image
from safetensors.torch import load_file

from tests.support.fresh import FORKSERVER

STOPPED = 7  # exit code
STATE = training_run.STATE_FILE


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """17 training images: the last step of an epoch has none for the second process; 5 to validate."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (9, 8)), ("val", (3, 2))):
        captions = {}
        for name, count in zip(("0_real", "1_fake"), counts):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
                captions[f"{name}/{i}.png"] = f"pattern {i % 3}"
        (root / split / "captions.json").write_text(json.dumps(captions))
    return root


def config_of(dataset, images_per_step, world, surgery=None):
    # Dropout differs with the number of processes, as with the seed.
    return Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2, lora_dropout=0.0),
        preprocess=PreprocessConfig(mode="crop", image_size=32),
        data=DataConfig(train=str(dataset), val=str(dataset), workers=0, cache=str(dataset / "cache")),
        optim=OptimConfig(lr=2e-3, batch_size=images_per_step // world, head_epochs=1, epochs=2),
        surgery=SurgeryConfig(reference_batch_size=8, **(surgery or {})),
        checkpoint_every=2,
        log_every=3,
    )


def _rank(rank, world, port, arguments, checkpoints):
    """In a process of its own: one rank, as torchrun starts it; ends after so many checkpoints, if any."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost"}
    place |= {"MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    if torch.cuda.is_available():
        place["ACCELERATE_USE_CPU"] = "true"
    os.environ.update({name: str(value) for name, value in place.items()})
    written, save_state = [], training_run.save_state

    def save(*arguments):
        save_state(*arguments)
        written.append(arguments)
        if len(written) == checkpoints:
            os._exit(STOPPED)

    training_run.save_state = save
    cli.main(arguments)


def run(world, out, config=None, checkpoints=0, parallel="ddp"):
    """Train in `out`, or go on there; returns the first process's exit code."""
    arguments = ["train", "--out", str(out), "--resume", "--optim.parallel", parallel]
    if config:
        path = out.with_suffix(".yaml")
        path.write_text(json.dumps(config.to_dict()))
        arguments += ["--config", str(path)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [
        FORKSERVER.Process(target=_rank, args=(rank, world, port, arguments, checkpoints))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    ranks[0].join()
    for process in ranks[1:]:
        if checkpoints:  # left alone by the first
            process.kill()
        process.join()
    if not checkpoints:
        assert all(process.exitcode == 0 for process in ranks)
    return ranks[0].exitcode


def rows(out):
    with open(out / METRICS_FILE, newline="") as file:
        return list(csv.DictReader(file))


def assert_same_training(out, expected, config):
    start = checkpoint.trained_state(checkpoint.build_model(config, with_text=False))
    weights = [load_file(folder / "last" / "adapters.safetensors") for folder in (out, expected)]
    changes = [torch.cat([(w[n] - start[n]).flatten() for n in sorted(start)]) for w in weights]
    assert (changes[0] - changes[1]).norm() < 1e-3 * changes[1].norm()
    assert len(rows(out)) == len(rows(expected))
    for found, known in zip(rows(out), rows(expected)):
        for name in found:
            assert float(found[name] or 0) == pytest.approx(float(known[name] or 0), rel=2e-3, abs=1e-6), name


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    """What one process makes, uninterrupted: 3 steps an epoch, of 8, 8 and 1 images."""
    out = tmp_path_factory.mktemp("runs") / "one"
    config = config_of(dataset, 8, 1)
    assert run(1, out, config) == 0
    return out, config


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one_to_the_last_image(one, dataset, tmp_path, parallel):
    out = tmp_path / "two"
    assert run(2, out, config_of(dataset, 8, 2), parallel=parallel) == 0
    assert_same_training(out, *one)


def test_layer_wise_surgery_of_sharded_adapters(dataset, tmp_path):
    outs = [tmp_path / "one", tmp_path / "two"]
    for world, out in enumerate(outs, 1):
        config = config_of(dataset, 8, world, surgery={"mode": "layer"})
        assert run(world, out, config, parallel="fsdp") == 0
    assert_same_training(*outs, config)


@pytest.fixture(scope="module")
def stopped(dataset, tmp_path_factory):
    """Runs that were stopped within an epoch of the second stage, by number of processes and kind."""
    found = {}
    for world, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        out = found[world, parallel] = tmp_path_factory.mktemp("stopped") / "run"
        assert run(world, out, config_of(dataset, 8, world), checkpoints=4, parallel=parallel) == STOPPED
    return found


@pytest.mark.parametrize(
    ("first", "second"), [((2, "ddp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp")), ((2, "fsdp"), (2, "ddp"))]
)
def test_a_run_goes_on_with_another_number_of_processes(one, stopped, tmp_path, first, second):
    out = shutil.copytree(stopped[first], tmp_path / "run")
    world, parallel = second
    assert run(world, out, parallel=parallel) == 0
    assert_same_training(out, *one)


def test_the_state_does_not_tell_the_number_of_processes(stopped):
    known, *others = (checkpoint.load_state(out / STATE) for out in stopped.values())
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


def test_selection_on_the_device_trains_the_same_weights(dataset, tmp_path):
    preprocess = PreprocessConfig(image_size=32, patch_size=8, num_patches=16)
    weights = []
    for selection in ("workers", "device"):
        config = dataclasses.replace(config_of(dataset, 8, 1), preprocess=preprocess)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, selection=selection))
        out = train(config, tmp_path / selection)
        weights.append(load_file(out / "last" / "adapters.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert rows(tmp_path / "workers") == rows(tmp_path / "device")


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
        config = config_of(dataset, 8, world)
        data = dataclasses.replace(config.data, train=[str(tmp_path / "photos-{0..2}.tar")])
        config = dataclasses.replace(config, data=data)
        outs.append(tmp_path / f"run-{world}")
        assert run(world, outs[-1], config) == 0
    assert_same_training(*outs, config)


@pytest.mark.parametrize(("setting", "value"), [("precision", "fp16"), ("compile", "reduce-overhead")])
def test_what_does_not_go_with_sharded_weights_is_refused(setting, value):
    with pytest.raises(ValueError, match=f"optim.{setting}={value} goes with optim.parallel=ddp only"):
        OptimConfig(parallel="fsdp", **{setting: value})
