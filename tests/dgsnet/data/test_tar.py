"""Shards written by the webdataset package: what is read from them, in which order, and what is refused."""

import io
import itertools
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.data.captions import attach_captions
from dgsnet.data.images import ImageError
from dgsnet.data.items import Item, find_items, find_samples
from dgsnet.data.loading import SHARDS_MIXED, ImageDataset, epoch_order, make_loader
from dgsnet.data.preprocess import Preprocessor
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.evaluation.evaluate import evaluate
from dgsnet.model.checkpoint import build_model, save_model
from PIL import Image

PREPROCESS = Preprocessor(PreprocessConfig(mode="crop", image_size=16))


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def png(seed):
    file = io.BytesIO()
    Image.fromarray(picture(seed)).save(file, "png")
    return file.getvalue()


def write(path, records):
    """One shard, as the library writes it; a record's first entry is its key."""
    with webdataset.TarWriter(str(path)) as writer:
        for key, members in records:
            writer.write({"__key__": key, **members})
    return path


@pytest.fixture
def numbered(tmp_path):
    """Three shards of 4 samples, labels alternating; "photos-00.tar" and so on."""
    with webdataset.ShardWriter(
        str(tmp_path / "photos-%02d.tar"), maxcount=4, verbose=0, encoder=True
    ) as writer:
        for i in range(12):
            text = f"picture {i}"
            writer.write({"__key__": f"{i:04d}", "png": picture(i), "cls": i % 2, "txt": text})
    return tmp_path


def test_every_sample_with_its_label_caption_and_pixels(numbered):
    samples = find_samples(str(numbered / "photos-{00..02}.tar"))
    assert [s.label for s in samples] == [0, 1] * 6
    assert [s.caption for s in samples] == [f"picture {i}" for i in range(12)]
    assert {s.generator for s in samples} == {"photos"}
    assert samples[5].path == str(numbered / "photos-01.tar" / "0005.png")
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(sample.read(), picture(i))
    assert attach_captions(samples, "auto", str(numbered / "photos-{00..02}.tar")) == samples


def test_the_library_reads_the_same(numbered):
    ours = find_samples(str(numbered / "photos-*.tar"))
    theirs = webdataset.WebDataset(
        [str(numbered / f"photos-{i:02d}.tar") for i in range(3)], shardshuffle=False
    ).decode("rgb8")
    for sample, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(sample.read(), other["png"])
        assert (sample.label, sample.caption) == (other["cls"], other["txt"])


def test_names_of_shards(numbered):
    for source, count in {
        "photos-{00..02}.tar": 12,
        "photos-{00,02}.tar": 8,
        "photos-*.tar": 12,
        "photos-01.tar": 4,
        # No archive comes twice.
        "{photos-00,photos-0*}.tar": 12,
    }.items():
        samples = find_samples(numbered / source)
        assert len(samples) == count and {s.generator for s in samples} == {"photos"}
    for source, reason in {
        "photos-{00..03}.tar": r"photos-03\.tar: no such archive",
        "other-*.tar": "no such archive",
        "photos-{00.tar": "braces do not match",
    }.items():
        with pytest.raises(UserError, match=reason):
            find_samples(numbered / source)


def test_where_label_caption_and_generator_come_from(tmp_path):
    sd = json.dumps({"label": "fake", "generator": "sd14", "caption": "a dog"})
    write(
        tmp_path / "mixed.tar",
        [
            ("a", {"jpg": png(0), "json": sd}),
            # .cls and .txt win over .json.
            ("b", {"png": png(1), "json": sd, "cls": "real", "txt": "a cat"}),
            ("train/progan/cat/0_real/c", {"webp": png(2)}),
            ("progan/1_fake/d", {"png": png(3), "txt": ""}),
            ("0_real/e", {"PNG": png(4), "cls": "generated"}),
        ],
    )
    found = [(s.label, s.generator, s.caption) for s in find_samples(tmp_path / "mixed.tar")]
    assert found == [
        (1, "sd14", "a dog"),
        (0, "sd14", "a cat"),
        (0, "progan", None),
        (1, "progan", None),
        (1, "mixed", None),
    ]


