"""Files of weights that strangers made: read without running what is in them, taken apart by shapes."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgsnet.errors import UserError
from dgsnet.files import one_line

State = dict[str, Tensor]

# What training programs put their state_dict under, beside other things.
WRAPPERS = ("model", "state_dict", "model_state_dict")
# Parts of names that say how a model was run and not what it is.
RUNNERS = ("module.", "_orig_mod.")
# Older versions of transformers kept it: the numbers 0, 1, 2, ...
POSITIONS = ".position_ids"


def load(checkpoint: Path) -> tuple[State, str]:
    """The tensors of a .safetensors file, or of one that torch.save wrote; the name that they stood under.

    The file is read with weights_only=True, and nothing in it is trusted yet, no shape either.

    Raises:
        UserError: no such file, or a damaged or hostile one, or one without a flat state_dict of floats.
    """
    if not checkpoint.is_file():
        raise UserError(f"no file {checkpoint}: give the authors' .pth or .safetensors file")
    try:
        found = load_file(checkpoint) if _is_safetensors(checkpoint) else _unpickled(checkpoint)
    except Exception as error:
        # torch.load's errors on damaged or hostile files share no class.
        reason = one_line(error).split(". ")[0][:200]
        raise UserError(
            f"{checkpoint} cannot be read as weights ({reason}): it is damaged, or no PyTorch file of plain "
            "tensors; download it again"
        ) from None
    wrapper = ""
    if isinstance(found, dict):
        wrapper = next((name for name in WRAPPERS if isinstance(found.get(name), dict)), "")
        found = found[wrapper] if wrapper else found
    if not isinstance(found, dict) or not found:
        raise UserError(
            f"{checkpoint} holds {type(found).__name__}, not a flat state_dict: give the authors' file"
        )
    state = {}
    for key, tensor in found.items():
        if isinstance(key, str) and key.endswith(POSITIONS):
            continue
        floats = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.is_floating_point()
        if not floats or not isinstance(key, str):
            kind = f"a {tensor.dtype} tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(
                f"{checkpoint} is no flat state_dict of the authors' layout: {one_line(repr(key))[:80]} is "
                f"{kind}, expected a dense tensor of floats"
            )
        for runner in RUNNERS:
            key = key.removeprefix(runner)
        state[key] = tensor
    return state, wrapper


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{"


def _unpickled(path: Path) -> object:
    with warnings.catch_warnings():
        # Files that warn are refused below.
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)


def part(state: State, prefix: str, shapes: dict[str, tuple[int, ...]]) -> State:
    """Take the tensors below a prefix out of `state`, in fp32.

    ValueError if one is missing, misshaped, not finite.
    """
    taken = {}
    for name, shape in shapes.items():
        if prefix + name not in state:
            raise ValueError(f"{prefix}{name} is missing")
        tensor = state.pop(prefix + name)
        # Checked before anything reads it: a file may claim any shape.
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{prefix}{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{prefix}{name} holds values that are not finite")
        taken[name] = tensor.float()
    return taken


def holds(state: State, prefix: str) -> bool:
    """Whether a name begins so."""
    return any(key.startswith(prefix) for key in state)


def drop(state: State, *prefixes: str) -> None:
    """Leave out what is not needed."""
    for key in [key for key in state if key.startswith(prefixes)]:
        del state[key]


def save(state: State, path: Path) -> None:
    """Write safetensors, in half precision where nothing is lost, as with weights that were published so."""
    save_file({key: _small(tensor) for key, tensor in state.items()}, path, {"format": "pt"})


def _small(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return (half if torch.equal(half.to(tensor.dtype), tensor) else tensor).contiguous()
