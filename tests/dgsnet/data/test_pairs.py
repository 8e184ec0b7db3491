"""Which images are twins, and how they come to training."""

import numpy as np
import pytest
import torch
from dgsnet.config import Config, DataConfig, OptimConfig, PreprocessConfig
from dgsnet.data.distortions import Degradations
from dgsnet.data.items import Item, find_samples
from dgsnet.data.loading import EpochSampler, ImageDataset, collate, pixels_on
from dgsnet.data.pairs import TWINS_FILE, attach_twins, find_pairs
from dgsnet.data.preprocess import Preprocessor
from dgsnet.errors import UserError
from dgsnet.training.checks import check_pairs
from PIL import Image

from tests.support.datasets import tree


def named(samples, pairs, root):
    return {tuple(samples[place].path[len(str(root)) + 1 :] for place in pair) for pair in pairs}


def found(root, split=None):
    samples = attach_twins(find_samples(root, split), root)
    return named(samples, find_pairs(samples), root)


def test_names_make_twins_within_a_generator_whatever_the_ending(tmp_path):
    tree(
        tmp_path,
        *("gan/0_real/a.png", "gan/1_fake/a.jpg", "gan/1_fake/b.png", "vae/0_real/b.png"),
        *("vae/cat/0_real/c.png", "vae/dog/1_fake/c.png", "vae/dog/0_real/c.png"),
    )
    assert found(tmp_path) == {
        ("gan/0_real/a.png", "gan/1_fake/a.jpg"),
        ("vae/dog/0_real/c.png", "vae/dog/1_fake/c.png"),
    }


def test_a_table_decides_in_place_of_names(tmp_path):
    folders = ("train/nature", "train/ai", "val/nature", "val/ai")
    tree(tmp_path, *(f"{folder}/{i}.png" for folder in folders for i in "01"))
    assert len(found(tmp_path, "train")) == 2
    (tmp_path / "train" / "twins.csv").write_text("path,twin\nnature/0.png,ai/1.png\nnature/0.png,ai/0.png\n")
    (tmp_path / "twins.csv").write_text(
        "path,twin,by\nval/nature/1.png,val/ai/0.png,x\nval/nature/0.png,,x\n"
    )
    assert found(tmp_path, "train") == {
        ("train/nature/0.png", "train/ai/1.png"),
        ("train/nature/0.png", "train/ai/0.png"),
    }
    assert found(tmp_path, "val") == {("val/nature/1.png", "val/ai/0.png")}


def test_a_list_names_twins_itself(tmp_path):
    tree(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "list.csv").write_text("path,label,twin\na.png,1,b.png\nb.png,0,a.png\nc.png,1,\n")
    samples = attach_twins(find_samples(tmp_path / "list.csv"), tmp_path / "list.csv")
    assert named(samples, find_pairs(samples), tmp_path) == {("b.png", "a.png")}


def test_what_makes_no_pair():
    """A twin that is not there, one of the same class, and one of itself."""
    samples = [Item("a", 0, twin="x"), Item("b", 0, twin="c"), Item("c", 0), Item("d", 1, twin="d")]
    assert find_pairs(samples).shape == (0, 2)


def test_images_without_a_twin_are_told_and_counted(capsys):
    config = Config(data=DataConfig(pairs=True))
    samples = [Item("a", 0), Item("b", 0), Item("c", 1, twin="a"), Item("d", 1, twin="gone")]
    check_pairs(config, samples)
    assert "2 of 4 training images have no twin, such as b;" in capsys.readouterr().err
    check_pairs(config, samples[::2])
    check_pairs(Config(), samples[1:])
    assert not any(capsys.readouterr())
    with pytest.raises(UserError, match="no training image has a twin"):
        check_pairs(config, samples[1:])
    with pytest.raises(ValueError, match="batch_size of at least 2"):
        Config(data=DataConfig(pairs="independent"), optim=OptimConfig(batch_size=1))


@pytest.fixture
def dataset(tmp_path):
    """Five real images, two with a twin of the same pixels, one with two, and one generated one alone."""
    tree(tmp_path, *(f"{i}.png" for i in "0123456"))
    for name, of in (("a", 0), ("b", 2), ("c", 2), ("d", 4)):
        (tmp_path / f"{name}.png").write_bytes((tmp_path / f"{of}.png").read_bytes())
    rows = [f"{i}.png,{int(i == '5')}," for i in "0123456"]
    rows += ["a.png,1,0.png", "b.png,1,2.png", "c.png,1,2.png", "d.png,1,4.png"]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,twin", *rows]))
    return find_samples(tmp_path / "list.csv")


PAIRS = {(0, 7), (2, 8), (2, 9), (4, 10)}


