"""`ReferenceSubspace` against its rank: time and memory of a step and of a reference.

An MLP of 2.1 M parameters on random numbers, SGD, batches of 128. Steps run in turns: the plain one; with
`harmful()`, whose reference is captured anew for each step; and with a basis that is full. A reference, its
backward included, is measured while the basis fills and when it is full, where it turns. Peaks are above
what there was before, in gradients; the basis itself is stated apart.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.multi_task import peak
from dgs_kernels import OptimizerSurgery, ReferenceSubspace

WIDTH, BATCH = 1024, 128
RANKS = (1, 4, 16, 32)
# References beyond a full basis.
REFERENCES = 4


class Training:
    """A model with its optimiser and the surgery of its rank, 0 for `harmful()`; None for the plain step."""

    def __init__(self, rank: int | None, device: str) -> None:
        torch.manual_seed(0)
        hidden = [layer for _ in range(2) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
        self.model = nn.Sequential(*hidden, nn.Linear(WIDTH, 10)).to(device)
        self.size = sum(p.nbytes for p in self.model.parameters())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.device, self.rank = device, rank
        self.surgery = self.subspace = None
        if rank:
            self.subspace = ReferenceSubspace(rank, self.optimizer, "model")
        elif rank == 0:
            self.surgery = OptimizerSurgery(self.optimizer, granularity="model")

    def loss(self) -> Tensor:
        x = torch.randn(BATCH, WIDTH, device=self.device)
        return F.cross_entropy(self.model(x), torch.randint(10, (BATCH,), device=self.device))

    def step(self) -> None:
        if self.surgery:
            with self.surgery.harmful():
                self.loss().backward()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def refer(self) -> None:
        assert self.subspace
        with self.subspace.reference():
            self.loss().backward()

    def seconds(self, run: Callable[[], None]) -> float:
        """Of the processor on a CPU, of the clock elsewhere."""
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        begin = clock()
        run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return clock() - begin

    def fill(self) -> dict[str, float]:
        """A reference in milliseconds as the basis fills and when it is full; its memory, how bent it is."""
        if not self.subspace or not self.rank:
            return {}
        filling, full = ([self.seconds(self.refer) for _ in range(n)] for n in (self.rank, REFERENCES))
        basis = self.subspace.state_dict()["basis"].values()
        rows = torch.cat([of.flatten(1).double() for of in basis], 1)
        bent = (rows @ rows.T).fill_diagonal_(0).abs().max()
        return {
            "reference_ms": statistics.median(filling) * 1e3,
            "reference_when_full_ms": statistics.median(full) * 1e3,
            "basis": sum(of.nbytes for of in basis) / self.size,
            "largest_inner_product": float(bent),
        }


def results(arguments: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(arguments.threads[0])
    names = {"plain": None, "harmful()": 0} | {f"rank {rank}": rank for rank in RANKS}
    trainings = {name: Training(rank, arguments.device) for name, rank in names.items()}
    of_references = {name: training.fill() for name, training in trainings.items()}
    times: dict[str, list[float]] = {name: [] for name in trainings}
    started = time.perf_counter()
    for turn in itertools.count():
        if turn >= 12 and time.perf_counter() - started > arguments.seconds:
            break
        for name, training in trainings.items():
            times[name].append(training.seconds(training.step))
    # M_MMAP_THRESHOLD: every tensor is memory of its own, which the system has back when it is freed.
    ctypes.CDLL(None).mallopt(-3, 2**14)
    found = []
    for name, training in trainings.items():
        training.step()
        ctypes.CDLL(None).malloc_trim(0)
        row = {
            "benchmark": "reference_subspace",
            "variant": name,
            "parameters": training.size // 4,
            "device": arguments.device,
            "threads": arguments.threads[0],
            "steps": turn,
            "step_ms": statistics.median(times[name][2:]) * 1e3,
            "step_peak": peak(arguments.device, training.step) / training.size,
            **of_references[name],
        }
        if training.subspace:
            row["reference_peak"] = peak(arguments.device, training.refer) / training.size
        found.append(row)
        figures = (f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float))
        print(f"{name:10}", *figures, sep="  ")
    return found
