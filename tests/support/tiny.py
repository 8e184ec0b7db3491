"""A detector small enough to make in a test, and unlike a new one: no adapter or head is at its zeros."""

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.model.checkpoint import build_model, save_model
from PIL import Image

CROP = PreprocessConfig(mode="crop", image_size=32)
PATCHES = PreprocessConfig(mode="patches", image_size=32, patch_size=8, num_patches=16)


def save_tiny(folder: Path, preprocess: PreprocessConfig = PATCHES, seed: int = 0) -> Path:
    """Make a run's folder with a model of random weights in it."""
    torch.set_num_threads(1)
    config = Config(model=ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2), preprocess=preprocess)
    model = build_model(config, with_text=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return save_model(folder / "best", model, config).parent


def save_picture(path: Path) -> None:
    """Write noise of a size that varies, which the path decides as it decides the noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list("/".join(path.parts[-3:]).encode()))
    Image.fromarray(rng.integers(0, 256, (*rng.integers(36, 60, 2), 3), dtype=np.uint8)).save(path)


def save_noise(folder: Path, images: int, sides: tuple[int, int] = (33, 90)) -> Path:
    """Fill a folder with PNG files of noise, each side's length drawn from this range."""
    rng = np.random.default_rng(0)
    for i in range(images):
        size = rng.integers(*sides, 2)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


def add_quick_gelu(folder: Path, name: str) -> None:
    """Register a CLIP as small as dgsnet-tiny with the published activation, for images of 64 pixels."""
    config = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
