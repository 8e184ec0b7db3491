"""The built-in data and model: everything `dgsnet demo` needs on a machine without data, weights or network.

Its numbers show that the machinery works; they say nothing about real generators.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from dgsnet.builtin.crops import Quality, damage, degrade, describe, encode, sample_crop
from dgsnet.builtin.decoders import DECODERS
from dgsnet.builtin.photographs import PHOTOGRAPHS, SPLITS, Photograph
from dgsnet.config import Config, DataConfig, ModelConfig, OptimConfig, PreprocessConfig, SurgeryConfig
from dgsnet.data.items import FOLDERS

# Decoder families of each split; the test's are unseen in training.
FAMILIES = {
    "train": ("nearest", "transposed", "shuffle"),
    "val": ("nearest", "transposed", "shuffle"),
    "test": ("bilinear", "unpool", "codebook", "resizeconv", "progressive"),
}
# Images of each class and decoder.
COUNTS = {"train": 120, "val": 40, "test": 60}
# Sides of images in pixels: training cuts random inputs of 32 out of them, and those that are decided on are
# as large as the smallest photograph allows.
SIZES = {"train": 48, "val": 80, "test": 80}
# Pixels decoded around it and cut off again, so that no decoder's border shows.
MARGIN = 8
# Standard deviation of the Gaussian that softens every crop, real or not, before anything else: less detail
# for a decoder to lose, and so less that its loss gives away.
SOFTENING = (0.4, 1.2)
# Least standard deviation of grey values.
CONTRAST = 8.0
# How often each level of blur, noise and JPEG comes, in both classes.
SHARES = ((0.8, 0.2, 0.0), (0.5, 0.4, 0.1), (0.8, 0.2, 0.0))
JPEG_MAGIC = b"\xff\xd8"


def write_dataset(
    root: str | Path,
    *,
    seed: int = 0,
    splits: Sequence[str] = SPLITS,
    compressed: tuple[float, float] | None = None,
    twins: bool | str = False,
) -> Path:
    """Write the built-in dataset below `root` and return it; some seconds, and the same bytes every time.

    Makes root/{train,val,test}/DECODER/{0_real,1_fake}/NUMBER.png, 48 x 48 pixels for training and 80 x 80
    else, and root/{train,val,test}/captions.json, image path relative to that folder to caption.

    Args:
        root: folder to write to, made if missing.
        seed: decides every crop and every degradation.
        splits: of train, val and test.
        compressed: shares of the real and of the generated images that are JPEG files, NUMBER.jpg of quality
            70 to 92. Unequal shares are a shortcut: the file, and its traces in the pixels, tell the label.
            All else is the same whatever the shares. None: all are PNG files, and a fifth of each class
            was compressed before.
        twins: the generated images are those of the real images' crops, with the same blur, noise and JPEG
            as the file of the same number (`data.pairs: true`); by the folder's decoder, or by the one named.
            The real images are the same with twins and without, and what `compressed` says of the generated
            ones does not hold.

    Raises:
        UserError: a photograph is missing from its package.

    Example:
        >>> import tempfile
        >>> from dgsnet import builtin
        >>> root = builtin.write_dataset(tempfile.mkdtemp())
        >>> len(list(root.glob("val/*/*/*.png")))
        240
    """
    root = Path(root)
    for split in splits:
        captions = {}
        for family in FAMILIES[split]:
            for label, name in enumerate(FOLDERS):
                folder = root / split / family / name
                folder.mkdir(parents=True, exist_ok=True)
                drawn = 0 if twins else label
                share = compressed[drawn] if compressed else None
                decoder = (twins if isinstance(twins, str) else family) if label else None
                files = make_files(
                    split, family, drawn, COUNTS[split], seed=seed, compressed=share, decoder=decoder
                )
                for i, (data, text) in enumerate(files):
                    path = folder / (f"{i:04d}.jpg" if data.startswith(JPEG_MAGIC) else f"{i:04d}.png")
                    path.write_bytes(data)
                    captions[path.relative_to(root / split).as_posix()] = text
        (root / split / "captions.json").write_text(json.dumps(captions, indent=0) + "\n")
    return root


def make_files(
    split: str,
    family: str,
    label: int,
    count: int,
    *,
    seed: int,
    compressed: float | None = None,
    decoder: str | None = None,
) -> Iterator[tuple[bytes, str]]:
    """`count` image files with captions, of a split's photographs: as of one folder of `write_dataset`.

    Family, label and seed decide what is drawn. Both classes go through the same steps, drawn from the same
    distributions but for `compressed`, the share of JPEG files; only the decoding is the generated ones' own.
    `decoder`: what a generated image comes out of, by default its family. With label 0 and a decoder the
    files are the twins of the real ones.
    """
    # One generator per folder: a longer list of decoders leaves the others' images as they are.
    rng = np.random.default_rng([seed, SPLITS.index(split), *family.encode(), label])
    name = decoder or (family if label else None)
    return render(PHOTOGRAPHS[split], count, rng, size=SIZES[split], decoder=name, compressed=compressed)


def render(
    photographs: Sequence[Photograph],
    count: int,
    rng: np.random.Generator,
    *,
    size: int,
    decoder: str | None = None,
    compressed: float | None = None,
) -> Iterator[tuple[bytes, str]]:
    """`count` image files of this size with captions, of crops of these photographs; see make_files."""
    shares = SHARES if compressed is None else (*SHARES[:2], (1 - compressed, compressed, 0.0))
    crops, contents = [], []
    for _ in range(count):
        photograph = photographs[int(rng.integers(len(photographs)))]
        crop, content = sample_crop(photograph, size + 2 * MARGIN, rng, contrast=CONTRAST)
        sigma = rng.uniform(*SOFTENING)
        crops.append(gaussian_filter(crop.astype(np.float32), (sigma, sigma, 0), mode="nearest"))
        contents.append(content)
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 255
    if decoder:
        images = DECODERS[decoder](images)
    for pixels, content in zip(images.permute(0, 2, 3, 1).numpy() * 255, contents):
        # Either pixel of the decoder's grid may come first.
        top, left = MARGIN + rng.integers(2, size=2)
        quality = Quality.draw(rng, shares)
        crop = pixels[top : top + size, left : left + size]
        if compressed is None:
            data = encode(degrade(crop, quality, rng), 100)
        else:
            data = encode(damage(crop, quality, rng), quality.jpeg)
        yield data, describe(content, quality.words)


def demo_config(root: str | Path, steps: int = 75) -> Config:
    """The settings that `dgsnet demo` trains DGS-Net with, on the training images below `root`.

    Without validation, which is for choosing settings and takes as long as training.
    """
    root = Path(root)
    return Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="builtin", lora_rank=6, lora_dropout=0.0),
        preprocess=PreprocessConfig(mode="crop", image_size=32, normalization="clip", crops=5),
        data=DataConfig(train=[str(root / "train")], workers=0, views=2),
        optim=OptimConfig(lr=4e-3, batch_size=24, head_epochs=4, epochs=100, max_steps=steps),
        surgery=SurgeryConfig(mode="feature", alignment=0.2, reference_batch_size=8),
        checkpoint_every=1000,
    )
