"""data: from an encoded photograph to the model's input, in images per second and core.

Stages and peers run in turn, image after image, on one thread: decoding, the patch selection, the whole
preprocessing, and what comes out of a loader's one worker; at one side each degradation and each preset of
them too, drawn anew in every call. The photographs are scikit-image's, scaled to the side. `core_ms` is
processor time of all processes, since images are decoded in one of their own. On a GPU also the part of the
selection that it takes over, for a batch.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from dgsnet.config import PreprocessConfig
from dgsnet.data.distortions import OPERATIONS, PRESETS, Degradations, Distortion
from dgsnet.data.images import read_image
from dgsnet.data.items import Item
from dgsnet.data.loading import ImageDataset, make_loader
from dgsnet.data.patches import select_patches
from dgsnet.data.preprocess import Preprocessor, content_seed
from PIL import Image

from benchmarks import harness
from benchmarks.processor_time import ProcessorTime
from benchmarks.spectral_entropy import SIZE, numpy_loop
from dgs_kernels import backends, spectral_entropy

SIDES = (256, 512, 1024, 2048)
KEPT, LOW = 49, 24
BATCH = 32
LOOP, OURS = "selection, NumPy loop", "selection, ours"
TURBO = "libjpeg-turbo alone"
# The side at which degradations are timed.
DEGRADED = 512
# Of each degradation a value as presets have it.
VALUES = {
    **{"jpeg": 75, "jpeg444": 75, "webp": 75, "avif": 60, "blur": 1.5, "sharpen": 2, "resize": 0.6},
    **{"bilinear": 0.6, "lanczos": 0.6, "nearest": 0.6, "shorter": 250, "longer": 250, "crop": 0.7},
    **{"cutout": 0.2, "noise": 5, "brightness": 1.2, "contrast": 1.2, "saturation": 0.6, "hue": 0.1},
}
# So long each stage runs for its processor time.
CORE_SECONDS = 1.0


def photographs(side: int) -> list[np.ndarray]:
    from skimage import data

    found = []
    for name in ("astronaut", "cat", "chelsea", "coffee", "rocket"):
        image = Image.fromarray(getattr(data, name)())
        short = min(image.size)
        found.append(np.array(image.crop((0, 0, short, short)).resize((side, side))))
    return found


def encoded(image: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **({"quality": 90} if kind == "jpeg" else {}))
    return file.getvalue()


def loop_selection(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Patch selection as it is usually written: one patch after the other, then a shuffle and a mosaic."""
    places = itertools.product(range(0, image.shape[0], SIZE), range(0, image.shape[1], SIZE))
    patches = [image[y : y + SIZE, x : x + SIZE] for y, x in places]
    entropies = numpy_loop(torch.from_numpy(image).permute(2, 0, 1)[None])[0].numpy()
    order = np.argsort(entropies, kind="stable")
    chosen = rng.permutation(np.concatenate([order[:LOW], order[LOW - KEPT :]]))
    rows = [np.concatenate([patches[i] for i in row], axis=1) for row in chosen.reshape(7, 7)]
    return np.concatenate(rows)


def loop_preprocess(data: bytes, rng: np.random.Generator) -> torch.Tensor:
    from torchvision.transforms import functional

    image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    pixels = functional.to_tensor(loop_selection(image, rng))
    if rng.random() < 0.5:
        pixels = functional.hflip(pixels)
    return functional.normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def libjpeg_turbo(data: torch.Tensor) -> torch.Tensor:
    """What decoding costs at least: the library alone, as torchvision has it, in this process."""
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decode_jpeg(data, mode=ImageReadMode.RGB)


def stages(side: int) -> dict[str, Callable[[int], object]]:
    """Name to a call that does the stage for the i-th image."""
    images = photographs(side)
    jpeg, webp, png = ([encoded(image, kind) for image in images] for kind in ("jpeg", "webp", "png"))
    turbo = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in jpeg]
    preprocess, rng = Preprocessor(PreprocessConfig()), np.random.default_rng(0)

    def of(items: list, call: Callable) -> Callable[[int], object]:
        return lambda i: call(items[i % len(items)])

    def entropy(image: np.ndarray) -> torch.Tensor:
        return spectral_entropy(torch.from_numpy(image).permute(2, 0, 1)[None], SIZE)

    def ours(image: np.ndarray) -> torch.Tensor:
        return select_patches(torch.from_numpy(image).permute(2, 0, 1)[None], seed=0)

    return {
        TURBO: of(turbo, libjpeg_turbo),
        "decode JPEG": of(jpeg, read_image),
        "decode WebP": of(webp, read_image),
        "decode PNG": of(png, read_image),
        "hash of the pixels": of(images, content_seed),
        "entropy": of(images, harness.through("cpu", entropy)),
        LOOP: of(images, lambda image: loop_selection(image, rng)),
        "selection, eager": of(images, harness.through("eager", ours)),
        OURS: of(images, harness.through("cpu", ours)),
        "JPEG to input, NumPy loop": of(jpeg, lambda data: loop_preprocess(data, rng)),
        "JPEG to input, ours": of(jpeg, lambda data: preprocess(read_image(data), rng=rng)),
        "JPEG to scoring's input": of(jpeg, lambda data: preprocess(read_image(data), normalised=False)),
        "JPEG to patches, the device selects": of(
            jpeg, lambda data: preprocess.cut(read_image(data), rng=rng)
        ),
    }


