"""Loading that can be reproduced and resumed."""

import os
import re
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from dgsnet.config import PreprocessConfig
from dgsnet.data.captions import attach_captions
from dgsnet.data.distortions import Degradations
from dgsnet.data.items import Item, find_samples
from dgsnet.data.loading import (
    DamageReport,
    EpochSampler,
    ImageDataset,
    LoaderWatch,
    collate,
    make_loader,
    pixels_on,
)
from dgsnet.data.preprocess import Preprocessor
from dgsnet.processes import start_worker, usable_cores
from PIL import Image

from tests.support.datasets import tree

PREPROCESS = Preprocessor(PreprocessConfig(mode="crop", image_size=16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve readable images, and four damaged ones among them."""
    root = tmp_path_factory.mktemp("data")
    tree(root, *(f"gan/{kind}/{i}.png" for kind in ("0_real", "1_fake") for i in range(6)))
    whole = (root / "gan/0_real/0.png").read_bytes()
    (root / "gan/0_real/3a_empty.png").write_bytes(b"")
    (root / "gan/0_real/3b_cut.png").write_bytes(whole[:100])
    (root / "gan/1_fake/2a_text.jpg").write_text("hello")
    (root / "gan/1_fake/7_gone.png").symlink_to(root / "nowhere.png")
    return root


def dataset_of(folder, train=True, seed=0, words=()):
    samples = attach_captions(find_samples(folder), "none", folder)
    degradations = Degradations.parse(words) if words else None
    return ImageDataset(samples, PREPROCESS, train=train, seed=seed, degradations=degradations)


def epoch_of(loader, epoch, skip=None):
    loader.sampler.set_epoch(epoch, skip)
    return list(loader)


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a["errors"] == b["errors"] and a["captions"] == b["captions"]
        assert all(torch.equal(a[key], b[key]) for key in ("pixels", "labels", "index"))


def test_items_and_batches(folder):
    dataset = dataset_of(folder, train=False)
    item = dataset[0]
    assert item["pixels"].shape == (3, 16, 16) and item["label"] == 0 and item["caption"] == ""
    (batch,) = make_loader(dataset, batch_size=16)
    assert batch["pixels"].shape == (12, 3, 16, 16) and batch["pixels"].dtype == torch.float32
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [0.0] * 6 + [1.0] * 6
    assert batch["index"].dtype == torch.int64 and len(batch["captions"]) == 12
    damaged = [(index, os.path.basename(message.split(": ")[0])) for index, message in batch["errors"]]
    assert damaged == [(4, "3a_empty.png"), (5, "3b_cut.png"), (11, "2a_text.jpg"), (15, "7_gone.png")]
    assert set(batch["index"].tolist()).isdisjoint(index for index, _ in damaged)


def test_batch_of_damaged_images_only(folder):
    dataset = dataset_of(folder)
    batch = collate([dataset[4], dataset[5]])
    assert len(batch["labels"]) == len(batch["pixels"]) == len(batch["index"]) == 0
    assert batch["captions"] == [] and len(batch["errors"]) == 2


def test_image_that_preprocessing_refuses_is_reported_by_name(tmp_path):
    path = tmp_path / "line.png"
    Image.new("L", (2**16, 1)).save(path)
    dataset = ImageDataset(
        [Item(str(path), 0, "x")], Preprocessor(PreprocessConfig(mode="crop")), train=False
    )
    assert dataset[0]["error"].startswith(f"{path}: would have to be enlarged")


@pytest.mark.parametrize("words", [(), ("noise:9@0.9", "jpeg:10..90")])
def test_batches_do_not_depend_on_workers(folder, words):
    data = dataset_of(folder, words=words)
    loaders = [make_loader(data, batch_size=5, workers=n, shuffle=True, seed=3) for n in (0, 2)]
    for epoch in (0, 1, 0):
        same(*(epoch_of(loader, epoch) for loader in loaders))


def test_order_and_augmentation_change_with_epoch_and_seed(folder):
    loader = make_loader(dataset_of(folder), batch_size=16, shuffle=True)
    first, second = epoch_of(loader, 0)[0], epoch_of(loader, 1)[0]
    assert first["index"].tolist() != second["index"].tolist()
    assert sorted(first["index"].tolist()) == sorted(second["index"].tolist())
    other = epoch_of(make_loader(dataset_of(folder), batch_size=16, shuffle=True, seed=1), 0)[0]
    assert other["index"].tolist() != first["index"].tolist()
    # Seed 1 in epoch 0 is not seed 0 in epoch 1.
    assert other["index"].tolist() != second["index"].tolist()
    dataset, reseeded = dataset_of(folder), dataset_of(folder, seed=1)
    pixels = [dataset[0]["pixels"]]
    dataset.set_epoch(1)
    pixels += [dataset[0]["pixels"], reseeded[0]["pixels"]]
    assert not any(torch.equal(pixels[i], pixels[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_no_two_of_neighbouring_seeds_epochs_and_images_draw_alike(tmp_path):
    """Seed, epoch and place are three numbers: a sum of two would give neighbours the same shuffle."""
    samples = [Item(str(path), 0, "x") for path in tree(tmp_path, "a.png").glob("*.png")] * 3
    preprocess = Preprocessor(PreprocessConfig(image_size=36, patch_size=4, num_patches=81, flip=False))
    drawn = set()
    for seed in range(3):
        dataset = ImageDataset(samples, preprocess, train=True, seed=seed)
        for epoch in range(3):
            dataset.set_epoch(epoch)
            drawn |= {dataset[index]["pixels"].numpy().tobytes() for index in range(3)}
    assert len(drawn) == 27


def test_degradations_are_drawn_anew_for_each_image_and_epoch_and_leave_crops_where_they_were(folder):
    plain, noisy = (dataset_of(folder, words=words) for words in ((), ("noise:9",)))
    # As much noise as a draw of the same seed gives, of which each image and epoch has another.
    drawn = []
    for epoch, index in ((0, 0), (0, 1), (1, 0)):
        for dataset in (plain, noisy):
            dataset.set_epoch(epoch)
        added = (noisy[index]["pixels"] - plain[index]["pixels"]).flatten()
        # A crop elsewhere would differ by far more.
        assert 0 < added.std() * 0.226 * 255 < 12
        drawn.append(added)
    correlations = np.corrcoef(torch.stack(drawn))[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 0.2
    same_seed, other = dataset_of(folder, words=("noise:9",)), dataset_of(folder, seed=1, words=("noise:9",))
    noisy.set_epoch(0)
    assert torch.equal(noisy[1]["pixels"], same_seed[1]["pixels"])
    assert not torch.equal(noisy[1]["pixels"], other[1]["pixels"])


def test_epochs_take_the_views_in_turn(tmp_path):
    tree(tmp_path, "0_real/a.png", "1_fake/b.png")
    viewed = ImageDataset(find_samples(tmp_path), PREPROCESS, train=True, views=3)
    free = ImageDataset(find_samples(tmp_path), PREPROCESS, train=True)
    for epoch in range(7):
        viewed.set_epoch(epoch)
        free.set_epoch(epoch % 3)
        assert torch.equal(viewed[1]["pixels"], free[1]["pixels"])


UNEVEN = {("", 0): 40, ("a", 0): 10, ("a", 1): 5, ("b", 1): 17, ("c", 1): 8}


@pytest.mark.parametrize(
    ("balance", "cap", "expected"),
    [
        ("none", 0, {"real": 50, "a": 5, "b": 17, "c": 8}),
        ("none", 6, {"real": 50, "a": 5, "b": 6, "c": 6}),
        ("class", 0, {"real": 30, "a": 5, "b": 17, "c": 8}),
        ("class", 7, {"real": 19, "a": 5, "b": 7, "c": 7}),
        ("generator", 0, {"real": 15, "a": 5, "b": 5, "c": 5}),
        ("generator", 3, {"real": 9, "a": 3, "b": 3, "c": 3}),
    ],
)
def test_an_epoch_draws_as_many_as_balance_says(balance, cap, expected):
    samples = [Item(f"{cell}{i}", cell[1], cell[0]) for cell, count in UNEVEN.items() for i in range(count)]
    dataset = ImageDataset(samples, PREPROCESS, train=True)
    sampler = EpochSampler(dataset, shuffle=True, seed=5, balance=balance, cap=cap)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(set(order)) == len(sampler) == sum(expected.values())
        names = Counter(samples[i].generator if samples[i].label else "real" for i in order)
        assert names == expected
        sampler.set_epoch(epoch, skip=4)
        assert list(sampler) == order[4:]
        epochs.append(set(order))
    assert (epochs[0] == epochs[1]) == (balance == "none" and not cap)


def test_generated_images_are_left_out_as_well_as_real_ones():
    samples = [Item(f"{label}{i}", label) for label, count in ((0, 3), (1, 9)) for i in range(count)]
    sampler = EpochSampler(ImageDataset(samples, PREPROCESS, train=True), shuffle=False, balance="class")
    assert [samples[i].label for i in sampler] == [0] * 3 + [1] * 3


def test_workers_end_with_their_parent_and_one_of_them_warns(folder):
    loader = make_loader(dataset_of(folder), batch_size=5, workers=2, silent=True)
    assert loader.worker_init_fn.func is start_worker
    assert loader.worker_init_fn.keywords == {"silent": True}


def test_without_training_nothing_is_random(folder):
    loader = make_loader(dataset_of(folder, train=False), batch_size=5)
    same(epoch_of(loader, 0), epoch_of(loader, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_epoch_is_the_rest_of_it_and_decodes_nothing_twice(folder, workers):
    whole = epoch_of(make_loader(dataset_of(folder), batch_size=5, shuffle=True), 2)
    loader = make_loader(dataset_of(folder), batch_size=5, workers=workers, shuffle=True)
    rest = epoch_of(loader, 2, skip=10)
    same(rest, whole[2:])
    assert len(loader) == len(rest) == 2
    # The epoch after it is whole again, and choosing the same epoch again keeps what is skipped.
    assert len(epoch_of(loader, 3)) == 4
    loader.sampler.set_epoch(3, skip=15)
    loader.sampler.set_epoch(3)
    assert len(list(loader)) == 1
    loader.sampler.set_epoch(3, skip=0)
    assert len(loader) == 4


def test_skipped_images_are_not_read(folder):
    read = []

    class Recording(ImageDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    dataset = Recording(find_samples(folder), PREPROCESS, train=False)
    epoch_of(make_loader(dataset, batch_size=4), 0, skip=12)
    assert read == [12, 13, 14, 15]


def test_accelerate_keeps_order_and_skip(folder):
    from accelerate import Accelerator

    loader = make_loader(dataset_of(folder), batch_size=5, shuffle=True)
    prepared = Accelerator(cpu=True).prepare(make_loader(dataset_of(folder), batch_size=5, shuffle=True))
    sampler = prepared.batch_sampler.sampler
    for epoch, skip in ((0, None), (1, None), (4, 10)):
        sampler.set_epoch(epoch, skip)
        prepared.set_epoch(epoch)
        same(list(prepared), epoch_of(loader, epoch, skip))


def test_damage_is_told_once_per_file_and_summed_up(folder):
    dataset = dataset_of(folder)
    loader = make_loader(dataset, batch_size=5, shuffle=True)
    report = DamageReport(len(dataset))
    assert report.summary() is None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(2):
            for batch in epoch_of(loader, epoch):
                report.add(batch["errors"])
    assert len(caught) == 4 and all("left out: " in str(w.message) for w in caught)
    summary = report.summary()
    assert summary.startswith("4 of 16 images could not be read and were left out: ")
    assert summary.endswith("; and 1 more") and "\n" not in summary


# Speed


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_device_selects_what_workers_would(folder, tmp_path, train, workers):
    samples = find_samples(folder)
    # Some of these must be enlarged.
    for i, size in enumerate([(300, 70), (64, 64), (31, 200), (90, 90)]):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        samples.insert(4 * i, Item(str(path), i % 2, "x"))
    preprocess = Preprocessor(PreprocessConfig(image_size=96, num_patches=9))
    loaders = [
        make_loader(
            ImageDataset(samples, preprocess, train=train, seed=5, selection=selection),
            batch_size=6,
            workers=workers if selection == "device" else 0,
            shuffle=train,
            seed=1,
        )
        for selection in ("workers", "device")
    ]
    device = torch.device("cpu")
    for mine, its in zip(epoch_of(loaders[0], 1), epoch_of(loaders[1], 1), strict=True):
        assert "pixels" not in its and its["patches"].dtype == torch.uint8
        assert torch.equal(pixels_on(device, its, preprocess), mine["pixels"])
        assert torch.equal(its["index"], mine["index"]) and torch.equal(its["labels"], mine["labels"])
        assert [index for index, _ in its["errors"]] == [index for index, _ in mine["errors"]]


def test_in_mode_crop_a_device_has_nothing_to_select(folder):
    dataset = ImageDataset(find_samples(folder), PREPROCESS, train=False, selection="device")
    assert dataset[0]["pixels"].shape == (3, 16, 16)


class QuickWatch(LoaderWatch):
    WARM_UP, STEPS, SECONDS = 2, 8, 0.05


def slowly(seconds):
    while True:
        time.sleep(seconds)
        yield {}


def watched(watch, wait, work, steps=30):
    """So many steps of 4 images, each after so many seconds of waiting and before so many of work."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        batches = slowly(wait)
        watch.start()
        for _ in range(steps):
            watch.next(batches)
            time.sleep(work)
            watch.step(4)
    return [str(warning.message) for warning in warned]


def test_waiting_for_images_is_told_once_with_figures():
    watch = QuickWatch(workers=0, device=torch.device("cpu"))
    (message,) = watched(watch, wait=0.02, work=0.005)
    found = re.fullmatch(
        r"training waits for its images (\d+)% of the time: they come at (\d+) images/s, the step could take "
        r"(\d+) images/s; raise data.workers \(0 now, the machine has \d+ cores\) \(docs/data.md, Speed\)",
        message,
    )
    share, rate, could = (int(x) for x in found.groups())
    # Sleeps may be long on a busy machine, but never short.
    assert 20 < share < 100 and rate <= 4 / 0.025 and rate < could <= 4 / 0.005
    assert not watched(watch, wait=0.02, work=0.005)


def test_images_that_come_in_time_are_not_told_of():
    assert not watched(QuickWatch(workers=2, device=torch.device("cpu")), wait=0.0, work=0.005)


def test_the_start_of_an_epoch_does_not_count():
    watch = QuickWatch(workers=2, device=torch.device("cpu"))
    assert not [warned for _ in range(8) for warned in watched(watch, wait=0.02, work=0.001, steps=2)]


def test_remedies_fit_the_machine():
    watch = QuickWatch(workers=usable_cores(), device=torch.device("cpu"))
    (message,) = watched(watch, wait=0.02, work=0.001)
    assert "cores are busy: scale the images down" in message
