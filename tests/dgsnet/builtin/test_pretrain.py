"""The tiny CLIP that ships with the package, and its pretraining."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from dgsnet import builtin
from dgsnet.builtin import pretrain
from dgsnet.builtin.photographs import PHOTOGRAPHS
from dgsnet.config import ModelConfig
from dgsnet.model.dgsnet import DGSNet
from safetensors.torch import load_file

FOLDER = Path(builtin.__file__).parent
WEIGHTS = FOLDER / "dgsnet-tiny.safetensors"


def test_tiny_model_is_small_and_is_what_its_record_says():
    assert WEIGHTS.stat().st_size <= 6_000_000
    weights = load_file(WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    record = json.loads((FOLDER / "dgsnet-tiny.training.json").read_text())
    assert record["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert f"--seed {record['seed']} --steps {record['steps']}" in record["command"]
    clip = open_clip.CLIP(**json.loads(pretrain.MODEL_CONFIG.read_text()))
    clip.load_state_dict(weights)
    # It knows what it was trained for: 24 contents, 3 levels of each quality.
    accuracy = pretrain.zero_shot(clip, seed=123, crops=128)
    assert accuracy["train_content"] > 0.5
    assert accuracy["val_noise"] > 0.6
    model = DGSNet(ModelConfig(name="dgsnet-tiny", pretrained="builtin"))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.teacher_features(pixels), clip.eval().encode_image(pixels))


def test_pretraining_runs_and_continues_as_if_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "zero_shot", lambda model, seed: {})
    settings = dict(seed=3, steps=4, batch_size=4, save_every=2)
    whole = load_file(pretrain.pretrain(tmp_path / "whole", **settings))
    save = pretrain._save

    def stop_after_two(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "_save", stop_after_two)
        pretrain.pretrain(tmp_path / "parts", **settings)
    parts = load_file(pretrain.pretrain(tmp_path / "parts", **settings))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(
        not torch.equal(whole[name], tensor.half())
        for name, tensor in pretrain.new_model().state_dict().items()
    )
    record = json.loads((tmp_path / "parts" / "dgsnet-tiny.training.json").read_text())
    assert (record["seed"], record["steps"]) == (3, 4) and record["final_loss"] > 0


def test_pretraining_sees_training_photographs_only():
    batches = pretrain.CaptionedCrops(PHOTOGRAPHS["train"], 64, seed=0, steps=1)
    contents = {words[0] for words in batches[0][2]}
    allowed = {c for p in PHOTOGRAPHS["train"] for c in (p.content, *(r[4] for r in p.regions))}
    assert contents <= allowed
    held = {
        c for s in ("val", "test") for p in PHOTOGRAPHS[s] for c in (p.content, *(r[4] for r in p.regions))
    }
    assert not contents & (held - allowed)
    again = pretrain.CaptionedCrops(PHOTOGRAPHS["train"], 64, seed=0, steps=9)[0]
    assert torch.equal(again[0], batches[0][0]) and torch.equal(again[1], batches[0][1])