def test_an_epoch_has_every_pair_and_every_image_alone_once(dataset):
    pairs = find_pairs(dataset)
    assert set(map(tuple, pairs.tolist())) == PAIRS
    images = ImageDataset(dataset, Preprocessor(PreprocessConfig(mode="crop", image_size=16)), train=True)
    sampler = EpochSampler(images, shuffle=True, seed=3, pairs=pairs)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        units = sampler.left()
        assert {tuple(unit) for unit in units.tolist()} == PAIRS | {(i, -1) for i in (1, 3, 5, 6)}
        assert list(sampler) == [place for unit in units.tolist() for place in unit if place >= 0]
        assert len(sampler) == 12
        orders.append(units.tolist())
        # Gone on with, behind whole units.
        for done in range(1, 8):
            seen = sum(place >= 0 for unit in orders[-1][:done] for place in unit)
            sampler.set_epoch(epoch, skip=seen)
            assert sampler.left().tolist() == orders[-1][done:] and len(sampler) == 12 - seen
    assert orders[0] != orders[1] != orders[2]


def test_twins_have_the_same_crop_mirroring_and_degradations(dataset):
    preprocess = Preprocessor(PreprocessConfig(mode="crop", image_size=16))
    drawn_as = np.arange(11)
    for real, twin in PAIRS:
        drawn_as[twin] = real
    options = {"train": True, "degradations": Degradations.parse(["noise:20@0.5", "jpeg:20..90"])}
    aligned = ImageDataset(dataset, preprocess, drawn_as=drawn_as, **options)
    alone = ImageDataset(dataset, preprocess, **options)
    for epoch in range(4):
        aligned.set_epoch(epoch)
        alone.set_epoch(epoch)
        for real, twin in PAIRS:
            assert torch.equal(aligned[real]["pixels"], aligned[twin]["pixels"])
            assert torch.equal(aligned[real]["pixels"], alone[real]["pixels"])
            assert not torch.equal(alone[real]["pixels"], alone[twin]["pixels"])


@pytest.mark.parametrize("selection", ["workers", "device"])
def test_in_mode_patches_the_real_image_decides_for_its_twin(tmp_path, selection):
    rng = np.random.default_rng(3)
    config = PreprocessConfig(image_size=32, patch_size=8, num_patches=16, flip=False)
    preprocess = Preprocessor(config)
    # 64 patches whose noise differs, and twins that show in each patch which one it is.
    strength = rng.permutation(64).reshape(8, 8)
    real = 128 + np.kron(strength, np.ones((8, 8)))[..., None] * rng.normal(size=(64, 64, 3))
    twin = np.kron(np.arange(64).reshape(8, 8), np.ones((8, 8)))[..., None].repeat(3, axis=2)
    for name, image in (("real", real), ("twin", twin), ("larger", np.concatenate([twin, twin[:8]]))):
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "damaged.png").write_bytes(b"no image")
    names = ("real", "twin", "larger", "damaged", "twin")
    samples = [Item(str(tmp_path / f"{name}.png"), int(name != "real")) for name in names]
    how = {"train": True, "selection": selection, "degradations": Degradations.parse(["brightness:0.5"])}
    paired = ImageDataset(samples, preprocess, drawn_as=np.array([0, 0, 0, 3, 3]), **how)
    alone = ImageDataset(samples, preprocess, **how)

    def pixels(dataset, place):
        return pixels_on(torch.device("cpu"), collate([dataset.item(place, 0)]), preprocess)[0]

    degraded = how["degradations"](real.clip(0, 255).astype(np.uint8), np.random.default_rng((0, 0, 0, 1)))
    cells, boxes = preprocess.boxes(degraded, rng=np.random.default_rng((0, 0, 0)))
    shown = torch.empty(32, 32)
    for (left, top, right, bottom), (x, y, *_) in zip(cells.tolist(), boxes.long().tolist()):
        shown[top:bottom, left:right] = (y // 8 * 8 + x // 8) // 2
    expected = preprocess.normalise(shown.to(torch.uint8).expand(3, 32, 32))
    assert torch.equal(pixels(paired, 1), expected)
    assert not torch.equal(pixels(alone, 1), expected)
    assert torch.equal(pixels(paired, 0), pixels(alone, 0))
    # Beside an image of another size, or one that cannot be read, each has its own.
    for place in (2, 4):
        assert pixels(paired, place).isfinite().all()


def test_a_row_that_ends_too_early_names_no_pair(tmp_path):
    samples = [Item(str(tmp_path / name), label) for label, name in enumerate(("a.png", "b.png"))]
    (tmp_path / TWINS_FILE).write_text("twin,path\nb.png\nb.png,a.png\na.png\n")
    assert [sample.twin for sample in attach_twins(samples, tmp_path)] == [None, samples[0].path]
