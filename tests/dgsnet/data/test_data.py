"""Datasets as the field lays them out, captions, and loading that can be reproduced and resumed."""

import csv
import json
import os
import re
import time
import warnings

import numpy as np
import pytest
import torch
from dgsnet.config import PreprocessConfig
from dgsnet.data.captions import attach_captions
from dgsnet.data.items import Item, find_samples
from dgsnet.data.loading import DamageReport, ImageDataset, LoaderWatch, collate, make_loader, pixels_on
from dgsnet.data.preprocess import Preprocessor
from dgsnet.errors import UserError
from dgsnet.processes import start_worker, usable_cores
from PIL import Image

from tests.support.permissions import folder_of_others, unprivileged

PREPROCESS = Preprocessor(PreprocessConfig(mode="crop", image_size=16))


def write_image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def tree(root, *paths):
    for seed, path in enumerate(paths):
        write_image(root / path, seed)
    return root


def listing(samples, root):
    return [(os.path.relpath(s.path, root), s.label, s.generator) for s in samples]


def one_line(error):
    return "\n" not in str(error.value)


# Layouts


def test_generator_and_class_folders(tmp_path):
    tree(tmp_path, "progan/cat/0_real/a.png", "progan/cat/1_fake/b.png", "progan/car/1_fake/c.png")
    tree(tmp_path, "biggan/0_real/d.JPG", "biggan/1_fake/e.png")
    assert listing(find_samples(tmp_path), tmp_path) == [
        ("biggan/0_real/d.JPG", 0, "biggan"),
        ("biggan/1_fake/e.png", 1, "biggan"),
        ("progan/car/1_fake/c.png", 1, "progan"),
        ("progan/cat/0_real/a.png", 0, "progan"),
        ("progan/cat/1_fake/b.png", 1, "progan"),
    ]


def test_class_folders_directly_in_the_root(tmp_path):
    root = tree(tmp_path / "sd14", "0_real/a.png", "1_fake/deeper/b.png")
    assert listing(find_samples(root), root) == [
        ("0_real/a.png", 0, "sd14"),
        ("1_fake/deeper/b.png", 1, "sd14"),
    ]
    other = tree(tmp_path / "other", "Nature/a.png", "AI/b.png")
    assert listing(find_samples(other), other) == [("AI/b.png", 1, "other"), ("Nature/a.png", 0, "other")]


def test_genimage(tmp_path):
    name = "stable_diffusion_v_1_4/imagenet_ai_0419_sdv4"
    for split in ("train", "val"):
        tree(tmp_path / name / split, "nature/a.png", "ai/a.png")
    assert listing(find_samples(tmp_path, "val"), tmp_path) == [
        (f"{name}/val/ai/a.png", 1, "stable_diffusion_v_1_4"),
        (f"{name}/val/nature/a.png", 0, "stable_diffusion_v_1_4"),
    ]
    assert len(find_samples(tmp_path, "train")) == 2
    inside = tmp_path / name / "val"
    assert {s.generator for s in find_samples(inside)} == {"imagenet_ai_0419_sdv4"}
    with pytest.raises(UserError, match="splits train, val; choose one with --split") as error:
        find_samples(tmp_path)
    assert one_line(error)


def test_split_folders_around_generators(tmp_path):
    tree(tmp_path, "train/progan/cat/0_real/a.png", "test/biggan/1_fake/b.png")
    assert listing(find_samples(tmp_path, "test"), tmp_path) == [("test/biggan/1_fake/b.png", 1, "biggan")]
    with pytest.raises(UserError, match="no labelled images of split val"):
        find_samples(tmp_path, "val")
    # Named directly, a folder of one split needs no choice, and the choice does not hurt.
    assert find_samples(tmp_path / "train") == find_samples(tmp_path / "train", "train")


def test_innermost_class_folder_decides(tmp_path):
    tree(tmp_path, "progan/nature/1_fake/a.png")
    assert listing(find_samples(tmp_path), tmp_path) == [("progan/nature/1_fake/a.png", 1, "progan")]


def test_other_files_are_no_samples(tmp_path):
    tree(tmp_path, "x/0_real/a.png", "x/b.png", "x/0_real/.hidden.png", "x/.hidden/0_real/c.png")
    (tmp_path / "x/0_real/Thumbs.db").write_bytes(b"0")
    (tmp_path / "x/captions.json").write_text("{}")
    assert listing(find_samples(tmp_path), tmp_path) == [("x/0_real/a.png", 0, "x")]


