"""Views: a finite set of augmentations, whose frozen features are computed once and are the tower's own."""

import contextlib
import copy
import dataclasses
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dgsnet.config import PreprocessConfig
from dgsnet.data import loading
from dgsnet.data.distortions import Degradations
from dgsnet.data.items import find_samples
from dgsnet.data.loading import ImageDataset
from dgsnet.data.preprocess import Preprocessor
from dgsnet.errors import UserError
from dgsnet.model.dgsnet import DGSNet
from dgsnet.model.pretrained import build_clip
from dgsnet.training import frozen
from dgsnet.training.frozen import ImageFeatures
from dgsnet.training.train import train
from PIL import Image
from safetensors.torch import save_file

from tests.support import runs
from tests.support.runs import changed, equal, interrupted_after, learned, weights, write_images

VIEWS, IMAGES = 2, 10


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Noise, under a chequerboard where it is generated; one image is damaged."""
    root = write_images(tmp_path_factory.mktemp("data"), (6, 4))
    # The ninth image is damaged.
    (root / "1_fake/2.png").write_bytes(b"no image")
    return root


def settings(root, **changes):
    small = {"data_val": [], "data_views": VIEWS, "optim_batch_size": 4, "log_every": 2}
    return runs.settings(root, **small | {"optim_head_epochs": 2, "optim_epochs": 3} | changes)


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
        yield images[3]["pixels"]


def test_epochs_take_the_views_in_turn(root):
    first, second, third, fourth, fifth = seen(dataset(root))
    assert torch.equal(first, third) and torch.equal(first, fifth) and torch.equal(second, fourth)
    assert not torch.equal(first, second)
    fresh = list(seen(dataset(root, views=0)))
    assert not any(torch.equal(fresh[i], fresh[k]) for i in range(5) for k in range(i))
    assert torch.equal(fresh[0], first) and torch.equal(fresh[1], second)


@pytest.mark.parametrize(("spare", "times"), [(2**20, 1), (0, 1), (-1, 5)])
def test_an_image_is_decoded_once_while_there_is_room(root, monkeypatch, spare, times):
    with Image.open(root / "0_real/3.png") as image:
        monkeypatch.setattr(loading, "KEPT_BYTES", image.width * image.height * 3 + spare)
    read, images, original = [], dataset(root), loading.read_image
    monkeypatch.setattr(
        loading, "read_image", lambda data, name: (read.append(name), original(data, name=name))[1]
    )
    kept = [images[3] for _ in range(5)]
    assert len(read) == times
    assert all(
        torch.equal(item["pixels"], kept[0]["pixels"]) and item["hash"] == kept[0]["hash"] for item in kept
    )


@pytest.fixture(scope="module")
def model(root):
    torch.manual_seed(0)
    return DGSNet(settings(root).model, with_text=False)


@pytest.fixture
def encoded(monkeypatch):
    """The numbers of images that the frozen tower has been given since, batch by batch."""
    calls, original = [], DGSNet.teacher_features
    monkeypatch.setattr(DGSNet, "teacher_features", lambda *a: (calls.append(len(a[1])), original(*a))[1])
    return calls


@pytest.fixture
def small_files(monkeypatch):
    """Twenty rows are five files."""
    monkeypatch.setattr(frozen, "CHUNK", 4)


def process(rank=0, world=1, local=0):
    """What an Accelerator says of a process."""
    return SimpleNamespace(
        process_index=rank,
        num_processes=world,
        local_process_index=local,
        device=torch.device("cpu"),
        is_main_process=rank == 0,
        autocast=contextlib.nullcontext,
        wait_for_everyone=lambda: None,
    )


def store(model, images, folder, one=None):
    return ImageFeatures(model, images, one or process(), 0, folder, "encoder")


def look_up(features, epoch, index):
    """Features of readable images in an epoch, and those images' pixels."""
    features.dataset.set_epoch(epoch)
    items = [features.dataset[i] for i in index]
    found = features(torch.tensor(index), epoch, torch.tensor([item["hash"] for item in items]))
    return found, torch.stack([item["pixels"] for item in items])


@pytest.mark.usefixtures("small_files")
def test_features_are_the_towers(root, model, encoded, tmp_path):
    features = store(model, dataset(root), tmp_path)
    assert encoded == [4, 4, 3, 4, 3]
    for epoch in range(2 * VIEWS):
        found, pixels = look_up(features, epoch, [5, 0, 9])
        torch.testing.assert_close(found, model.teacher_features(pixels))
    none = torch.empty(0, dtype=torch.int64)
    assert features(none, 0, none).shape == (0, model.dim)


