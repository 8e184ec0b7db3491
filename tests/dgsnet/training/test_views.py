"""Views: a finite set of augmentations, whose frozen features are computed once and are the tower's own."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dgsnet.config import Config, DataConfig, ModelConfig, OptimConfig, PreprocessConfig, SurgeryConfig
from dgsnet.data import loading
from dgsnet.data.loading import ImageDataset
from dgsnet.data.preprocess import Preprocessor
from dgsnet.data.samples import find_samples
from dgsnet.model.dgsnet import DGSNet
from dgsnet.training import run as training_run
from dgsnet.training.frozen import FrozenFeatures
from dgsnet.training.train import train
from PIL import Image
from safetensors.torch import load_file

VIEWS, IMAGES = 2, 10


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Noise, the generated half brighter; one image is damaged."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    captions = {}
    for label, name in enumerate(("0_real", "1_fake")):
        (root / name).mkdir()
        for i in range(IMAGES // 2):
            pixels = rng.integers(0, 150, (40, 40, 3)) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
            captions[f"{name}/{i}.png"] = f"a photo of {name[2:]} noise"
    (root / "captions.json").write_text(json.dumps(captions))
    (root / "1_fake/2.png").write_bytes(b"no image")
    return root


def settings(root, **data):
    return Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2, lora_dropout=0.3),
        preprocess=PreprocessConfig(mode="crop", image_size=32),
        data=DataConfig(train=str(root), workers=0, **{"views": VIEWS, **data}),
        optim=OptimConfig(lr=2e-3, batch_size=4, head_epochs=2, epochs=3),
        log_every=2,
    )


def weights(folder):
    return load_file(folder / "last/adapters.safetensors")


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    with pytest.warns(UserWarning, match="left out"):
        return train(settings(root), tmp_path_factory.mktemp("run") / "whole")


def dataset(root, views=VIEWS):
    preprocess = Preprocessor(settings(root).preprocess)
    return ImageDataset(find_samples(root), preprocess, train=True, seed=1, views=views)


def seen(images, epochs=5):
    for epoch in range(epochs):
        images.set_epoch(epoch)
        yield images[0]["pixels"]


def test_epochs_take_the_views_in_turn(root):
    first, second, third, fourth, fifth = seen(dataset(root))
    assert torch.equal(first, third) and torch.equal(first, fifth) and torch.equal(second, fourth)
    assert not torch.equal(first, second)
    fresh = list(seen(dataset(root, views=0)))
    assert not any(torch.equal(fresh[i], fresh[k]) for i in range(5) for k in range(i))
    assert torch.equal(fresh[0], first) and torch.equal(fresh[1], second)


@pytest.mark.parametrize(("limit", "times"), [(2**20, 1), (40 * 40 * 3, 1), (40 * 40 * 3 - 1, 5)])
def test_an_image_is_decoded_once_while_there_is_room(root, monkeypatch, limit, times):
    monkeypatch.setattr(loading, "KEPT_BYTES", limit)
    read, images, original = [], dataset(root), loading.read_image
    monkeypatch.setattr(
        loading, "read_image", lambda data, name: (read.append(name), original(data, name=name))[1]
    )
    kept = [images[0] for _ in range(5)]
    assert len(read) == times
    assert all(
        torch.equal(item["pixels"], kept[0]["pixels"]) and item["hash"] == kept[0]["hash"] for item in kept
    )


def test_features_are_the_towers(root):
    model, images = DGSNet(settings(root).model), dataset(root)
    alone = SimpleNamespace(
        process_index=0,
        num_processes=1,
        device=torch.device("cpu"),
        is_main_process=True,
        autocast=contextlib.nullcontext,
        reduce=lambda rows, how: {"sum": rows}[how],
    )
    found = FrozenFeatures(model, images, alone, 0)
    for epoch in (1, 2):
        images.set_epoch(epoch)
        expected = model.teacher_features(torch.stack([images[i]["pixels"] for i in (5, 0)]))
        torch.testing.assert_close(found(torch.tensor([5, 0]), epoch), expected)
    # Two processes, whose rows are summed.
    halves = []
    for rank in range(2):
        alone.process_index, alone.num_processes = rank, 2
        halves.append(FrozenFeatures(model, images, alone, 0).rows)
    assert not (halves[0] * halves[1]).any()
    torch.testing.assert_close(halves[0] + halves[1], found.rows)


@pytest.mark.parametrize("surgery", [SurgeryConfig(), SurgeryConfig(mode="layer"), None])
def test_training_is_as_with_the_tower_in_every_step(root, tmp_path, monkeypatch, surgery, finished):
    config = settings(root)
    if surgery is None:
        config = replace(config, model=replace(config.model, lora_rank=0))
    else:
        config = replace(config, surgery=surgery)
    calls = []
    frozen = DGSNet.teacher_features
    monkeypatch.setattr(DGSNet, "teacher_features", lambda *a: (calls.append(len(a[1])), frozen(*a))[1])
    with pytest.warns(UserWarning, match="left out"):
        stored = weights(train(config, tmp_path / "stored"))
    assert calls == [IMAGES - 1] * VIEWS
    monkeypatch.setattr(training_run, "FrozenFeatures", lambda *_: None)
    with pytest.warns(UserWarning, match="left out"):
        plain = weights(train(config, tmp_path / "plain"))
    for name, tensor in plain.items():
        torch.testing.assert_close(stored[name], tensor, rtol=1e-3, atol=1e-5)
    if surgery == SurgeryConfig():
        assert all(torch.equal(stored[name], tensor) for name, tensor in weights(finished).items())


def test_plain_lora_needs_no_frozen_features(root, tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "FrozenFeatures", None)
    with pytest.warns(UserWarning, match="left out"):
        train(replace(settings(root), surgery=SurgeryConfig(mode="none")), tmp_path / "run")


def test_a_resumed_run_has_the_same_weights(root, tmp_path, monkeypatch, finished):
    end = training_run._Run._end_epoch

    def stop(self, epochs):
        end(self, epochs)
        if self.position.stage == 2 and self.position.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.warns(UserWarning), pytest.raises(KeyboardInterrupt):
        patch.setattr(training_run._Run, "_end_epoch", stop)
        train(settings(root), tmp_path / "run")
    with pytest.warns(UserWarning):
        resumed = weights(train(settings(root), tmp_path / "run", resume=True))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights(finished).items())