def test_links_are_followed_but_not_in_circles(tmp_path):
    tree(tmp_path / "elsewhere", "0_real/a.png")
    root = tree(tmp_path / "root", "gan/1_fake/b.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "gan/1_fake/again").symlink_to(root)
    (root / "gan/1_fake/broken.png").symlink_to(tmp_path / "nowhere.png")
    assert listing(find_samples(root), root) == [
        ("gan/1_fake/b.png", 1, "gan"),
        ("gan/1_fake/broken.png", 1, "gan"),
        ("linked/0_real/a.png", 0, "linked"),
    ]


@pytest.mark.parametrize(
    "name, reason", [("empty", "looked for .*0_real,1_fake.*nature,ai"), ("none", "no such")]
)
def test_nothing_found(tmp_path, name, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=reason) as error:
        find_samples(tmp_path / name)
    assert one_line(error) and name in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="needs the permissions of POSIX")
def test_folder_that_cannot_be_listed():
    with folder_of_others() as folder:
        root = folder / "root"
        root.mkdir()
        root.chmod(0)
        with unprivileged(), pytest.raises(UserError, match="root: cannot be listed: Permission denied"):
            find_samples(root)


def test_unknown_split_and_unknown_file(tmp_path):
    with pytest.raises(UserError, match="split 'dev' is unknown; choose one of train, val, test"):
        find_samples(tmp_path, "dev")
    (tmp_path / "list.txt").write_text("a.png 0")
    with pytest.raises(UserError, match=r"ends in \.json or \.csv"):
        find_samples(tmp_path / "list.txt")


# Lists

ROWS = [
    {"path": "z/b.png", "label": 1, "generator": "sd", "caption": "a cat, sitting"},
    {"path": "a.png", "label": "real"},
]


def expected_of_list(folder):
    return [
        Item(str(folder / "z/b.png"), 1, "sd", "a cat, sitting"),
        Item(str(folder / "a.png"), 0, "mine", None),
    ]


def test_json_list(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ROWS))
    assert find_samples(path) == expected_of_list(tmp_path)
    path.write_text(json.dumps({"z/b.png": 1, str(tmp_path / "elsewhere.png"): "0"}))
    assert find_samples(path) == [
        Item(str(tmp_path / "z/b.png"), 1, "mine"),
        Item(str(tmp_path / "elsewhere.png"), 0, "mine"),
    ]


def test_csv_list(tmp_path):
    path = tmp_path / "mine.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["path", "label", "generator", "caption"])
        writer.writeheader()
        writer.writerows(ROWS)
    assert find_samples(path) == expected_of_list(tmp_path)


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("a.json", "{", "not readable as JSON"),
        ("a.json", "[1, 2]", "expected a JSON array"),
        ("a.json", "[]", "list is empty"),
        ("a.json", '[{"path": "x.png"}]', "entry 1: label None is unknown"),
        ("a.json", '[{"path": "x.png", "label": 0}, {"label": 1}]', "entry 2: path is missing"),
        ("a.json", '{"x.png": 2}', "entry 1: label 2 is unknown"),
        ("a.json", '[{"path": "x.png", "label": 0, "caption": ["a"]}]', "entry 1: caption is not text"),
        ("a.csv", "x.png,0\n", "must name the columns path and label"),
        ("a.csv", "", "must name the columns path and label"),
        ("a.csv", "path,label\n", "list is empty"),
        ("a.csv", "path,label\nx.png,0\ny.png,\n", "line 3: label '' is unknown"),
        ("a.csv", b"path,label\n\xff\xfe.png,0\n", "not readable as CSV in UTF-8"),
    ],
)
def test_bad_lists_are_named_in_one_line(tmp_path, name, text, reason):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=reason) as error:
        find_samples(tmp_path / name)
    assert one_line(error) and str(tmp_path / name) in str(error.value)


# Captions


@pytest.fixture
def captioned(tmp_path):
    root = tree(tmp_path / "root", "gan/0_real/a.png", "gan/1_fake/b.png")
    return root, find_samples(root)


def captions_of(samples):
    return [sample.caption for sample in samples]


def test_captions_by_every_kind_of_key(captioned, tmp_path):
    root, samples = captioned
    captions = tmp_path / "texts" / "all.json"
    captions.parent.mkdir()
    keys = (
        [samples[0].path, samples[1].path],
        ["gan/0_real/a.png", "./gan/1_fake/b.png"],
        ["../root/gan/0_real/a.png", "../root/gan/1_fake/b.png"],
    )
    for first, second in keys:
        captions.write_text(json.dumps({first: "real", second: "fake", "unused.png": "x"}))
        assert captions_of(attach_captions(samples, captions, root)) == ["real", "fake"]


