"""Which models there are, and settings that do not go with them."""

import sys

import pytest
from dgsnet.config import ModelConfig
from dgsnet.errors import UserError
from dgsnet.model.catalogue import check_model
from dgsnet.model.dgsnet import DGSNet


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(name="ViT-L-14-quickgeluu"), "did you mean ViT-L-14-quickgelu"),
        (dict(name="hf-hub:a/b"), "unknown model 'hf-hub:a/b'"),
        (dict(name="RN50"), "is a ResNet"),
        (dict(name="convnext_base"), "has timm's convnext_base for an image tower"),
        (dict(name="coca_ViT-L-14"), "is CoCa"),
        (dict(name="ViT-L-14"), "with QuickGELU .* use name=ViT-L-14-quickgelu"),
        (dict(name="ViT-B-32", pretrained="nope"), "no pretrained weights 'nope': .* laion2b_s34b_b79k"),
        (dict(name="ViT-B-32", pretrained="no/such.pt"), "no/such.pt does not exist"),
        (dict(name="ViT-B-32", pretrained="builtin"), "goes with name='dgsnet-tiny'"),
    ],
)
def test_wrong_settings_end_in_one_line(config, message):
    with pytest.raises(UserError, match=message) as caught:
        DGSNet(ModelConfig(**config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", [{"lora_rank": -1}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}])
def test_settings_out_of_range_are_refused_where_they_are_made(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be (at least 0|in 0..4096)"):
        ModelConfig(**setting)


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("ViT-B-32", 224, None),
        ("ViT-B-32", 256, None),
        ("ViT-B-32", 250, "into patches of 32, but preprocess.image_size is 250: give .* such as 224"),
        ("timm/vit_base_patch16_dinov3", 256, None),
        ("timm/vit_base_patch16_dinov3", 518, "into patches of 16, but preprocess.image_size is 518"),
        ("timm/vit_base_patch16_sapiens2", 768, "takes 1024x768 images; only square inputs"),
        ("timm/vit_base_patch16_dinov33", 256, "did you mean timm/vit_base_patch16_dinov3"),
    ],
)
def test_checked_before_anything_is_imported(name, given, message, monkeypatch):
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    if message is None:
        check_model(ModelConfig(name=name), given)
        return
    with pytest.raises(UserError, match=message):
        check_model(ModelConfig(name=name), given)
