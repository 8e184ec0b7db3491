"""Small training runs for tests: their images and settings, what they leave, and how they are stopped."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dgsnet import cli
from dgsnet.config import Config, DataConfig, ModelConfig, OptimConfig, PreprocessConfig
from dgsnet.model import checkpoint
from dgsnet.training.log import METRICS_FILE
from PIL import Image
from safetensors.torch import load_file

from tests.support.fresh import FORKSERVER

CLASSES = ("0_real", "1_fake")
STATE_FILE = Path("state") / "resume.pt"
WORDS = ("a photo of noise", "some pattern", "noise")


def stripes(height: int, width: int, period: int = 2) -> np.ndarray:
    """Every other row of [height, width] bright."""
    return np.indices((height, width))[0] % period * 90


def board(height: int, width: int) -> np.ndarray:
    """A chequerboard [height, width] of single pixels."""
    return np.indices((height, width)).sum(0) % 2 * 90


def write_images(
    root: Path,
    counts: tuple[int, int],
    generated: Callable[[int, int], np.ndarray] | None = board,
    real: Callable[[int, int], np.ndarray] | None = None,
    seed: int = 0,
    kinds: tuple[str, str] = ("png", "png"),
) -> Path:
    """Fill a folder with noise of many sizes, under a pattern for each class, and captions for it.

    Files that are not the first of their class have the ending of `kinds` for the class; the first has the
    other class's, so that a format alone never tells the label.
    """
    rng = np.random.default_rng(seed)
    captions = {}
    for label, (name, count) in enumerate(zip(CLASSES, counts)):
        (root / name).mkdir(parents=True)
        pattern = (real, generated)[label]
        for i in range(count):
            height, width = rng.integers(33, 46, 2)
            pixels = rng.integers(0, 160, (height, width, 3))
            if pattern:
                pixels = pixels + pattern(height, width)[..., None]
            path = root / name / f"{i}.{kinds[label != (i == 0)]}"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            captions[f"{name}/{path.name}"] = str(rng.choice(WORDS))
    (root / "captions.json").write_text(json.dumps(captions))
    return root


def changed(config: Config, **changes: Any) -> Config:
    """The configuration with settings named as on the command line, with _ for the dot: optim_lr=1e-3."""
    for name, value in changes.items():
        section, _, key = name.partition("_")
        if hasattr(config, name):
            config = dataclasses.replace(config, **{name: value})
        else:
            part = dataclasses.replace(getattr(config, section), **{key: value})
            config = dataclasses.replace(config, **{section: part})
    return config


def settings(dataset: Path, **changes: Any) -> Config:
    """A small run of two stages on <dataset>/{train,val}; batches divide neither split."""
    config = Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2, lora_dropout=0.3),
        preprocess=PreprocessConfig(mode="crop", image_size=32),
        data=DataConfig(train=str(dataset), val=str(dataset), workers=0, cache=str(dataset / "cache")),
        optim=OptimConfig(lr=2e-3, batch_size=8, head_epochs=1, epochs=2),
        seed=5,
        log_every=3,
    )
    return changed(config, **changes)


def write_config(path: Path, config: Config) -> str:
    """A configuration file for the command line; JSON is YAML."""
    path.write_text(json.dumps(config.to_dict()))
    return str(path)


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    """Adapters and heads of a run's model."""
    return load_file(run / which / "adapters.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def learned(run: Path, config: Config) -> torch.Tensor:
    """What training added to every adapter and to the student's head, as one vector."""
    before = checkpoint.trained_state(checkpoint.build_model(config, with_text=False))
    after = weights(run)
    names = sorted(name for name in before if "lora_" in name or "image_head" in name)
    return torch.cat([(after[name] - before[name]).flatten() for name in names])


def rows(run: Path) -> list[dict[str, str]]:
    """metrics.csv."""
    with open(run / METRICS_FILE, newline="") as file:
        return list(csv.DictReader(file))


def validations(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv that validation wrote."""
    return [row for row in rows(run) if row["val_ap"]]


def assert_same_training(out: Path, expected: Path, config: Config) -> None:
    """To rounding: what two runs have learned and logged."""
    changes = [learned(run, config) for run in (out, expected)]
    assert (changes[0] - changes[1]).norm() < 1e-3 * changes[1].norm()
    for found, known in zip(rows(out), rows(expected), strict=True):
        for name in found:
            assert float(found[name] or 0) == pytest.approx(float(known[name] or 0), rel=2e-3, abs=1e-6), name


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line, but for warnings and progress, that a wrong command line ends with."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    (line,) = [x for x in err.splitlines() if x.startswith("dgsnet: ") and "warning: " not in x]
    return line


@contextlib.contextmanager
def interrupted_after(states: int) -> Iterator[None]:
    """Within it a run ends, as by Ctrl-C, when it has written so many states to resume from."""
    left, replace = [states], os.replace

    def guard(source: Any, target: Any) -> None:
        replace(source, target)
        left[0] -= os.path.basename(target) == STATE_FILE.name
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", guard)
        yield


def _until(arguments: list[str], fatal_call: int, started: Any) -> None:
    """Run a command line in this process; SIGKILL at the n-th change to the file system, 0: at none."""
    torch.set_num_threads(1)
    left = [fatal_call]

    def guard(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "truncate", "rmdir"):
        setattr(os, name, guard(getattr(os, name)))
    started.set()
    cli.main(arguments)


def launch(arguments: list[str], fatal_call: int = 0, seconds: float | None = None) -> int:
    """The exit code of a command line in a process of its own, killed at a change of files or a time."""
    started = FORKSERVER.Event()
    child = FORKSERVER.Process(target=_until, args=(arguments, fatal_call, started))
    child.start()
    if seconds is not None:
        started.wait()
        time.sleep(seconds)
        child.kill()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


# A process that was to end after some checkpoints exits with this code.
STOPPED = 7


def _rank(rank: int, world: int, port: int, arguments: list[str], states: int) -> None:
    """One process of a group on gloo, as torchrun starts it; ends after so many states, if any."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost"}
    place |= {"MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    if torch.cuda.is_available():
        place["ACCELERATE_USE_CPU"] = "true"
    os.environ.update({name: str(value) for name, value in place.items()})
    left, replace = [states], os.replace

    def guard(source: Any, target: Any) -> None:
        replace(source, target)
        left[0] -= os.path.basename(target) == STATE_FILE.name
        if not left[0] and states:
            os._exit(STOPPED)

    os.replace = guard  # type: ignore[assignment]
    cli.main(arguments)


def train_on(
    world: int, out: Path, config: Config | None = None, states: int = 0, parallel: str = "ddp"
) -> int:
    """Train in `out` on so many processes, or go on there; returns the first one's exit code.

    With `states` the processes end after so many states to resume from.
    """
    arguments = ["train", "--out", str(out), "--resume", "--optim.parallel", parallel]
    if config:
        arguments += ["--config", write_config(out.with_suffix(".yaml"), config)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [
        FORKSERVER.Process(target=_rank, args=(rank, world, port, arguments, states)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    ranks[0].join()
    for process in ranks[1:]:
        if states:
            # The first process has left the others alone.
            process.kill()
        process.join()
    if not states:
        assert all(process.exitcode == 0 for process in ranks)
    assert ranks[0].exitcode is not None
    return ranks[0].exitcode
