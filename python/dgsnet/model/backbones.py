"""open_clip's models: which can be adapted, where their weights come from, and how they are built."""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path

import open_clip
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from dgsnet.errors import UserError
from dgsnet.model.catalogue import (
    BUILTIN_FOLDER,
    BUILTIN_NAME,
    BUILTIN_WEIGHTS,
    canonical,
    check_known,
    check_tower,
    check_weights,
)


def encode_text(text: nn.Module, tokens: Tensor) -> Tensor:
    """Text features [N, D] of tokens [N, context], without the columns that cannot change them.

    Under a causal mask nothing after the token that is pooled reaches it, so columns after the batch's last
    such token are cut, with the mask. Towers that pool or attend otherwise get all columns.
    """
    mask = getattr(text, "attn_mask", None)
    if mask is None or text.cls_emb is not None or text.pool_type not in ("argmax", "eos"):
        return text(tokens)
    end = tokens if text.pool_type == "argmax" else (tokens == text.eos_id).int()
    length = int(end.argmax(dim=-1).max()) + 1
    return torch.func.functional_call(text, {"attn_mask": mask[:length, :length]}, (tokens[:, :length],))


def build_clip(name: str, pretrained: str, with_text: bool) -> open_clip.CustomTextCLIP:
    """open_clip's model with its towers as `.visual` and `.text`, on the CPU in fp32.

    The weights are the file's own tensors, taken over one by one: nothing is initialised only to be
    overwritten, and there is never a second CLIP in memory.
    """
    config = _model_config(name)
    quick_gelu = bool(config.get("quick_gelu"))
    config.pop("custom_text", None)  # the text tower is always made a module of its own
    config["vision_cfg"]["patch_dropout"] = 0.0  # a device for pretraining, and noise to the teacher
    config["text_cfg"]["hf_model_pretrained"] = False
    weights = _find_weights(name, pretrained, quick_gelu)
    if weights is None:
        return open_clip.CustomTextCLIP(**config)

    with init_empty_weights(include_buffers=False):
        clip = open_clip.CustomTextCLIP(**config)
    clip.load_state_dict = functools.partial(clip.load_state_dict, assign=True)
    try:
        # Old TorchScript archives hold no pickled objects but need the full loader to be recognised.
        open_clip.load_checkpoint(clip, str(weights), weights_only=not _is_torchscript(weights))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"cannot load {weights} as weights of {name} ({reason}): check that the file is complete and was "
            "made for this model"
        ) from error
    del clip.load_state_dict
    if not with_text:
        clip.text = None
    for parameter in clip.parameters():  # a copy, as the tensors may be windows into the file
        parameter.data = parameter.data.to(torch.float32, copy=True)
    return clip


def _model_config(name: str) -> dict:
    """open_clip's configuration of a model whose vision tower DGS-Net can adapt."""
    if name == BUILTIN_NAME and name not in open_clip.list_models():
        open_clip.add_model_config(BUILTIN_FOLDER / f"{BUILTIN_NAME}.json")
    check_known(name, open_clip.list_models())
    config = open_clip.get_model_config(canonical(name))
    check_tower(name, config)
    return config


def _find_weights(name: str, pretrained: str, quick_gelu: bool) -> Path | None:
    """The weights file for a tag, a path or "builtin"; None for "" (random weights)."""
    if not pretrained:
        return None
    check_weights(name, pretrained)
    if pretrained == BUILTIN_WEIGHTS:
        return BUILTIN_FOLDER / f"{BUILTIN_NAME}.safetensors"

    tag = open_clip.get_pretrained_cfg(canonical(name), pretrained)
    path = Path(pretrained).expanduser()
    if tag:
        _check_activation(name, f"the {pretrained!r} weights", bool(tag.get("quick_gelu")), quick_gelu)
        return _download(name, pretrained, tag)
    if path.is_file():
        if _is_torchscript(path):  # the only TorchScript CLIPs are OpenAI's originals
            _check_activation(name, str(path), True, quick_gelu)
        return path
    tags = [
        known
        for known in open_clip.list_pretrained_tags_by_model(canonical(name))
        if bool(open_clip.get_pretrained_cfg(canonical(name), known).get("quick_gelu")) == quick_gelu
    ]
    raise UserError(
        f"{name} has no pretrained weights {pretrained!r}: give a weights file"
        + (f" or one of {', '.join(tags)}" if tags else "")
    )


def _check_activation(name: str, weights: str, trained: bool, built: bool) -> None:
    # The wrong activation loads without complaint and only costs accuracy.
    if trained != built:
        fitting = canonical(name).removesuffix("-quickgelu") + "-quickgelu" * trained
        remedy = f"use name={fitting}" if fitting in open_clip.list_models() else "use other weights"
        raise UserError(
            f"{weights} were trained {'with' if trained else 'without'} QuickGELU but model {name} is built "
            f"{'with' if built else 'without'} it: {remedy}"
        )


def _download(name: str, pretrained: str, tag: dict) -> Path:
    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # whatever the hub, the proxy or the socket raised
        source = str(tag.get("hf_hub") or tag.get("url"))
        raise UserError(
            f"cannot download the {pretrained!r} weights of {name} from {source.rstrip('/')}: check the "
            "network, or fetch the file elsewhere and give its path as pretrained"
        ) from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(member).name == "constants.pkl" for member in archive.namelist())
