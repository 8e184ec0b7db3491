"""A detector small enough to make in a test, and unlike a new one: no adapter or head is at its zeros."""

from pathlib import Path

import torch
from dgsnet.checkpoint import build_model, save_model
from dgsnet.config import Config, ModelConfig, PreprocessConfig

CROP = PreprocessConfig(mode="crop", image_size=32)
PATCHES = PreprocessConfig(mode="patches", image_size=32, patch_size=8, num_patches=16)


def save_tiny(folder: Path, preprocess: PreprocessConfig = PATCHES) -> Path:
    """Make a run's folder with a model of random weights in it."""
    torch.set_num_threads(1)
    config = Config(model=ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2), preprocess=preprocess)
    model = build_model(config, with_text=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return save_model(folder / "best", model, config).parent