def test_captions_from_a_json_beside_the_shards(tmp_path):
    write(tmp_path / "x-0.tar", [("a", {"png": png(0), "cls": "0"}), ("b", {"png": png(1), "cls": "1"})])
    samples = find_samples(tmp_path / "x-0.tar")
    with pytest.raises(UserError, match="2 of 2 images have no caption"):
        attach_captions(samples, "auto", tmp_path / "x-0.tar")
    (tmp_path / "captions.json").write_text(json.dumps({"x-0.tar/a.png": "one", "x-0.tar/b.png": "two"}))
    captioned = attach_captions(samples, "auto", tmp_path / "x-0.tar")
    assert [s.caption for s in captioned] == ["one", "two"]
    np.testing.assert_array_equal(captioned[1].read(), picture(1))


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([("a", {"png": b"0"})], r"x\.tar, a: label None is unknown"),
        ([("a", {"png": b"0", "cls": "7"})], "a: label '7' is unknown"),
        ([("a", {"png": b"0", "jpg": b"0", "cls": "0"})], "a: 2 images under one key"),
        ([("a", {"png": b"0", "json": "{"})], r"a\.json: not readable as JSON"),
        ([("a", {"png": b"0", "json": "[]"})], r"a\.json: expected an object"),
        ([("a", {"png": b"0", "json": '{"label": 0, "caption": 3}'})], "caption is not text"),
        ([("a", {"png": b"0", "cls": b"\xff"})], "not text in UTF-8"),
        ([("a", {"cls": "0"}), ("b", {"png": b"0", "cls": "0"})], "a has no image; .* neighbours"),
        ([("a", {"png": b"0", "cls": "0"}), ("b", {"png": b"0", "cls": "0"})] * 2, "a comes twice"),
        ([("a", {"mp3": b"0"})], "holds no images"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, records, reason):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for key, members in records:
            for extension, content in members.items():
                content = content if isinstance(content, bytes) else content.encode()
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match=reason) as error:
        find_samples(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_shards_that_are_damaged_compressed_or_cut(numbered):
    whole = (numbered / "photos-00.tar").read_bytes()
    with tarfile.open(numbered / "gz.tar", "w:gz") as tar:
        tar.add(numbered / "photos-01.tar", "a.png")
    (numbered / "text.tar").write_text("hello" * 1000)
    # Within the data of a member, and within a header.
    (numbered / "cut1.tar").write_bytes(whole[:700])
    (numbered / "cut2.tar").write_bytes(whole[: len(whole) // 2 // 512 * 512 + 100])
    for name in ("gz", "text", "cut1", "cut2"):
        with pytest.raises(UserError, match=rf"{name}\.tar: not readable .*complete and uncompressed"):
            find_samples(numbered / f"{name}.tar")


@pytest.mark.parametrize(
    "name", ["a.tar", "a.tar.gz", "a.TGZ", "a.tar.bz2", "a.tbz2", "a.tar.xz", "a.txz", "a.tar.zst"]
)
def test_a_compressed_tar_is_called_one_whatever_its_name(tmp_path, name):
    path = tmp_path / name
    if name.endswith("zst"):
        # Python knows Zstandard from 3.14 on.
        path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    else:
        kind = "gz" if name.lower().endswith("gz") else "bz2" if name.endswith("2") else "xz"
        with tarfile.open(path, f"w:{kind}") as tar:
            tar.addfile(tarfile.TarInfo("0_real/a.png"))
    message = r"not readable as a tar archive \(a compressed tar\); shards must be complete and uncompressed"
    with pytest.raises(UserError, match=message) as error:
        find_samples(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    for named in (path, tmp_path / "a*"):
        (item,) = find_items([named])
        assert re.fullmatch(message, item.error) and not item.missing


def test_a_shard_that_changes_later_damages_only_images(numbered):
    samples = find_samples(numbered / "photos-02.tar")
    (numbered / "photos-02.tar").write_bytes(b"short")
    with pytest.raises(ImageError, match=r"photos-02\.tar/0008\.png: "):
        samples[0].read()
    (numbered / "photos-02.tar").unlink()
    assert "0009.png: no such file" in ImageDataset(samples, PREPROCESS, train=False)[1]["error"]


def test_batches_do_not_depend_on_workers(numbered):
    dataset = ImageDataset(find_samples(numbered / "photos-*.tar"), PREPROCESS, train=True)
    batches = [list(make_loader(dataset, batch_size=5, workers=workers, shuffle=True)) for workers in (0, 2)]
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a["pixels"], b["pixels"]) and a["captions"] == b["captions"]
        assert not a["errors"] and not b["errors"]


def test_evaluation_scores_images_in_shards(numbered, tmp_path_factory):
    model = ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=0)
    config = Config(model=model, preprocess=PreprocessConfig(mode="crop", image_size=32))
    folder = tmp_path_factory.mktemp("model") / "model"
    detector = Detector.load(save_model(folder, build_model(config, with_text=False), config))
    samples = find_samples(numbered / "photos-*.tar")
    scores = evaluate(detector, samples, workers=0, progress=False).scores
    expected = detector.predict([picture(i) for i in range(12)])
    assert [score.probability for score in scores] == pytest.approx(expected, abs=1e-5)
    assert [(score.path, score.label) for score in scores] == [(s.path, s.label) for s in samples]


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    captions = {}
    for i in range(6):
        name = f"sd14/{('0_real', '1_fake')[i % 2]}/{i}.png"
        path = tmp_path / "photos" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
        captions[f"train/{name}"] = f"picture {i}"
    (tmp_path / "photos" / "captions.json").write_text(json.dumps(captions))
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    samples = sorted(find_samples("photos-*.tar"), key=lambda sample: sample.caption)
    assert [(s.label, s.generator, s.caption) for s in samples] == [
        (i % 2, "sd14", f"picture {i}") for i in range(6)
    ]
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(sample.read(), picture(i))


# The order of an epoch


def fake_samples(archives, per_archive, files=0):
    members = [
        Item(f"{a}.tar/{i}.png", 0, "x", container=f"{a}.tar")
        for a in range(archives)
        for i in range(per_archive)
    ]
    return [*(Item(f"{i}.png", 0, "x") for i in range(files)), *members]


@pytest.mark.parametrize(("archives", "files"), [(0, 50), (1, 0), (40, 0), (40, 333), (3, 7)])
def test_every_image_once_in_an_order_that_seed_and_epoch_decide(archives, files):
    samples = fake_samples(archives, 9, files)
    order = epoch_order(samples, np.random.default_rng((3, 1)))
    assert sorted(order) == list(range(len(samples)))
    assert (order == epoch_order(samples, np.random.default_rng((3, 1)))).all()
    for other in ((3, 2), (4, 1)):
        assert (order != epoch_order(samples, np.random.default_rng(other))).any()


def test_few_shards_are_read_at_a_time_and_mixed_with_files():
    samples = fake_samples(100, 50, files=700)
    order = epoch_order(samples, np.random.default_rng(0))
    archives = [samples[i].container for i in order]
    for window in np.array_split(np.arange(len(order)), 7):
        inside = [archives[i] for i in window]
        assert len(set(inside) - {""}) <= 2 * SHARDS_MIXED
        assert 80 < inside.count("") < 120
        # The shards of a window are mixed: neighbours are seldom of one shard.
        assert np.mean([a == b for a, b in itertools.pairwise(inside)]) < 0.25
    spread = [np.ptp([i for i, name in enumerate(archives) if name == f"{a}.tar"]) for a in range(100)]
    assert max(spread) <= SHARDS_MIXED * 50 + 101