@pytest.mark.usefixtures("small_files")
def test_another_run_computes_nothing(root, model, encoded, tmp_path):
    first, _ = look_up(store(model, dataset(root), tmp_path), 1, [5, 0])
    encoded.clear()
    again, _ = look_up(store(model, dataset(root), tmp_path), 1, [5, 0])
    assert not encoded and torch.equal(first, again)
    assert isinstance(np.load(files(tmp_path)[0], mmap_mode="r"), np.memmap)


@pytest.mark.usefixtures("small_files")
def test_features_of_degraded_images_are_their_own(root, model, encoded, tmp_path):
    store(model, dataset(root), tmp_path)
    encoded.clear()
    degraded = dataset(root)
    degraded.degradations = Degradations.parse(["noise:30"])
    features = store(model, degraded, tmp_path)
    assert sum(encoded) == VIEWS * (IMAGES - 1)
    found, pixels = look_up(features, 1, [5, 0, 9])
    torch.testing.assert_close(found, model.teacher_features(pixels))


def files(folder):
    return sorted(folder.rglob("*.npy"))


@pytest.mark.usefixtures("small_files")
def test_processes_share_the_work(root, model, encoded, tmp_path, monkeypatch):
    """On one disk each file is computed once; on disks of their own both have all of them in the end."""
    alone = tmp_path / "alone"
    store(model, dataset(root), alone)
    expected = [path.read_bytes() for path in files(alone)]
    encoded.clear()
    for local_world, folders in ((2, ("shared", "shared")), (1, ("node0", "node1"))):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world))
        together = threading.Barrier(2)

        def start(rank, folder, together=together, local_world=local_world):
            one = process(rank, 2, local=rank % local_world)
            one.wait_for_everyone = together.wait
            store(copy.deepcopy(model), dataset(root), tmp_path / folder, one)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(start, range(2), folders))
        assert len(encoded) == {2: 5, 1: 15}[local_world]
    for folder in ("shared", "node0", "node1"):
        assert [path.read_bytes() for path in files(tmp_path / folder)] == expected


@pytest.mark.usefixtures("small_files")
def test_a_kill_costs_one_file(root, model, encoded, tmp_path, monkeypatch):
    store(model, dataset(root), tmp_path / "whole")

    def killed(*args):
        if len(files(tmp_path / "killed")) == 2:
            next((tmp_path / "killed").rglob("*.npy")).with_name(".000002.npy.1.new").write_bytes(b"half")
            raise KeyboardInterrupt
        return original(*args)

    original = DGSNet.teacher_features
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DGSNet, "teacher_features", killed)
        store(model, dataset(root), tmp_path / "killed")
    encoded.clear()
    store(model, dataset(root), tmp_path / "killed")
    assert encoded == [3, 4, 3]
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in resumed]


def flip(data):
    """A bit of the last feature is another."""
    return data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"junk", lambda data: data[:-8], flip])
