"""A detector, images and their table that several files score; a file may have others of the same names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dgsnet.detection.scoring import predict_command

from tests.support.tables import read_csv
from tests.support.tiny import CROP, save_noise, save_tiny

N = 80


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights whose adapters and head are not at their initial zeros."""
    return str(save_tiny(tmp_path_factory.mktemp("run"), CROP))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_noise(tmp_path_factory.mktemp("images"), N)


@pytest.fixture(scope="session")
def table(run: str, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Rows of all images, by file name, of one undisturbed call."""
    out = tmp_path_factory.mktemp("table") / "scores.csv"
    predict_command([str(images)], run, str(out), workers=0)
    return {os.path.basename(row["path"]): row for row in read_csv(out)}
