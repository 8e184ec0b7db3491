"""open_clip's and timm's models: how they are built, and where their weights come from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from dgsnet.errors import UserError
from dgsnet.files import one_line
from dgsnet.model import catalogue
from dgsnet.model.backbones import backbone_of, family_of, use_class_token

Tokenizer = Callable[[list[str]], Tensor]
# Before the names of a CLIP's image tower in a file of its weights.
IMAGE_TOWER = "visual."


def build_towers(
    name: str, pretrained: str, with_text: bool, image_size: int | None = None
) -> tuple[nn.Module, nn.Module | None]:
    """The image tower of a model, and its text tower if asked for, on the CPU in fp32.

    Raises:
        UserError: an unknown name or tag, a model that cannot be adapted or has no text tower, or weights
            that cannot be found, downloaded, read or fitted.
    """
    if not catalogue.has_text(name):
        if with_text:
            raise UserError(f"{name} has no text tower: train without captions (data.captions none)")
        return build_timm(name, pretrained, image_size), None
    clip = build_clip(name, pretrained, with_text)
    return clip.visual, clip.text if with_text else None


def build_timm(name: str, pretrained: str, image_size: int | None = None) -> nn.Module:
    """timm's model of the name after "timm/", without a classifier, on the CPU in fp32.

    It takes images of its own size, or of `image_size` where a weights file has the positions of that one.
    """
    arguments = catalogue.timm_arguments(name)
    # This refuses an unknown name.
    catalogue.timm_config(name)
    if not pretrained:
        return timm.create_model(**arguments)
    catalogue.check_weights(name, pretrained)
    with init_empty_weights(include_buffers=False):
        # This refuses a foreign tower before anything is downloaded.
        backbone_of(timm.create_model(**arguments), name)
    path, tags = Path(pretrained).expanduser(), timm_tags(name)
    if path.is_file():
        # As many classes as are built, for otherwise timm would not mind what the file lacks.
        source: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(path), "num_classes": 0}}
    elif pretrained in tags:
        source = {"pretrained_cfg": pretrained}
    else:
        raise _no_weights(name, pretrained, tags)
    try:
        if path.is_file() and image_size:
            arguments |= _size_of_positions(path, arguments, image_size)
        return timm.create_model(**arguments, **source, pretrained=True)
    except Exception as error:
        # It may be timm's, torch's, safetensors' or the hub's.
        reason = one_line(error, 200)
        if path.is_file():
            raise _unfit(name, path, reason) from error
        raise _not_downloaded(name, pretrained, f"({reason})") from error


def _size_of_positions(path: Path, arguments: dict[str, Any], image_size: int) -> dict[str, int]:
    """timm's argument for this size, where a file's position embeddings are of it and not of the model's."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(str(path), framework="pt") as file:
        if "pos_embed" not in file.keys():  # noqa: SIM118 - not a mapping
            return {}
        stored = tuple(file.get_slice("pos_embed").get_shape())
    with init_empty_weights(include_buffers=False):
        own, other = (
            timm.create_model(**arguments, **size).pos_embed for size in ({}, {"img_size": image_size})
        )
    fits = own is not None and stored != tuple(own.shape) and stored == tuple(other.shape)
    return {"img_size": image_size} if fits else {}


def timm_tags(name: str) -> list[str]:
    """Tags of the pretrained weights that timm knows for a model."""
    model = catalogue.timm_arguments(name)["model_name"]
    return [entry.partition(".")[2] for entry in timm.list_pretrained(f"{model}.*")]


@functools.cache
def tokenizer_of(name: str) -> Tokenizer:
    """open_clip's tokenizer of a model: captions to tokens [N, context]."""
    try:
        return open_clip.get_tokenizer(catalogue.canonical(name))
    except Exception as error:
        # Configurations from the hub need a download.
        raise UserError(
            f"cannot load the tokenizer of {name} ({one_line(error, 200)}): check the network, or train "
            "without captions (data.captions none)"
        ) from error


def untouched_tower(name: str, image_size: int | None = None, feature: str = "own") -> nn.Module:
    """The image tower as its library builds it, without memory for its weights.

    image_size is as of DGSNet, feature as of ModelConfig.
    """
    with init_empty_weights(include_buffers=False):
        if not catalogue.has_text(name):
            visual = timm.create_model(**catalogue.timm_arguments(name))
        else:
            config = _clip_arguments(name)
            quick_gelu = config.get("quick_gelu", False)
            visual = open_clip.model._build_vision_tower(
                config["embed_dim"], config["vision_cfg"], quick_gelu
            )
        if feature == "class":
            use_class_token(visual, name)
        if image_size is not None:
            family_of(visual, name).resize(visual, image_size)
    return visual


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
    arguments = _clip_arguments(name)
    if not pretrained:
        return open_clip.CustomTextCLIP(**arguments)

    weights = _find_weights(name, pretrained, bool(arguments.get("quick_gelu")))
    with init_empty_weights(include_buffers=False):
        clip = open_clip.CustomTextCLIP(**arguments)
    clip.load_state_dict = functools.partial(clip.load_state_dict, assign=True)
    try:
        if catalogue.is_torchscript(weights):
            clip.load_state_dict(_openai_state(weights))
        elif image := None if with_text else _image_tower(weights):
            if "proj" not in image:
                clip.visual.proj = None
            clip.visual.load_state_dict(image, assign=True)
        else:
            open_clip.load_checkpoint(clip, str(weights), weights_only=True)
    except Exception as error:
        raise _unfit(name, weights, f"{type(error).__name__}: {error}") from error
    del clip.load_state_dict
    if not with_text:
        clip.text = None
        for name in ("logit_scale", "logit_bias"):
            setattr(clip, name, None)
    # Parameters are copied, as they may be windows into the file.
    for parameter in clip.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    return clip


