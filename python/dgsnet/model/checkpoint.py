"""Trained models and resume states on disk: small, written atomically, refused in one line when unfit.

A model folder holds what training changed and nothing of the backbone: `adapters.safetensors` (the adapters
and the three heads, with the backbone's fingerprint in its header) and `config.json` (the configuration, with
preprocessing); after `dgsnet train` also `training_images.npy` (hashes of the files it was trained on), after
`dgsnet calibrate` `calibration.json`. Only a converted one carries its backbone, `clip.safetensors` or
`backbone.safetensors`, and one that was trained by other programs has `detector.json` in place of
`config.json`. A run folder, as `dgsnet train --out` writes it, holds two model folders, `best` and `last`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.distributed.tensor import DTensor

from dgsnet.config import CONFIG_FILE, Config
from dgsnet.errors import UserError
from dgsnet.files import one_line, replace_folder, replacing, write_synced
from dgsnet.model.description import DETECTOR_FILE, Description
from dgsnet.model.dgsnet import DGSNet
from dgsnet.model.folders import (
    WEIGHTS_FILE,
    beside,
    model_folder,
    read_model_config,
    with_pretrained,
)

# Hashes of the training images' files (images.file_hash), int64, ascending.
TRAINED_ON_FILE = "training_images.npy"
WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# It changes when an older program could not read the file rightly.
FORMAT = "dgsnet-1"


def build_model(config: Config, *, with_text: bool = True) -> DGSNet:
    """A new DGSNet; config.seed decides its random parts: heads, adapters, a backbone not pretrained.

    It takes images of the configuration's size. UserError if the backbone does not exist or takes none of
    that size, or its weights cannot be had.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return DGSNet(config.model, with_text=with_text, image_size=config.preprocess.image_size)


def trained_state(model: DGSNet) -> dict[str, torch.Tensor]:
    """Adapters and heads by name, whole and on the CPU: all that a run changes in a model.

    Of a sharded model every process has to ask for it.
    """
    return {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in _trained(model).items()}


def _trained(model: DGSNet) -> dict[str, Tensor]:
    """The same as they lie in the model."""
    heads = {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()}
    return model.adapter_state() | heads


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_trained_state(model: DGSNet, state: dict[str, torch.Tensor]) -> None:
    """The inverse of trained_state; ValueError names a tensor missing, unknown, misshaped or not finite."""
    _check_fits(model, state)
    prefix = "head."
    heads = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    model.load_adapter_state({name: t for name, t in state.items() if not name.startswith(prefix)})
    model.head.load_state_dict(heads)


def _check_fits(model: DGSNet, state: dict[str, Tensor]) -> None:
    """The errors of load_trained_state, of a model without memory too."""
    expected = _trained(model)
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise ValueError(f"{name} is missing")
        if name not in expected:
            raise ValueError(f"{name} is unknown to this backbone and lora_rank")
        if state[name].dtype not in WEIGHT_TYPES:
            raise ValueError(f"{name} is of type {state[name].dtype}")
        if state[name].shape != expected[name].shape:
            raise ValueError(
                f"{name} has shape {list(state[name].shape)}, expected {list(expected[name].shape)}"
            )
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"{name} holds values that are not finite")


def fingerprint(model: DGSNet) -> str:
    """`sampled_hash` of the frozen image encoder."""
    state = model.visual.state_dict().items()
    return sampled_hash(tensor for name, tensor in state if "lora_" not in name)


