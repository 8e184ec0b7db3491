"""Which parts of an image made its score: heatmaps by occlusion, mapped back through the mosaic to the image.

docs/heatmaps.md says how to read one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgsnet.detection.decisions import DECIMALS
from dgsnet.detection.detector import Detector, prepare_views, view_generator
from dgsnet.detection.engine import mean
from dgsnet.files import replacing, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Longest side, in pixels, at which a heatmap is drawn.
DRAWN_SIDE = 768
# What contributions are, in words.
OCCLUSION = "logit minus logit with the patch painted over in its mean colour"
OWN = "logit of the crop by itself"


@dataclass(frozen=True)
class Heatmap:
    """What every part of an image that the model looked at adds to its logit.

    Attributes:
        boxes: float64 [n, 4], left, top, right, bottom in pixels of the upright image.
        contributions: float64 [n], in logits: positive speaks for generated.
        logit: of the image as it is, before any temperature.
        method: what a contribution is.
    """

    boxes: np.ndarray
    contributions: np.ndarray
    logit: float
    method: str = OCCLUSION

    def pixels(self, height: int, width: int, scale: float = 1.0) -> np.ndarray:
        """float64 [height, width], the mean contribution of the boxes on a pixel; NaN where there is none.

        `scale` is pixels of the result to one pixel of the image.
        """
        sums, count = np.zeros((height, width)), np.zeros((height, width))
        for box, value in zip(np.rint(self.boxes * scale).astype(int), self.contributions):
            part = np.s_[box[1] : box[3], box[0] : box[2]]
            sums[part] += value
            count[part] += 1
        return np.divide(sums, count, out=np.full_like(sums, np.nan), where=count > 0)


def heatmap(detector: Detector, image: np.ndarray, logits: Sequence[float] | None = None) -> Heatmap:
    """Of several crops, which have the mean of their logits: the logit of each.

    Otherwise the change of the logit when a part of the image is painted over with its own mean colour.

    Texture goes and colour stays, for traces of generation are texture. Each of the mosaic's patches (in mode
    "crop": each cell of a grid) is painted over alone, so it takes one forward pass per patch, 49 as
    published, and view. Of several views the contributions are averaged like the logits. It is occlusion
    (Zeiler and Fergus 2014): exact for one patch, and blind to what several do together.

    Args:
        detector: the model.
        image: uint8 [H, W, 3]; ImageError if it cannot be prepared.
        logits: of its crops and views, where they are known (`engine.Answer.single`): those of several crops
            then need no further work.

    Example:
        >>> from dgsnet import Detector
        >>> from dgsnet.data.images import read_image
        >>> detector = Detector.load("runs/demo/model")  # doctest: +SKIP
        >>> heatmap(detector, read_image("photo.jpg")).contributions.max()  # doctest: +SKIP
        0.31
    """
    import torch

    if detector.crops != 1:
        if logits is None:
            pixels = prepare_views(detector.preprocess, image, detector.views, normalised=False)
            (logits,) = detector.single_logits([pixels])
        generators = (view_generator(image, view) for view in range(detector.views))
        boxes = torch.cat([detector.preprocess.crop_boxes(image, rng=rng) for rng in generators])
        return Heatmap(boxes.numpy(), np.array(logits), mean(logits), OWN)
    sums: defaultdict[tuple[float, ...], float] = defaultdict(float)
    whole = []
    for view in range(detector.views):
        # The same numbers are drawn for the pixels and for where they come from.
        pixels = detector.preprocess(image, rng=view_generator(image, view))
        cells, boxes = detector.preprocess.boxes(image, rng=view_generator(image, view))
        # The last copy stays as it is.
        occluded = pixels[None].repeat(len(cells) + 1, 1, 1, 1)
        for copy, (left, top, right, bottom) in zip(occluded, cells.tolist()):
            part = copy[:, top:bottom, left:right]
            part[:] = part.mean(dim=(1, 2), keepdim=True)
        *without, logit = detector.logits(occluded).double().tolist()
        whole.append(logit)
        for box, other in zip(boxes.tolist(), without):
            sums[tuple(box)] += (logit - other) / detector.views
    return Heatmap(np.array(list(sums)), np.array(list(sums.values())), float(np.mean(whole)))


def draw(result: Heatmap, image: np.ndarray, title: str = "") -> Figure:
    """The heatmap over its image, uint8 [H, W, 3], hatched where the model did not look; a colour bar."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image

    from dgsnet.pages.plots import GENERATED, REAL

    scale = min(1.0, DRAWN_SIDE / max(image.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    small = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    grey = np.asarray(small.convert("L"))[:, :, None] / 255
    values = result.pixels(height, width, scale)
    largest = max(np.abs(result.contributions).max(initial=0), 1e-9)
    colours = LinearSegmentedColormap.from_list("contribution", [REAL, "white", GENERATED])
    painted = 0.45 * grey + 0.55 * colours(Normalize(-largest, largest)(np.nan_to_num(values)))[:, :, :3]
    seen = ~np.isnan(values)[:, :, None]
    with matplotlib.rc_context({"font.size": 9, "hatch.color": "#00000055", "text.parse_math": False}):
        inches = 6 / max(width, height)
        figure = Figure(
            figsize=(max(width * inches, 3) + 1.2, max(height * inches, 1.5) + 0.5),
            dpi=120,
            layout="constrained",
        )
        axes = figure.subplots()
        axes.imshow(0.4 + 0.6 * grey.repeat(3, axis=2))
        axes.add_patch(Rectangle((-0.5, -0.5), width, height, hatch="////", fill=False, linewidth=0))
        axes.imshow(np.concatenate([painted, seen], axis=2), interpolation="nearest", zorder=2)
        for left, top, right, bottom in result.boxes * scale - 0.5:
            outline = Rectangle((left, top), right - left, bottom - top, fill=False, linewidth=0.6, zorder=3)
            axes.add_patch(outline)
        axes.set_axis_off()
        axes.set_title(title, loc="left")
        bar = figure.colorbar(
            matplotlib.cm.ScalarMappable(Normalize(-largest, largest), colours), ax=axes, shrink=0.8
        )
        bar.set_label("logit: below 0 speaks for real, above for generated")
        bar.ax.spines["outline"].set_visible(False)
    return figure


def save(
    detector: Detector,
    name: str,
    image: np.ndarray,
    folder: str | Path,
    logits: Sequence[float] | None = None,
) -> Path:
    """Write the heatmap of an image as .png, whose path it gives, and .json, named after the image's name.

    Image and logits are as of `heatmap`.
    """
    import torch

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    result = heatmap(detector, image, logits)
    probability = detector.probabilities(torch.tensor(result.logit)).item()
    # Legible, legal on any file system, and different for different images.
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8]
    path = folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)[-80:]}-{digest}.png"
    decision = detector.decide(probability)[0]
    content = {
        "path": name,
        "width": image.shape[1],
        "height": image.shape[0],
        "probability": round(probability, DECIMALS),
        "decision": decision,
        "method": result.method,
        "logit": result.logit,
        "patches": [
            {"box": [round(x, 3) for x in box], "contribution": value}
            for box, value in zip(result.boxes.tolist(), result.contributions.tolist())
        ],
    }
    write_file(path.with_suffix(".json"), (json.dumps(content, indent=1) + "\n").encode("ascii"))
    title = f"{Path(name).name[-40:]}: {decision}, {probability:.3f}"
    with replacing(path, "wb") as file:
        draw(result, image, title.encode(errors="replace").decode()).savefig(file, format="png")
    return path
