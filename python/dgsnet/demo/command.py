"""`dgsnet demo`: five methods trained and compared on built-in data with a shortcut and without."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgsnet.demo import compare as demo
from dgsnet.errors import UserError
from dgsnet.files import LOCK_FILE, locked

if TYPE_CHECKING:
    from dgsnet.data.items import Item

# Enough points to see clusters, few enough for t-SNE in seconds.
MAP_IMAGES = 300
TABLE_NOTE = (
    "Percent. Methods: mean ± standard deviation over seeds. Differences to LoRA: paired by seed, mean ±\n"
    "standard error (seeds in which it is higher). Tests are balanced, on photographs and decoders that no\n"
    "training has seen; an image is decided on by the mean logit of five crops. Conflicting: generated JPEG\n"
    "files against real PNG files. Zero-shot and CKA: what is left of CLIP; the linear probe keeps all of it."
)
# Tells a demo's folder, which may be overwritten, from any other.
MARKER = ".dgsnet-demo"


def demo_command(out: str = "runs/demo") -> None:
    """Train and compare linear probe, LoRA, DGS-Net, an expert and twins on built-in data; write report.html.

    Args:
        out: folder for everything; a former demo in it is replaced.
    """
    with locked(Path(out)):
        _demo(_prepare(Path(out)))


def _demo(folder: Path) -> None:
    from dgsnet import builtin
    from dgsnet.data.items import find_samples
    from dgsnet.demo import report

    started = time.monotonic()
    print("writing the built-in data ...", flush=True)
    data = builtin.write_dataset(folder / "data", splits=("test",), compressed=(0.5, 0.5))
    test = find_samples(data / "test")
    runs = demo.compare(data, builtin.demo_config, folder / "runs")
    print(f"\n{demo.table(runs)}\n\n{TABLE_NOTE}\n")
    shutil.copytree(demo.of(runs, demo.BALANCED, demo.DGSNET)[0].folder / "best", folder / "model")
    (folder / "results.json").write_text(json.dumps(demo.results(runs), indent=2) + "\n")
    maps, labels = feature_maps(runs, test)
    sets = {
        f"{task}, seed {runs[0].seed}": demo.training_set(data, task, runs[0].seed) for task in demo.TASKS
    }
    sets |= {f"{name}, twins": demo.twins_of(images) for name, images in sets.items()}
    report.write(
        folder / "report.html",
        runs,
        samples={name: find_samples(images) for name, images in sets.items()} | {"test": test},
        maps=maps,
        map_labels=labels,
        seconds=time.monotonic() - started,
    )
    print(f"report: {folder / 'report.html'}")
    print(
        f"model:  {folder / 'model'}   (dgsnet predict PATHS... --model {folder / 'model'} --out scores.csv)"
    )
    print(f"{time.monotonic() - started:.0f} seconds")


def _prepare(out: Path) -> Path:
    """Empty the folder of a former demo; refuse to empty any other."""
    entries = [entry for entry in out.iterdir() if entry.name != LOCK_FILE]
    if entries:
        if not (out / MARKER).is_file():
            raise UserError(f"{out} holds files that are not a demo's; give --out a new folder")
        for entry in entries:
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != MARKER:
                entry.unlink()
    (out / MARKER).touch()
    return out


def feature_maps(runs: list[demo.Run], test: list[Item]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """t-SNE of the test images' features: title to points [N, 2], and the labels [N].

    As in the paper's figure 1, the frozen encoder and what the methods made of it: trained on the data with
    the shortcut, each with the first seed.
    """
    import torch
    from sklearn.manifold import TSNE

    from dgsnet.data.images import read_image
    from dgsnet.detection.detector import Detector

    chosen = np.random.default_rng(0).permutation(len(test))[:MAP_IMAGES]
    detectors = {
        method: Detector.load(demo.of(runs, demo.BIASED, method)[0].folder, "cpu") for method in demo.METHODS
    }
    preprocess = detectors[demo.PROBE].preprocess
    pixels = torch.stack([preprocess(read_image(test[i].path)) for i in chosen])
    with torch.inference_mode():
        features = {
            "frozen CLIP" if method == demo.PROBE else method: detector.model.student_features(pixels)
            for method, detector in detectors.items()
        }
    maps = {
        title: TSNE(perplexity=min(30, len(chosen) / 4), random_state=0).fit_transform(values.numpy())
        for title, values in features.items()
    }
    return maps, np.array([test[i].label for i in chosen])
