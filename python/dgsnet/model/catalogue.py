"""Which models there are and what their settings must be, told before anything heavy is imported."""

from __future__ import annotations

import difflib
import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dgsnet.config import ModelConfig
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


def canonical(name: str) -> str:
    return name.replace("/", "-")


def check_model(model: ModelConfig, image_size: int) -> None:
    """Refuse a model that does not exist, takes other images or can have no such weights.

    This reads open_clip's files and does not import it. What needs open_clip itself, such as the tags of its
    weights, is told when the model is built.

    Raises:
        UserError: one line with the remedy.
    """
    if "open_clip" in sys.modules:  # then building the model is quick, and the caller may have added models
        return
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise UserError("open_clip is not installed: pip install 'dgs-kernels[dgsnet]'")
    files = {path.stem: path for path in (Path(spec.origin).parent / "model_configs").glob("*.json")}
    files[BUILTIN_NAME] = BUILTIN_FOLDER / f"{BUILTIN_NAME}.json"
    check_known(model.name, files)
    config = json.loads(files[canonical(model.name)].read_text())
    check_tower(model.name, config)
    size = config["vision_cfg"].get("image_size", 224)
    if isinstance(size, int):
        check_image_size(model.name, size, image_size)
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
    found = (
        "a timm tower"
        if "timm_model_name" in vision
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
            f"model {name} is {found}; dgsnet adapts plain CLIP vision transformers, e.g. ViT-L-14-quickgelu"
        )


def check_image_size(name: str, taken: int, given: int) -> None:
    if taken != given:
        raise UserError(
            f"model {name} takes images of {taken} pixels, but preprocess.image_size is {given}: "
            "make them equal"
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
