"""Published detectors convert to folders whose logits are those of a plain reading of their forward pass."""

import json

import numpy as np
import pytest
import torch
from dgsnet.cli import main
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.detection.detector import Detector
from dgsnet.model.checkpoint import build_model, save_model
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms as T

from tests.support import published
from tests.support.published import BASE, CLIP, CLIP_NORM, IMAGENET, LARGE, Random, prepared

SIZES = ((331, 245), (150, 97))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two pictures, one smaller than any crop."""
    folder = tmp_path_factory.mktemp("published")
    published.register(folder)
    folder.joinpath("photos").mkdir()
    published.pictures(folder / "photos", *SIZES)
    return folder


def photos(place):
    return sorted((place / "photos").iterdir())


def converted(place, name, file, *more):
    main(["convert", str(file), "--out", str(place / name), *more])
    return Detector.load(place / name, device="cpu")


def check(place, detector, expected):
    """`expected` is a logit of a picture's path."""
    for path in photos(place):
        ((logit, error),) = detector.stream_logits([path], workers=0)
        assert not error and abs(logit - float(expected(path))) < 1e-5 * max(1, abs(logit)), path


def test_universal_fake_detect(place, capsys):
    theirs, projection = published.openai_file(place / "clip.pt")
    r = Random(5)
    head = {"weight": r(1, 768), "bias": r(1)}
    torch.save(head, place / "fc_weights.pth")
    with pytest.raises(SystemExit):
        main(["convert", str(place / "fc_weights.pth"), "--out", str(place / "ufd"), "--name", CLIP])
    missing = capsys.readouterr().err
    assert "UniversalFakeDetect" in missing and "--pretrained" in missing and missing.count("\n") == 1
    detector = converted(
        place, "ufd", place / "fc_weights.pth", "--name", CLIP, "--pretrained", str(place / "clip.pt")
    )
    steps = T.CenterCrop(224), T.ToTensor(), CLIP_NORM

    def expected(path):
        features = published.clip_features(theirs, prepared(path, *steps)) @ projection.double().T
        return features @ head["weight"].double().T + head["bias"].double()

    check(place, detector, expected)
    assert "UniversalFakeDetect" in capsys.readouterr().out
    assert sorted(path.name for path in (place / "ufd").iterdir()) == [
        "adapters.safetensors",
        "detector.json",
    ]


def community(state, head, path, *steps):
    features = published.timm_features(state, prepared(path, *steps, T.ToTensor(), IMAGENET), heads=6)
    return features @ head["head.weight"].double().T + head["head.bias"].double()


@pytest.mark.parametrize(("size", "resize", "tokens"), [(384, 440, 577), (224, 256, 197)])
def test_community_forensics(place, size, resize, tokens):
    state, head = published.timm_state(384, tokens, patch=16), Random(5).linear("head", 1, 384)
    file = place / f"community{size}.safetensors"
    save_file({f"vit.{name}": tensor for name, tensor in (state | head).items()}, file)
    detector = converted(place, file.stem, file, "--name", f"timm/vit_small_patch16_{size}_two")
    check(place, detector, lambda p: community(state, head, p, T.Resize(resize), T.CenterCrop(size)))
    said = json.loads((place / file.stem / "detector.json").read_text())
    assert said["origin"]["layout"] == f"Community Forensics ({size} pixels)" and said["licence"] == "MIT"
    assert said["model"]["pretrained"] == "backbone.safetensors"


def test_the_authors_own_file_of_community_forensics_decides_and_is_exported(place):
    state, head = published.timm_state(384, 197, patch=16), Random(5).linear("head", 1, 384)
    names = {f"module._orig_mod.vit.{name}": tensor for name, tensor in (state | head).items()}
    torch.save({"model": names, "epoch": 3}, place / "theirs.pt")
    detector = converted(place, "theirs", place / "theirs.pt", "--name", "timm/vit_small_patch16_224_two")
    check(place, detector, lambda p: community(state, head, p, T.Resize(256), T.CenterCrop(224)))
    folder, pictures, table = str(place / "theirs"), str(place / "photos"), place / "theirs.csv"
    main(["calibrate", "--model", folder, "--reals", pictures, "--fpr", "0.9", "--batch", "1"])
    main(["predict", pictures, "--model", folder, "--out", str(table)])
    assert all(path.name in table.read_text() for path in photos(place))
    # The command compares the written file's scores with the detector's.
    main(["export", "--model", folder, "--format", "safetensors", "--out", str(place / "file")])
    assert "theirs.pt" in (place / "file.md").read_text()


def test_sieve_has_a_bias_and_a_threshold_of_its_own(place):
    state, head = published.timm_state(384, 577, patch=16, seed=3), Random(6).linear("head", 1, 384)
    torch.save({"model_state_dict": {f"vit.{n}": t for n, t in (state | head).items()}}, place / "sieve.pth")
    detector = converted(place, "sieve", place / "sieve.pth", "--name", "timm/vit_small_patch16_384_two")
    check(place, detector, lambda p: community(state, head, p, T.Resize(440), T.CenterCrop(384)) + 0.43)
    assert detector.decide([0.64, 0.66]) == ["real", "generated"]


