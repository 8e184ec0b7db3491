"""`dgsnet predict` finds what it is given and writes one row for each image."""

import csv

import numpy as np
import pytest
import torch
from dgsnet import scoring as module
from dgsnet.checkpoint import build_model, save_model
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.errors import UserError
from dgsnet.scoring import predict_command
from dgsnet.sources import find_images
from PIL import Image

PREPROCESS = {
    "crop": PreprocessConfig(mode="crop", image_size=32),
    "patches": PreprocessConfig(mode="patches", image_size=32, patch_size=8, num_patches=16),
}


@pytest.fixture(scope="module", params=list(PREPROCESS))
def run(request, tmp_path_factory):
    """A model with random weights whose adapters and head are not at their initial zeros."""
    torch.set_num_threads(1)
    config = Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2),
        preprocess=PREPROCESS[request.param],
    )
    model = build_model(config, with_text=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return save_model(tmp_path_factory.mktemp("run") / "best", model, config).parent


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(40):
        size = rng.integers(33, 90, 2)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_find_images(tmp_path):
    for name in (
        "a.png",
        "b.JPG",
        "notes.txt",
        "deep/er/c.webp",
        "deep/d.jpeg",
        "odd[1].png",
        "._a.png",
        ".x/e.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(*paths):
        files, missing = find_images([tmp_path / path for path in paths])
        return [str(file).removeprefix(f"{tmp_path}/") for file in files], list(missing.values())

    assert names(".")[0] == ["a.png", "b.JPG", "deep/d.jpeg", "deep/er/c.webp", "odd[1].png"]
    assert names("b.JPG", "a.png", "b.JPG") == (["b.JPG", "a.png"], [])
    assert names("*.png")[0] == ["a.png", "odd[1].png"]
    assert names("odd[1].png")[0] == ["odd[1].png"]
    assert names("**/*.webp")[0] == ["deep/er/c.webp"]
    assert names("dee*")[0] == ["deep/d.jpeg", "deep/er/c.webp"]
    assert names("notes.txt")[0] == ["notes.txt"]
    assert names("none.png", "*.gif") == ([], ["no such file or folder", "no image matches this pattern"])


def test_predict_command(run, images, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    out = tmp_path / "new" / "scores.csv"
    predict_command([str(images), str(broken), str(tmp_path / "missing.png")], str(run), str(out))
    table = rows(out)
    assert list(table[0]) == ["path", "probability", "decision", "error"]
    assert len(table) == 42
    scored = [row for row in table if not row["error"]]
    assert len(scored) == 40
    for row in scored:
        assert row["decision"] == ("generated" if float(row["probability"]) > 0.5 else "real")
    assert {row["decision"] for row in scored} == {"real", "generated"}
    failed = {row["path"]: row for row in table if row["error"]}
    assert set(failed) == {str(broken), str(tmp_path / "missing.png")}
    assert all(row["probability"] == row["decision"] == "" for row in failed.values())
    assert "2 could not be read" in capsys.readouterr().out

    alone = tmp_path / "alone.csv"
    predict_command([scored[7]["path"]], str(run), str(alone))
    assert rows(alone) == [scored[7]]


def test_nothing_to_score_is_one_line(run, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder") as error:
        predict_command([str(tmp_path / "nowhere")], str(run), str(tmp_path / "s.csv"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "s.csv").exists()

    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the images"):
        predict_command([str(tmp_path / "broken.png")], str(run), str(tmp_path / "s.csv"))
    assert "empty" in rows(tmp_path / "s.csv")[0]["error"]


def test_an_interrupted_run_leaves_no_half_csv(run, images, tmp_path, monkeypatch):
    out = tmp_path / "scores.csv"
    out.write_text("old\n")

    def stream(self, files, *, workers=None):
        yield 0.5, ""
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Detector, "stream", stream)
    with pytest.raises(KeyboardInterrupt):
        predict_command([str(images)], str(run), str(out))
    assert out.read_text() == "old\n"
