"""The built-in photographs, decoders and dataset, and the tiny CLIP with its pretraining."""

import hashlib
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from dgsnet import builtin
from dgsnet.builtin import pretrain
from dgsnet.builtin.crops import BLUR, JPEG, NOISE, Quality, degrade, describe, sample_crop
from dgsnet.builtin.decoders import DECODERS
from dgsnet.builtin.photographs import PHOTOGRAPHS, SPLITS, Photograph
from dgsnet.config import ModelConfig
from dgsnet.data.captions import attach_captions
from dgsnet.data.images import read_image
from dgsnet.data.items import FOLDERS, find_samples
from dgsnet.data.nuisances import NUISANCES, file_nuisances
from dgsnet.data.pairs import attach_twins, find_pairs
from dgsnet.errors import UserError
from dgsnet.model.dgsnet import DGSNet
from PIL import Image
from safetensors.torch import load_file

FOLDER = Path(builtin.__file__).parent
WEIGHTS = FOLDER / "dgsnet-tiny.safetensors"


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


def test_photographs_are_disjoint_across_splits_and_large_enough():
    files = [photograph.file for split in SPLITS for photograph in PHOTOGRAPHS[split]]
    assert len(files) == len(set(files))
    pixels = []
    for split in SPLITS:
        for photograph in PHOTOGRAPHS[split]:
            pixels.append(photograph.pixels())
            assert pixels[-1].dtype == np.uint8 and pixels[-1].shape[2] == 3
            assert min(pixels[-1].shape[:2]) >= builtin.SIZES[split] + 2 * builtin.MARGIN
    # Not the same pixels under two names either.
    assert len({hashlib.sha256(p.tobytes()).hexdigest() for p in pixels}) == len(pixels)


def test_regions_lie_in_their_photographs():
    for photograph in (p for split in SPLITS for p in PHOTOGRAPHS[split]):
        for left, top, right, bottom, content in photograph.regions:
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1 and content != photograph.content


def test_degradations_are_drawn_from_their_levels():
    rng, names = np.random.default_rng(0), ("blur", "noise", "jpeg", "gain", "offset")
    drawn = {}
    for quality in (Quality.draw(rng) for _ in range(3000)):
        for name, word in zip(names, (*quality.words, "", "")):
            drawn.setdefault((name, word), []).append(getattr(quality, name))
    ranges = {
        **{("blur", "sharp"): (0, 0.4), ("blur", "soft"): (0.6, 1.1), ("blur", "blurry"): (1.3, 2.2)},
        **{("noise", "clean"): (0, 1), ("noise", "grainy"): (3, 6), ("noise", "noisy"): (8, 14)},
        **{("jpeg", "uncompressed"): (100, 100), ("jpeg", "compressed"): (70, 92)},
        **{("jpeg", "heavily compressed"): (30, 55), ("gain", ""): (0.75, 1.2), ("offset", ""): (-12, 12)},
    }
    assert drawn.keys() == ranges.keys()
    for key, (low, high) in ranges.items():
        tolerance = 0 if key[0] == "jpeg" else (high - low) / 100
        assert low <= min(drawn[key]) <= low + tolerance and high - tolerance <= max(drawn[key]) <= high, key
        assert len(drawn[key]) > 900


def test_decoder_families_of_the_test_are_not_trained_on():
    assert set(builtin.FAMILIES["val"]) <= set(builtin.FAMILIES["train"])
    assert not set(builtin.FAMILIES["test"]) & set(builtin.FAMILIES["train"])
    assert set().union(*builtin.FAMILIES.values()) == set(DECODERS)


def test_the_codebook_keeps_means_and_rounds_details():
    """A cell's mean and three details, by hand for one cell."""
    a, b, c, d = 0.95, 0.13, 0.02, 0.36
    details = [(a - b + c - d) / 4, (a + b - c - d) / 4, (a - b - c + d) / 4]
    x, y, z = (round(10 * detail) / 10 for detail in details)
    mean = (a + b + c + d) / 4
    expected = [[mean + x + y + z, mean - x + y - z], [mean + x - y - z, mean - x - y + z]]
    found = DECODERS["codebook"](torch.tensor([[a, b], [c, d]]).expand(1, 3, 2, 2))
    assert min(abs(x), abs(y), abs(z)) > 0
    torch.testing.assert_close(found, torch.tensor(expected).expand(1, 3, 2, 2))


