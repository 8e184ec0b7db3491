"""The mean of several trained models: `dgsnet average`, and the last checkpoints of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dgsnet.config import Config, ModelConfig
from dgsnet.errors import UserError
from dgsnet.files import check_new
from dgsnet.model.folders import model_folder

if TYPE_CHECKING:
    from torch import Tensor

# What models must share for the mean of their weights to be one of their kind.
SHARED = ("model.name", "model.lora_targets", "preprocess")


def average_command(paths: list[str], out: str, pretrained: str | None = None) -> None:
    """Write the mean of several detectors of one backbone, such as runs with several seeds.

    Args:
        paths: model folders, or folders of training runs, whose best models are taken.
        out: folder for the model; must be new or empty. It has no calibration.
        pretrained: weights file of their backbone, in place of what their folders name.
    """
    check_new(Path(out))
    if len(paths) < 2:
        raise UserError("one model has no mean: give two or more")
    for path in paths:
        model_folder(path)

    import numpy as np

    from dgsnet.model.checkpoint import fingerprint, load_model, trained_on, trained_state, write_model

    states, configs, backbones = [], [], []
    for path in paths:
        model, config = load_model(path, pretrained=pretrained)
        states.append(trained_state(model))
        configs.append(config)
        backbones.append(fingerprint(model))
        for what, first, found in (
            *((name, _setting(configs[0], name), _setting(config, name)) for name in SHARED),
            ("the backbone's weights", backbones[0], backbones[-1]),
            ("what is adapted", states[0].keys(), states[-1].keys()),
        ):
            if found != first:
                raise UserError(f"{path} and {paths[0]} differ in {what}: their mean is no model")
    hashes = np.unique(np.concatenate([trained_on(path) for path in paths]))
    state, model_config = average(states, [config.model for config in configs])
    config = replace(configs[0], model=model_config)
    write_model(out, state, backbones[0], config, trained_on=hashes, averaged=list(paths))
    print(f"{out}: the mean of {len(paths)} models")


def average(
    states: Sequence[dict[str, Tensor]], configs: Sequence[ModelConfig]
) -> tuple[dict[str, Tensor], ModelConfig]:
    """The mean of models' weights, of heads and of linears with their adapters.

    The mean of products B A is no product of means: adapters are put side by side, so that the rank is the
    sum of theirs, and the mean is exact to rounding.

    Args:
        states: `trained_state` of each; of the same linears, adapters of any rank.
        configs: of each, with its `lora_rank` and `lora_alpha`.

    Returns:
        A state, and a configuration that it goes with.
    """
    import torch

    ranks = [config.lora_rank for config in configs]
    merged = replace(configs[0], lora_rank=sum(ranks))
    # What each B is multiplied by, so that the mean's own scaling makes it its share.
    shares = [
        _scaling(config) / (len(states) * _scaling(merged)) if config.lora_rank else 0.0 for config in configs
    ]
    mean = {}
    for name, first in states[0].items():
        tensors = [state[name].double() for state in states]
        if "lora_A" in name:
            found = torch.cat(tensors)
        elif "lora_B" in name:
            found = torch.cat([share * b for share, b in zip(shares, tensors)], dim=1)
        else:
            found = torch.stack(tensors).mean(0)
        mean[name] = found.to(first.dtype).contiguous()
    return mean, merged


def _scaling(config: ModelConfig) -> float:
    return config.lora_alpha / config.lora_rank**0.5


def _setting(config: Config, name: str) -> object:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field) if field else getattr(config, section)
