"""What training is fed: damaged images left out, captions read from disk, patches selected in two places."""

import math
import shutil

import pytest
from dgsnet.config import PreprocessConfig
from dgsnet.errors import UserError
from dgsnet.model.dgsnet import DGSNet
from dgsnet.training.train import train

from tests.support.runs import equal, rows, settings, weights


def with_damage(dataset, folder, pattern):
    """A copy of the data in which the files that match are no images."""
    copy = shutil.copytree(dataset, folder)
    for path in copy.glob(pattern):
        path.write_bytes(b"no image")
    return copy


@pytest.mark.filterwarnings("ignore:left out")
def test_damaged_images_are_left_out_and_counted(dataset, tmp_path, capsys):
    root = with_damage(dataset, tmp_path / "data", "*/*/[12].png")
    (root / "val" / "0_real" / "3.png").write_bytes(b"no image")
    run = train(settings(root, optim_batch_size=2, optim_accumulation=2), tmp_path / "run")
    err = capsys.readouterr().err
    assert "4 of 31 images could not be read" in err
    assert "5 of 11 images could not be read" in err
    assert all(math.isfinite(float(row["loss"])) for row in rows(run) if row["loss"])


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize(("split", "name"), [("train", "training"), ("val", "validation")])
def test_nothing_readable_is_an_error(dataset, tmp_path, split, name):
    root = with_damage(dataset, tmp_path / "data", f"{split}/*/*.png")
    with pytest.raises(UserError, match=f"none of the {name} images could be read; .*/{split}/"):
        train(settings(root), tmp_path / "run")


def test_no_text_encoder_runs_in_a_step(dataset, tmp_path, monkeypatch):
    """Nor at all in a second run on the same captions."""
    calls = []
    original = DGSNet.text_features
    monkeypatch.setattr(DGSNet, "text_features", lambda *a: calls.append(len(a[1])) or original(*a))
    cache = str(tmp_path / "cache")
    for run in ("a", "b"):
        train(settings(dataset, data_val=[], data_cache=cache), tmp_path / run)
    # The data has three different captions.
    assert calls == [3]
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_selection_on_the_device_trains_the_same_weights(dataset, tmp_path):
    preprocess = PreprocessConfig(image_size=32, patch_size=8, num_patches=16)
    for selection in ("workers", "device"):
        train(settings(dataset, preprocess=preprocess, data_selection=selection), tmp_path / selection)
    assert equal(weights(tmp_path / "workers"), weights(tmp_path / "device"))
    assert rows(tmp_path / "workers") == rows(tmp_path / "device")