def test_a_damaged_store_is_refused(root, model, tmp_path, damage):
    store(model, dataset(root), tmp_path)
    path = files(tmp_path)[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{path.name} is damaged .*: remove it") as caught:
        look_up(store(model, dataset(root), tmp_path), 0, [3])
    assert "\n" not in str(caught.value)
    path.unlink()
    look_up(store(model, dataset(root), tmp_path), 0, [3])


@pytest.mark.usefixtures("small_files")
def test_a_foreign_store_is_refused(root, model, tmp_path):
    """A file from another place, another set of views or a wider model in the place of the right one."""
    store(model, dataset(root), tmp_path / "own")
    first, second, *_ = files(tmp_path / "own")
    right = first.read_bytes()
    store(model, dataset(root, views=1), tmp_path / "other")
    wide = np.zeros(4, [("check", "<u4"), ("hash", "<i8"), ("feature", "<f4", (model.dim + 1,))])
    np.save(tmp_path / "wide.npy", wide)
    for foreign in (second, files(tmp_path / "other")[0], tmp_path / "wide.npy"):
        first.write_bytes(foreign.read_bytes())
        with pytest.raises(UserError, match=rf"{first.name} is .*of another store: remove it"):
            look_up(store(model, dataset(root), tmp_path / "own"), 0, [3])
    first.write_bytes(right)
    look_up(store(model, dataset(root), tmp_path / "own"), 0, [3])


def test_what_decides_the_features_has_a_store_of_its_own(root, model, tmp_path):
    """Each of it changes alone."""
    images = tmp_path / "images"
    shutil.copytree(root, images)
    cropped = PreprocessConfig(mode="crop", image_size=32)
    known = set()

    def is_new(views=VIEWS, seed=1, encoder="encoder", **preprocess):
        made = Preprocessor(dataclasses.replace(cropped, **preprocess))
        dataset = ImageDataset(find_samples(images), made, train=True, seed=seed, views=views)
        ImageFeatures(model, dataset, process(), 0, tmp_path / "cache", encoder)
        before = len(known)
        known.update(files(tmp_path / "cache"))
        return len(known) == before + 1

    assert is_new() and not is_new()
    for other in (
        {"views": 1},
        {"seed": 2},
        {"encoder": "another"},
        {"flip": False},
        {"normalization": "clip"},
        {"mode": "patches", "patch_size": 8, "num_patches": 16},
    ):
        assert is_new(**other), other
    path = images / "0_real/3.png"
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert is_new()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert is_new()
    path.rename(images / "0_real/31.png")
    assert is_new() and not is_new()


def test_a_changed_image_is_computed_again_or_refused(root, model, encoded, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(root, images)
    path = images / "0_real/3.png"
    before = path.stat()
    old, _ = look_up(store(model, dataset(images), tmp_path), 0, [3])
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    os.utime(path, ns=(0, 0))
    features = store(model, dataset(images), tmp_path)
    found, pixels = look_up(features, 0, [3])
    torch.testing.assert_close(found, model.teacher_features(pixels))
    assert not torch.equal(found, old)
    # Another file of the same size and time.
    shutil.copy(root / "0_real/3.png", path)
    assert path.stat().st_size == before.st_size
    with pytest.raises(UserError, match=r"0_real/3.png has changed since .*: remove .*images"):
        # This dataset has not read the file before.
        features.dataset = dataset(images)
        look_up(features, 0, [3])


def test_a_folder_that_cannot_be_written_is_named(root, model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be kept in .*file.* set data\.cache"):
        store(model, dataset(root), tmp_path / "file")


@pytest.mark.parametrize("changes", [{}, {"surgery_mode": "layer"}, {"model_lora_rank": 0}])
def test_training_is_as_with_the_tower_in_every_step(root, tmp_path, monkeypatch, encoded, changes):
    """With a view for every epoch of both stages, an epoch sees what it sees without views."""
    # A probe has no stage 1, so its epochs count from stage 2.
    epochs, probe = 5, "model_lora_rank" in changes
    configured = settings(root, data_views=epochs, data_cache=str(tmp_path / "cache"), **changes)
    read, original = [], ImageDataset.item
    monkeypatch.setattr(ImageDataset, "item", lambda *a: (read.append(a[1]), original(*a))[1])
    with pytest.warns(UserWarning, match="left out"):
        stored = learned(train(configured, tmp_path / "stored"), configured)
    assert sum(encoded) == epochs * (IMAGES - 1)
    # Every view once; then what trains adapters reads the images, all else only what ails the damaged one.
    assert len(read) == epochs * IMAGES + (3 if probe else 3 * IMAGES + 2)
    encoded.clear()
    with pytest.warns(UserWarning, match="left out"):
        plain = learned(train(changed(configured, data_views=0), tmp_path / "plain"), configured)
    assert sum(encoded) == (0 if probe else epochs * (IMAGES - 1))
    # Adam makes much of a gradient that is nearly 0; another view or image is as much as the whole.
    assert (stored - plain).norm() < 1e-2 * plain.norm()


def test_plain_lora_needs_no_frozen_features(root, tmp_path, encoded):
    with pytest.warns(UserWarning, match="left out"):
        train(settings(root, surgery_mode="none", data_cache=str(tmp_path / "cache")), tmp_path / "run")
    assert encoded == [] and files(tmp_path / "cache") == []


def test_a_resumed_run_has_the_same_weights(root, tmp_path, finished):
    # This is after an epoch of stage 2.
    with pytest.warns(UserWarning), interrupted_after(4):
        train(settings(root), tmp_path / "run")
    with pytest.warns(UserWarning):
        assert equal(weights(train(settings(root), tmp_path / "run", resume=True)), weights(finished))


def test_a_run_uses_no_other_models_features(root, tmp_path, encoded):
    """Precision, and the backbone's weights, change alone; a store of either is there."""
    clip = build_clip("dgsnet-tiny", "", with_text=False)
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    probe = settings(
        root,
        model_lora_rank=0,
        model_pretrained=str(tmp_path / "clip.safetensors"),
        data_cache=str(tmp_path / "cache"),
        optim_epochs=1,
    )

    def stores(config):
        with pytest.warns(UserWarning, match="left out"):
            train(config, tmp_path / str(len(encoded)))
        return len(files(tmp_path / "cache"))

    assert [stores(probe), stores(changed(probe, optim_precision="bf16"))] == [1, 2]
    clip.visual.ln_post.bias.data += 1
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    assert stores(probe) == 3
    assert len(encoded) == 3 and stores(changed(probe, optim_lr=1e-3)) == 3 and len(encoded) == 3
