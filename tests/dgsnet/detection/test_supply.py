"""Images are prepared while the model works, and who waits for whom is told."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from dgsnet.cli import main
from dgsnet.config import Config
from dgsnet.data.items import Item
from dgsnet.detection.detector import Detector
from dgsnet.detection.supply import in_order
from dgsnet.errors import UserError
from torch import nn

from tests.support.tables import read_csv
from tests.support.tiny import CROP


class Model(nn.Module):
    """One that takes a time, or does something, for each batch."""

    image_size = 32

    def __init__(self, work) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.work = work

    def logits(self, pixels):
        self.work(self)
        return pixels.mean((1, 2, 3)) * self.weight


@dataclass(frozen=True, slots=True)
class Noted(Item):
    """An image that takes some seconds to read, and leaves a file at its path."""

    seconds: float = 0.0

    def read(self):
        time.sleep(self.seconds)
        Path(self.path).touch()
        return np.full((40, 50, 3), len(self.path), np.uint8)


def detector(work, batch):
    return Detector(Model(work), Config(preprocess=CROP), batch=batch)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_next_batch_is_made_while_the_model_works(tmp_path, workers):
    batch, count = 12, 36
    items = [Noted(f"{tmp_path}/{i:02}") for i in range(count)]
    taken = 0

    def images():
        nonlocal taken
        for item in items:
            taken += 1
            yield item

    batches = 0

    def work(_):
        nonlocal batches
        batches += 1
        wanted = [item.path for item in items[: (batches + 1) * batch]]
        end = time.monotonic() + 20
        while not all(map(os.path.exists, wanted)):
            assert time.monotonic() < end, "nothing is read while the model works"
            time.sleep(0.005)
        # Little more is taken than the next batch.
        assert taken <= (batches + 1) * batch + 8 * (workers + 1)

    found = list(detector(work, batch).stream(images(), workers=workers))
    assert len(found) == count and batches == 3 and not any(error for _, error in found)


@pytest.mark.parametrize("workers", [0, 1])
def test_both_rates_are_told_where_the_model_waits(tmp_path, workers):
    slow = detector(lambda _: time.sleep(0.02), batch=2)
    # What comes before the first batch, while processes start, tells nothing of the others.
    items = [Noted(f"{tmp_path}/{i}", seconds=0.05 if i else 0.8) for i in range(12)]
    for _ in slow.stream(items, workers=workers):
        pass
    found = re.fullmatch(r"waits for images: (\S+)/s come, (\S+)/s could be scored", slow.waiting())
    come, could = map(float, found.groups())
    # Sleeps may be long on a busy machine, but never short; four of 12 may be read before it begins.
    assert 1 < come <= 12 / (8 * 0.05) and come < could <= 101 and could > 15
    quick = detector(lambda _: time.sleep(0.1), batch=2)
    assert quick.waiting() == ""
    for _ in quick.stream([Noted(f"{tmp_path}/{i}") for i in range(12)], workers=workers):
        pass
    assert quick.waiting() == ""


@pytest.fixture
def slow(monkeypatch):
    """Files take 20 ms to read."""
    read_bytes = Item.read_bytes

    def slowly(item):
        time.sleep(0.02)
        return read_bytes(item)

    monkeypatch.setattr(Item, "read_bytes", slowly)


def test_the_last_line_of_predict_tells_it(run, images, slow, tmp_path, capsys):
    main(["predict", *sorted(map(str, images.glob("1?.png"))), "--model", run, "--out", f"{tmp_path}/s.csv"])
    assert len(read_csv(tmp_path / "s.csv")) == 10
    said = capsys.readouterr().out
    assert re.search(r"; \S+ images per second \(the model waits for images: \S+/s come, \S+/s could", said)


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_the_progress_line_tells_it(run, images, slow, tmp_path, monkeypatch, capsys, command):
    # Progress is shown only on a terminal.
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    files = sorted(map(str, images.glob("[12]?.png")))
    rows = [f"{file},{i % 2}" for i, file in enumerate(files)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    words = {
        "evaluate": ["--data", f"{tmp_path}/list.csv", "--out", f"{tmp_path}/out"],
        "calibrate": ["--reals", *files, "--fpr", "0.2"],
    }
    model = shutil.copytree(run, tmp_path / "model")
    main([command, *words[command], "--model", str(model), "--workers", "0", "--batch", "2"])
    lines = re.findall(
        r"20/20 .*waits for images: (\S+)/s come, (\S+)/s could be scored", capsys.readouterr().err
    )
    come, could = map(float, lines[-1])
    assert 1 < come <= 50 and come < could


class Answers:
    """What datasets hand over: pixels in any structure, and other things beside."""

    def __getitem__(self, number):
        if number == 5:
            return None, "unreadable"
        pixels = torch.full((1 + number % 2, 3, 4, 5), number, dtype=torch.uint8)
        return {"views": (pixels, pixels[:, :, ::2].permute(0, 2, 3, 1)), "": torch.ones(2) * number}, ""


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_answers_come_whole_and_in_order(workers, batch):
    found = list(in_order(Answers(), iter(range(23)), workers, batch=batch))
    assert len(found) == 23 and found[5] == (None, "unreadable")
    for number, (answer, error) in enumerate(found):
        if number != 5:
            want = Answers()[number][0]
            assert error == "" and answer.keys() == want.keys()
            for mine, its in zip((*answer["views"], answer[""]), (*want["views"], want[""]), strict=True):
                assert mine.dtype == its.dtype and torch.equal(mine, its)


def test_what_a_dataset_raises_reaches_the_caller_and_nothing_more_is_read():
    seen = []

    class Raising:
        def __getitem__(self, number):
            time.sleep(0.01)
            seen.append(number)
            if number == 2:
                raise UserError("number 2")
            return number

    found = in_order(Raising(), range(100), 0, batch=40)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(UserError, match="number 2"):
        next(found)
    assert len(seen) < 20
    found = in_order(Raising(), range(3, 100), 0, batch=40)
    assert next(found) == 3
    found.close()
    assert len(seen) < 40
