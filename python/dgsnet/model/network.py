"""The network of a detector, wherever it lies: in a model folder for torch, or in an .onnx."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from dgsnet.config import Config
from dgsnet.errors import UserError
from dgsnet.files import one_line
from dgsnet.model.checkpoint import fingerprint, load_model, trained_state
from dgsnet.model.description import Description
from dgsnet.model.folders import is_onnx, model_folder, read_description
from dgsnet.model.onnx_network import OnnxNetwork, load_onnx


def usable_device(device: str | None) -> str:
    """This device, the GPU where there is one if it is None; UserError where it cannot be used."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device} cannot be used here ({one_line(error)}); try cpu") from None
    return device


def device_for(run: str | Path, device: str | None) -> str:
    """Where a model is put; UserError where it cannot be."""
    if is_onnx(run):
        if device not in (None, "cpu"):
            raise UserError(
                f"{run} is scored on the CPU: leave out --device {device}, or give a model folder"
            )
        return "cpu"
    return usable_device(device)


def load_network(
    run: str | Path, device: str, pretrained: str | None = None
) -> tuple[Any, Config, Description | None]:
    """The network in evaluation mode, its configuration and, where there is one, its description.

    Raises:
        UserError: as of `load_model` and of `load_onnx`.
    """
    if is_onnx(run):
        if pretrained is not None:
            raise UserError(f"{run} has its backbone's weights in it: leave --pretrained out")
        return load_onnx(run)
    return *load_model(run, device=device, pretrained=pretrained), read_description(model_folder(run))


def identity(model: Any, config: Config) -> str:
    """A short hash that tells one network from another."""
    if isinstance(model, OnnxNetwork):
        return model.sha256[:16]
    found = hashlib.sha256(fingerprint(model).encode())
    if config.model.feature != "own" or config.model.l2:
        found.update(f"{config.model.feature} {config.model.l2}".encode())
    for name, tensor in sorted(trained_state(model).items()):
        found.update(name.encode() + tensor.float().numpy().tobytes())
    return found.hexdigest()[:16]
