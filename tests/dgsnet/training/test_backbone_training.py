"""Whole runs on other families of image towers, the frozen backbone beside them, and what is refused."""

import csv
import json

import numpy as np
import pytest
import torch
from dgsnet import cli
from dgsnet.config import Config
from dgsnet.detection.decisions import calibrate
from dgsnet.detection.detector import Detector
from dgsnet.evaluation.evaluate import JOURNAL, evaluate, find_suites
from dgsnet.model import checkpoint
from PIL import Image

from tests.support import towers

CROPS = ["--preprocess.mode", "crop", "--preprocess.image_size", "32"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return towers.register(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise is real, a chequerboard under the same noise is generated."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    board = (np.indices((36, 36)).sum(0) % 2 * 90)[..., None]
    captions = {}
    for label, name in enumerate(("0_real", "1_fake")):
        (root / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 160, (36, 36, 3)) + board * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
            captions[f"{name}/{i}.png"] = ("a photograph", "a pattern")[i % 2]
    (root / "captions.json").write_text(json.dumps(captions))
    return root


def command(name, weights, data, out, *extra):
    base = [
        "--data.train",
        str(data),
        "--data.workers",
        "0",
        "--optim.max_steps",
        "3",
        "--optim.batch_size",
        "4",
    ]
    pretrained = str(weights[name]) if name in weights else ""
    return ["train", "--model.name", name, "--model.pretrained", pretrained, "--out", str(out), *base, *extra]


def moved(run):
    """Which adapters a run has changed; those of B begin at zero."""
    model, config = checkpoint.load_model(run)
    before = checkpoint.build_model(config, with_text=False).adapter_state()
    return {key: not torch.equal(t, before[key]) for key, t in model.adapter_state().items()}


@pytest.fixture(scope="module")
def dinov3(weights, data, tmp_path_factory):
    """A run on a tower without text that says nothing of captions, sizes or normalisation."""
    out = tmp_path_factory.mktemp("dinov3") / "run"
    rate = ["--optim.lr", "1e-2", "--optim.head_epochs", "8"]
    cli.main(command(towers.DINOV3, weights, data, out, *rate, "--preprocess.mode", "crop"))
    return out


def test_a_tower_without_text_trains_without_captions(dinov3):
    config = Config.load(dinov3 / "config.json")
    assert config.data.captions == "none" and config.surgery.mode == "feature"
    assert (config.preprocess.image_size, config.preprocess.normalization) == (32, "imagenet")
    assert all(moved(dinov3).values())
    rows = list(csv.DictReader((dinov3 / "metrics.csv").open()))
    branches = [row for row in rows if row["text_loss"]]
    assert branches and all(float(row["text_loss"]) == 0 != float(row["alignment_loss"]) for row in branches)


def test_the_frozen_backbone_stands_beside_it(dinov3, data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "results"
    cli.main(["evaluate", "--data", str(data), "--model", str(dinov3), "--out", str(out), "--frozen"])
    assert "beside the frozen backbone with a linear head:" in capsys.readouterr().out
    detector, rows = Detector.load(dinov3, "cpu"), scores(out)
    with torch.inference_mode():
        pixels = [detector.preprocess(np.array(Image.open(row["path"])))[None] for row in rows]
        expected = np.array([detector.model.teacher_logits(p).sigmoid().item() for p in pixels])
    np.testing.assert_allclose([float(row["frozen"]) for row in rows], expected, atol=2e-6)
    assert all(abs(float(row["frozen"]) - float(row["probability"])) > 1e-3 for row in rows)
    found = json.loads((out / "metrics.json").read_text())
    generated = np.array([row["label"] == "1" for row in rows])
    above = expected[generated][:, None] > expected[~generated]
    assert found["frozen"]["mean"]["auc"] == pytest.approx(above.mean())
    assert found["frozen"]["mean"]["ece"] != found["mean"]["ece"]
    # The frozen backbone is no distortion.
    assert found["robustness"] == {}
    page = (out / "report.html").read_text()
    assert "<h2>Beside the frozen backbone</h2>" in page and "AUC, frozen" in page
    assert "## Beside the frozen backbone" in (out / "metrics.md").read_text()

    # Nothing is scored twice.
    monkeypatch.setattr(Detector, "logits", None)
    # A calibration belongs to the model, not to the frozen backbone.
    rng = np.random.default_rng(0)
    detector.calibration = calibrate(rng.normal(-3, 5, 300), rng.normal(3, 5, 300), fpr=0.05)
    assert detector.calibration.temperature > 1.2
    again = evaluate(detector, find_suites([str(data)]), frozen=True, journal=out / JOURNAL, workers=0)
    assert [s.probability for s in again.frozen.scores] == [float(row["frozen"]) for row in rows]
    assert [s.probability for s in again.scores] != [float(row["probability"]) for row in rows]
    with_none = evaluate(detector, find_suites([str(data)]), journal=out / JOURNAL, workers=0)
    assert with_none.frozen is None and with_none.scores == again.scores


def scores(folder):
    return [row for row in csv.DictReader((folder / "scores.csv").open()) if not row["distortion"]]


def test_siglip_trains_by_layer_with_captions_in_bf16(weights, data, tmp_path):
    extra = ["--surgery", "layer", "--model.lora_targets", "qkvo", "--optim.precision", "bf16"]
    extra += [
        "--optim.checkpointing",
        "true",
        "--optim.head_epochs",
        "1",
        "--preprocess.normalization",
        "inception",
    ]
    cli.main(command("nano-map", weights, data, tmp_path / "run", *extra, *CROPS))
    changed = moved(tmp_path / "run")
    assert len(changed) == 2 * 4 * 2 and all(changed.values())
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert all(float(row["text_loss"]) > 0 for row in rows if row["text_loss"])


def test_a_frozen_backbone_with_a_linear_head_is_one_setting(weights, data, tmp_path, capsys):
    run = tmp_path / "run"
    extra = ["--model.lora_rank", "0", "--data.views", "1"]
    cli.main(command("nano-pe", weights, data, run, *extra, *CROPS))
    model, _ = checkpoint.load_model(run)
    assert model.adapter_state() == {}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["evaluate", "--data", str(data), "--model", str(run), "--out", str(tmp_path / "e"), "--frozen"]
        )
    *_, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "--frozen needs" in error and "trained with model.lora_rank=0" in error


@pytest.mark.parametrize(
    "name, extra, message",
    [
        (towers.DINOV3, ["--data.captions", "auto"], "has no text tower to read data.captions=auto"),
        (
            towers.DINOV3,
            ["--surgery.text", "expert"],
            "choose a model with a text tower and give captions, or set",
        ),
        (towers.DINOV3, ["--surgery.text", "both", "--surgery", "none"], "needs the three branches"),
        (
            towers.DINOV3,
            ["--preprocess.image_size", "60", "--preprocess.mode", "crop"],
            "give a multiple of 8, such as 56",
        ),
        (towers.DINOV3, ["--model.lora_targets", "k"], 'setting "model.lora_targets"'),
        (towers.DINOV3, ["--model.pretrained", "lvd"], "no pretrained weights 'lvd'"),
        ("timm/resnet50", [], "timm's resnet50 for an image tower"),
        ("timm/vit_base_patch16_dinov9", [], "did you mean timm/vit_"),
        ("convnext_base_w", [], "timm's convnext_base for an image tower"),
        ("MobileCLIP-S1", [], "is a MobileCLIP"),
        ("RN50", [], "is a ResNet"),
        ("coca_ViT-B-32", [], "is CoCa"),
    ],
)
def test_what_cannot_go_together_is_refused_in_one_line(
    name, extra, message, weights, data, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        cli.main(command(name, weights, data, tmp_path / "run", *extra))
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("dgsnet: warning")]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run" / "best").exists()
