"""What leaves the program, and what looks into it, for a small model of every family of image towers."""

import numpy as np
import pytest
import torch
from dgsnet.config import Config, DataConfig, ModelConfig, PreprocessConfig
from dgsnet.detection.detector import Detector
from dgsnet.detection.heatmaps import heatmap
from dgsnet.errors import UserError
from dgsnet.exchange.convert import convert
from dgsnet.exchange.export import export
from dgsnet.model.checkpoint import build_model, save_model

from tests.dgsnet.exchange.test_export import code_of
from tests.support import towers

IN_TRANSFORMERS = ("nano-worldwide", "nano-map", towers.DINOV3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model of each family whose adapters, on all linears, matter."""
    folder = tmp_path_factory.mktemp("towers")
    runs = {}
    for name, weights in towers.register(folder).items():
        config = Config(
            model=ModelConfig(name, str(weights), lora_rank=2, lora_targets="all"),
            preprocess=PreprocessConfig(image_size=32, patch_size=8, num_patches=16),
            data=DataConfig(train=["some/where"]),
        )
        model = build_model(config, with_text=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.trainable_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
        runs[name] = save_model(folder / "runs" / name, model, config)
    return runs


@pytest.mark.parametrize(
    "name, format",
    [
        # Each of these takes seconds.
        *((name, "onnx") for name in ("nano-map", "nano-pe", towers.DINOV3)),
        ("nano-pe", "torchscript"),
        *((name, format) for name in towers.NAMES for format in ("safetensors", "hf")),
    ],
)
def test_an_export_scores_as_its_card_shows(runs, name, format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / f"exported.{format}"
    if format == "hf" and name not in IN_TRANSFORMERS:
        with pytest.raises(UserError, match=r"transformers.*export it as onnx, torchscript or safetensors"):
            export(runs[name], out, format)
        return
    card = export(runs[name], out, format)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    expected = Detector.load(runs[name], "cpu").logits(pixels)
    assert expected.max() - expected.min() > 0.1
    scope = {"pixels": pixels}
    exec(code_of(card), scope)
    np.testing.assert_allclose(scope["logits"], expected, atol=1e-4, rtol=1e-4)
    assert "LoRA of rank 2 on all linears of the blocks" in card.read_text()


@pytest.mark.parametrize("name", towers.NAMES)
def test_a_heatmap_is_the_loss_of_each_patch(runs, name):
    detector = Detector.load(runs[name], "cpu")
    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    found = heatmap(detector, image)
    assert found.boxes.shape == (16, 4) and np.ptp(found.contributions) > 1e-3
    assert found.logit == pytest.approx(detector.logits(detector.preprocess(image)[None]).item(), abs=1e-4)


def test_published_weights_of_another_family_are_refused(tmp_path):
    torch.save({"clip_model.visual.conv1.weight": torch.zeros(2, 3, 8, 8)}, tmp_path / "c.pth")
    for name, message in (
        ("nano-map", "no checkpoint of DGS-Net on nano-map"),
        (towers.DINOV3, "has no text tower: give --name one"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            convert(tmp_path / "c.pth", tmp_path / "out", name=name)
        assert "\n" not in str(caught.value)
