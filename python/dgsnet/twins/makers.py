"""What makes twins: autoencoders of latent diffusion models, the built-in decoders, and plain resizing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dgsnet.builtin.decoders import DECODERS
from dgsnet.data.lists import read_json
from dgsnet.errors import UserError
from dgsnet.files import one_line

WEIGHTS = "diffusion_pytorch_model"
# Images of more pixels go through an autoencoder in tiles.
LARGE = 2**20
# Side of a tile of AutoencoderKL's latents.
TILE = 64
# AutoencoderTiny's tiles, and how much of their sides is cut away: about as far as a pixel is seen there.
TINY_TILE, TINY_MARGIN = 1024, 128


@dataclass(frozen=True)
class Maker:
    """One thing that makes twins.

    Attributes:
        name: also of the generator's folder.
        multiple: of which the sides of its images must be.
        make: float32 [N, 3, H, W] in 0..1 and a seed for each, to the same shape.
        identity: tells it from others, as JSON values.
        origin: what to say of where it comes from; "": nothing.
    """

    name: str
    multiple: int
    make: Callable[[Tensor, Sequence[int]], Tensor]
    identity: tuple[str, ...]
    origin: str = ""

    def __call__(self, images: Sequence[np.ndarray], seeds: Sequence[int]) -> list[np.ndarray | None]:
        """Twins of images uint8 [h, w, 3] that `padded` makes equally large, each of its original's size.

        None of one for which there are no finite numbers.
        """
        batch = torch.from_numpy(np.stack([self.padded(image) for image in images]))
        with torch.inference_mode():
            made = self.make(given := batch.permute(0, 3, 1, 2).contiguous() / 255, seeds)
        if made.shape != given.shape:
            raise UserError(f"--by {self.name} makes images of another size than it is given")
        finite = made.isfinite().flatten(1).all(1).tolist()
        levels = (made.nan_to_num(0).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [
            np.ascontiguousarray(twin[: image.shape[0], : image.shape[1]]) if whole else None
            for twin, image, whole in zip(levels, images, finite)
        ]

    def padded(self, image: np.ndarray) -> np.ndarray:
        """An image mirrored at its right and its lower end up to sides that fit."""
        height, width = self.size(*image.shape[:2])
        return np.pad(image, [(0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)], "reflect")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The sides that `padded` makes of these."""
        return -(-height // self.multiple) * self.multiple, -(-width // self.multiple) * self.multiple


def load_makers(words: Sequence[str], device: str | None = None) -> list[Maker]:
    """What the words of --by name, each with a name of its own; errors as of `twins_command`."""
    makers: list[Maker] = []
    for word in words:
        kind, _, name = word.partition(":")
        if kind == "vae":
            maker = _autoencoder(name, device)
        elif kind == "builtin":
            if name not in DECODERS:
                raise UserError(f"--by {word} is unknown: the built-in decoders are {', '.join(DECODERS)}")
            maker = Maker(f"builtin-{name}", 4, _builtin(name), (word,))
        else:
            maker = Maker("resize", 1, _resize, (word,))
        if any(maker.name == other.name for other in makers):
            raise UserError(f"--by {word} and another would both be called {maker.name}: rename its folder")
        makers.append(maker)
    return makers


def _builtin(name: str) -> Callable[[Tensor, Sequence[int]], Tensor]:
    return lambda images, _: DECODERS[name](images)


def _resize(images: Tensor, _: Sequence[int]) -> Tensor:
    """Half the size and back: detail is lost as by a decoder, and no generator has left its traces."""
    height, width = images.shape[-2:]
    options: dict[str, Any] = {"mode": "bicubic", "antialias": True, "align_corners": False}
    half = F.interpolate(images, (max(1, height // 2), max(1, width // 2)), **options)
    return F.interpolate(half, (height, width), **options)


def _autoencoder(source: str, device: str | None) -> Maker:
    """diffusers' AutoencoderKL or AutoencoderTiny, from a folder or the Hugging Face Hub."""
    folder, origin = _folder(source)
    kinds = {"AutoencoderKL": _kl, "AutoencoderTiny": _tiny}
    config = read_json(folder / "config.json")
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in kinds:
        raise UserError(f"{folder} holds a {kind}; --by vae: takes {' and '.join(kinds)}")
    try:
        import diffusers
    except ImportError:
        raise UserError("--by vae:... needs diffusers: pip install 'dgs-kernels[twins]'") from None
    from dgsnet.detection.batches import fast_precision
    from dgsnet.model.checkpoint import sampled_hash
    from dgsnet.model.network import usable_device

    diffusers.utils.logging.set_verbosity_error()
    where = torch.empty(0, device=usable_device(device)).device
    dtype = torch.bfloat16 if fast_precision(where) == "bf16" else torch.float32
    try:
        options = {"torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        vae, loaded = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:
        # Errors are as various as what may be wrong with a folder.
        raise UserError(f"{folder}: cannot be loaded as {kind} ({one_line(error)[:200]})") from None
    if missing := loaded["missing_keys"]:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, such as {sorted(missing)[0]}")
    if (vae.config.in_channels, vae.config.out_channels) != (3, 3):
        raise UserError(f"{folder} is for images of {vae.config.in_channels} channels; it must be 3")
    vae.to(where).eval()
    blocks = (
        vae.config.block_out_channels if kind == "AutoencoderKL" else vae.config.encoder_block_out_channels
    )
    multiple = 2 ** (len(blocks) - 1)
    make = kinds[kind](vae, multiple)

    def on_device(images: Tensor, seeds: Sequence[int]) -> Tensor:
        try:
            made = make((images.to(where) * 2 - 1).to(dtype), seeds)
        except torch.OutOfMemoryError:
            size = "{} x {}".format(*images.shape[-2:])
            raise UserError(
                f"{where} has no memory for images of {size}: give a smaller --batch_size"
            ) from None
        return (made.float() + 1) / 2

    identity = (sampled_hash(vae.state_dict().values()), str(dtype), where.type)
    return Maker(_called(source), multiple, on_device, identity, origin)


def _called(source: str) -> str:
    if not os.path.isdir(source):
        return f"vae-{source.partition('@')[0].replace('/', '-')}"
    path = Path(source).resolve()
    return f"vae-{path.name}" if path.name != "vae" else f"vae-{path.parent.name}"


def _kl(vae: Any, multiple: int) -> Callable[[Tensor, Sequence[int]], Tensor]:
    # Its own sizes of tiles differ from model to model.
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE * multiple, TILE

    def make(images: Tensor, seeds: Sequence[int]) -> Tensor:
        large = images.shape[-2] * images.shape[-1] > LARGE
        (vae.enable_tiling if large else vae.disable_tiling)()
        latents = vae.encode(images).latent_dist
        # Every image has a seed, and the numbers are those of a CPU, whatever works at it.
        noise = [
            torch.randn(latents.mean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds
        ]
        sample = latents.mean + latents.std * torch.stack(noise).to(latents.mean)
        return vae.decode(sample).sample

    return make


def _tiny(vae: Any, multiple: int) -> Callable[[Tensor, Sequence[int]], Tensor]:
    def whole(images: Tensor) -> Tensor:
        return vae.decode(vae.encode(images).latents).sample

    def make(images: Tensor, _: Sequence[int]) -> Tensor:
        height, width = images.shape[-2:]
        if height * width <= LARGE:
            return whole(images)
        # diffusers' own tiles are of models with four latent channels, and fp32, alone.
        made, step = torch.empty_like(images), TINY_TILE - 2 * TINY_MARGIN
        for top in range(0, height, step):
            for left in range(0, width, step):
                above, before = min(top, TINY_MARGIN), min(left, TINY_MARGIN)
                tile = whole(
                    images[
                        ..., top - above : top + step + TINY_MARGIN, left - before : left + step + TINY_MARGIN
                    ]
                )
                made[..., top : top + step, left : left + step] = tile[
                    ..., above : above + step, before : before + step
                ]
        return made

    return make


def _folder(source: str) -> tuple[Path, str]:
    """The folder with an autoencoder's configuration and weights, and what to say of where it is from."""
    origin = ""
    if os.path.isdir(source):
        root = Path(source)
    else:
        from huggingface_hub import snapshot_download

        name, _, revision = source.partition("@")
        files = ["config.json", *(f"{WEIGHTS}{rest}" for rest in (".safetensors", "-*-of-*.safetensors"))]
        files.append(f"{WEIGHTS}.safetensors.index.json")
        try:
            patterns = [f"{place}{file}" for place in ("", "vae/") for file in files]
            root = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
        except Exception as error:
            # It may be the hub's, the proxy's or the socket's.
            raise UserError(
                f"{source} is no folder, and cannot be had from the Hugging Face Hub "
                f"({one_line(error)[:200]}): give a folder that holds one, or a network"
            ) from None
        origin = f"{name}: revision {root.name}"
    for folder in (root, root / "vae"):
        if (folder / "config.json").is_file():
            if any(folder.glob(f"{WEIGHTS}*.safetensors")):
                return folder, origin
            raise UserError(
                f"{folder} has no {WEIGHTS}.safetensors; pickled weights, which can run code, are not read"
            )
    raise UserError(f"{source} has no config.json of an autoencoder, nor one in its folder vae")
