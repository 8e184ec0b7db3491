"""Trained models and resume states on disk: small, written atomically, refused in one line when unfit.

A model folder holds what training changed and nothing of the backbone: `adapters.safetensors` (the adapters
and the three heads, with the backbone's fingerprint in its header) and `config.json` (the configuration, with
preprocessing); after `dgsnet calibrate` also `calibration.json`. Only a converted one carries its backbone,
`clip.safetensors`. A run folder, as `dgsnet train --out` writes it, holds two model folders, `best` and
`last`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from .calibration import Calibration
from .config import CONFIG_FILE, Config
from .errors import UserError
from .model import DGSNet
from .parallel import whole

WEIGHTS_FILE = "adapters.safetensors"
CALIBRATION_FILE = "calibration.json"
# As `pretrained` in config.json it means the file of this name in the model folder.
BACKBONE_FILE = "clip.safetensors"
FORMAT = "dgsnet-1"  # changes when an older program could not read the file rightly


def build_model(config: Config, *, with_text: bool = True) -> DGSNet:
    """A new DGSNet; config.seed decides its random parts: heads, adapters, a backbone not pretrained.

    Args:
        config: the run's configuration; `model` and `seed` are used.
        with_text: load the text encoder too (needed to train with gradient surgery only).

    Raises:
        UserError: the backbone does not exist or its weights cannot be had.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return DGSNet(config.model, with_text=with_text)


def trained_state(model: DGSNet) -> dict[str, torch.Tensor]:
    """Adapters and heads by name, whole and on the CPU: all that a run changes in a model.

    Of a sharded model every process has to ask for it.
    """
    heads = {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()}
    trained = (model.adapter_state() | heads).items()
    return {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in trained}


def load_trained_state(model: DGSNet, state: dict[str, torch.Tensor]) -> None:
    """The inverse of trained_state; ValueError names a tensor missing, unknown, misshaped or not finite."""
    expected = trained_state(model)
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise ValueError(f"{name} is missing")
        if name not in expected:
            raise ValueError(f"{name} is unknown to this backbone and lora_rank")
        if state[name].shape != expected[name].shape:
            raise ValueError(
                f"{name} has shape {list(state[name].shape)}, expected {list(expected[name].shape)}"
            )
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"{name} holds values that are not finite")
    prefix = "head."
    heads = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    model.load_adapter_state({name: t for name, t in state.items() if not name.startswith(prefix)})
    model.head.load_state_dict(heads)


def fingerprint(model: DGSNet) -> str:
    """A short hash of the frozen image encoder that tells one set of weights from another.

    64 evenly spaced values of every frozen tensor are hashed, rounded to bf16 so that a model kept in that
    type has the same one, and the digests sorted, so that neither parameter names nor their order matter.
    """
    digests = []
    for name, tensor in model.visual.state_dict().items():
        if "lora_" in name:
            continue
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
        model: the trained model.
        config: the configuration it was trained with.
        backbone: weights file of its CLIP that is moved into the folder; None leaves config's.
        extra: anything JSON can hold that belongs to this model (step, validation results, a threshold);
            read_extra returns it.

    Returns:
        The folder.

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
    **extra: Any,
) -> Path:
    """save_model for a model that is not at hand whole: given its trained_state and fingerprint."""
    header = {"format": FORMAT, "backbone": backbone_fingerprint, "extra": json.dumps(extra)}
    if backbone:
        config = _with_pretrained(config, BACKBONE_FILE)

    def fill(new: Path) -> None:
        if backbone:
            with open(backbone, "rb+") as file:
                os.fsync(file.fileno())
            os.rename(backbone, new / BACKBONE_FILE)
        _write_synced(new / CONFIG_FILE, config.to_json().encode())
        _write_synced(new / WEIGHTS_FILE, to_safetensors(state, metadata=header))

    return replace_folder(Path(folder), fill)


