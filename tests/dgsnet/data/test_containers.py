"""The same images in folders, lists, archives and Parquet: the same labels, pixels and bounds."""

import csv
import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dgsnet.config import PreprocessConfig
from dgsnet.data.images import ImageError
from dgsnet.data.items import Item, find_items, find_labelled, find_samples
from dgsnet.data.loading import ImageDataset, make_loader
from dgsnet.data.preprocess import Preprocessor
from dgsnet.errors import UserError

from tests.support.pictures import encode, picture

LABELS = (0, 1, 1, 0, 1)
PICTURES = [picture(40 + 3 * i, 70 - 4 * i, seed=i) for i in range(len(LABELS))]
FILES = [encode(pixels, "png") for pixels in PICTURES]
CAPTIONS = [f"picture {i}" for i in range(len(LABELS))]
# Pictures 1 and 2 were made from 0 and 3; of 4 nothing is known.
TWINS = (None, 0, 3, None, None)
CATEGORIES = ("night", None, "old scan", "night", "")


def folder(root, files=FILES):
    """0_real comes first: the images in another order than elsewhere, so that each is known by its pixels."""
    for i, (label, data) in enumerate(zip(LABELS, files)):
        path = root / "photos" / ("0_real", "1_fake")[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root / "photos"


def listed(root, files):
    (root / "pictures").mkdir()
    for i, data in enumerate(files):
        (root / "pictures" / f"{i}.png").write_bytes(data)
    called = [f"pictures/{i}.png" for i in range(len(files))]
    return [
        {"path": called[i], "label": label, "generator": "photos", "caption": CAPTIONS[i]}
        | {"twin": None if TWINS[i] is None else called[TWINS[i]], "category": CATEGORIES[i]}
        for i, label in enumerate(LABELS)
    ]


def csv_list(root, files=FILES):
    rows = listed(root, files)
    with (root / "photos.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root / "photos.csv"


def json_list(root, files=FILES):
    (root / "photos.json").write_text(json.dumps(listed(root, files)))
    return root / "photos.json"


def add(tar, name, data=b"", kind=tarfile.REGTYPE, **header):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), kind, "/etc/passwd" if kind in b"12" else ""
    member.pax_headers = header
    tar.addfile(member, io.BytesIO(data))


def shards(root, files=FILES):
    for number in range(2):
        with tarfile.open(root / f"photos-{number}.tar", "w") as tar:
            for i in range(len(files))[3 * number : 3 * number + 3]:
                for kind, data in {
                    "png": files[i],
                    "cls": str(LABELS[i]).encode(),
                    "txt": CAPTIONS[i].encode(),
                    "json": json.dumps(
                        {"category": CATEGORIES[i]}
                        | ({} if TWINS[i] is None else {"twin": f"{TWINS[i]}.png"})
                    ).encode(),
                }.items():
                    add(tar, f"{i}.{kind}", data)
    return root / "photos-*.tar"


def parquet(root, files=FILES):
    columns = {"image": list(files), "label": LABELS, "caption": CAPTIONS, "twin": TWINS}
    columns["category"] = CATEGORIES
    for number in range(2):
        part = {name: values[3 * number : 3 * number + 3] for name, values in columns.items()}
        pq.write_table(pa.table(part), root / f"photos-{number}.parquet", row_group_size=2)
    return root / "photos-*.parquet"


KINDS = {make.__name__: make for make in (folder, csv_list, json_list, shards, parquet)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def numbers(items):
    """Which of PICTURES each item is."""
    by_pixels = {pixels.tobytes(): i for i, pixels in enumerate(PICTURES)}
    return [by_pixels[item.read().tobytes()] for item in items]


@every_kind
def test_labels_generators_captions_and_pixels(kind, tmp_path):
    source = KINDS[kind](tmp_path)
    items = find_samples(source)
    found = numbers(items)
    assert sorted(found) == list(range(len(LABELS)))
    assert [item.label for item in items] == [LABELS[i] for i in found]
    assert {item.generator for item in items} == {"photos"}
    assert [item.caption for item in items] == [None if kind == "folder" else CAPTIONS[i] for i in found]
    assert [item.category for item in items] == [
        "" if kind == "folder" else CATEGORIES[i] or "" for i in found
    ]
    assert len({item.path for item in items}) == len(items)
    assert find_labelled(source) == items


@pytest.mark.parametrize("kind", ["csv_list", "json_list", "shards", "parquet"])
def test_twins(kind, tmp_path):
    """A twin's path is the one that its item has, where both are in one list, archive or table."""
    items = find_samples(KINDS[kind](tmp_path))
    names = {"shards": "photos-0.tar/{}.png", "parquet": "photos-0.parquet/{}"}.get(kind, "pictures/{}.png")
    twins = [None if twin is None else f"{tmp_path}/{names.format(twin)}" for twin in TWINS]
    assert [item.twin for item in items] == twins and items[1].twin == items[0].path


@pytest.mark.parametrize(
    ("field", "why"),
    [
        ({"twin": ["y.png"]}, "twin is not text"),
        ({"category": ["night"]}, "category is no text of at most 200 letters"),
        ({"category": "n" * 201}, "category is no text of at most 200 letters"),
    ],
)
def test_what_is_no_text_is_refused(field, why, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"path": "x.png", "label": 1} | field]))
    with pytest.raises(UserError, match=f"entry 1: {why}"):
        find_samples(tmp_path / "a.json")


