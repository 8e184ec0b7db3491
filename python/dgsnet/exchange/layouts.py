"""Checkpoints of published detectors that are a backbone and a linear head: how each is told and taken apart.

docs/published_detectors.md has their tensors, their sources, and what was not verified.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dgsnet.config import ModelConfig, PreprocessConfig
from dgsnet.exchange.huggingface import CLIP
from dgsnet.exchange.weights import State, drop, holds, part
from dgsnet.model.pretrained import IMAGE_TOWER, untouched_tower

Shapes = dict[str, tuple[int, ...]]
# The head's weight [1, D] and bias [1], by the names of nn.Linear.
Head = dict[str, Tensor]

OPENAI = "ViT-L-14-quickgelu"
# DDA's adapters: rank, and the scaling alpha / rank with alpha 1.
DDA_RANK = 8
DDA_ADAPTED = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)")
# Dimension that DINOv2's positions are enlarged by before they are interpolated, in tokens.
DINOV2_OFFSET = 0.1


@dataclass(frozen=True)
class Layout:
    """A published detector, by what its file holds.

    Args:
        title: whose detector it is.
        what: what is in the file.
        name: its backbone.
        take: takes backbone and head out of a state. Given the state, the backbone's shapes by its library's
            names, and the side of its images in pixels.
        holds: beginnings of names, each of which some name has.
        preprocess: what the authors' test does before the network, as of `PreprocessConfig`.
        licence: of the weights, by its SPDX name where it has one; empty: the authors name none.
        pretrained: the backbone's weights where the file has none; empty: the file has them.
        model: as of `ModelConfig`.
        wrapper: the name that the state stands under, where that tells it from others.
        tokens: how many position embeddings it has, where that does.
        bias, threshold: as of `Description`.
    """

    title: str
    what: str
    name: str
    take: Callable[[State, Shapes, int], tuple[State, Head]]
    holds: tuple[str, ...]
    preprocess: dict[str, Any]
    licence: str = ""
    pretrained: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    wrapper: str = ""
    tokens: int = 0
    bias: float = 0.0
    threshold: float = 0.5

    def fits(self, state: State, wrapper: str) -> bool:
        """Whether a state, with the name that it stood under, looks like this."""
        positions = [tensor for name, tensor in state.items() if name.endswith("pos_embed")]
        return (
            all(holds(state, beginning) for beginning in self.holds)
            and self.wrapper in ("", wrapper)
            and (not self.tokens or [tensor.shape[1:2] for tensor in positions] == [(self.tokens,)])
        )

    def settings(self, name: str, pretrained: str) -> tuple[ModelConfig, PreprocessConfig]:
        """Its typed settings, with this backbone and these weights of it."""
        model = ModelConfig(name, pretrained, lora_rank=0, **self.model)
        return model, PreprocessConfig(mode="crop", **self.preprocess)


def shapes_of(model: ModelConfig, size: int) -> Shapes:
    """Shapes of a backbone's tensors by its library's names, for images of this side in pixels."""
    tower = untouched_tower(model.name, size, model.feature)
    return {key: tuple(tensor.shape) for key, tensor in tower.state_dict().items()}


def _head(state: State, prefix: str, width: int, classes: int = 1) -> Head:
    head = part(state, prefix, {"weight": (classes, width), "bias": (classes,)})
    # Of two classes the second is "generated", and the logit is the difference.
    return head if classes == 1 else {name: (t[1:] - t[:1]) for name, t in head.items()}


def _head_alone(state: State, shapes: Shapes, size: int) -> tuple[State, Head]:
    return {}, _head(state, "", shapes["proj"][1])


def _timm(state: State, shapes: Shapes, size: int) -> tuple[State, Head]:
    prefix = "vit." if holds(state, "vit.") else ""
    return part(state, prefix, shapes), _head(state, f"{prefix}head.", shapes["norm.weight"][0])


def _dda(state: State, shapes: Shapes, size: int) -> tuple[State, Head]:
    prefix, tower = "base_model.model.", {}
    state.pop(f"{prefix}mask_token", None)
    for key, shape in shapes.items():
        if key == "pos_embed":
            stored = tuple(state[f"{prefix}{key}"].shape) if f"{prefix}{key}" in state else shape
            side = round(max(stored[1] - 1, 0) ** 0.5) if len(stored) == 3 else 0
            (positions,) = part(state, prefix, {key: (1, 1 + side * side, shape[2])}).values()
            tower[key] = interpolated(positions, size // shapes["patch_embed.proj.weight"][-1])
        elif match := DDA_ADAPTED.fullmatch(key):
            linear, kind = f"{prefix}{key.removesuffix(f'.{match[3]}')}.", match[3]
            (weight,) = part(state, f"{linear}original_layer.", {kind: shape}).values()
            if kind == "weight":
                lora = part(
                    state,
                    f"{linear}lora.",
                    {"lora_A": (DDA_RANK, shape[1]), "lora_B": (shape[0], DDA_RANK)},
                )
                update = lora["lora_B"].double() @ lora["lora_A"].double() / DDA_RANK
                weight = (weight.double() + update).float()
            tower[key] = weight
        else:
            tower |= part(state, prefix, {key: shape})
    return tower, _head(state, "base_model.fc.", shapes["norm.weight"][0])


def interpolated(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings [1, 1 + n * n, D] for a grid of another side, [1, 1 + grid * grid, D].

    As DINOv2's own code does it: bicubic without antialiasing, with the scale enlarged by DINOV2_OFFSET. What
    stands first is the class token's.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions
    rows = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (grid + DINOV2_OFFSET) / side
    rows = F.interpolate(rows, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], rows.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _clip(
    state: State,
    shapes: Shapes,
    size: int,
    *,
    prefix: str,
    head: str,
    classes: int = 1,
    effort: bool = False,
    projection: str = "",
) -> tuple[State, Head]:
    """A CLIP by the names of transformers' vision model."""
    drop(state, "model.text_model.", "model.text_projection.", "model.logit_scale")
    if not projection:
        drop(state, "model.visual_projection.")
    tower = {}
    for key, shape in shapes.items():
        if key == "proj":
            tower[key] = part(state, "", {projection: shape[::-1]})[projection].T
            continue
        fused = "in_proj_" in key
        each = (shape[0] // 3, *shape[1:]) if fused else shape
        names = [key.replace("in_proj_", f"{letter}_proj.") for letter in "qkv"] if fused else [key]
        theirs = [prefix + CLIP.name(name).removeprefix("vision_model.") for name in names]
        merge = effort and ".attn." in key and key.endswith("weight")
        tower[key] = torch.cat([_linear(state, name, each, merge) for name in theirs])
    return {f"{IMAGE_TOWER}{key}": tensor for key, tensor in tower.items()}, _head(
        state, head, shapes["proj"][1] if projection else shapes["ln_post.weight"][0], classes
    )


def _linear(state: State, name: str, shape: tuple[int, ...], merge: bool) -> Tensor:
    """A tensor as it is, or as Effort has it: the main part and a residual of few singular directions."""
    if not merge:
        return part(state, "", {name: shape})[name]
    # The main part's own directions stand beside it.
    stem = name.removesuffix("weight")
    for letter in "USV":
        state.pop(f"{stem}{letter}_r", None)
    singular = state.get(f"{stem}S_residual")
    rank = singular.numel() if singular is not None and singular.ndim == 1 else 0
    if not 0 < rank <= min(shape):
        raise ValueError(f"{stem}S_residual is missing, or holds no singular values")
    found = part(
        state,
        stem,
        {
            "weight_main": shape,
            "U_residual": (shape[0], rank),
            "S_residual": (rank,),
            "V_residual": (rank, shape[1]),
        },
    )
    main, u, s, v = (tensor.double() for tensor in found.values())
    return (main + u * s @ v).float()


# What goes in and out of Community Forensics, and of what was tuned from it.
COMMUNITY: dict[str, Any] = {
    "name": "timm/vit_small_patch16_384",
    "take": _timm,
    "preprocess": {"image_size": 384, "normalization": "imagenet", "resize": "shorter", "side": 440},
    "licence": "MIT",
}
CLIP_224 = {"image_size": 224, "normalization": "clip"}
# In this order they are tried.
LAYOUTS = (
    Layout(
        "UniversalFakeDetect",
        "a linear head on the projected embedding of OpenAI's CLIP ViT-L/14",
        OPENAI,
        _head_alone,
        ("weight", "bias"),
        CLIP_224 | {"small": "pad"},
        licence="MIT",
        pretrained="openai",
    ),
    Layout(
        "Sieve",
        "a ViT-S/16 of timm, all of it tuned",
        holds=(),
        wrapper="model_state_dict",
        bias=0.43,
        threshold=0.65,
        **COMMUNITY,
    ),
    Layout(
        "Community Forensics (224 pixels)",
        "a ViT-S/16 of timm, all of it tuned",
        holds=("vit.",),
        tokens=197,
        **COMMUNITY
        | {
            "name": "timm/vit_small_patch16_224",
            "preprocess": COMMUNITY["preprocess"] | {"image_size": 224, "side": 256},
        },
    ),
    Layout(
        "Community Forensics (384 pixels)",
        "a ViT-S/16 of timm, all of it tuned",
        holds=("vit.",),
        **COMMUNITY,
    ),
    Layout(
        "DDA",
        "a DINOv2 ViT-L/14 with LoRA, which was merged",
        "timm/vit_large_patch14_dinov2",
        _dda,
        ("base_model.",),
        {"image_size": 336, "normalization": "clip", "small": "pad"},
        licence="Apache-2.0",
    ),
    Layout(
        "Effort (DeepfakeBench)",
        "the image tower of a CLIP ViT-L/14 with residuals of singular directions, which were merged",
        OPENAI,
        partial(_clip, prefix="backbone.", head="head.", classes=2, effort=True),
        ("backbone.encoder.layers.", "head."),
        CLIP_224 | {"resize": "squash", "side": 224, "antialias": False},
        licence="CC-BY-NC-4.0",
        model={"feature": "class"},
    ),
    Layout(
        "Effort (UniversalFakeDetect benchmark)",
        "the image tower of a CLIP ViT-L/14 with residuals of singular directions, which were merged",
        OPENAI,
        partial(_clip, prefix="model.vision_model.", head="fc.", effort=True),
        ("model.vision_model.", "fc."),
        CLIP_224 | {"small": "tile"},
        licence="CC-BY-NC-4.0",
        model={"feature": "class"},
    ),
    Layout(
        "C2P-CLIP",
        "the image tower of a CLIP ViT-L/14 with its projection, tuned, and a head on the embedding's "
        "direction",
        OPENAI,
        partial(
            _clip,
            prefix="model.vision_model.",
            head="model.fc.",
            projection="model.visual_projection.weight",
        ),
        ("model.vision_model.", "model.fc."),
        CLIP_224 | {"resize": "shorter", "side": 224},
        model={"l2": True},
    ),
    Layout(
        "B-Free",
        "a DINOv2 ViT-B/14 with four registers, all of it tuned",
        "timm/vit_base_patch14_reg4_dinov2",
        _timm,
        ("reg_token",),
        {"image_size": 504, "normalization": "imagenet", "crops": 5, "small": "tile", "grid": 14},
        licence="GRIP-UNINA non-profit",
    ),
)
# Published detectors that no backbone with a linear head expresses, by the beginning of a name of theirs.
OTHERS = {"gating_network.": "OmniAID, whose weights another network chooses for each image"}


def layout_of(state: State, wrapper: str) -> Layout | None:
    """The first layout that a state fits; None where none does."""
    return next((layout for layout in LAYOUTS if layout.fits(state, wrapper)), None)
