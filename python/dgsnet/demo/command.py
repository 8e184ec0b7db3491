"""`dgsnet demo`: linear probe, plain LoRA and DGS-Net trained and compared on the built-in data."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgsnet.demo.compare import DGSNET, LORA, Run, compare, first, results, table
from dgsnet.errors import UserError
from dgsnet.files import LOCK_FILE, locked

if TYPE_CHECKING:
    from dgsnet.data.samples import Sample

# Enough points to see clusters, few enough for t-SNE in seconds.
MAP_IMAGES = 500
# Tells a demo's folder, which may be overwritten, from any other.
MARKER = ".dgsnet-demo"


def demo_command(out: str = "runs/demo") -> None:
    """Train and compare linear probe, LoRA and DGS-Net on the built-in data; write report.html and a model.

    Args:
        out: folder for everything; a former demo in it is replaced.
    """
    with locked(Path(out)):
        _demo(_prepare(Path(out)))


def _demo(folder: Path) -> None:
    from dgsnet import builtin
    from dgsnet.data.samples import find_samples
    from dgsnet.demo import report

    started = time.monotonic()
    print("writing the built-in data ...", flush=True)
    data = builtin.write_dataset(folder / "data")
    test = find_samples(data, "test")
    runs = compare(data, builtin.demo_config(data), folder / "runs")
    print("\n" + table(runs) + "\n")
    shutil.copytree(first(runs, DGSNET).folder / "best", folder / "model")
    maps, labels = feature_maps(runs, test)
    (folder / "results.json").write_text(json.dumps(results(runs), indent=2) + "\n")
    report.write(
        folder / "report.html",
        runs,
        samples={split: find_samples(data, split) for split in ("train", "val", "test")},
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


def feature_maps(runs: list[Run], test: list[Sample]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """t-SNE of the test images' features: title to points [N, 2], and the labels [N].

    As in the paper's figure 1: the frozen encoder, plain LoRA and DGS-Net, each of the first seed.
    """
    import torch
    from sklearn.manifold import TSNE

    from dgsnet.data.images import read_image
    from dgsnet.detection.detector import Detector

    chosen = np.random.default_rng(0).permutation(len(test))[:MAP_IMAGES]
    lora, dgsnet = (Detector.load(first(runs, method).folder) for method in (LORA, DGSNET))
    device = next(lora.model.parameters()).device
    pixels = torch.stack([lora.preprocess(read_image(test[i].path)) for i in chosen]).to(device)
    with torch.inference_mode():
        features = {
            "frozen CLIP": lora.model.teacher_features(pixels),
            LORA: lora.model.student_features(pixels),
            DGSNET: dgsnet.model.student_features(pixels),
        }
    maps = {
        title: TSNE(perplexity=min(30, len(chosen) / 4), random_state=0).fit_transform(
            values.float().cpu().numpy()
        )
        for title, values in features.items()
    }
    return maps, np.array([test[i].label for i in chosen])
