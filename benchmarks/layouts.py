"""Published detectors in full depth with random weights: their logits beside those of a plain reading.

The same as the tests of `dgsnet convert`, which have two narrow blocks. Not timed. Needs torchvision, 16 GiB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from dgsnet.detection.detector import Detector
from dgsnet.exchange.convert import convert
from torchvision import transforms as T

from benchmarks import harness
from tests.support import published
from tests.support.published import CLIP_NORM, IMAGENET, Random, prepared

# Largest difference of logits, of their own size where that is above 1.
TOLERANCE = 1e-5


def _community() -> tuple[Any, Any]:
    published.DEPTH = 12
    state, head = published.timm_state(384, 577, patch=16), Random(5).linear("head", 1, 384)

    def logit(path: Path) -> Any:
        pixels = prepared(path, T.Resize(440), T.CenterCrop(384), T.ToTensor(), IMAGENET)
        features = published.timm_features(state, pixels, heads=6)
        return features @ head["head.weight"].double().T + head["head.bias"].double()

    return {"model": {f"vit.{name}": tensor for name, tensor in (state | head).items()}}, logit


def _dda() -> tuple[Any, Any]:
    published.DEPTH = 24
    state = published.timm_state(1024, 1370, patch=14, gamma=True)
    head = {"weight": Random(5)(1, 1024), "bias": Random(6)(1)}
    file, merged = published.dda_file(state, head)
    merged["pos_embed"] = published.hub_positions(state["pos_embed"], 24)

    def logit(path: Path) -> Any:
        pixels = prepared(path, T.CenterCrop(336), T.ToTensor(), CLIP_NORM)
        features = published.timm_features(merged, pixels, heads=16)
        return features @ head["weight"].double().T + head["bias"].double()

    return {"model": file}, logit


def _c2p() -> tuple[Any, Any]:
    published.DEPTH = 24
    state, r = published.clip_state(1024), Random(5)
    projection, head = r(768, 1024), {"weight": r(1, 768, scale=1), "bias": r(1)}
    file = {f"model.vision_model.{name}": tensor for name, tensor in state.items()}
    file |= {f"model.fc.{kind}": tensor for kind, tensor in head.items()}

    def logit(path: Path) -> Any:
        pixels = prepared(path, T.Resize(224), T.CenterCrop(224), T.ToTensor(), CLIP_NORM)
        embedding = published.clip_features(state, pixels) @ projection.double().T
        embedding = embedding / embedding.norm(dim=-1, keepdim=True)
        return embedding @ head["weight"].double().T + head["bias"].double()

    return file | {"model.visual_projection.weight": projection}, logit


def _effort() -> tuple[Any, Any]:
    published.DEPTH = 24
    state, head = published.effort_state(width=1024), Random(5).linear("fc", 1, 1024)
    file = {f"model.vision_model.{name}": tensor for name, tensor in state.items()}

    def logit(path: Path) -> Any:
        pixels = prepared(path, T.CenterCrop(224), T.ToTensor(), CLIP_NORM)
        features = published.clip_features(state, pixels, weight=published.effort_weight)
        return features @ head["fc.weight"].double().T + head["fc.bias"].double()

    return {"model": file | head}, logit


def _bfree() -> tuple[Any, Any]:
    published.DEPTH = 12
    state = published.timm_state(768, 36 * 36, patch=14, gamma=True, registers=4)
    head = Random(5).linear("head", 1, 768)

    def logit(path: Path) -> Any:
        return published.bfree_logit(state, head, prepared(path, T.ToTensor(), IMAGENET))

    return {"model": state | head}, logit


LAYOUTS = {
    "Community Forensics": _community,
    "C2P-CLIP": _c2p,
    "Effort": _effort,
    "DDA": _dda,
    "B-Free": _bfree,
}


def results(arguments: Any) -> Iterator[dict[str, Any]]:
    """One result for each layout, or for those that --models names."""
    for name in arguments.models or LAYOUTS:
        file, logit = LAYOUTS[name]()
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            torch.save(file, place / "theirs.pth")
            del file
            convert(place / "theirs.pth", place / "model")
            (path,) = published.pictures(place, (627, 500))
            ((found, _),) = Detector.load(place / "model", "cpu").stream_logits([path], workers=0)
            expected = float(logit(path))
        error = abs(found - expected) / max(1.0, abs(expected))
        right = error < TOLERANCE
        print(f"{name:20} logit {found:+.6f}, expected {expected:+.6f}: {'right' if right else 'WRONG'}")
        yield {
            "operation": "layouts",
            "layout": name,
            "logit": found,
            "expected": expected,
            "error": error,
        } | ({} if right else {"faults": {harness.OURS: f"off by {error:.2g}"}})