def degradations(side: int) -> dict[str, Callable[[int], object]]:
    """Name to a call that does it to the i-th image, drawn anew of each."""
    images = photographs(side)

    def of(degrade: Callable) -> Callable[[int], object]:
        return lambda i: degrade(images[i % len(images)], np.random.default_rng(i))

    calls = {f"{name}:{VALUES[name]:g}": of(Distortion(((name, VALUES[name]),))) for name in OPERATIONS}
    presets = {f"preset {name}": of(Degradations.parse(steps)) for name, steps in PRESETS.items() if steps}
    return calls | presets


def loader_rate(folder: Path, side: int, selection: str, images: int) -> float:
    """Images per second out of a loader with one worker, of a JPEG folder in memory."""
    for i, image in enumerate(photographs(side)):
        (folder / f"{side}-{i}.jpg").write_bytes(encoded(image, "jpeg"))
    files = sorted(map(str, folder.glob(f"{side}-*.jpg")))
    samples = [Item(files[i % len(files)], 0, "") for i in range(images)]
    dataset = ImageDataset(samples, Preprocessor(PreprocessConfig()), train=True, selection=selection)
    batches = iter(make_loader(dataset, batch_size=BATCH, workers=1))
    # The worker starts meanwhile.
    next(batches)
    started = time.perf_counter()
    count = sum(len(batch["labels"]) for batch in batches)
    return count / (time.perf_counter() - started)


def on_gpu(side: int, seconds: float) -> dict:
    """Selection and normalisation of a batch on the GPU, patches already there."""
    preprocess, images = Preprocessor(PreprocessConfig()), photographs(side)
    cut = [preprocess.cut(images[i % len(images)], rng=np.random.default_rng(i)) for i in range(BATCH)]
    patches, seeds, flips = zip(*cut)
    counts = torch.tensor([len(p) for p in patches]).cuda()
    batch = (torch.cat(patches).cuda(), counts, torch.tensor(seeds).cuda(), torch.tensor(flips).cuda())
    name = f"selection of {BATCH}, on the GPU"
    return measured({name: lambda i: preprocess.select(*batch)}, "cuda", seconds, images=BATCH)


def measured(calls: dict[str, Callable[[int], object]], device: str, seconds: float, images: int = 1) -> dict:
    """Medians and spread of calls made in turn; `images` is what one call does."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
        harness.timed(device, call, (0,))
    started = time.perf_counter()
    for i in itertools.count():
        if i >= harness.MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name, call in calls.items():
            samples[name].append(harness.timed(device, call, (i,)))
    found = {name: harness.summary(times, 0) for name, times in samples.items()}
    for name, result in found.items():
        result["images_per_s"] = 1e3 * images / result["median_ms"]
        del result["gb_per_s"], result["cpu_median_ms"]
        count = max(10, round(1e3 * CORE_SECONDS / result["median_ms"]))
        with ProcessorTime() as used:
            for i in range(count):
                calls[name](i)
        result["core_ms"] = 1e3 * used.seconds / count / images
    return found


def results(arguments: argparse.Namespace) -> list[dict]:
    """What `python -m benchmarks data` writes: a result for each side; prints it too."""
    torch.set_num_threads(1)
    before, found = os.environ.get(backends.VARIABLE), []
    for side in SIDES:
        print(f"\ndata side={side} device={arguments.device} threads=1", flush=True)
        variants = measured(stages(side), "cpu", arguments.seconds)
        if side == DEGRADED:
            variants |= measured(degradations(side), "cpu", arguments.seconds)
        os.environ.pop(backends.VARIABLE, None)
        if before is not None:
            os.environ[backends.VARIABLE] = before
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            # In turn as well, each long enough for the queue's start not to matter.
            count = BATCH * max(4, round(2 * arguments.seconds / BATCH * 1e5 / side**1.5))
            rates: dict[str, list[float]] = {"workers": [], "device": []}
            for _ in range(3):
                for selection, rate in rates.items():
                    rate.append(loader_rate(Path(folder), side, selection, count))
        if arguments.device == "cuda":
            variants |= on_gpu(side, arguments.seconds)
        result = {
            "operation": "data",
            "side": side,
            "device": arguments.device,
            "threads": 1,
            "variants": variants,
            "loader_images_per_s": {f"selection {name}": sorted(r)[1] for name, r in rates.items()},
            "selection_over_loop": variants[LOOP]["median_ms"] / variants[OURS]["median_ms"],
        }
        print(table(result), flush=True)
        found.append(result)
    return found


def table(result: dict) -> str:
    lines = [f"{'':38}{'median ms':>10}{'p10':>9}{'p90':>9}{'images/s':>10}{'core ms':>10}"]
    for name, v in result["variants"].items():
        lines.append(
            f"{name:38}{v['median_ms']:10.3f}{v['p10_ms']:9.3f}{v['p90_ms']:9.3f}{v['images_per_s']:10.0f}"
            f"{v['core_ms']:10.2f}"
        )
    for name, rate in result["loader_images_per_s"].items():
        lines.append(f"{'a loader of one worker, ' + name:66}{rate:10.0f}")
    lines.append(f"the selection is {result['selection_over_loop']:.1f} times as fast as the NumPy loop")
    return "\n".join(lines)
