"""Where a trained model lies and what it is made of, found before anything heavy is imported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dgsnet.config import CONFIG_FILE, Config, read_config, read_settings
from dgsnet.errors import UserError
from dgsnet.files import aside
from dgsnet.model.catalogue import check_no_code
from dgsnet.model.description import DETECTOR_FILE, Description

WEIGHTS_FILE = "adapters.safetensors"
CALIBRATION_FILE = "calibration.json"
# As `pretrained` of a model they mean the file of this name in its folder: a whole CLIP, or an image tower.
BACKBONE_FILES = ("clip.safetensors", "backbone.safetensors")


def is_onnx(path: str | Path) -> bool:
    """Whether a model is a network in an ONNX file."""
    return Path(path).suffix.lower() == ".onnx" and Path(path).is_file()


def model_folder(path: str | Path) -> Path:
    """The model folder that `path` means: itself, or a run folder's best model; UserError: there is none."""
    path = Path(path)
    if is_onnx(path):
        raise UserError(
            f"{path} is a network alone, which predict, evaluate, calibrate, monitor and serve take: give "
            "the model folder that it was exported from"
        )
    for folder in (path / "best", path):
        # The latter after a kill between replace_folder's renames.
        for candidate in (folder, aside(folder)):
            if (candidate / WEIGHTS_FILE).is_file():
                return candidate
    if not path.exists():
        raise UserError(f"no model at {path}: give the folder that `dgsnet train --out` wrote")
    if (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} has no finished model yet ({WEIGHTS_FILE} is missing): finish its training with --resume"
        )
    if (path / CALIBRATION_FILE).is_file():
        raise UserError(
            f"{path} holds no network, but the threshold of another program's scores: it goes with --scores"
        )
    raise UserError(
        f"{path} is no model: it holds no {WEIGHTS_FILE}; give the folder that `dgsnet train` wrote"
    )


def holds_rule(path: str | Path) -> bool:
    """Whether a folder has a calibration of another program's scores, as `calibrate --scores` writes it."""
    path = Path(path)
    return (path / CALIBRATION_FILE).is_file() and not (path / WEIGHTS_FILE).is_file()


def beside(model: str | Path, name: str) -> Path:
    """Where a file that goes with a model lies, or will lie; UserError: there is no model.

    Args:
        model: as of `model_folder`, a folder that `holds_rule`, or an .onnx: beside x.onnx they are called
            x.onnx.calibration.json.
        name: as CALIBRATION_FILE.
    """
    if is_onnx(model):
        return Path(f"{model}.{name}")
    return Path(model) / name if holds_rule(model) else model_folder(model) / name


def read_model_config(folder: Path, pretrained: str | None = None) -> Config:
    """The configuration of a model folder; `model.pretrained` is where its backbone's weights are.

    UserError if there is none, its own backbone is missing, or it names TorchScript by itself.
    """
    described = read_description(folder)
    if described:
        config = Config(model=described.model, preprocess=described.preprocess)
    else:
        config = read_config(folder / CONFIG_FILE)
    named = config.model.pretrained
    if pretrained is None and named in BACKBONE_FILES:
        pretrained = str((folder / named).resolve())
        if not Path(pretrained).is_file():
            raise UserError(f"{folder / named} is missing: copy the model's folder whole")
    if pretrained is None:
        check_no_code(folder / (DETECTOR_FILE if described else CONFIG_FILE), named, "--pretrained")
        return config
    return with_pretrained(config, pretrained)


def read_description(folder: Path) -> Description | None:
    """A model folder's detector.json; None where it has none, UserError where it is damaged."""
    path = folder / DETECTOR_FILE
    return read_settings(path, Description) if path.is_file() else None


def with_pretrained(config: Config, pretrained: str) -> Config:
    return replace(config, model=replace(config.model, pretrained=pretrained))
