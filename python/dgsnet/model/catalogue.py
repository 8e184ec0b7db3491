"""Which models there are and what their settings must be, found without importing anything heavy."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dgsnet.config import NORMALIZATIONS, ModelConfig
from dgsnet.errors import UserError

BUILTIN_NAME = "dgsnet-tiny"
BUILTIN_WEIGHTS = "builtin"
BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin"
# What goes with the built-in model where the command line says nothing else: how it was pretrained.
BUILTIN_SETTINGS = {
    "model.pretrained": BUILTIN_WEIGHTS,
    "preprocess.mode": "crop",
    "preprocess.image_size": 32,
    "preprocess.normalization": "clip",
}
WEIGHTS_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
# Before the names of image towers that come from timm, without a text tower.
TIMM = "timm/"
# Names of timm's plain and rotary vision transformers; `backbones.FAMILIES` looks at the tower itself.
TIMM_TRANSFORMERS = re.compile(r"(vit|eva|eva02)_(?!relpos)")
# Patches of a tower along a side of its images, at most: attention takes the fourth power of it.
MAX_GRID = 128
# The mosaic's patches, where they tile the model's images.
PATCH_SIZE = 32


def canonical(name: str) -> str:
    return name.replace("/", "-")


def has_text(name: str) -> bool:
    """Whether a model of this name has a text tower."""
    return not name.startswith(TIMM)


def own_settings(name: str) -> dict[str, Any]:
    """Settings that go with a model where nothing else is said: its images' size and normalisation.

    The normalisation of open_clip's own towers stays the published one.
    """
    if name == BUILTIN_NAME:
        return BUILTIN_SETTINGS
    settings: dict[str, Any] = {}
    if has_text(name):
        vision = read_config_file(name).get("vision_cfg", {})
        size, trunk = vision.get("image_size", 224), vision.get("timm_model_name")
    else:
        settings["data.captions"] = "none"
        size, trunk = None, name.removeprefix(TIMM)
    if trunk:
        import timm

        found = timm.get_pretrained_cfg(trunk)
        if found is None:
            return settings
        size = size or found.input_size[-1]
        statistics = (tuple(found.mean), tuple(found.std))
        for normalization, values in NORMALIZATIONS.items():
            if values == statistics:
                settings["preprocess.normalization"] = normalization
    if isinstance(size, int):
        patch = min((p for p in range(1, size + 1) if size % p == 0), key=lambda p: abs(p - PATCH_SIZE))
        settings |= {
            "preprocess.image_size": size,
            "preprocess.patch_size": patch,
            "preprocess.num_patches": (size // patch) ** 2,
        }
    return settings


def timm_arguments(name: str) -> dict[str, Any]:
    """What `timm.create_model` takes for a model of this name, without a classifier."""
    model = name.removeprefix(TIMM)
    # timm pools DINOv3's patches unless told to take the class token, as its authors do.
    return {"model_name": model, "num_classes": 0} | ({"global_pool": "token"} if "dinov3" in model else {})


def timm_config(name: str) -> Any:
    """timm's `PretrainedCfg` of a model of this name; UserError where there is none, or no transformer."""
    import timm

    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3) or ["vit_base_patch16_dinov3"]
        raise UserError(f"timm has no model {model!r}: did you mean {TIMM}{f' or {TIMM}'.join(close)}?")
    check_trunk(name, model)
    return timm.get_pretrained_cfg(model)


def check_trunk(name: str, trunk: str) -> None:
    """Refuse a tower of timm whose name is not that of a plain or rotary vision transformer."""
    if not TIMM_TRANSFORMERS.match(trunk):
        raise UserError(
            f"model {name} has timm's {trunk} for an image tower; of timm's dgsnet adapts vision "
            f"transformers, e.g. ViT-B-16-SigLIP2, PE-Core-B-16 or {TIMM}vit_base_patch16_dinov3"
        )


@functools.cache
def config_files() -> dict[str, Path]:
    """open_clip's configurations by model, found without importing it, and the built-in model's."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise UserError("open_clip is not installed: pip install 'dgs-kernels[dgsnet]'")
    files = {path.stem: path for path in (Path(spec.origin).parent / "model_configs").glob("*.json")}
    return files | {BUILTIN_NAME: BUILTIN_FOLDER / f"{BUILTIN_NAME}.json"}


def read_config_file(name: str) -> dict[str, Any]:
    """open_clip's configuration of a model; empty for an unknown one."""
    path = config_files().get(canonical(name))
    return json.loads(path.read_text()) if path else {}


