"""Towers on images of another size than their own: what their library makes of them."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import open_clip
import pytest
import timm
import torch
from dgsnet import Detector
from dgsnet.cli import main
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.errors import UserError
from dgsnet.exchange.export import export
from dgsnet.model import checkpoint, pretrained
from dgsnet.model.adapters import merge_adapters
from dgsnet.model.catalogue import BUILTIN_FOLDER, check_model, has_text, timm_arguments
from dgsnet.model.dgsnet import DGSNet
from safetensors.torch import load_file, save_file

from tests.dgsnet.exchange.test_export import code_of
from tests.support import towers
from tests.support.tables import read_csv
from tests.support.tiny import save_picture

TINY = "dgsnet-tiny"
# Of the small towers' patches of 8 pixels, and of the built-in one's of 4.
SIZES = [48, 24]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    found = towers.register(tmp_path_factory.mktemp("towers"))
    # Its file is in half precision, which open_clip does not interpolate.
    tiny = {key: t.float() for key, t in load_file(BUILTIN_FOLDER / f"{TINY}.safetensors").items()}
    folder = tmp_path_factory.mktemp("tiny")
    save_file(tiny, folder / "tiny.safetensors")
    return found | {TINY: folder / "tiny.safetensors"}


def the_librarys(name: str, path: str, size: int) -> torch.nn.Module:
    """The image tower as whoever uses its library gets it for this size, weights included."""
    if has_text(name):
        return open_clip.create_model(name, pretrained=path, force_image_size=size).visual.eval()
    overlay = {"file": path, "num_classes": 0}
    make = partial(timm.create_model, **timm_arguments(name), img_size=size)
    return make(pretrained=True, pretrained_cfg_overlay=overlay).eval()


def trained(name: str, path: str, size: int) -> tuple[DGSNet, Config]:
    """A model whose adapters and heads are not at their initial zeros."""
    config = Config(
        model=ModelConfig(name, path, lora_rank=2, lora_targets="all"),
        preprocess=PreprocessConfig(mode="crop", image_size=size),
    )
    model, generator = checkpoint.build_model(config, with_text=False), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    return model.eval(), config


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [TINY, *towers.NAMES])
def test_features_are_the_librarys_own_at_that_size(weights, name, size, tmp_path):
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    model, config = trained(name, str(weights[name]), size)
    assert model.image_size == size
    with torch.no_grad():
        expected = the_librarys(name, str(weights[name]), size)(pixels)
        torch.testing.assert_close(model.teacher_features(pixels), expected, rtol=1e-5, atol=1e-5)
        student, logits = model.student_features(pixels), model.logits(pixels)
        assert (student - expected).abs().max() > 0.01
        # What a folder gives back, and what is merged into the library's own tower.
        checkpoint.save_model(tmp_path / "m", model, config)
        assert torch.equal(checkpoint.load_model(tmp_path / "m")[0].logits(pixels), logits)
        merge_adapters(model.visual)
        own = pretrained.untouched_tower(name, size).eval()
        own.load_state_dict(model.backbone.state(), assign=True)
        torch.testing.assert_close(own(pixels), student, rtol=1e-4, atol=1e-5)


def test_at_its_own_size_a_tower_is_left_as_it_is(weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "interpolate", None)
        for name in (TINY, *towers.NAMES):
            models = [
                DGSNet(ModelConfig(name, str(weights[name])), with_text=False, image_size=s)
                for s in (None, 32)
            ]
            first, second = (model.visual.state_dict() for model in models)
            assert all(torch.equal(first[key], second[key]) for key in first if "lora_" not in key)


@pytest.mark.parametrize(
    "name, given, message",
    [
        (
            "ViT-B-32",
            250,
            "ViT-B-32 cuts images of up to 4096 pixels into patches of 32.* is 250.* such as 224",
        ),
        ("ViT-L-14", 520, "multiple of 14, such as 518"),
        ("ViT-B-16-SigLIP2", 100, "multiple of 16, such as 96"),
        ("ViT-B-32", 4128, "cuts images of up to 4096 pixels into patches of 32.* is 4128.* such as 4096"),
        ("timm/vit_base_patch16_dinov3", 8, "multiple of 16, such as 16"),
        (TINY, 516, "cuts images of up to 512 pixels .* is 516: give a multiple of 4, such as 512"),
        (TINY, 2**14, "such as 512"),
        (TINY, 33, "such as 32"),
    ],
)
def test_sizes_that_no_patches_tile_are_one_line(name, given, message, monkeypatch):
    """Before anything heavy is imported where that is known from the name, and where a model is made."""
    calls = (
        [partial(DGSNet, ModelConfig(name, ""), with_text=False, image_size=given)] if name == TINY else []
    )
    with monkeypatch.context() as patch:
        patch.delitem(__import__("sys").modules, "open_clip")
        for call in (partial(check_model, ModelConfig(name, ""), given), *calls):
            with pytest.raises(UserError, match=message) as caught:
                call()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, format",
    [
        (TINY, "torchscript"),
        (TINY, "hf"),
        ("nano-map", "safetensors"),
        (towers.DINOV3, "safetensors"),
        (towers.DINOV3, "hf"),
    ],
)
def test_an_export_scores_as_its_card_shows(weights, name, format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save_model("m", *trained(name, str(weights[name]), 48))
    card = export("m", f"exported.{format}", format)
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    scope = {"pixels": pixels}
    exec(code_of(card), scope)
    np.testing.assert_allclose(
        scope["logits"], Detector.load("m", "cpu").logits(pixels), atol=1e-4, rtol=1e-4
    )


def test_from_training_to_scores(tmp_path, monkeypatch, capsys):
    """With captions, a teacher's distillation and kept features; resumed, scored by tiles and calibrated."""
    monkeypatch.chdir(tmp_path)
    captions = {}
    for i in range(14):
        name = f"{'0_real' if i % 2 else '1_fake'}/{i:02}.png"
        save_picture(tmp_path / "data" / name)
        captions[name] = ("a photograph", "a pattern")[i // 2 % 2]
    (tmp_path / "data/captions.json").write_text(json.dumps(captions))
    words = ["train", "--model.name", TINY, "--data.train", "data", "--data.val", "data", "--out", "run"]
    words += ["--preprocess.image_size", "40", "--preprocess.crops", "5", "--preprocess.small", "tile"]
    words += ["--surgery.distillation", "0.1", "--data.views", "2", "--data.workers", "0"]
    words += ["--optim.batch_size", "7", "--optim.max_steps", "2", "--data.cache", "kept"]
    main(words)
    assert Config.load("run/config.json").preprocess == PreprocessConfig(
        mode="crop", image_size=40, normalization="clip", crops=5, small="tile"
    )
    main([*words, "--resume"])
    with pytest.raises(SystemExit):
        main([*words, "--resume", "--preprocess.image_size", "32"])
    assert (
        "cannot resume run with preprocess.image_size=32, it was started with 40" in capsys.readouterr().err
    )
    main(
        [
            "calibrate",
            "--model",
            "run",
            "--reals",
            "data/0_real",
            "--fpr",
            "0.5",
            "--crops",
            "tiles",
            "--batch",
            "4",
        ]
    )
    main(["predict", "data", "--model", "run", "--out", "s.csv"])
    main(["evaluate", "--data", "data", "--model", "run", "--out", "e", "--frozen"])
    rows = {row["path"]: float(row["probability"]) for row in read_csv("s.csv")}
    assert len(set(rows.values())) == 14
    measured = {row["path"]: float(row["probability"]) for row in read_csv("e/scores.csv")}
    assert measured == rows
    assert Detector.load("run", "cpu").model.image_size == 40