def test_relative_root(captioned, tmp_path, monkeypatch):
    root, samples = captioned
    (root / "captions.json").write_text(json.dumps({s.path: "absolute" for s in samples}))
    monkeypatch.chdir(tmp_path)
    assert captions_of(attach_captions(find_samples("root"), "auto", "root")) == ["absolute"] * 2


def test_auto_reads_the_root_and_its_splits(tmp_path):
    tree(tmp_path, "train/gan/0_real/a.png", "val/gan/0_real/a.png")
    for split in ("train", "val"):
        (tmp_path / split / "captions.json").write_text(json.dumps({"gan/0_real/a.png": split}))
        samples = find_samples(tmp_path, split)
        assert captions_of(attach_captions(samples, "auto", tmp_path)) == [split]
        assert captions_of(attach_captions(samples, "auto", tmp_path / split)) == [split]


def test_captions_of_a_list_are_kept_and_completed(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ROWS))
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": "from the file", "z/b.png": "not this"}))
    samples = attach_captions(find_samples(path), "auto", path)
    assert captions_of(samples) == ["a cat, sitting", "from the file"]
    assert captions_of(attach_captions(samples, "none", path)) == ["", ""]


def test_missing_captions_are_counted_with_the_remedy(captioned):
    root, samples = captioned
    with pytest.raises(UserError, match=r"2 of 2 images .*captions\.json, which does not exist"):
        attach_captions(samples, "auto", root)
    (root / "captions.json").write_text(json.dumps({"gan/0_real/a.png": "x"}))
    with pytest.raises(UserError) as error:
        attach_captions(samples, "auto", root)
    message = str(error.value)
    assert one_line(error) and message.startswith(
        f"1 of 2 images have no caption, the first is {samples[1].path}"
    )
    assert f"`dgsnet caption --data {root}`" in message and "captions none" in message


@pytest.mark.parametrize(
    "text, reason", [("[1]", "JSON object"), ('{"a": 1}', "JSON object"), ("{", "as JSON")]
)
def test_unusable_captions(captioned, tmp_path, text, reason):
    root, samples = captioned
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=rf"c\.json.*{reason}"):
        attach_captions(samples, tmp_path / "c.json", root)
    with pytest.raises(UserError, match=r"nowhere\.json.*No such file"):
        attach_captions(samples, tmp_path / "nowhere.json", root)


# Loading


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


def dataset_of(folder, train=True, seed=0):
    samples = attach_captions(find_samples(folder), "none", folder)
    return ImageDataset(samples, PREPROCESS, train=train, seed=seed)


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


def test_batches_do_not_depend_on_workers(folder):
    loaders = [make_loader(dataset_of(folder), batch_size=5, workers=n, shuffle=True, seed=3) for n in (0, 2)]
    for epoch in (0, 1, 0):
        same(*(epoch_of(loader, epoch) for loader in loaders))


def test_order_and_augmentation_change_with_epoch_and_seed(folder):
    loader = make_loader(dataset_of(folder), batch_size=16, shuffle=True)
    first, second = epoch_of(loader, 0)[0], epoch_of(loader, 1)[0]
    assert first["index"].tolist() != second["index"].tolist()
    assert sorted(first["index"].tolist()) == sorted(second["index"].tolist())
    other = epoch_of(make_loader(dataset_of(folder), batch_size=16, shuffle=True, seed=1), 0)[0]
    assert other["index"].tolist() != first["index"].tolist()
    assert other["index"].tolist() != second["index"].tolist()  # seed and epoch do not add up
    dataset, reseeded = dataset_of(folder), dataset_of(folder, seed=1)
    pixels = [dataset[0]["pixels"]]
    dataset.set_epoch(1)
    pixels += [dataset[0]["pixels"], reseeded[0]["pixels"]]
    assert not any(torch.equal(pixels[i], pixels[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_workers_end_with_their_parent_and_one_of_them_warns(folder):
    loader = make_loader(dataset_of(folder), batch_size=5, workers=2, told=True)
    assert loader.worker_init_fn.func is start_worker
    assert loader.worker_init_fn.keywords == {"told": True}


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
    for i, size in enumerate([(300, 70), (64, 64), (31, 200), (90, 90)]):  # some must be enlarged
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
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        batches = slowly(wait)
        watch.start()
        for _ in range(steps):
            watch.next(batches)
            time.sleep(work)
            watch.step(4)
    return [str(warning.message) for warning in told]


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
    assert not [told for _ in range(8) for told in watched(watch, wait=0.02, work=0.001, steps=2)]


def test_remedies_fit_the_machine():
    watch = QuickWatch(workers=usable_cores(), device=torch.device("cpu"))
    (message,) = watched(watch, wait=0.02, work=0.001)
    assert "cores are busy: scale the images down" in message
