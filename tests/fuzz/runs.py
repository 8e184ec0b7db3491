"""What is fuzzed of the folders that training and evaluation write, and go on from."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

from dgsnet.config import ModelConfig
from dgsnet.data.items import Item
from dgsnet.detection.detector import Detector
from dgsnet.evaluation.evaluate import evaluate
from dgsnet.model.dgsnet import DGSNet
from dgsnet.training.checks import UPDATE_FILE
from dgsnet.training.frozen import CaptionFeatures
from dgsnet.training.train import train
from dgsnet.training.update import check_update

from tests.fuzz.changes import changed_any, changed_bytes, changed_numbers, changed_state
from tests.fuzz.target import Target
from tests.support.runs import METRICS_FILE, STATE_FILE, interrupted_after, settings, write_images
from tests.support.tiny import save_noise

JOURNAL = "scores.jsonl"


def runs(folder: Path, model: Path) -> list[Target]:
    """A run that is gone on with, an update's record, an evaluation's journal, and features that are kept."""
    return [*training(folder / "training"), journal(folder / "journal", model), captions(folder / "captions")]


def training(folder: Path) -> list[Target]:
    """Files of a run that was stopped within stage 2, which goes on from them for a step."""
    data = write_images(folder / "data", (4, 3))
    few = {"optim_batch_size": 3, "optim_epochs": 1, "optim_average": 2, "optim_max_steps": 2}
    config = settings(data, data_val=[], data_captions="none", data_views=1, checkpoint_every=1, **few)
    stopped, run = folder / "stopped", folder / "run"
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        interrupted_after(5),
    ):
        train(config, stopped)
    record = {"weights": "0" * 16, "rule": "gem", "replay_share": "0.5", "margin": "0"}
    (stopped / UPDATE_FILE).write_text(json.dumps(record))
    (features,) = (data / "cache").rglob("*.npy")

    def fresh(name: Path | str, content: bytes) -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(stopped, run)
        (run / UPDATE_FILE).unlink()
        (run / name).write_bytes(content)

    def go_on(name: Path | str, content: bytes) -> None:
        fresh(name, content)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(config, run, resume=True)

    def read_features(content: bytes) -> None:
        whole = features.read_bytes()
        features.write_bytes(content)
        try:
            go_on("more", b"")
        finally:
            features.write_bytes(whole)

    def read_update(content: bytes) -> None:
        fresh(UPDATE_FILE, content)
        check_update(config, run, record, resume=True)

    state = (stopped / STATE_FILE).read_bytes()
    metrics, kept = (stopped / METRICS_FILE).read_bytes(), features.read_bytes()
    return [
        Target("resume.pt", [state], changed_state, lambda data: go_on(STATE_FILE, data), seconds=5.0),
        Target("metrics.csv", [metrics], changed_bytes, lambda data: go_on(METRICS_FILE, data), seconds=5.0),
        Target("image features", [kept], changed_numbers, read_features, seconds=5.0),
        Target("update.json", [(stopped / UPDATE_FILE).read_bytes()], changed_any, read_update),
    ]


def journal(folder: Path, model: Path) -> Target:
    """An evaluation's scores, which it goes on from."""
    folder.mkdir()
    detector, path = Detector.load(model, device="cpu"), folder / JOURNAL
    samples = [Item(str(file), i % 2) for i, file in enumerate(sorted(save_noise(folder, 3).iterdir()))]

    def read(content: bytes) -> None:
        path.write_bytes(content)
        evaluate(detector, samples, journal=path, workers=0, progress=False)

    path.write_bytes(b"")
    read(b"")
    return Target(JOURNAL, [path.read_bytes()], changed_bytes, read, seconds=3.0)


def captions(folder: Path) -> Target:
    """Features of captions, which are there for the next run."""
    model, words = DGSNet(ModelConfig(name="dgsnet-tiny", pretrained="")), ["a cat", "a dog", "a boat"]
    CaptionFeatures(model, words, folder)
    (path,) = folder.rglob("*.npy")

    def read(content: bytes) -> None:
        path.write_bytes(content)
        CaptionFeatures(model, words, folder)(words)

    return Target("caption features", [path.read_bytes()], changed_numbers, read)
