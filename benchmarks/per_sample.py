"""Every sample's loss as an objective: `ObjectiveSurgery.per_sample` beside TorchJD's autogram engine.

Steps on 64 samples of a small transformer, and of the built-in CLIP's image tower with low-rank adapters on
its attention, in turns from the same weights: processor time, peak memory above what there was before, and
how far the gradients are apart in float64. No step goes below the plain one on the mean of the losses; the
weighting, which is timed alone too, is in the steps of both libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import importlib.util
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from dgsnet.config import ModelConfig
from dgsnet.model.dgsnet import DGSNet
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.multi_task import peak
from dgs_kernels import ObjectiveSurgery

# The peer, where it is installed.
with contextlib.suppress(ImportError):
    from torchjd.aggregation import UPGradWeighting
    from torchjd.autogram import Engine

SAMPLES, CLASSES = 64, 10
TOKENS, WIDTH, BLOCKS = 32, 128, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.inner(self.before(x)).chunk(3, -1))
        x = x + self.outer(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(48, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.first(x)).mean(1))


class Tower(nn.Module):
    """The built-in CLIP's image tower with peft's own adapters, whose layers are called as layers."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = DGSNet(ModelConfig(name="dgsnet-tiny", pretrained="builtin", lora_rank=0))
        self.clip.requires_grad_(False)
        targets = ["q_proj", "k_proj", "v_proj"]
        inject_adapter_in_model(LoraConfig(r=6, target_modules=targets, init_lora_weights=False), self.clip)
        self.head = nn.Linear(96, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.clip.student_features(x))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transformer": (Transformer, (TOKENS, 48)),
    "CLIP's adapters": (Tower, (3, 32, 32)),
}


def steps(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], nn.Module]]:
    """What leaves a gradient in `.grad` of a copy of the model, which it returns."""
    ours, theirs, plain = (copy.deepcopy(model) for _ in range(3))
    trained = [p for p in ours.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    surgery = ObjectiveSurgery(optimizer, UPGradWeighting(), model=ours)
    weighting = UPGradWeighting()
    engine = engine_of(theirs)
    of = partial(F.cross_entropy, target=y, reduction="none")

    def by_ours() -> nn.Module:
        optimizer.zero_grad()
        with surgery.record():
            losses = of(ours(x))
        surgery.per_sample(losses)
        return ours

    def by_theirs() -> nn.Module:
        theirs.zero_grad()
        losses = of(theirs(x))
        losses.backward(weighting(engine.compute_gramian(losses)))
        return theirs

    def by_mean() -> nn.Module:
        plain.zero_grad()
        of(plain(x)).mean().backward()
        return plain

    return {"dgs_kernels": by_ours, "TorchJD": by_theirs, "mean of the losses": by_mean}


def engine_of(model: nn.Module) -> Engine:
    owners = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    return Engine(*owners, batch_dim=0)


def apart(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Largest relative difference of the two libraries' gradients of a parameter."""
    found = steps(model, x, y)
    pairs = zip(*(found[name]().parameters() for name in ("dgs_kernels", "TorchJD")))
    return max(
        float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs if a.grad is not None is not b.grad
    )


def case(name: str, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (SAMPLES,))
    return make().to(device), torch.randn(SAMPLES, *shape).to(device), labels.to(device)


def speed(name: str, arguments: argparse.Namespace) -> dict:
    """Medians of a step's time: of the processor's on a CPU."""
    model, x, y = case(name, arguments.device)
    other = copy.deepcopy(model)
    products = engine_of(other).compute_gramian(F.cross_entropy(other(x), y, reduction="none"))
    running: dict[str, Callable[[], object]] = dict(steps(model, x, y))
    running["of it the weighting"] = partial(UPGradWeighting(), products)
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {key: [] for key in running}
    started = time.perf_counter()
    for turn in itertools.count():
        if turn >= 12 and time.perf_counter() - started > arguments.seconds:
            break
        for key, step in running.items():
            begin = clock()
            step()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            seconds[key].append(clock() - begin)
    model, x, y = case(name, arguments.device)
    return {
        "benchmark": "per_sample",
        "model": name,
        "samples": SAMPLES,
        "device": arguments.device,
        "threads": arguments.threads[0],
        "steps": turn,
        "median_ms": {key: statistics.median(times[2:]) * 1e3 for key, times in seconds.items()},
        "relative_difference": apart(model.double(), x.double(), y),
    }


def memory(name: str, arguments: argparse.Namespace) -> dict:
    """Peaks of a step, the second one, above what there was before; for a process whose heap has no holes."""
    torch.set_num_threads(arguments.threads[0])
    # M_MMAP_THRESHOLD: every tensor is memory of its own, which the system has back when it is freed.
    ctypes.CDLL(None).mallopt(-3, 2**14)
    peaks = {}
    for key, step in steps(*case(name, arguments.device)).items():
        step()
        ctypes.CDLL(None).malloc_trim(0)
        peaks[key] = peak(arguments.device, step) / 2**20
    return {"benchmark": "per_sample_memory", "model": name, "samples": SAMPLES, "peak_mib": peaks}


def results(arguments: argparse.Namespace) -> list[dict]:
    if not importlib.util.find_spec("torchjd"):
        print("\nper_sample: not measured, TorchJD is not installed")
        return []
    torch.set_num_threads(arguments.threads[0])
    found = []
    for name in MODELS:
        found.append(speed(name, arguments))
        print(f"\n{name}, {SAMPLES} samples, medians of {found[-1]['steps']} steps")
        for key, milliseconds in found[-1]["median_ms"].items():
            print(f"  {key:20}{milliseconds:9.1f} ms")
        print(f"  gradients in float64: {found[-1]['relative_difference']:.1e} apart")
    print("\npeak memory of a step")
    for name in MODELS:
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            found.append(fresh.apply(memory, (name, arguments)))
        peaks = "  ".join(f"{key} {value:.1f} MiB" for key, value in found[-1]["peak_mib"].items())
        print(f"  {name}: {peaks}")
    return found
