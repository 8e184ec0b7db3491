"""Exported detectors score as the original, wherever they run, and carry what a program must know."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from dgsnet.cli import main
from dgsnet.config import Config, DataConfig, ModelConfig, PreprocessConfig
from dgsnet.data.patches import select_patches
from dgsnet.data.preprocess import Preprocessor, content_seed
from dgsnet.detection.decisions import calibrate, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.exchange.export import CONTRACT, CONTRACT_FILE, _check, export
from dgsnet.model.checkpoint import build_model, save_model
from safetensors import safe_open

from tests.support.tiny import add_quick_gelu

QUICK = "tiny-quickgelu-export"
SIZE = {"dgsnet-tiny": 32, QUICK: 64}


@pytest.fixture(scope="module", autouse=True)
def quick_gelu(tmp_path_factory):
    add_quick_gelu(tmp_path_factory.mktemp("clip"), QUICK)


def make(folder, name="dgsnet-tiny", rank=3, calibrated=True):
    """A model whose adapters matter."""
    config = Config(
        model=ModelConfig(name, "builtin" if name == "dgsnet-tiny" else "", lora_rank=rank),
        preprocess=PreprocessConfig(
            mode="patches", image_size=SIZE[name], patch_size=SIZE[name] // 4, num_patches=16
        ),
        data=DataConfig(train=["/home/somebody/AIGIBench/train"]),
    )
    model = build_model(config, with_text=False).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    save_model(folder, model, config, step=7, auc=0.875)
    if calibrated:
        rng = np.random.default_rng(0)
        save_calibration(folder, calibrate(rng.normal(-3, 2, 900), rng.normal(3, 2, 900), fpr=0.05))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make(tmp_path_factory.mktemp("run") / "best").parent


@pytest.fixture(scope="module")
def pixels():
    """Three prepared images."""
    rng = np.random.default_rng(0)
    preprocess = Preprocessor(PreprocessConfig(image_size=32, patch_size=8, num_patches=16))
    images = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (40, 64, 100)]
    return torch.stack([preprocess(image) for image in images])


def original(run, pixels):
    detector = Detector.load(run, device="cpu")
    logits = detector.logits(pixels)
    assert logits.max() - logits.min() > 0.1
    return logits, detector.probabilities(logits).float()


def code_of(card):
    return re.search(r"```python\n(.*?)```", Path(card).read_text(), re.DOTALL)[1]


def test_onnx_runtime_gives_the_same_probabilities(run, pixels, tmp_path, capsys):
    import onnx
    import onnxruntime

    out = tmp_path / "new" / "model.onnx"
    main(["export", "--model", str(run), "--format", "onnx", "--out", str(out)])
    assert "verified" in capsys.readouterr().out
    logits, probabilities = original(run, pixels)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    for n in (1, 3):
        ours = session.run(["logits", "probabilities"], {"pixels": pixels[:n].numpy()})
        np.testing.assert_allclose(ours[1], probabilities[:n], atol=1e-4, rtol=0)
        np.testing.assert_allclose(ours[0], logits[:n], atol=1e-4, rtol=1e-4)
    contract = json.loads(session.get_modelmeta().custom_metadata_map[CONTRACT])
    assert contract["input"]["shape"] == ["batch", 3, 32, 32]
    onnx.checker.check_model(str(out))
    # Nothing of this machine's disk is in the file.
    assert str(Path(open_clip.__file__).parent).encode() not in out.read_bytes()
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "model.onnx",
        "model.onnx.calibration.json",
        "model.onnx.detector.json",
        "model.onnx.md",
    ]
    assert "somebody" not in (out.parent / "model.onnx.detector.json").read_text()


@pytest.mark.parametrize("format", ["torchscript", "safetensors", "hf"])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_card_shows_how_to_get_the_same_scores(pixels, tmp_path, monkeypatch, format, rank):
    monkeypatch.chdir(tmp_path)
    run = make(tmp_path / "run", rank=rank)
    card = export(run, tmp_path / "exported", format)
    logits, _ = original(run, pixels)
    for n in (1, 3):
        scope = {"pixels": pixels[:n]}
        exec(code_of(card), scope)
        torch.testing.assert_close(scope["logits"], logits[:n], atol=1e-5, rtol=1e-5)


def test_the_card_shows_how_to_run_onnx(run, pixels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = export(run, tmp_path / "model.onnx", "onnx")
    scope = {"pixels": pixels}
    exec(code_of(card), scope)
    np.testing.assert_allclose(scope["probabilities"], original(run, pixels)[1], atol=1e-4)


def test_transformers_and_peft_load_it_to_the_same_scores(tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import CLIPVisionModelWithProjection

    run, out = make(tmp_path / "run", QUICK), tmp_path / "hf"
    export(run, out, "hf")
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    detector = Detector.load(run, device="cpu")
    base = CLIPVisionModelWithProjection.from_pretrained(out / "base").eval()
    head = load_file(out / "head.safetensors")
    with torch.no_grad():
        frozen = base(pixel_values=pixels).image_embeds
        torch.testing.assert_close(frozen, detector.model.teacher_features(pixels), atol=1e-5, rtol=1e-5)
        adapted = PeftModel.from_pretrained(base, out / "adapter").eval()
        features = adapted(pixel_values=pixels).image_embeds
        # The adapter changes the features.
        assert (features - frozen).abs().max() > 0.05
        torch.testing.assert_close(features, detector.model.student_features(pixels), atol=1e-5, rtol=1e-5)
        scores = features @ head["weight"].T + head["bias"]
    torch.testing.assert_close(scores.squeeze(1), detector.logits(pixels), atol=1e-5, rtol=1e-5)
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["use_rslora"]
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter",
        "base",
        CONTRACT_FILE,
        "head.safetensors",
    ]


def contract_in(path, format):
    if format == "torchscript":
        extra = {CONTRACT_FILE: ""}
        torch.jit.load(str(path), _extra_files=extra)
        return json.loads(extra[CONTRACT_FILE])
    if format == "hf":
        return json.loads((path / CONTRACT_FILE).read_text())
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[CONTRACT])


def test_the_contract_of_a_model_without_calibration(run, tmp_path):
    bare = shutil.copytree(run, tmp_path / "bare")
    next(bare.rglob("calibration.json")).unlink()
    export(bare, tmp_path / "exported", "hf")
    assert contract_in(tmp_path / "exported", "hf")["decision"] == {
        "temperature": 1.0,
        "generated_above": 0.5,
        "real_at_or_below": 0.5,
        "decimals_before_comparing": 6,
        "calibrated": False,
        "precision": "fp32",
    }


@pytest.mark.parametrize("format", ["torchscript", "safetensors", "hf"])
def test_the_contract_suffices_to_score_an_image(run, tmp_path, format):
    export(run, tmp_path / "exported", format)
    contract = contract_in(tmp_path / "exported", format)
    detector = Detector.load(run, device="cpu")
    c = detector.calibration
    assert contract["decision"] == {
        "temperature": c.temperature,
        "generated_above": c.threshold,
        "real_at_or_below": c.low,
        "decimals_before_comparing": 6,
        "calibrated": True,
        "precision": "fp32",
    }
    # From the contract's numbers alone to the detector's input.
    image = np.random.default_rng(3).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    preprocess = contract["preprocess"]
    mosaic = select_patches(
        torch.from_numpy(image).permute(2, 0, 1)[None],
        preprocess["patch_size"],
        preprocess["num_patches"],
        seed=content_seed(image),
    )[0]
    mean, std = (torch.tensor(preprocess[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close((mosaic / 255 - mean) / std, detector.preprocess(image), atol=1e-5, rtol=0)


def test_the_card_names_scope_data_decisions_and_limits(run, tmp_path):
    text = export(run, tmp_path / "m.pt", "torchscript").read_text()
    for heading in ("Scope", "Training data", "Decisions", "Limits", "Use"):
        assert f"\n## {heading}\n" in text
    c = Detector.load(run, device="cpu").calibration
    assert f"above {c.threshold:.6f}: generated" in text and "`AIGIBench/train`" in text
    assert "somebody" not in text and "| auc | 0.8750 |" in text
    plain = make(tmp_path / "plain", calibrated=False)
    assert "Not calibrated" in export(plain, tmp_path / "p.pt", "torchscript").read_text()


def test_a_converted_model_names_its_source(tmp_path):
    run = make(tmp_path / "run")
    detector = Detector.load(run, device="cpu")
    save_model(tmp_path / "c", detector.model, detector.config, source="x.pth", stage=2, merged=False)
    text = export(tmp_path / "c", tmp_path / "c.pt", "torchscript").read_text()
    assert "authors' checkpoint `x.pth` (stage 2)" in text and "not checked" in text


def test_what_a_strangers_model_says_is_no_markup_in_its_card(tmp_path):
    run, hostile = make(tmp_path / "run"), "x`|<img src=y>\n\n# Proof\n\n[z](https://z)"
    detector = Detector.load(run, device="cpu")
    detector.config.data.train = [hostile]
    for number, extra in enumerate(
        ({hostile: 0.5, "update": {"rule": hostile, "model": hostile}}, {"source": hostile, "stage": hostile})
    ):
        save_model(tmp_path / f"{number}", detector.model, detector.config, **extra)
        text = export(tmp_path / f"{number}", tmp_path / f"{number}.pt", "torchscript").read_text()
        assert "Proof" in text and "\n# Proof" not in text
        # Code may show what a name holds.
        outside = re.sub(r"`[^`\n]*`", "", text.partition("## Use")[0])
        assert "<img" not in outside and not re.search(r"(?<!\\)\[z", outside)


def test_an_export_that_scores_otherwise_is_refused(run, pixels):
    logits, _ = original(run, pixels)
    _check(lambda p: logits[: len(p)] + 1e-5, pixels, logits, "onnx")
    for wrong in (
        lambda p: logits[: len(p)] + 0.01,
        lambda p: logits,
        lambda p: logits[: len(p)] * torch.nan,
    ):
        with pytest.raises(UserError, match="gives other scores"):
            _check(wrong, pixels, logits, "onnx")


def test_what_cannot_be_exported_is_one_line(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for options, message in (
        (["--format", "hf", "--out", str(tmp_path / "full")], "is not an empty folder"),
        (["--format", "onnx", "--out", str(tmp_path / "full")], "is a folder"),
        (["--format", "gguf", "--out", str(tmp_path / "m")], "gguf"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export", "--model", str(run), *options])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1
    with pytest.raises(UserError, match="unknown format"):
        export(run, tmp_path / "m", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
