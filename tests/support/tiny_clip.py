"""The tiny CLIP with random weights: ours, and open_clip's untouched one to compare it with."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from dgsnet.config import ModelConfig, SurgeryConfig
from dgsnet.model.dgsnet import DGSNet
from dgsnet.model.pretrained import untouched_tower
from dgsnet.training.plan import BRANCHES
from dgsnet.training.step import Found, Step

TINY = ModelConfig(name="dgsnet-tiny", pretrained="", lora_dropout=0.0)
CAPTIONS = ["a dog", "a very blurred photograph, with compression, of a cat that sits on a mat", "", "sea"]


def build(config: ModelConfig = TINY, seed: int = 0, **options: Any) -> DGSNet:
    torch.manual_seed(seed)
    return DGSNet(config, **options)


def original_clip(name: str = TINY.name, seed: int = 0) -> torch.nn.Module:
    """open_clip's untouched model, with the random weights that `build` has for the same seed."""
    # This registers the built-in model with open_clip.
    untouched_tower(name)
    torch.manual_seed(seed)
    return open_clip.create_model(name).eval().requires_grad_(False)


def randomise_adapters(model: DGSNet, scale: float = 0.05) -> None:
    """B starts at zero, where A has no gradient and student and teacher agree."""
    for name, tensor in model.adapter_state().items():
        if "lora_B" in name:
            tensor.normal_(std=scale)


def pixels_for(model: DGSNet, count: int = 4, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = model.visual.conv1.weight.dtype
    return torch.randn(count, 3, model.image_size, model.image_size, generator=generator).to(dtype)


def step(
    model: DGSNet,
    pixels: torch.Tensor,
    captions: list[str] | None,
    labels: torch.Tensor,
    **surgery: Any,
) -> Found:
    """What a training step of the three branches finds."""
    text = model.text_features(captions) if captions else None
    made = Step(model, BRANCHES, SurgeryConfig(**surgery), captions is not None)
    return made(pixels, labels.to(pixels.dtype), text)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()
