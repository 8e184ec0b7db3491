"""The built-in dataset: both classes alike in all but the decoding, and the demo's configuration."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from dgsnet import builtin
from dgsnet.builtin import pretrain
from dgsnet.builtin.decoders import DECODERS
from dgsnet.data.captions import attach_captions
from dgsnet.data.images import read_image
from dgsnet.data.items import FOLDERS, find_samples
from dgsnet.data.nuisances import NUISANCES, file_nuisances
from dgsnet.data.pairs import attach_twins, find_pairs
from PIL import Image


@pytest.fixture(scope="module")
def root(tmp_path_factory, module_counts):
    return builtin.write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def module_counts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, "COUNTS", {"train": 6, "val": 5, "test": 4})
        yield builtin.COUNTS


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(
        b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)
    ).hexdigest()


def test_decoder_families_of_the_test_are_not_trained_on():
    assert set(builtin.FAMILIES["val"]) <= set(builtin.FAMILIES["train"])
    assert not set(builtin.FAMILIES["test"]) & set(builtin.FAMILIES["train"])
    assert set().union(*builtin.FAMILIES.values()) == set(DECODERS)


def test_dataset_layout_and_captions(root, module_counts):
    for split, count in module_counts.items():
        captions = json.loads((root / split / "captions.json").read_text())
        images = {p.relative_to(root / split).as_posix() for p in (root / split).rglob("*.png")}
        assert images == set(captions)
        for family in builtin.FAMILIES[split]:
            for name in FOLDERS:
                assert sum(path.startswith(f"{family}/{name}/") for path in images) == count
        samples = attach_captions(find_samples(root / split), "auto", root / split)
        assert sum(sample.label for sample in samples) * 2 == len(samples) == len(images)
        assert {sample.generator for sample in samples} == set(builtin.FAMILIES[split])
        for path in (root / split).rglob("*.png"):
            with Image.open(path) as image:
                assert (image.mode, image.size) == ("RGB", (builtin.SIZES[split],) * 2)


@pytest.mark.parametrize("decoder", [True, "shuffle"])
def test_twins_differ_in_the_decoding_alone(root, decoder, tmp_path, monkeypatch):
    """With a decoder that does nothing they are the same file, JPEG and all; the real ones are as without."""
    shares, splits = (0.8, 0.2), ("train",)
    plain = builtin.write_dataset(tmp_path / "plain", splits=splits, compressed=shares)
    twins = builtin.write_dataset(tmp_path / "twins", splits=splits, compressed=shares, twins=decoder)
    own, _ = next(builtin.make_files("train", "nearest", 0, 6, seed=0, compressed=0.8, decoder="nearest"))
    for name in DECODERS:
        monkeypatch.setitem(DECODERS, name, lambda images: images)
    same = builtin.write_dataset(tmp_path / "same", splits=splits, compressed=shares, twins=decoder)
    reals = sorted(path.relative_to(plain) for path in plain.glob("train/*/0_real/*"))
    assert len(reals) == 18
    for real in reals:
        assert (plain / real).read_bytes() == (twins / real).read_bytes() == (same / real).read_bytes()
        twin = real.parent.with_name("1_fake") / real.name
        assert (twins / twin).read_bytes() != (plain / real).read_bytes() == (same / twin).read_bytes()
    samples = attach_twins(find_samples(twins / "train"), twins / "train")
    assert len(find_pairs(samples)) == 18
    (first,) = twins.glob("train/nearest/1_fake/0000.*")
    assert (first.read_bytes() == own) == (decoder is True)


def test_dataset_is_deterministic_and_its_seed_matters(root, tmp_path):
    assert digest(builtin.write_dataset(tmp_path / "again")) == digest(root)
    assert digest(builtin.write_dataset(tmp_path / "other", seed=1)) != digest(root)


@pytest.mark.parametrize("compressed", [None, 0.5])
def test_both_classes_are_degraded_alike(monkeypatch, compressed):
    """With a decoder that does nothing, the classes cannot be told: same steps, same distributions."""
    monkeypatch.setitem(DECODERS, "nothing", lambda images: images)
    statistics, words = [], []
    for label in (0, 1):
        images = list(builtin.make_files("train", "nothing", label, 400, seed=0, compressed=compressed))
        pixels = np.stack([read_image(data) for data, _ in images]).astype(float)
        detail = np.log(1 + np.abs(np.diff(pixels, axis=2)).mean(axis=(1, 2, 3)))
        statistics.append((pixels.mean(axis=(1, 2, 3)), pixels.std(axis=(1, 2, 3)), detail))
        words.append([caption.split(" photo of ")[0] for _, caption in images])
    for real, generated in zip(*statistics):
        spread = np.hypot(real.std(), generated.std()) / np.sqrt(400)
        assert abs(real.mean() - generated.mean()) < 4 * spread
    for kind in set(words[0]) | set(words[1]):
        counts = [w.count(kind) for w in words]
        assert abs(counts[0] - counts[1]) < 4 * np.sqrt(sum(counts)) + 1


def test_compression_is_all_that_a_shortcut_changes():
    """The same crops whatever the share of JPEG files; those files are compressed once, and say so."""
    balanced, biased, none = (
        list(builtin.make_files("train", "shuffle", 1, 60, seed=0, compressed=share))
        for share in (0.5, 0.8, 0)
    )
    qualities = []
    for (data, caption), (other, _), (plain, said) in zip(biased, balanced, none):
        jpeg = data.startswith(builtin.JPEG_MAGIC)
        assert jpeg == (", compressed photo" in caption) and ", uncompressed photo" in said
        assert caption.split(" photo of ")[1] == said.split(" photo of ")[1]
        assert jpeg or data == plain
        # More images are compressed than in the balanced set, and no fewer.
        assert jpeg == other.startswith(builtin.JPEG_MAGIC) or jpeg
        difference = np.abs(read_image(data).astype(int) - read_image(plain)).mean()
        assert (0 < difference < 12) if jpeg else difference == 0
        qualities += [100 * file_nuisances(data)[NUISANCES.index("JPEG quality")]] if jpeg else []
    assert 0.6 < len(qualities) / 60 < 0.95
    assert 69.5 < min(qualities) < 76 and 86 < max(qualities) < 92.5


def test_demo_config_fits_data_and_model(root):
    config = builtin.demo_config(root)
    assert type(config).from_dict(config.to_dict()) == config
    assert (
        config.preprocess.image_size
        == json.loads(pretrain.MODEL_CONFIG.read_text())["vision_cfg"]["image_size"]
    )
    assert all(find_samples(source) for source in config.data.train + config.data.val)