def check_model(model: ModelConfig, image_size: int) -> None:
    """Refuse a model that does not exist, takes other images or can have no such weights.

    This reads open_clip's files and does not import it. What needs open_clip itself, such as the tags of its
    weights, is checked when the model is built.
    """
    # Building the model is quick then, and the caller may have added models.
    if "open_clip" in sys.modules:
        return
    if has_text(model.name):
        check_known(model.name, config_files())
        config = read_config_file(model.name)
        check_tower(model.name, config)
        vision = config["vision_cfg"]
        size, patch, trunk = vision["image_size"], vision.get("patch_size"), vision.get("timm_model_name")
    else:
        size, patch, trunk = timm_config(model.name).input_size[1:], None, model.name
    if trunk:
        named = re.search(r"patch(\d+)", trunk)
        patch = int(named[1]) if named else None
    if side(model.name, size) != image_size and patch:
        check_image_size(model.name, patch, image_size)
    check_weights(model.name, model.pretrained)


def check_known(name: str, known: Iterable[str]) -> None:
    known = list(known)
    if canonical(name) not in known:
        close = difflib.get_close_matches(name, known, n=3) or ["ViT-L-14-quickgelu", BUILTIN_NAME]
        raise UserError(
            f"unknown model {name!r}: did you mean {' or '.join(close)}? "
            "open_clip.list_models() names them all"
        )


def check_tower(name: str, config: dict[str, Any]) -> None:
    """Refuse an image tower that DGS-Net cannot adapt, given open_clip's configuration of the model."""
    vision = config["vision_cfg"]
    trunk = vision.get("timm_model_name")
    if trunk and not name.startswith("MobileCLIP"):
        return check_trunk(name, trunk)
    found = (
        "a MobileCLIP, which takes pixels that are not normalised"
        if trunk
        else "a ResNet"
        if isinstance(vision.get("layers"), (list, tuple))
        else "CoCa, with attentional pooling"
        if "multimodal_cfg" in config or vision.get("attentional_pool")
        else "a transformer with custom attention blocks"
        if vision.get("block_type") == "custom"
        else None
    )
    if found:
        raise UserError(
            f"model {name} is {found}; dgsnet adapts plain vision transformers, and timm's, e.g. "
            "ViT-L-14-quickgelu or ViT-B-16-SigLIP2"
        )


def side(name: str, size: int | Sequence[int]) -> int:
    """Of a model's square input; UserError where it is none."""
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(f"model {name} takes {height}x{width} images; only square inputs are supported")
    return height


def check_image_size(name: str, patch: int, given: int) -> None:
    """Refuse images, `given` pixels high and wide, that a model with these patches does not take."""
    if given % patch or given > MAX_GRID * patch:
        below = min(max(given // patch, 1), MAX_GRID) * patch
        raise UserError(
            f"model {name} cuts images of up to {MAX_GRID * patch} pixels into patches of {patch}, but "
            f"preprocess.image_size is {given}: give a multiple of {patch}, such as {below}"
        )


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is TorchScript, which is code. As for torch, `constants.pkl` at its root says so."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return False
    return bool(names) and f"{names[0].partition('/')[0]}/constants.pkl" in names


def check_no_code(config: Path, pretrained: str, option: str) -> None:
    """Refuse weights that a configuration, which may be a stranger's, names and that run code when loaded.

    `option` is how whoever runs the command can name the file.
    """
    path = Path(pretrained).expanduser()
    if path.is_file() and is_torchscript(path):
        raise UserError(
            f"{config} names {pretrained}, which is TorchScript and can run code: if you trust that file, "
            f"give it yourself with {option} {pretrained}"
        )


def check_weights(name: str, pretrained: str) -> None:
    """Refuse what is neither a file, nor could be a tag of open_clip's, nor the built-in model's own."""
    if pretrained == BUILTIN_WEIGHTS and name != BUILTIN_NAME:
        raise UserError(f"pretrained='builtin' goes with name='{BUILTIN_NAME}' only, not with {name}")
    path = Path(pretrained).expanduser()
    if pretrained in ("", BUILTIN_WEIGHTS) or path.is_file():
        return
    if path.suffix in WEIGHTS_SUFFIXES or len(path.parts) > 1:
        raise UserError(
            f"weights file {pretrained} does not exist: give an existing .pt, .bin or .safetensors file"
        )
    if name == BUILTIN_NAME:
        raise UserError(
            f"{name} has no pretrained weights {pretrained!r}: give {BUILTIN_WEIGHTS}, a weights file, or '' "
            "for random ones"
        )