def squash(image):
    """As OpenCV's INTER_LINEAR has it: of the four nearest pixels, whatever lies between them."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    pixels = torch.nn.functional.interpolate(pixels, (224, 224), mode="bilinear", align_corners=False)
    return pixels[0].round().permute(1, 2, 0).byte().numpy()


def duplicated(image):
    """Tiled until no side is below 224."""
    pixels = np.array(image)
    times = [-(-224 // side) if side < 224 else 1 for side in pixels.shape[:2]]
    tiled = np.tile(pixels, (*times, 1))
    sides = [224 if time > 1 else side for time, side in zip(times, pixels.shape)]
    return Image.fromarray(tiled[: sides[0], : sides[1]])


def test_effort_of_deepfakebench_decides_between_two_classes(place):
    state, head = published.effort_state(), Random(8).linear("head", 2, LARGE)
    file = {f"module.backbone.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": file | {f"module.{n}": t for n, t in head.items()}}, place / "effort.pth")
    detector = converted(place, "effort", place / "effort.pth", "--name", CLIP)

    def expected(path):
        pixels = prepared(path, squash, T.ToTensor(), CLIP_NORM)
        features = published.clip_features(state, pixels, weight=published.effort_weight)
        real, generated = (features @ head["head.weight"].double().T + head["head.bias"].double())[0]
        return generated - real

    check(place, detector, expected)
    assert json.loads((place / "effort" / "detector.json").read_text())["licence"] == "CC-BY-NC-4.0"


def test_effort_of_the_other_benchmark_tiles_what_is_small(place):
    state, head = published.effort_state(seed=4, rank=2), Random(9).linear("fc", 1, LARGE)
    file = {f"model.vision_model.{name}": tensor for name, tensor in state.items()}
    text = {"model.text_model.final_layer_norm.bias": torch.zeros(8), "model.logit_scale": torch.ones(())}
    torch.save({"model": file | head | text}, place / "effort-ufd.pth")
    detector = converted(place, "effort-ufd", place / "effort-ufd.pth", "--name", CLIP)

    def expected(path):
        pixels = prepared(path, duplicated, T.CenterCrop(224), T.ToTensor(), CLIP_NORM)
        features = published.clip_features(state, pixels, weight=published.effort_weight)
        return features @ head["fc.weight"].double().T + head["fc.bias"].double()

    check(place, detector, expected)


def test_c2p_clip_sees_the_direction_of_the_embedding_alone(place):
    state, r = published.clip_state(seed=2), Random(10)
    projection, head = r(768, LARGE), {"weight": r(1, 768, scale=1), "bias": r(1)}
    file = {f"model.vision_model.{name}": tensor for name, tensor in state.items()}
    file |= {f"model.fc.{kind}": tensor for kind, tensor in head.items()}
    torch.save(file | {"model.visual_projection.weight": projection}, place / "c2p.pth")
    detector = converted(place, "c2p", place / "c2p.pth", "--name", CLIP)

    def expected(path):
        pixels = prepared(path, T.Resize(224), T.CenterCrop(224), T.ToTensor(), CLIP_NORM)
        embedding = published.clip_features(state, pixels) @ projection.double().T
        embedding = embedding / embedding.norm(dim=-1, keepdim=True)
        return embedding @ head["weight"].double().T + head["bias"].double()

    check(place, detector, expected)


def test_dda_has_its_adapters_merged_and_positions_as_dinov2_interpolates_them(place):
    state = published.timm_state(LARGE, 1370, patch=14, gamma=True, seed=6)
    head = Random(11).linear("fc", 1, LARGE)
    head = {name.removeprefix("fc."): tensor for name, tensor in head.items()}
    file, merged = published.dda_file(state, head)
    torch.save({"model": file, "optimizer": {"state": {}}, "total_steps": 5}, place / "DDA_ckpt.pth")
    detector = converted(place, "dda", place / "DDA_ckpt.pth", "--name", "timm/vit_large_patch14_dinov2_two")
    merged["pos_embed"] = published.hub_positions(state["pos_embed"], 24)

    def expected(path):
        pixels = prepared(path, T.CenterCrop(336), T.ToTensor(), CLIP_NORM)
        features = published.timm_features(merged, pixels, heads=LARGE // 64)
        return features @ head["weight"].double().T + head["bias"].double()

    check(place, detector, expected)
    assert detector.model.image_size == 336


def test_b_free_is_the_mean_of_five_windows_of_tokens(place):
    state = published.timm_state(BASE, 36 * 36, patch=14, gamma=True, registers=4, seed=7)
    head = Random(12).linear("head", 1, BASE)
    torch.save({"model": state | head}, place / "bfree.pth")
    name = "timm/vit_base_patch14_reg4_dinov2_two"
    detector = converted(place, "bfree", place / "bfree.pth", "--name", name)
    # Its 35 rows of tokens are too few, and of its 44 columns each window has 36.
    (path,) = published.pictures(place, (627, 500))
    expected = published.bfree_logit(state, head, prepared(path, T.ToTensor(), IMAGENET))
    ((logit, _),) = detector.stream_logits([path], workers=0)
    assert abs(logit - float(expected)) < 1e-5 * max(1, abs(logit))


@pytest.mark.parametrize("format", ["torchscript", "safetensors"])
def test_an_export_has_the_feature_and_its_length(tmp_path, format, capsys):
    model = ModelConfig("dgsnet-tiny", "", lora_rank=0, feature="class", l2=True)
    config = Config(model, PreprocessConfig("crop", 32, resize="shorter", side=40))
    save_model(tmp_path / "run", build_model(config, with_text=False), config)
    main(["export", "--model", str(tmp_path / "run"), "--format", format, "--out", str(tmp_path / "file")])
    assert "verified against the original" in capsys.readouterr().out
    card = (tmp_path / "file.md").read_text()
    assert '"resize": "shorter"' in card and '"feature": "class"' in card and '"l2": true' in card
