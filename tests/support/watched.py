"""Commands of dgsnet, called with stand-ins that note what they are given."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from dgsnet.audit.shortcuts import FileModel
from dgsnet.cli import COMMANDS, main
from dgsnet.config import Config
from dgsnet.data.nuisances import NUISANCES
from dgsnet.detection.detector import Detector
from dgsnet.detection.provenance import Provenance
from dgsnet.errors import UserError
from dgsnet.exchange.convert import Official

from tests.support.tiny import CROP, save_noise, save_tiny

# Loaded before anything is replaced: what is imported while it is would keep the replacement.
FUNCTIONS = {name: command.load() for name, command in COMMANDS.items()}
FILE_MODEL = FileModel([0.5], [1.5, 2.5], 3.5)
# Real and generated images by folder.
IMAGES = {"old/train": (1, 2), "old/val": (12, 14), "new/train": (3, 4), "new/val": (16, 19)}


def write_files(root: Path) -> Path:
    """A model, images of which no two are alike, and the other files that options name."""
    save_tiny(root / "mine", CROP)
    folders = {"noise": 3}
    for name, counts in IMAGES.items():
        folders |= {f"{name}/0_real": counts[0], f"{name}/1_fake": counts[1]}
    (root / "all").mkdir()
    pictures = iter(sorted(save_noise(root / "all", sum(folders.values()), (32, 40)).iterdir()))
    captions = {}
    for name, count in folders.items():
        (root / name).mkdir(parents=True)
        for picture in itertools.islice(pictures, count):
            captions[f"{name}/{picture.name}"] = "sea" if "fake" in name else "sky"
            picture.rename(root / name / picture.name)
    for name, text in {
        "words.json": json.dumps(captions),
        "run.yaml": "seed: 77",
        "audit.json": json.dumps({"model": {**vars(FILE_MODEL), "of": NUISANCES}}),
    }.items():
        (root / name).write_text(text)
    return root


class Watched:
    """Calls commands in the current folder, with stand-ins for what they call in turn.

    Args:
        files: a folder from `write_files`.
        monkeypatch: takes the stand-ins away again.

    Attributes:
        seen: of the last command, arguments as "function.parameter", and what its stand-ins noted besides.
    """

    def __init__(self, files: Path, monkeypatch: pytest.MonkeyPatch):
        self.seen: dict[str, Any] = {}
        self._monkeypatch = monkeypatch
        self._stop = sys.maxsize
        shutil.copytree(files, ".", dirs_exist_ok=True)
        self._detector = Detector.load("mine", "cpu")
        self._config = Config.load("mine/best/config.json")
        monkeypatch.setattr(
            uvicorn.Server, "run", lambda server, **_: self.seen.update(app=server.config.app)
        )
        for home, name, answer in [
            ("dgsnet.detection.detector", "Detector.load", self._load),
            ("dgsnet.detection.provenance", "ProvenanceReader", lambda _, **__: Reader()),
            ("dgsnet.detection.ray_engine", "on_ray", self._on_ray),
            ("dgsnet.data.captioning", "Captioner", lambda _, **__: Captioner(self.seen)),
            ("dgsnet.training.train", "train", lambda _, **__: None),
            ("dgsnet.training.trainer", "fit", lambda _, **__: None),
            ("dgsnet.training.update", "report", lambda _, **__: None),
            ("dgsnet.training.pins", "settle", lambda _, **__: None),
            ("dgsnet.model.checkpoint", "load_model", lambda _, **__: (self._detector.model, self._config)),
            ("dgsnet.evaluation.evaluate", "evaluate", _evaluate_plainly),
            ("dgsnet.evaluation.report", "write_tables", lambda real, **given: real(**given)),
            ("dgsnet.exchange.convert", "convert", lambda _, **__: Official({}, {}, {}, 0, 1, False, "0")),
            ("dgsnet.exchange.export", "export", lambda _, **__: Path("card")),
            ("dgsnet.twins.makers", "load_makers", lambda real, words, **_: real(words)),
            ("dgsnet.twins.command", "PairWriter", lambda real, **given: real(**given)),
            ("dgsnet.builtin", "write_dataset", _end),
            ("socket", "create_server", lambda real, **_: real(("127.0.0.1", 0))),
        ]:
            self._replace(home, name, answer)
        # What is imported while the loader is another's would keep it.
        importlib.import_module("dgsnet.builtin.pretrain")
        monkeypatch.setattr(torch.utils.data, "DataLoader", self._loader())

    def call(self, words: list[str], interrupt_after: int = sys.maxsize) -> int:
        """Call one command, interrupted after so many images or batches; returns its exit code."""
        self.seen.clear()
        self._stop = interrupt_after
        # A shell that runs the tests in the background has them ignore interrupts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            main(words)
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            signal.signal(signal.SIGINT, before)
        return 0

    def _replace(self, home: str, name: str, answer: Callable[..., Any]) -> None:
        """Note what a module's function or method is called with; `answer` gets it, and that by name."""
        owner: Any = importlib.import_module(home)
        *outer, last = name.split(".")
        for part in outer:
            owner = getattr(owner, part)
        real = getattr(owner, last)
        signature = inspect.signature(real)

        # Some functions are commands themselves, whose options are their parameters.
        @functools.wraps(real)
        def stand_in(*words: Any, **named: Any) -> Any:
            given = signature.bind(*words, **named)
            given.apply_defaults()
            self.seen |= {f"{last}.{key}": value for key, value in given.arguments.items()}
            return answer(real, **given.arguments)

        if outer:
            self._monkeypatch.setattr(owner, last, staticmethod(stand_in))
            return
        # Wherever it has been imported to.
        for module in [owner, *(m for key, m in sys.modules.items() if key.startswith("dgsnet"))]:
            if getattr(module, last, None) is real:
                self._monkeypatch.setattr(module, last, stand_in)

    def _load(self, _: Any, views: Any, batch: Any, precision: Any, crops: Any, **__: Any) -> Detector:
        model, config = self._detector.model, self._detector.config
        detector = Detector(model, config, None, views, batch=batch, precision=precision, crops=crops)
        detector.again = lambda **changed: detector
        return detector

    def _on_ray(self, _: Any, load: Any, prepare: Any, items: Any, **__: Any) -> Iterator[Any]:
        score = load()
        for count, item in enumerate(items, 1):
            yield item, *score([prepare[item]])
            self.seen["on Ray"] = count

    def _loader(self) -> type:
        watched = self

        class Loader(torch.utils.data.DataLoader):
            """Works without processes, and interrupts the command when it has loaded enough."""

            def __init__(self, data: Any, *, num_workers: int, **others: Any):
                watched.seen.setdefault("workers", set()).add(num_workers)
                of_processes = "prefetch_factor", "worker_init_fn"
                super().__init__(data, **{k: v for k, v in others.items() if k not in of_processes})

            def __iter__(self) -> Iterator[Any]:
                for count, loaded in enumerate(super().__iter__()):
                    if count == watched._stop:
                        signal.raise_signal(signal.SIGINT)
                    watched.seen["loaded"] = count + 1
                    yield loaded

        return Loader


class Reader(contextlib.AbstractContextManager):
    """Finds no Content Credentials in any file."""

    anchors = ""

    def __call__(self, _: Any) -> Provenance:
        return Provenance("absent")

    def __exit__(self, *_: object) -> None:
        pass


class Captioner:
    """Captions an image with its mean colour, and notes the largest batch."""

    model = torch.nn.Linear(2, 1)

    def __init__(self, seen: dict[str, Any]):
        self.seen = seen

    def prepare(self, image: Any) -> torch.Tensor:
        return torch.tensor(image.mean((0, 1)))

    def __call__(self, pixels: torch.Tensor) -> list[str]:
        self.seen["batch"] = max(len(pixels), self.seen.get("batch", 0))
        return [str(pixel.tolist()) for pixel in pixels]


def _evaluate_plainly(real: Any, detector: Any, samples: Any, **given: Any) -> Any:
    return real(detector, samples, **{name: given[name] for name in ("journal", "workers", "engine")})


def _end(*_: Any, **__: Any) -> None:
    raise UserError("far enough")
