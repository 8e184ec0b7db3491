"""An audit of twins finds no shortcut; without one of the steps that make them alike it finds that one."""

import io

import numpy as np
import pytest
from dgsnet.audit.audit import audit
from dgsnet.audit.shortcuts import find_shortcuts, read_nuisances
from dgsnet.data.items import find_samples
from dgsnet.data.nuisances import NUISANCES, file_nuisances
from dgsnet.data.pairs import attach_twins, find_pairs
from dgsnet.twins.command import twins_command
from PIL import Image, JpegImagePlugin

from tests.dgsnet.twins.conftest import crops

QUALITIES = (35, 60, 75, 90, 97)


def of_camera(number):
    """Metadata, which every second photograph has; those of some are not upright."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", 1 + 5 * (number % 3 == 0)
    return {"exif": exif} if number % 2 else {}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twins of PNG, WebP and JPEG of five qualities, with whole and halved chroma: samples, and places."""
    root = tmp_path_factory.mktemp("twins")
    (root / "photos").mkdir()
    kinds = [
        ("jpg", {"quality": quality, "subsampling": chroma}) for quality in QUALITIES for chroma in (0, 2)
    ]
    kinds += 2 * [("png", {}), ("webp", {"quality": 80}), ("png", {})]
    for number, image in enumerate(crops(4 * len(kinds), seed=2)):
        ending, options = kinds[number % len(kinds)]
        image.save(root / "photos" / f"{number:03d}.{ending}", **options, **of_camera(number // len(kinds)))
    twins_command([str(root / "photos")], str(root / "out"), ["builtin:codebook", "builtin:resizeconv"])
    samples = attach_twins(find_samples(root / "out"), root / "out")
    found = find_pairs(samples)
    assert len(found) == 4 * len(kinds) == 64
    return samples, found


def test_none_is_found(pairs):
    samples, places = pairs
    result = audit(samples)
    assert result.shortcuts.verdict == "none found" and not result.damaged
    # Neither could a better audit find one: but for their length, files of a pair are alike.
    nuisances, _ = read_nuisances(samples)
    differ = np.abs(nuisances[places[:, 0]] - nuisances[places[:, 1]]).max(axis=0) > 0
    assert {name for name, other in zip(NUISANCES, differ) if other} == {"log2 bytes per pixel"}
    assert nuisances[:, NUISANCES.index("EXIF")].max() == 0
    for ending in ("JPEG", "PNG", "WEBP"):
        assert 0 < nuisances[:, NUISANCES.index(f"format {ending}")].mean() < 1


def opened(content):
    return Image.open(io.BytesIO(content))


def saved(content, kind, **options):
    file = io.BytesIO()
    opened(content).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def tables(content):
    return opened(content).quantization


def sampling(content):
    return JpegImagePlugin.get_sampling(opened(content))


def square(content):
    file = io.BytesIO()
    opened(content).resize((96, 96)).save(file, "JPEG", quality=75)
    return file.getvalue()


# Without one step: of which files, what is then done to which of a pair, and what an audit finds of it.
WITHOUT = {
    "the format": ("JPEG", 1, lambda content: saved(content, "PNG"), "format PNG"),
    "the tables": (
        "JPEG",
        1,
        lambda content: saved(content, "JPEG", subsampling=sampling(content)),
        "JPEG quality",
    ),
    "chroma": ("JPEG", 1, lambda content: saved(content, "JPEG", qtables=tables(content)), "chroma 4:2:0"),
    "the size": ("JPEG", 1, square, "log2 aspect"),
    "leaving out metadata": (
        "JPEG",
        0,
        lambda content: saved(
            content, "JPEG", qtables=tables(content), subsampling=sampling(content), **of_camera(1)
        ),
        "EXIF",
    ),
    "writing the original again": (
        "PNG",
        0,
        lambda content: saved(content, "PNG", compress_level=0),
        "log2 bytes per pixel",
    ),
}


@pytest.mark.parametrize("step", WITHOUT)
def test_without_a_step_it_is_found(step, pairs):
    samples, _ = pairs
    kind, label, change, nuisance = WITHOUT[step]
    read = [(sample.label, sample.read_bytes()) for sample in samples]
    chosen = [(of, content) for of, content in read if opened(content).format == kind]
    rows = np.stack([file_nuisances(change(content) if of == label else content) for of, content in chosen])
    # The other nuisances are left out, since they would take seconds.
    alone = np.where(np.array(NUISANCES) == nuisance, rows, 0)
    found = find_shortcuts(alone, np.array([of for of, _ in chosen]))
    assert found.strongest == [nuisance]