def load_model(
    folder: str | Path, *, device: str | torch.device = "cpu", with_text: bool = False
) -> tuple[DGSNet, Config]:
    """Read a trained model.

    Args:
        folder: a model folder, or a run folder (its best model is taken).
        device: where the model is put.
        with_text: load the text encoder too.

    Returns:
        The model in evaluation mode and the configuration it was trained with; `pretrained` is the path of
        the folder's own backbone where it has one.

    Raises:
        UserError: nothing there, damaged, of an unknown format, or trained on other backbone weights.

    Example:
        >>> model, config = load_model("runs/mine")  # doctest: +SKIP
    """
    folder = model_folder(folder)
    config = read_config(folder / CONFIG_FILE)
    if config.model.pretrained == BACKBONE_FILE:
        if not (folder / BACKBONE_FILE).is_file():
            raise UserError(f"{folder / BACKBONE_FILE} is missing: copy the model's folder whole")
        config = _with_pretrained(config, str(folder / BACKBONE_FILE))
    header, state = _read_weights(folder / WEIGHTS_FILE)
    model = build_model(config, with_text=with_text)
    try:
        load_trained_state(model, state)
    except ValueError as error:
        raise UserError(
            f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE} beside it: {error}; they must be of one run"
        ) from None
    found = fingerprint(model)
    if found != header["backbone"]:
        raise UserError(
            f"{folder} was trained on other weights of {config.model.name} than those that pretrained="
            f"{config.model.pretrained!r} gives here (fingerprint {header['backbone']}, here {found}): "
            "restore the weights it was trained on, or train again"
        )
    return model.to(device).eval(), config


def _with_pretrained(config: Config, pretrained: str) -> Config:
    return replace(config, model=replace(config.model, pretrained=pretrained))


def read_extra(folder: str | Path) -> dict[str, Any]:
    """What save_model was given as `extra`, of a model folder or of a run folder's best model."""
    return json.loads(_read_weights(model_folder(folder) / WEIGHTS_FILE)[0]["extra"])


def save_calibration(folder: str | Path, calibration: Calibration) -> Path:
    """Store a calibration in a model folder, or in a run folder's best model; returns the file.

    A model that is trained or saved again has none: the folder is replaced as a whole.
    """
    path = model_folder(folder) / CALIBRATION_FILE
    write_file(path, calibration.to_json().encode())
    return path


def load_calibration(folder: str | Path) -> Calibration | None:
    """The calibration of a model folder, or of a run folder's best model; None where there is none.

    Raises:
        UserError: no model there, or a damaged calibration.
    """
    path = model_folder(folder) / CALIBRATION_FILE
    try:
        return Calibration.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:  # JSON's and Unicode's errors are ValueErrors too
        raise UserError(
            f"{path} is damaged ({one_line(error)}): remove it, or run dgsnet calibrate again"
        ) from None


def model_folder(path: str | Path) -> Path:
    """The model folder that `path` means: itself, or the best model of a run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    for folder in (path / "best", path):
        for candidate in (
            folder,
            _previous(folder),
        ):  # the latter after a kill between replace_folder's renames
            if (candidate / WEIGHTS_FILE).is_file():
                return candidate
    if not path.exists():
        raise UserError(f"no model at {path}: give the folder that `dgsnet train --out` wrote")
    if (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} has no finished model yet ({WEIGHTS_FILE} is missing): finish its training with --resume"
        )
    raise UserError(
        f"{path} is no model: it holds no {WEIGHTS_FILE}; give the folder that `dgsnet train` wrote"
    )


def read_config(path: Path) -> Config:
    """Read a config.json; UserError when it is missing, damaged or unknown."""
    try:
        return Config.load(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a model needs it beside {WEIGHTS_FILE}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or of another version of dgsnet: {one_line(error)}") from None


def _read_weights(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): copy it again or train again") from None
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} is no model of this version of dgsnet: format {header.get('format')}, expected {FORMAT}"
        )
    return header, state


def one_line(error: BaseException | str) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a resume state (tensors and plain values) in one atomic step."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "wb") as file:
        torch.save(state, file)
        _sync(file)
    os.replace(new, path)
    _sync_folder(path.parent)


def load_state(path: Path) -> dict[str, Any]:
    """Read what save_state wrote; UserError when it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load's errors on damaged files share no class
        raise UserError(
            f"{path} is damaged ({one_line(error)[:200]}): remove {path.parent} to train from the start"
        ) from None


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write a new folder, then put it in the place of `folder`.

    The new folder is on the disk before the old one is moved aside, and the old one is deleted last. A kill
    between the two renames leaves the old one under its other name, where model_folder finds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, previous = folder.with_name(f".{folder.name}.new"), _previous(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    fill(new)
    _sync_folder(new)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(folder, previous)
    os.rename(new, folder)
    _sync_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)
    return folder


def write_file(path: Path, data: bytes) -> None:
    """Write a file in one atomic step."""
    new = path.with_name(f".{path.name}.new")
    _write_synced(new, data)
    os.replace(new, path)
    _sync_folder(path.parent)


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames inside the folder durable, where the system can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
