"""Training on several losses: ObjectiveSurgery beside TorchJD, on scikit-learn's digits; and its memory.

Speed: an MLP learns four tasks of the handwritten digits, with the same weighting in both libraries, step by
step in turns, from the same start. TorchJD differentiates its losses either one after the other or at once
(vmap). Memory: the peak above the parameters while K losses of a larger MLP make one step, in gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from dgs_kernels import ObjectiveSurgery

# The peer, where it is installed.
with contextlib.suppress(ImportError):
    from torchjd import aggregation
    from torchjd.autojac import backward, jac_to_grad

BATCH, WIDTH, STEPS = 128, 1024, 20
METHODS = ("UPGrad", "MGDA", "PCGrad", "AlignedMTL")
OURS = {"UPGrad": "upgrad", "MGDA": "mgda", "PCGrad": "pcgrad"}
# Numbers of objectives.
NUMBERS = (2, 4, 8, 16)
# The width of matrices whose memory malloc gives back to the system.
MEMORY_WIDTH = 3072


DIGITS = load_digits(return_X_y=True)


class Digits(nn.Module):
    """Which digit, its parity, how much ink, and the picture itself, from one trunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(WIDTH, n) for n in (10, 1, 1, 64))

    def losses(self, x: Tensor, y: Tensor) -> list[Tensor]:
        features = self.trunk(x)
        digit, parity, ink, picture = (head(features) for head in self.heads)
        odd, mean = (y % 2).to(x)[:, None], x.mean(1, keepdim=True)
        return [
            F.cross_entropy(digit, y),
            F.binary_cross_entropy_with_logits(parity, odd),
            F.mse_loss(ink, mean),
            F.mse_loss(picture, x),
        ]


class Loop:
    """A model, its optimiser, and what makes gradients of its losses."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.model = Digits().to(device, dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def step(self, x: Tensor, y: Tensor) -> list[Tensor]:
        losses = self.model.losses(x, y)
        self.gradient(losses)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [loss.detach() for loss in losses]


class Ours(Loop):
    def __init__(self, device: str, dtype: torch.dtype, weighting: str | nn.Module) -> None:
        super().__init__(device, dtype)
        self.surgery = ObjectiveSurgery(self.optimizer, weighting)

    def gradient(self, losses: list[Tensor]) -> None:
        for loss in losses:
            with self.surgery.objective():
                loss.backward(retain_graph=True)


class TorchJD(Loop):
    def __init__(self, device: str, dtype: torch.dtype, aggregator: nn.Module, chunk: int | None) -> None:
        super().__init__(device, dtype)
        self.aggregator, self.chunk = aggregator, chunk

    def gradient(self, losses: list[Tensor]) -> None:
        backward(losses, parallel_chunk_size=self.chunk)
        jac_to_grad(self.model.parameters(), self.aggregator)


def loops(method: str, device: str, dtype: torch.dtype) -> dict[str, Loop]:
    aggregator = getattr(aggregation, method)
    found: dict[str, Loop] = {
        "TorchJD, at once": TorchJD(device, dtype, aggregator(), None),
        "TorchJD, one by one": TorchJD(device, dtype, aggregator(), 1),
        "dgs_kernels, TorchJD's weighting": Ours(device, dtype, aggregator().gramian_weighting),
    }
    return found | ({"dgs_kernels": Ours(device, dtype, OURS[method])} if method in OURS else {})


def batch(step: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pixels, labels = DIGITS
    rows = torch.randint(len(labels), (BATCH,), generator=torch.Generator().manual_seed(step))
    # TorchJD's PCGrad draws random orders.
    torch.manual_seed(step)
    return torch.tensor(pixels[rows], device=device).to(dtype) / 16, torch.tensor(labels[rows], device=device)


def same_losses(method: str, device: str) -> float:
    """How far the losses with TorchJD's weighting part from TorchJD's own, after some steps in float64."""
    found = loops(method, device, torch.float64)
    theirs, ours = found["TorchJD, at once"], found["dgs_kernels, TorchJD's weighting"]
    for step in range(STEPS):
        last = [torch.stack(loop.step(*batch(step, device, torch.float64))) for loop in (theirs, ours)]
    return ((last[1] - last[0]) / last[0]).abs().max().item()


def speed(method: str, arguments: argparse.Namespace) -> dict:
    """Medians of a step's time: of the processor's on a CPU."""
    running = loops(method, arguments.device, torch.float32)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    started = time.perf_counter()
    for step in itertools.count():
        if step >= STEPS and time.perf_counter() - started > arguments.seconds:
            break
        for name, loop in running.items():
            x, y = batch(step, arguments.device, torch.float32)
            begin = clock()
            loop.step(x, y)
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - begin)
    return {
        "benchmark": "multi_task",
        "method": method,
        "device": arguments.device,
        "threads": arguments.threads[0],
        "steps": step,
        "median_ms": {name: statistics.median(times[5:]) * 1e3 for name, times in seconds.items()},
        "losses_relative_difference": same_losses(method, arguments.device),
    }


def peak(device: str, run: Callable[[], None]) -> int:
    """Bytes that `run` needed at its peak above what there was before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # The peak becomes what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


def memory(count: int, arguments: argparse.Namespace) -> dict:
    """Peaks of the gradient work of one step with `count` losses, as multiples of one gradient."""
    torch.manual_seed(0)
    layers = [nn.Linear(MEMORY_WIDTH, MEMORY_WIDTH, bias=False) for _ in range(3)]
    model = nn.Sequential(*layers).to(arguments.device)
    x = torch.randn(4, MEMORY_WIDTH, device=arguments.device)
    size = sum(p.nbytes for p in model.parameters())

    def ours(mode: str) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        surgery = ObjectiveSurgery(optimizer, "pcgrad", mode=mode)
        y = model(x)
        for k in range(count):
            with surgery.objective():
                y[:, k].square().mean().backward(retain_graph=True)
        optimizer.step()
        surgery.remove()

    def theirs() -> None:
        y = model(x)
        backward([y[:, k].square().mean() for k in range(count)], parallel_chunk_size=1)
        jac_to_grad(model.parameters(), aggregation.PCGrad())

    gradients = {}
    runs = {"exact": lambda: ours("exact"), "running": lambda: ours("running"), "TorchJD, one by one": theirs}
    for name, run in runs.items():
        # The first has the libraries' own buffers in it.
        for _ in range(2):
            model.zero_grad()
            gradients[name] = peak(arguments.device, run) / size
    return {"benchmark": "multi_task_memory", "objectives": count, "gradients": gradients}


def results(arguments: argparse.Namespace) -> list[dict]:
    if not importlib.util.find_spec("torchjd"):
        print("\nmulti_task: not measured, TorchJD is not installed")
        return []
    torch.set_num_threads(arguments.threads[0])
    found = []
    for method in METHODS:
        found.append(speed(method, arguments))
        times = found[-1]["median_ms"]
        print(f"\n{method}, four tasks of the digits, medians of {found[-1]['steps']} steps")
        for name, time_of in times.items():
            print(f"  {name:34}{time_of:9.2f} ms{times['TorchJD, at once'] / time_of:7.2f}x")
        difference = found[-1]["losses_relative_difference"]
        print(f"  losses with TorchJD's weighting, {STEPS} steps in float64: {difference:.1e} apart")
    print("\npeak memory of a step, in gradients")
    for count in NUMBERS:
        found.append(memory(count, arguments))
        peaks = "  ".join(f"{name} {value:5.1f}" for name, value in found[-1]["gradients"].items())
        print(f"  {count:2} objectives: {peaks}")
    return found