def test_a_missing_photograph_is_a_user_error():
    with pytest.raises(UserError, match=r"no_such\.png.*reinstall skimage"):
        Photograph("skimage/no_such.png", "nothing").pixels()


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


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_keep_the_picture_and_leave_a_trace(family):
    rng = np.random.default_rng(0)
    crops = [sample_crop(p, 64, rng, contrast=8)[0] for p in PHOTOGRAPHS["train"] for _ in range(4)]
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 255
    decoded = DECODERS[family](images)
    assert decoded.shape == images.shape
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    error = (decoded - images)[inner]
    assert error.square().mean().sqrt() > 0.005
    pooled = torch.stack([F.avg_pool2d(t[inner], 4).flatten() for t in (images, decoded)])
    assert torch.corrcoef(pooled)[0, 1] > 0.98
    assert abs(error.mean()) < 0.03


def test_degrade_does_what_the_caption_says():
    rng = np.random.default_rng(0)
    crop, _ = sample_crop(PHOTOGRAPHS["train"][1], 48, rng)
    same = dict(gain=1.0, offset=0.0, words=("sharp", "clean", "uncompressed"))
    assert np.array_equal(degrade(crop, Quality(0.0, 0.0, 100, **same), rng), crop)

    def roughness(image):
        return np.abs(np.diff(image.astype(float), axis=1)).mean()

    assert roughness(degrade(crop, Quality(2.0, 0.0, 100, **same), rng)) < 0.7 * roughness(crop)
    assert roughness(degrade(crop, Quality(0.0, 12.0, 100, **same), rng)) > 1.1 * roughness(crop)
    assert not np.array_equal(degrade(crop, Quality(0.0, 0.0, 40, **same), rng), crop)
    drawn = [Quality.draw(rng) for _ in range(300)]
    for quality in drawn:
        for value, word, table in zip(
            (quality.blur, quality.noise, quality.jpeg), quality.words, (BLUR, NOISE, JPEG)
        ):
            low, high = next((low, high) for name, low, high in table if name == word)
            assert low <= value <= high
    assert len({quality.words for quality in drawn}) == 27
    assert describe("a cat", ("soft", "noisy", "compressed")) == "a soft, noisy, compressed photo of a cat"


def test_tiny_model_is_small_and_is_what_its_record_says():
    assert WEIGHTS.stat().st_size <= 6_000_000
    weights = load_file(WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    record = json.loads((FOLDER / "dgsnet-tiny.training.json").read_text())
    assert record["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert f"--seed {record['seed']} --steps {record['steps']}" in record["command"]
    clip = open_clip.CLIP(**json.loads(pretrain.MODEL_CONFIG.read_text()))
    clip.load_state_dict(weights)
    # It knows what it was trained for: 24 contents, 3 levels of each quality.
    accuracy = pretrain.zero_shot(clip, seed=123, crops=128)
    assert accuracy["train_content"] > 0.5
    assert accuracy["val_noise"] > 0.6
    model = DGSNet(ModelConfig(name="dgsnet-tiny", pretrained="builtin"))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.teacher_features(pixels), clip.eval().encode_image(pixels))


def test_demo_config_fits_data_and_model(root):
    config = builtin.demo_config(root)
    assert type(config).from_dict(config.to_dict()) == config
    assert (
        config.preprocess.image_size
        == json.loads(pretrain.MODEL_CONFIG.read_text())["vision_cfg"]["image_size"]
    )
    assert all(find_samples(source) for source in config.data.train + config.data.val)


def test_pretraining_runs_and_continues_as_if_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "zero_shot", lambda model, seed: {})
    settings = dict(seed=3, steps=4, batch_size=4, save_every=2)
    whole = load_file(pretrain.pretrain(tmp_path / "whole", **settings))
    save = pretrain._save

    def stop_after_two(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "_save", stop_after_two)
        pretrain.pretrain(tmp_path / "parts", **settings)
    parts = load_file(pretrain.pretrain(tmp_path / "parts", **settings))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(
        not torch.equal(whole[name], tensor.half())
        for name, tensor in pretrain.new_model().state_dict().items()
    )
    record = json.loads((tmp_path / "parts" / "dgsnet-tiny.training.json").read_text())
    assert (record["seed"], record["steps"]) == (3, 4) and record["final_loss"] > 0


def test_pretraining_sees_training_photographs_only():
    batches = pretrain.CaptionedCrops(PHOTOGRAPHS["train"], 64, seed=0, steps=1)
    contents = {words[0] for words in batches[0][2]}
    allowed = {c for p in PHOTOGRAPHS["train"] for c in (p.content, *(r[4] for r in p.regions))}
    assert contents <= allowed
    held = {
        c for s in ("val", "test") for p in PHOTOGRAPHS[s] for c in (p.content, *(r[4] for r in p.regions))
    }
    assert not contents & (held - allowed)
    again = pretrain.CaptionedCrops(PHOTOGRAPHS["train"], 64, seed=0, steps=9)[0]
    assert torch.equal(again[0], batches[0][0]) and torch.equal(again[1], batches[0][1])
