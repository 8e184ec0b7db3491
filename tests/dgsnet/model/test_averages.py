"""The mean of trained models is the mean of their weights."""

import dataclasses

import numpy as np
import pytest
import torch
from dgsnet.cli import main
from dgsnet.data.images import file_hash
from dgsnet.detection.detector import Detector
from dgsnet.model import checkpoint
from dgsnet.model.adapters import Adapter, merged_weight
from dgsnet.model.averages import average
from dgsnet.model.checkpoint import load_model, save_model

from tests.support.runs import fails
from tests.support.tiny import CROP, PATCHES, save_noise, save_tiny


def linears(model):
    return {name: merged_weight(m) for name, m in model.visual.named_modules() if isinstance(m, Adapter)}


@pytest.fixture
def runs(tmp_path):
    """Three runs of one backbone; the last has another rank and scaling."""
    folders = [save_tiny(tmp_path / f"run{seed}", CROP, seed) for seed in range(2)]
    _, config = load_model(folders[0])
    model_config = dataclasses.replace(config.model, lora_rank=1, lora_alpha=2.5)
    smaller = dataclasses.replace(config, model=model_config)
    other = checkpoint.build_model(smaller, with_text=False)
    torch.manual_seed(5)
    for parameter in other.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    save_model(tmp_path / "run2" / "best", other, smaller)
    return [*folders, tmp_path / "run2"]


def test_weights_and_heads_are_means(runs, tmp_path, capsys):
    main(["average", *map(str, runs), "--out", str(tmp_path / "mean")])
    assert "the mean of 3 models" in capsys.readouterr().out
    models = [load_model(run)[0] for run in runs]
    mean, config = load_model(tmp_path / "mean")
    assert config.model.lora_rank == 2 + 2 + 1
    found, parts = linears(mean), [linears(model) for model in models]
    assert len(found) > 3
    for name, weight in found.items():
        torch.testing.assert_close(weight, sum(part[name] for part in parts) / 3, atol=1e-6, rtol=1e-5)
    for name, tensor in mean.head.state_dict().items():
        expected = sum(model.head.state_dict()[name] for model in models) / 3
        torch.testing.assert_close(tensor, expected)
    assert checkpoint.read_extra(tmp_path / "mean") == {"averaged": [str(run) for run in runs]}
    images = save_noise(tmp_path, 2)
    assert np.isfinite(Detector.load(tmp_path / "mean").predict([images / "00.png", images / "01.png"])).all()


def test_it_remembers_what_any_was_trained_on(runs, tmp_path):
    hashes = [[file_hash(word) for word in words] for words in ((b"a", b"b"), (b"b", b"c"))]
    for run, seen in zip(runs, hashes):
        model, config = load_model(run)
        state, of = checkpoint.trained_state(model), checkpoint.fingerprint(model)
        checkpoint.write_model(run / "best", state, of, config, trained_on=np.array(sorted(seen), np.int64))
    main(["average", *map(str, runs[:2]), "--out", str(tmp_path / "mean")])
    assert checkpoint.trained_on(tmp_path / "mean").tolist() == sorted({*hashes[0], *hashes[1]})


def test_one_model_alone_is_its_own_mean(runs):
    model, config = load_model(runs[0])
    state, found = average([checkpoint.trained_state(model)], [config.model])
    assert found == config.model
    for name, tensor in checkpoint.trained_state(model).items():
        torch.testing.assert_close(state[name], tensor)


def test_models_that_have_no_mean(runs, tmp_path, capsys):
    first, second, _ = map(str, runs)
    out = ["--out", str(tmp_path / "mean")]
    assert "one model has no mean" in fails(["average", first, *out], capsys)
    assert "is not an empty folder" in fails(["average", first, second, "--out", first], capsys)
    other = str(save_tiny(tmp_path / "other", PATCHES))
    assert f"{other} and {first} differ in preprocess" in fails(["average", first, other, *out], capsys)
    _, config = load_model(first)
    probe = dataclasses.replace(config, model=dataclasses.replace(config.model, lora_rank=0))
    save_model(tmp_path / "probe", checkpoint.build_model(probe, with_text=False), probe)
    line = fails(["average", first, str(tmp_path / "probe"), *out], capsys)
    assert "differ in what is adapted" in line
    elsewhere = dataclasses.replace(config, seed=9)
    save_model(tmp_path / "seed9", checkpoint.build_model(elsewhere, with_text=False), elsewhere)
    line = fails(["average", first, str(tmp_path / "seed9"), *out], capsys)
    assert "differ in the backbone's weights" in line
    assert not (tmp_path / "mean").exists()
