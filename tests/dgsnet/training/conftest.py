"""Data and runs that several files of this folder look at; none of them changes what it is given."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from dgsnet.config import Config, SurgeryConfig
from dgsnet.training.train import train

from tests.support.runs import board, changed, settings, stripes, write_images


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise is real, a chequerboard under the same noise is generated; <root>/{train,val} with captions.

    31 images to train on and 11 to validate on: in batches of 8 the last of either is smaller.
    """
    root = tmp_path_factory.mktemp("data")
    write_images(root / "train", (17, 14), seed=1)
    write_images(root / "val", (6, 5), seed=2)
    return root


@pytest.fixture(scope="session")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run to compare with."""
    # The tests themselves run in one thread, but that is set later than this.
    torch.set_num_threads(1)
    return train(settings(dataset), tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="session")
def generators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Old generators leave a board or stripes; the new set's real images have the board: a conflict."""
    root = tmp_path_factory.mktemp("generators")
    write_images(root / "old" / "board", (12, 10), board, seed=1)
    write_images(root / "old" / "stripes", (15, 13), stripes, seed=2)
    write_images(root / "new", (11, 10), real=board, generated=None, seed=3)
    write_images(root / "test" / "board", (15, 14), board, seed=4)
    write_images(root / "test" / "stripes", (13, 15), stripes, seed=5)
    return root


@pytest.fixture(scope="session")
def known(generators: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector that knows the old generators."""
    torch.set_num_threads(1)
    config = changed(
        settings(generators / "old"),
        model_lora_dropout=0.0,
        data_val=[],
        data_captions="none",
        optim_lr=4e-3,
        optim_epochs=10,
        surgery=SurgeryConfig(mode="none"),
    )
    return train(config, tmp_path_factory.mktemp("runs") / "known")


@pytest.fixture(scope="session")
def detector(known: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, whose updates are checkpointed after every step."""
    copy = shutil.copytree(known, tmp_path_factory.mktemp("runs") / "detector")
    config = changed(Config.load(copy / "best" / "config.json"), checkpoint_every=1)
    (copy / "best" / "config.json").write_text(config.to_json())
    return copy


@pytest.fixture
def options(generators: Path, detector: Path) -> dict[str, object]:
    """Of every update here, unless said otherwise."""
    return {
        "model": detector,
        "data": [str(generators / "new")],
        "replay": [str(generators / "old")],
        "steps": 3,
        "lr": 2e-3,
    }
