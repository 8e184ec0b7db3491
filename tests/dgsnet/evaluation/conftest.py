"""A model and labelled images in which no two counts are alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import CROP, save_picture, save_tiny

# Images by generator and class; beta has a damaged one besides.
COUNTS = {"alpha": (5, 7), "beta": (4, 6)}
TOTAL = 23


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), CROP)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two generators, and one damaged image in the second."""
    for generator, counts in COUNTS.items():
        for folder, count in zip(("0_real", "1_fake"), counts):
            for i in range(count):
                save_picture(tmp_path / "data" / generator / folder / f"{i}.png")
    (tmp_path / "data/beta/1_fake/broken.png").write_bytes(b"no picture")
    return tmp_path / "data"
