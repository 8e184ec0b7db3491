"""The checkpoints that the authors of DGS-Net published: what they hold, and how they become models.

Their file is a flat state_dict that holds CLIP twice (student and frozen teacher), the adapters, and three
heads; docs/official_weights.md has the layout. One copy of CLIP is kept.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from dgsnet.config import Config, ModelConfig, PreprocessConfig, SurgeryConfig
from dgsnet.errors import UserError
from dgsnet.exchange.weights import State, holds, load, part, save
from dgsnet.files import file_sha256
from dgsnet.model.catalogue import has_text
from dgsnet.model.checkpoint import build_model, load_trained_state, save_model
from dgsnet.model.dgsnet import DGSNet
from dgsnet.model.folders import BACKBONE_FILES

# Prefixes of the file's parts.
STUDENT, TEACHER = "clip_model.", "clip_model_frozen."
# Our heads by the file's names; the teacher's lies inside the teacher's part.
IMAGE_HEAD, TEXT_HEAD, TEACHER_HEAD = "img_fc", "text_fc", "img_frozen_fc"
ADAPTED = re.compile(r"visual\.(transformer\.resblocks\.\d+\.attn\.)([qkv]_proj)\.(weight|bias)")
# The published mosaic's patches, in pixels.
PATCH_SIZE = 32
# SHA-256 of files that the authors have published.
PUBLISHED = {
    "89b96a586a6b9f2e5626b03aa27e8063bbe6aaae00f4d0cf97fd3ced2379c216": "the authors' detector (stage 2)"
}


@dataclass
class Official:
    """What a published checkpoint holds.

    Attributes:
        clip: the one frozen CLIP, by OpenAI's names (fused attention).
        adapters: LoRA A [r, width] and B [width, r] by peft's names; empty in stage 1.
        heads: weight [1, D] and bias [1] of our three heads, by the names of `SurgeryHead`.
        rank: r; 0 in stage 1.
        stage: 1, the linear head on the frozen encoder, or 2, the detector.
        merged: whether the file's student had its adapters added into its weights.
        sha256: of the file, as hexadecimal digits.
    """

    clip: State
    adapters: State
    heads: State
    rank: int
    stage: int
    merged: bool
    sha256: str = ""


def read(checkpoint: Path, *, name: str, alpha: float, state: State | None = None) -> Official:
    """What a published checkpoint holds; UserError where it is damaged, of another layout or of another CLIP.

    Args:
        checkpoint: the file.
        name: open_clip model name of its CLIP.
        alpha: numerator of the adapters' scaling.
        state: the file's tensors, where they are read already.
    """
    if not has_text(name):
        raise UserError(
            f"the published checkpoints are of a CLIP, and {name} has no text tower: give --name one"
        )
    state = load(checkpoint)[0] if state is None else state
    try:
        found = _stage2(state, name, alpha) if holds(state, STUDENT) else _stage1(state, name)
        if state:
            raise ValueError(f"{min(state)} is unknown to this layout")
    except ValueError as error:
        raise UserError(f"{checkpoint} is no checkpoint of DGS-Net on {name}: {error}") from None
    found.sha256 = file_sha256(checkpoint)
    return found


def write(out: Path, folder: Path, checkpoint: str, found: Official, *, name: str, alpha: float) -> None:
    """Make the model folder `out` of it, by way of a temporary folder on the same disk."""
    backbone = folder / BACKBONE_FILES[0]
    save(found.clip, backbone)
    config = config_of(name, str(backbone), found, alpha)
    model = build_model(config, with_text=False)
    load_trained_state(model, found.adapters | {f"head.{key}": t for key, t in found.heads.items()})
    save_model(
        out,
        model,
        config,
        backbone=backbone,
        source=checkpoint,
        sha256=found.sha256,
        stage=found.stage,
        merged=found.merged,
    )


def _stage1(state: State, name: str) -> Official:
    heads = _heads(state, {TEACHER_HEAD: "teacher_head"}, _skeleton(name).dim)
    clip = part(state, TEACHER, _shapes(name)[0])
    # In stage 1 the frozen encoder with its head is the detector; there is no text head yet.
    same = {key.replace("teacher", "image"): tensor for key, tensor in heads.items()}
    unused = {
        f"text_head.{kind}": torch.zeros_like(heads[f"teacher_head.{kind}"]) for kind in ("weight", "bias")
    }
    return Official(clip, {}, heads | same | unused, rank=0, stage=1, merged=False)


def _stage2(state: State, name: str, alpha: float) -> Official:
    if not holds(state, TEACHER):
        raise ValueError(f"it lacks the teacher, {TEACHER}*, so merged adapters cannot be recognised")
    heads = _heads(
        state,
        {IMAGE_HEAD: "image_head", TEXT_HEAD: "text_head", TEACHER + TEACHER_HEAD: "teacher_head"},
        _skeleton(name).dim,
    )
    fused, split = _shapes(name)
    clip = part(state, TEACHER + TEACHER, fused)
    found = (ADAPTED.fullmatch(key) for key in split)
    linears = {
        match[0].removesuffix(".weight"): split[match[0]][0]
        for match in found
        if match and match[3] == "weight"
    }
    adapters, rank = _adapters(state, linears)
    student = part(state, STUDENT, split)
    merged = _check_student(student, clip, adapters, alpha / rank**0.5)
    return Official(clip, adapters, heads, rank=rank, stage=2, merged=merged)


def _check_student(student: State, clip: State, adapters: State, scaling: float) -> bool:
    """Whether the adapters were merged; ValueError where the student is not the teacher with these adapters.

    A file saved in evaluation mode has W + scaling * B @ A in place of W. The teacher holds W itself, so
    nothing has to be subtracted and the result is exact.
    """
    merged = None
    for key, tensor in student.items():
        if match := ADAPTED.fullmatch(key):
            attention, target, kind = match.groups()
            base = clip[f"visual.{attention}in_proj_{kind}"].chunk(3)["qkv".index(target[0])]
        else:
            base = clip[key.replace(".attn.proj.", ".attn.out_proj.")]
        same = torch.equal(tensor, base)
        if not match or kind == "bias":
            if not same:
                raise ValueError(f"{STUDENT}{key} differs from the teacher's, and no adapter is on it")
            continue
        lora = f"{attention}{target}.lora_"
        update = scaling * (adapters[f"{lora}B.weight"] @ adapters[f"{lora}A.weight"])
        fits = torch.allclose(
            tensor, base + update, rtol=0, atol=1e-5 * float(base.abs().max() + update.abs().max())
        )
        if same and fits:
            # The update is too small to tell.
            continue
        if not (same or fits) or merged == same:
            raise ValueError(
                f"{STUDENT}{key} is neither the teacher's nor that plus {scaling:.4g} * B @ A, or not the "
                "one that it is in the blocks before: the file is damaged, or alpha is another"
            )
        merged = fits
    return bool(merged)


def _adapters(state: State, targets: dict[str, int]) -> tuple[State, int]:
    """Take A and B of every adapted linear (name and width) by peft's names; returns them and their rank."""
    first = f"{STUDENT}{next(iter(targets))}.w_lora_A"
    if first not in state:
        raise ValueError(f"{first} is missing")
    rank = state[first].shape[0] if state[first].ndim == 2 else 0
    adapters = {}
    for target, width in targets.items():
        if not 1 <= rank <= width:
            raise ValueError(f"{first} has shape {list(state[first].shape)}, expected [r, {width}]")
        ours = target.removeprefix("visual.")
        taken = part(state, f"{STUDENT}{target}.", {"w_lora_A": (rank, width), "w_lora_B": (width, rank)})
        adapters[f"{ours}.lora_A.weight"] = taken["w_lora_A"]
        adapters[f"{ours}.lora_B.weight"] = taken["w_lora_B"]
    return adapters, rank