def test_a_list_without_labels_has_categories_too(tmp_path):
    (tmp_path / "a.csv").write_text("category,path\nnight,a.png\n,b.png\n")
    assert [item.category for item in find_items([tmp_path / "a.csv"])] == ["night", ""]


@every_kind
def test_scoring_finds_the_same_images_without_asking_for_labels(kind, tmp_path):
    source = KINDS[kind](tmp_path)
    items = list(find_items([str(source)]))
    assert sorted(numbers(items)) == list(range(len(LABELS)))
    assert {item.path for item in items} == {item.path for item in find_samples(source)}
    assert all(item.label is None for item in items)


@every_kind
def test_a_loader_reads_them_in_any_order_and_process(kind, tmp_path):
    preprocess = Preprocessor(PreprocessConfig(mode="crop", image_size=16))
    dataset = ImageDataset(find_samples(KINDS[kind](tmp_path)), preprocess, train=True, nuisances=True)
    loaders = [
        make_loader(dataset, batch_size=2, workers=workers, shuffle=True, seed=4) for workers in (0, 2)
    ]
    for ours, theirs in zip(*loaders, strict=True):
        assert not ours["errors"] and not theirs["errors"]
        for key in ("pixels", "labels", "index", "hashes", "nuisances"):
            assert torch.equal(ours[key], theirs[key]), key
        draws = [(dataset.samples[i], np.random.default_rng((0, 0, i))) for i in ours["index"].tolist()]
        expected = [preprocess(sample.read(), rng=rng) for sample, rng in draws]
        assert torch.equal(ours["pixels"], torch.stack(expected))


@every_kind
def test_an_image_is_read_once_for_all_that_is_asked_of_it(kind, tmp_path, monkeypatch):
    dataset = ImageDataset(
        find_samples(KINDS[kind](tmp_path)),
        Preprocessor(PreprocessConfig(mode="crop", image_size=16)),
        train=False,
        nuisances=True,
    )
    read, once = [], Item.read_bytes
    monkeypatch.setattr(Item, "read_bytes", lambda item: read.append(item.path) or once(item))
    assert {"pixels", "hash", "nuisances"} <= dataset[1].keys()
    assert read == [dataset.samples[1].path]