def sampled_hash(tensors: Iterable[Tensor]) -> str:
    """A short hash that tells one set of weights from another.

    64 evenly spaced values of every tensor are hashed, rounded to bf16 so that a model kept in that
    type has the same one, and the digests sorted, so that neither parameter names nor their order matter.
    """
    digests = []
    for tensor in tensors:
        values = tensor.detach().flatten()
        sample = values[:: max(1, values.numel() // 64)][:64].cpu().bfloat16().contiguous()
        digests.append(
            hashlib.sha256(
                f"{tuple(tensor.shape)}".encode() + sample.view(torch.int16).numpy().tobytes()
            ).digest()
        )
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def save_model(
    folder: str | Path, model: DGSNet, config: Config, *, backbone: Path | None = None, **extra: Any
) -> Path:
    """Write a model folder; one that is there stays complete until the new one is.

    Args:
        folder: where to; replaced when it exists.
        model, config: the trained model, and what it was trained with.
        backbone: weights file, named as one of `BACKBONE_FILES`, that is moved into the folder; None leaves
            config's.
        extra: what belongs to this model (step, validation results) as JSON holds it; read_extra returns it.

    Example:
        >>> save_model("runs/mine/best", model, config, step=1000)  # doctest: +SKIP
    """
    return write_model(folder, trained_state(model), fingerprint(model), config, backbone=backbone, **extra)


def write_model(
    folder: str | Path,
    state: dict[str, torch.Tensor],
    backbone_fingerprint: str,
    config: Config,
    *,
    backbone: Path | None = None,
    trained_on: np.ndarray | None = None,
    description: Description | None = None,
    **extra: Any,
) -> Path:
    """save_model for a model that is not at hand whole: given its trained_state and fingerprint.

    `trained_on`: hashes of the files that it was trained on, int64 [N], ascending. `description`: written in
    place of the configuration, whose model and preprocessing it has.
    """
    header = {"format": FORMAT, "backbone": backbone_fingerprint, "extra": json.dumps(extra)}
    if backbone:
        config = with_pretrained(config, backbone.name)
        if description:
            description = replace(description, model=config.model)

    def fill(new: Path) -> None:
        if backbone:
            with open(backbone, "rb+") as file:
                os.fsync(file.fileno())
            os.rename(backbone, new / backbone.name)
        if trained_on is not None:
            hashes = io.BytesIO()
            np.save(hashes, trained_on)
            write_synced(new / TRAINED_ON_FILE, hashes.getvalue())
        said = description or config
        write_synced(new / (DETECTOR_FILE if description else CONFIG_FILE), said.to_json().encode())
        write_synced(new / WEIGHTS_FILE, to_safetensors(state, metadata=header))

    return replace_folder(Path(folder), fill)


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    with_text: bool = False,
    pretrained: str | None = None,
) -> tuple[DGSNet, Config]:
    """Read a trained model.

    Args:
        folder: a model folder, or a run folder (its best model is taken).
        device: where the model is put.
        with_text: load the text encoder too.
        pretrained: the backbone's weights, in place of those that the folder's configuration names. A file
            of TorchScript, which can run code, is loaded only if it is named here.

    Returns:
        The model in evaluation mode and the configuration it was trained with; `pretrained` is the path of
        the folder's own backbone where it has one.

    Raises:
        UserError: nothing there, damaged, of an unknown format, or trained on other backbone weights.

    Example:
        >>> model, config = load_model("runs/mine")  # doctest: +SKIP
    """
    folder = model_folder(folder)
    config = read_model_config(folder, pretrained)
    header, state = _read_weights(folder / WEIGHTS_FILE)
    try:
        _check_rank(state, config.model.lora_rank)
        if not config.model.pretrained:
            # A name alone takes what memory it likes: the largest model's 27 GB.
            with init_empty_weights(include_buffers=False):
                _check_fits(build_model(config, with_text=False), state)
        model = build_model(config, with_text=with_text)
        load_trained_state(model, state)
    except ValueError as error:
        raise UserError(
            f"{folder / WEIGHTS_FILE} does not fit the settings beside it: {one_line(error, 200)}; they "
            "must be of one run"
        ) from None
    found, expected = fingerprint(model), header.get("backbone", "")
    if found != expected:
        raise UserError(
            f"{folder} was trained on other weights of {config.model.name} than those that pretrained="
            f"{config.model.pretrained!r} gives here (fingerprint {expected[:80]}, here {found}): "
            "restore the weights it was trained on, or train again"
        )
    return model.to(device).eval(), config


def read_extra(folder: str | Path) -> dict[str, Any]:
    """What save_model was given as `extra`, of a model folder or of a run folder's best model."""
    path = model_folder(folder) / WEIGHTS_FILE
    try:
        extra = json.loads(_read_weights(path)[0].get("extra", "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error, 200)}): copy it again or train again") from None
    return extra if isinstance(extra, dict) else {}


def trained_on(folder: str | Path) -> np.ndarray:
    """Hashes of the files that a model was trained on, int64 [N], ascending; none where it does not say."""
    path = beside(folder, TRAINED_ON_FILE)
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, kind = read[version](file)
            # Before room is made for what a header claims.
            if kind != np.int64 or len(shape) != 1 or 8 * shape[0] != os.stat(path).st_size - file.tell():
                raise ValueError(f"numbers of type {kind} and shape {shape} where hashes belong")
            return np.fromfile(file, kind)
    except FileNotFoundError:
        return np.empty(0, np.int64)
    except Exception as error:
        # NumPy reads the header as Python; its errors share no class.
        raise UserError(f"{path} is damaged ({one_line(error, 200)}): copy it again, or remove it") from None


def _check_rank(state: dict[str, torch.Tensor], rank: int) -> None:
    """ValueError where adapters are of another rank, before a model is made of that one."""
    found = {len(tensor) for name, tensor in state.items() if "lora_A" in name and tensor.ndim}
    if found != ({rank} if rank else set()):
        raise ValueError(f"its adapters are of rank {sorted(found)}, and lora_rank is {rank}")


def _read_weights(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    # Types that it knows and torch does not are RuntimeErrors, KeyErrors or AttributeErrors.
    except (SafetensorError, OSError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error, 200)}): copy it again or train again") from None
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} is no model of this version of dgsnet: format {header.get('format', '')[:80]}, expected "
            f"{FORMAT}"
        )
    return header, state


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a resume state (tensors and plain values) in one atomic step."""
    with replacing(path, "wb") as file:
        torch.save(state, file)


def load_state(path: Path) -> dict[str, Any]:
    """Read what save_state wrote; UserError when it is damaged."""
    with damaged_state(path):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def damaged_state(path: Path) -> Iterator[None]:
    """Whatever a resume state that is damaged raises where it is used, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # torch's errors about such files share no class.
        raise UserError(
            f"{path} is damaged ({one_line(error, 200)}): remove {path.parent} to train from the start"
        ) from None