def _heads(state: State, names: dict[str, str], dim: int) -> State:
    heads: State = {}
    for theirs, ours in names.items():
        head = part(state, f"{theirs}.", {"weight": (1, dim), "bias": (1,)})
        heads |= {f"{ours}.{kind}": tensor for kind, tensor in head.items()}
    return heads


def _shapes(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of a CLIP's tensors by OpenAI's names, and by the student's, which has q, k and v apart."""
    clip = _skeleton(name)
    assert clip.text
    text = {"logit_scale": ()} | {key: tuple(tensor.shape) for key, tensor in clip.text.state_dict().items()}
    fused, split = (
        {f"visual.{key}": tuple(tensor.shape) for key, tensor in state.items()}
        for state in (clip.backbone.state(), clip.visual.state_dict())
    )
    return fused | text, text | {key.replace(".attn.out_proj.", ".attn.proj."): split[key] for key in split}


@functools.lru_cache(maxsize=1)
def _skeleton(name: str) -> DGSNet:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return DGSNet(ModelConfig(name=name, pretrained="", lora_rank=0))


def config_of(name: str, pretrained: str, found: Official, alpha: float) -> Config:
    """The published settings, with a mosaic of as many patches as the model's input holds."""
    size = _skeleton(name).image_size
    if size % PATCH_SIZE:
        raise UserError(
            f"{name} takes images of {size} pixels, which patches of {PATCH_SIZE} do not tile: the published "
            "checkpoints are of ViT-L-14-quickgelu at 224 pixels"
        )
    return Config(
        model=ModelConfig(name, pretrained, lora_rank=found.rank, lora_alpha=alpha),
        preprocess=PreprocessConfig(
            image_size=size, patch_size=PATCH_SIZE, num_patches=(size // PATCH_SIZE) ** 2
        ),
        surgery=SurgeryConfig(mode="feature" if found.stage == 2 else "none"),
    )