@every_kind
def test_a_damaged_image_costs_one_row_and_ends_nothing(kind, tmp_path):
    source = KINDS[kind](tmp_path, [FILES[0], FILES[1][:40], b"", *FILES[3:]])
    for items in (find_samples(source), list(find_items([str(source)]))):
        bad = []
        for item in items:
            try:
                item.read()
            except ImageError as error:
                assert str(error).startswith(f"{item.path}: ") and "\n" not in str(error)
                bad.append(item)
        assert len(bad) == 2


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.tar", "a.parquet"])
def test_a_pipe_under_a_containers_name_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    try:
        [item] = find_items([str(tmp_path / name)])
        assert "not a regular file" in item.error
    except UserError as error:
        assert "not a regular file" in str(error)
    if name != "a.txt":
        with pytest.raises(UserError, match="not a regular file") as error:
            find_samples(tmp_path / name)
        assert "\n" not in str(error.value)


def test_members_of_a_tar_that_are_not_read_are_rows_with_the_reason(tmp_path):
    source = tmp_path / "odd.tar"
    sparse = {"size": 2**40, "map": "0,1", "major": 0, "minor": 1}
    reasons = {"link": "a link in a tar", "hard": "a link in a tar", "pipe": "not a regular file"}
    reasons |= {"sparse": "a sparse file", "good": ""}
    with tarfile.open(source, "w") as tar:
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE)):
            add(tar, f"{name}.png", kind=kind)
            add(tar, f"{name}.cls", b"1")
        add(tar, "sparse.png", b"x", **{f"GNU.sparse.{name}": str(value) for name, value in sparse.items()})
        add(tar, "sparse.cls", b"1")
        add(tar, "good.png", FILES[2])
        add(tar, "good.cls", b"0")
    samples = find_samples(source)
    assert [sample.label for sample in samples] == [1, 1, 1, 1, 0]
    for items in (samples, list(find_items([str(source)]))):
        for item, (name, reason) in zip(items, reasons.items(), strict=True):
            assert item.path == f"{source}/{name}.png" and item.error.startswith(reason)
            if reason:
                with pytest.raises(ImageError, match=reason):
                    item.read()
    with tarfile.open(source, "w") as tar:
        for name in ("/etc/a", "a/../../b"):
            add(tar, f"{name}.png", FILES[0])
            add(tar, f"{name}.json", b'{"label": 1}')
    assert all("leads out of the tar" in item.error for item in find_items([str(source)]))
    with pytest.raises(UserError, match="label None is unknown"):
        # A text that leads out of the tar is not read.
        find_samples(source)


@pytest.mark.parametrize("kind", ["cls", "txt", "json"])
def test_texts_of_a_tar_are_bounded(kind, tmp_path):
    with tarfile.open(tmp_path / "long.tar", "w") as tar:
        for name, size in (("a.png", 5), (f"a.{kind}", 2**20 + 1)):
            add(tar, name, bytes(size))
    with pytest.raises(UserError, match=rf"a\.{kind}: a text of more than 1,048,576 bytes") as error:
        find_samples(tmp_path / "long.tar")
    assert "\n" not in str(error.value)


def test_headers_of_a_tar_are_bounded_for_training_too(tmp_path):
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2**34
    (tmp_path / "huge.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="a header of 17179869184 bytes") as error:
        find_samples(tmp_path / "huge.tar")
    assert "\n" not in str(error.value)


def test_one_image_without_a_label_among_others_is_a_mistake(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"path": "x.png", "label": 1}, {"path": "y.png"}]))
    with pytest.raises(UserError, match="entry 2: label None is unknown"):
        find_labelled(tmp_path / "a.json")
    for name, text in (("none.json", '[{"path": "x.png"}]'), ("none.csv", "path,size\nx.png,3\n")):
        (tmp_path / name).write_text(text)
        assert find_labelled(tmp_path / name) == []
    with tarfile.open(tmp_path / "none.tar", "w") as tar:
        add(tar, "x.png")
    pq.write_table(pa.table({"image": FILES}), tmp_path / "none.parquet")
    for name in ("none.tar", "none.parquet", "nothing.tar", "photos/*.png", "a.png"):
        assert find_labelled(tmp_path / name) == []