def _image_tower(weights: Path) -> dict[str, Tensor]:
    """The tensors of a file that holds an image tower and nothing else; empty for another."""
    if weights.suffix != ".safetensors":
        return {}
    with safe_open(str(weights), framework="pt") as file:
        names = list(file.keys())
        if not all(name.startswith(IMAGE_TOWER) for name in names):
            return {}
        return {name.removeprefix(IMAGE_TOWER): file.get_tensor(name) for name in names}


def _openai_state(archive: Path) -> dict[str, Tensor]:
    """OpenAI's weights by the names of CustomTextCLIP; torch.jit.load knows no pickled Python objects."""
    state = torch.jit.load(str(archive), map_location="cpu").state_dict()
    for name in ("input_resolution", "context_length", "vocab_size"):
        state.pop(name, None)
    return open_clip.model.convert_to_custom_text_state_dict(state)


def _unfit(name: str, weights: Path, reason: str) -> UserError:
    return UserError(
        f"cannot load {weights} as weights of {name} ({one_line(reason, 200)}): check that the file is "
        "complete and was made for this model"
    )


def _clip_arguments(name: str) -> dict[str, Any]:
    """What open_clip's CLIP is made of: the model's configuration, without what is only for pretraining."""
    config = _model_config(name)
    # The text tower is always made a module of its own.
    config.pop("custom_text", None)
    vision = config["vision_cfg"]
    # It would be noise to the teacher, as the others would.
    vision["patch_dropout"] = 0.0
    if "timm_model_name" in vision:
        vision |= {"timm_model_pretrained": False, "timm_drop": 0.0, "timm_drop_path": None}
    config["text_cfg"]["hf_model_pretrained"] = False
    return config


def _model_config(name: str) -> dict[str, Any]:
    """open_clip's configuration of a model whose vision tower DGS-Net can adapt."""
    if name == catalogue.BUILTIN_NAME and name not in open_clip.list_models():
        open_clip.add_model_config(catalogue.BUILTIN_FOLDER / f"{catalogue.BUILTIN_NAME}.json")
    catalogue.check_known(name, open_clip.list_models())
    config = open_clip.get_model_config(catalogue.canonical(name))
    catalogue.check_tower(name, config)
    return config


def _find_weights(name: str, pretrained: str, quick_gelu: bool) -> Path:
    """The weights file for a tag, a path or "builtin"."""
    catalogue.check_weights(name, pretrained)
    if pretrained == catalogue.BUILTIN_WEIGHTS:
        return catalogue.BUILTIN_FOLDER / f"{catalogue.BUILTIN_NAME}.safetensors"

    tag = open_clip.get_pretrained_cfg(catalogue.canonical(name), pretrained)
    path = Path(pretrained).expanduser()
    if tag:
        _check_activation(name, f"the {pretrained!r} weights", bool(tag.get("quick_gelu")), quick_gelu)
        return _download(name, pretrained, tag)
    if path.is_file():
        # The only TorchScript CLIPs are OpenAI's originals.
        if catalogue.is_torchscript(path):
            _check_activation(name, str(path), True, quick_gelu)
        return path
    tags = [
        known
        for known in open_clip.list_pretrained_tags_by_model(catalogue.canonical(name))
        if bool(open_clip.get_pretrained_cfg(catalogue.canonical(name), known).get("quick_gelu"))
        == quick_gelu
    ]
    raise _no_weights(name, pretrained, tags)


def _no_weights(name: str, pretrained: str, tags: list[str]) -> UserError:
    known = f" or one of {', '.join(tags)}" if tags else ""
    return UserError(f"{name} has no pretrained weights {pretrained!r}: give a weights file{known}")


def _not_downloaded(name: str, pretrained: str, why: str) -> UserError:
    return UserError(
        f"cannot download the {pretrained!r} weights of {name} {why}: check the network, or fetch the file "
        "elsewhere and give its path as pretrained"
    )


def _check_activation(name: str, weights: str, trained: bool, built: bool) -> None:
    # The wrong activation loads without complaint and only costs accuracy.
    if trained != built:
        fitting = catalogue.canonical(name).removesuffix("-quickgelu") + "-quickgelu" * trained
        remedy = f"use name={fitting}" if fitting in open_clip.list_models() else "use other weights"
        raise UserError(
            f"{weights} were trained {'with' if trained else 'without'} QuickGELU but model {name} is built "
            f"{'with' if built else 'without'} it: {remedy}"
        )


def _download(name: str, pretrained: str, tag: dict) -> Path:
    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:
        # It may be the hub's, the proxy's or the socket's.
        source = str(tag.get("hf_hub") or tag.get("url")).rstrip("/")
        raise _not_downloaded(name, pretrained, f"from {source}") from error
