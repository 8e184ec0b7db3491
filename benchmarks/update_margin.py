"""What a margin does for GEM: tasks that arrive one after the other, learning rate and margin chosen jointly.

Split: an MLP learns scikit-learn's digits two at a time, with one output for all ten. Permuted: all digits,
with the pixels in another order in every task. AdamW; of each earlier task MEMORY images are kept, and beside
each step their losses are captured: GEM has one constraint per task, replay takes the mean of all losses.
Accuracy on test images of all tasks, after the last. Decoders: `dgsnet update` as in benchmarks/update.py,
AUC after the last of two arrivals, over all decoders known by then.

For each method the learning rate, and for GEM the margin with it, is the pair that is best on seeds that are
not reported (decoders: on validation photographs, after one arrival). Digits that the result file holds are
not learned again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import update
from dgs_kernels import ObjectiveSurgery

NAME, CHOICE = "update_margin", "update_margin_choice"
SEEDS, CHOICE_SEEDS = range(8), (100, 101, 102)
METHODS = ("none", "GEM", "GEM with margin", "replay")
RATES, MARGINS = (1e-3, 3e-3, 1e-2), (0.1, 0.3, 0.6)
TASKS, STEPS, BATCH, MEMORY, HELD_OUT = 5, 60, 32, 20, 500
DECODER_SEEDS, DECODER_CHOICE_SEEDS = range(8), (100, 101)
DECODER_RATES, DECODER_MARGINS, DECODER_ARRIVALS = (2e-3, 4e-3), (0.2, 0.6), ("codebook", "resizeconv")
DECODER_RULES = {"GEM": "gem", "GEM with margin": "gem", "replay": "replay"}


def tasks(kind: str, seed: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each task images and labels to learn, and to test on."""
    pixels, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draw)
    x, y = pixels[order].float() / 16, labels[order]
    digits = torch.randperm(10, generator=draw)
    found = []
    for task in range(TASKS):
        if kind == "split digits":
            columns, mine = torch.arange(64), torch.isin(y, digits[2 * task : 2 * task + 2])
        else:
            columns, mine = torch.randperm(64, generator=draw), torch.ones_like(y, dtype=torch.bool)
        learn, test = mine.clone(), mine.clone()
        learn[:HELD_OUT], test[HELD_OUT:] = False, False
        found.append((x[learn][:, columns], y[learn], x[test][:, columns], y[test]))
    return found


def digits(kind: str, method: str, seed: int, rate: float, margin: float) -> float:
    """Mean accuracy over the tasks, after the last."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    surgery = ObjectiveSurgery(optimizer, "mean" if method == "replay" else "gem", margin=margin)
    draw, memory = torch.Generator().manual_seed(seed), []
    all_tasks = tasks(kind, seed)
    for x, y, _, _ in all_tasks:
        for _ in range(STEPS):
            rows = torch.randint(len(y), (BATCH,), generator=draw)
            batches = [(x[rows], y[rows]), *(memory if method != "none" else ())]
            for images, labels in batches:
                with surgery.objective():
                    F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        memory.append((x[:MEMORY], y[:MEMORY]))
    with torch.no_grad():
        return mean(float((model(x).argmax(1) == y).float().mean()) for _, _, x, y in all_tasks)


def choices(method: str, rates: tuple, margins: tuple) -> list[tuple[float, float]]:
    return [*itertools.product(rates, margins if method == "GEM with margin" else (0.0,))]


def of_digits() -> Iterator[dict]:
    for kind, method in itertools.product(("split digits", "permuted digits"), METHODS):
        tried = {}
        for rate, margin in choices(method, RATES, MARGINS):
            values = [digits(kind, method, seed, rate, margin) for seed in CHOICE_SEEDS]
            tried[rate, margin] = mean(values)
            yield row(CHOICE, kind, method, rate, margin) | {"values": values}
        best = max(tried, key=lambda pair: tried[pair])
        for seed in SEEDS:
            yield row(NAME, kind, method, *best) | {"seed": seed, "value": digits(kind, method, seed, *best)}


def decoders(folder: Path, method: str, seed: int, rate: float, margin: float, choose: bool) -> float:
    chosen = update.START | {"lr": rate, "margin": margin}
    split, arrivals = ("val", DECODER_ARRIVALS[:1]) if choose else ("test", DECODER_ARRIVALS)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        *_, last = update.chain(folder, seed, DECODER_RULES[method], chosen, split, arrivals)
    known = (*update.BASE, *arrivals)
    return mean(last["auc"][family] for family in known)


def of_decoders() -> Iterator[dict]:
    best = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for method in DECODER_RULES:
            tried = {}
            for rate, margin in choices(method, DECODER_RATES, DECODER_MARGINS):
                values = [decoders(folder, method, seed, rate, margin, True) for seed in DECODER_CHOICE_SEEDS]
                tried[rate, margin] = mean(values)
                yield row(CHOICE, "decoders", method, rate, margin) | {"values": values}
            best[method] = max(tried, key=lambda pair: tried[pair])
        for seed, method in itertools.product(DECODER_SEEDS, DECODER_RULES):
            value = decoders(folder, method, seed, *best[method], False)
            yield row(NAME, "decoders", method, *best[method]) | {"seed": seed, "value": value}


def row(benchmark: str, data: str, method: str, rate: float, margin: float) -> dict:
    case = {"benchmark": benchmark, "device": "cpu", "data": data, "method": method}
    return case | {"lr": rate, "margin": margin}


def results(arguments: argparse.Namespace) -> Iterator[dict]:
    torch.set_num_threads(1)
    kept = json.loads(arguments.out.read_text())["results"] if arguments.out.is_file() else []
    kept = [one for one in kept if one["data"] != "decoders"]
    found: list[dict] = []
    for one in itertools.chain(kept or of_digits(), of_decoders()):
        found.append(one)
        print({name: value for name, value in one.items() if name != "device"}, flush=True)
        yield one
    print(table(found))


def table(rows: list[dict]) -> str:
    """Markdown, in percent, means over seeds with standard errors, and paired differences to GEM."""
    lines = [
        ["tasks", "method", "learning rate", "margin", "after the last", "difference to GEM"],
        ["---"] * 6,
    ]
    reported = [r for r in rows if r["benchmark"] == NAME]
    for data, method in dict.fromkeys((r["data"], r["method"]) for r in reported):
        mine = [r for r in reported if (r["data"], r["method"]) == (data, method)]
        base = {r["seed"]: r["value"] for r in reported if (r["data"], r["method"]) == (data, "GEM")}
        values = np.array([[r["value"], r["value"] - base[r["seed"]]] for r in mine])
        cells = update.cells(values[:, :1], "") + update.cells(values[:, 1:], "+")
        chosen = f"{mine[0]['lr']:g}", f"{mine[0]['margin']:g}" if "GEM" in method else "-"
        lines.append([data, method, *chosen, cells[0], "-" if method == "GEM" else cells[1]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
