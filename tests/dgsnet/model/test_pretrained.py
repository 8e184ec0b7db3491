"""Where a model's weights come from: files of every kind, and what cannot be loaded in one line."""

import json

import open_clip
import pytest
import torch
from dgsnet.config import ModelConfig
from dgsnet.errors import UserError
from dgsnet.model import pretrained
from dgsnet.model.backbones import backbone_of
from dgsnet.model.catalogue import check_tower
from dgsnet.model.dgsnet import DGSNet
from safetensors.torch import save_file

from tests.support.tiny_clip import CAPTIONS, TINY, build, difference, original_clip, pixels_for


def test_captions_stay_whole_where_later_tokens_matter():
    text = open_clip.model._build_text_tower(
        16, {"width": 32, "heads": 2, "layers": 1, "no_causal_mask": True, "pool_type": "last"}
    ).eval()
    tokens = open_clip.tokenize(CAPTIONS)
    assert torch.equal(pretrained.encode_text(text, tokens), text(tokens))


def test_eos_pooling_is_cut_at_the_first_eos():
    text = open_clip.model._build_text_tower(
        16, {"width": 32, "heads": 2, "layers": 2, "pool_type": "eos", "eos_id": 2}
    ).eval()
    tokens = torch.zeros(2, 77, dtype=torch.long)
    tokens[0, :4] = torch.tensor([5, 900, 7, 2])
    tokens[1, :3] = torch.tensor([5, 8, 2])
    assert difference(pretrained.encode_text(text, tokens), text(tokens)) < 1e-6


def test_weights_load_from_every_kind_of_file(tmp_path):
    clip = original_clip(seed=7)
    pixels = pixels_for(build())
    expected = clip.encode_image(pixels)
    tokens = open_clip.get_tokenizer(TINY.name)(CAPTIONS)
    state = clip.state_dict()
    torch.save(state, tmp_path / "weights.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "weights.bin")
    save_file(state, tmp_path / "weights.safetensors")
    for suffix in ("pt", "bin", "safetensors"):
        path = tmp_path / f"weights.{suffix}"
        model = DGSNet(ModelConfig(name=TINY.name, pretrained=str(path))).eval()
        with path.open("r+b") as file:
            # The file changes in place: a model that still looked into it would notice.
            file.write(bytes(path.stat().st_size))
        assert difference(model.teacher_features(pixels), expected) < 1e-5
        assert difference(model.text_features(CAPTIONS), clip.encode_text(tokens)) < 1e-5
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# torch deprecates TorchScript, but OpenAI's files are made of it.
@pytest.mark.filterwarnings("ignore")
def test_openais_torchscript_archives_load(tmp_path):
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    config["vision_cfg"] |= {"layers": 2, "width": 64}
    config["text_cfg"] |= {"layers": 1, "width": 16, "heads": 2}
    (tmp_path / "small-quickgelu.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small-quickgelu.json")
    clip = original_clip("small-quickgelu", seed=7).half()
    archive = torch.nn.Module()
    for name, tensor in clip.state_dict().items():
        *parents, leaf = name.split(".")
        owner = archive
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, torch.nn.Module())
            owner = getattr(owner, parent)
        owner.register_buffer(leaf, tensor)
    archive.register_buffer("input_resolution", torch.tensor(224))
    path = tmp_path / "ViT.pt"
    torch.jit.save(torch.jit.script(archive), path)

    model = DGSNet(ModelConfig(name="small-quickgelu", pretrained=str(path))).eval()
    pixels = pixels_for(model)
    assert difference(model.teacher_features(pixels), clip.float().encode_image(pixels)) < 1e-5
    with pytest.raises(UserError, match="use name=ViT-L-14-quickgelu"):
        DGSNet(ModelConfig(name="ViT-L-14", pretrained=str(path)))


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"PK\x03\x04" + b"\0" * 50])
@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_damaged_weights_end_in_one_line(tmp_path, content, suffix):
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name} as weights of dgsnet-tiny .* complete") as caught:
        DGSNet(ModelConfig(name="dgsnet-tiny", pretrained=str(path)))
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_end_in_one_line(tmp_path):
    path = tmp_path / "other.pt"
    state = original_clip().state_dict()
    torch.save({key: value for key, value in state.items() if "resblocks.1" not in key}, path)
    with pytest.raises(UserError, match=r"other\.pt as weights of dgsnet-tiny .*resblocks.1") as caught:
        DGSNet(ModelConfig(name="dgsnet-tiny", pretrained=str(path)))
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_downloaded_end_in_one_line(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no route to host\nat all")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(UserError, match=r"'openai' weights of ViT-B-32-quickgelu .* network") as caught:
        DGSNet(ModelConfig(name="ViT-B-32-quickgelu"))
    assert "\n" not in str(caught.value)


def test_every_plain_vision_transformer_of_open_clip_converts(tmp_path):
    """Each configuration that is not refused, shrunk to one narrow block so that it builds in no time."""
    accepted = 0
    for name in open_clip.list_models():
        try:
            config = open_clip.get_model_config(name)
            check_tower(name, config)
        except UserError:
            continue
        # test_backbones.py covers timm's towers.
        if "timm_model_name" in config["vision_cfg"]:
            continue
        accepted += 1
        config["embed_dim"] = 16
        config["vision_cfg"] |= {"layers": 1, "width": 32, "head_width": 16}
        path = tmp_path / f"small-{name}.json"
        path.write_text(json.dumps(config))
        visual = open_clip.model._build_vision_tower(
            16, config["vision_cfg"], config.get("quick_gelu", False)
        )
        side = visual.image_size[0]
        x = torch.randn(1, 3, side, side)
        with torch.no_grad():
            expected = visual.eval()(x)
            backbone = backbone_of(visual, name)
            assert difference(backbone.encode(x), expected) < 1e-5, name
    assert accepted >= 40


def test_attention_of_another_open_clip_is_refused():
    visual = original_clip().visual
    visual.transformer.resblocks[0].attn = torch.nn.Identity()
    with pytest.raises(UserError, match="open_clip_torch>=3,<4"):
        backbone_of(visual, TINY.name)
