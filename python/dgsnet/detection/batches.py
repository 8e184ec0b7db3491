"""Scoring in batches of one shape, at one precision, with the adapters merged.

Sums in floating point depend on the shape of a batch, and on nothing else of it: in batches of one shape an
image's logit is the same to the bit, whatever stands beside it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor, nn

from dgsnet.model.dgsnet import DGSNet
from dgsnet.model.onnx_network import OnnxNetwork

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = (1, 2, 4, 8, 16, 32, 64)
# The smallest size is taken whose rate is at least this share of the best.
ENOUGH = 0.9
# A size of which one batch takes longer, in seconds, is the last that is tried.
PATIENCE = 4.0
# On a processor two batches are under way: one has the cores while the other waits for a thread whose core
# went to a process that reads images. With two threads that is up to a fifth more images, and nothing where
# the machine is otherwise quiet; with many, whose every operation wakes them all, nobody has measured it.
MOST_THREADS = 4


def ready(model: nn.Module, precision: str) -> nn.Module:
    """A `DGSNet` as a copy with its adapters merged, at a precision; another module as it is."""
    return model.merged(DTYPES[precision]) if isinstance(model, DGSNet) else model


def device_of(model: nn.Module) -> torch.device:
    """Where a module's weights are; the CPU where it has none of torch's."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def fp32_only(model: nn.Module) -> bool:
    """Whether a model computes in no other precision."""
    return isinstance(model, OnnxNetwork)


class Batches:
    """Logits of prepared images, in batches of one shape. Threads that ask at the same time take turns.

    Args:
        model: the network, as `ready` gives it.
        size: images in a batch. Less is filled up, and costs as much.

    Attributes:
        size: as given, or 1 where images change each other's bits on this device.
        device: the model's.
        behind: batches that are best under way while the logits of those before them are taken.
        pool: what works at so many of them at a time, None where the device or the caller's thread does.
    """

    def __init__(self, model: Any, size: int) -> None:
        self.model, self.size = model, size
        self.device = device_of(model)
        self._run: Callable[[Tensor], Tensor] = model.logits
        # ONNX Runtime says nothing of the bits in a batch, and some files hold one image at a time.
        if size > 1 and (isinstance(model, OnnxNetwork) or not self._independent()):
            self.size = 1
        if self.device.type == "cuda":
            self._run = _captured(model.logits, self._random())
        few = self.device.type == "cpu" and 1 < torch.get_num_threads() <= MOST_THREADS
        self.pool: Executor | None = ThreadPoolExecutor(2, "batches") if few else None
        self.behind = 2 if few else int(self.device.type == "cuda")
        # A captured graph reads and writes in one place.
        self._turn = threading.BoundedSemaphore(2 if few else 1)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits, float32 [N] on the model's device, of normalised images [N, 3, S, S] on any device."""
        logits = [torch.empty(0, device=self.device)]
        for part in pixels.split(self.size) if len(pixels) else ():
            filled = torch.cat([part, part[-1:].expand(self.size - len(part), -1, -1, -1)])
            with self._turn:
                found = self._run(filled.to(self.device, non_blocking=True))
            logits.append(found[: len(part)].float())
        return torch.cat(logits)

    def _random(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (self.size, 3, self.model.image_size, self.model.image_size)
        return torch.randn(shape, generator=generator).to(self.device)

    @torch.inference_mode()
    def _independent(self) -> bool:
        """Whether an image has the same bits in every place of a batch and among others.

        One block is like the others, and stands for them. Of a module that is no DGSNet it is taken as given.
        """
        if not isinstance(self.model, DGSNet):
            return True
        pixels = self._random()
        alike = self.model.logits(pixels[:1].expand_as(pixels).contiguous(), depth=1)
        others = self.model.logits(pixels, depth=1)
        return bool((alike == alike[0]).all() and alike[0] == others[0])


class Line:
    """Prepared images in line for batches: what does not fill one waits for those that come after it.

    Args:
        score: from uint8 pixels on the device to logits.
        batches: what scores.
    """

    def __init__(self, score: Callable[[Tensor], Tensor], batches: Batches) -> None:
        self._logits, self._size, self._device = score, batches.size, batches.device
        self._pool = batches.pool
        self._waiting: list[Tensor] = []
        # Of every batch how many images are in it, and its logits.
        self._begun: deque[tuple[int, Future[Tensor]]] = deque()
        self._done: deque[float] = deque()
        self.added = self._scored = 0

    def add(self, pixels: Tensor) -> None:
        """Take more into the line, uint8 [n, 3, S, S], and score what fills batches."""
        self._waiting.append(pixels.to(self._device, non_blocking=True))
        self.added += len(pixels)
        if self.added - self._scored >= self._size:
            self._score(self._size)

    def finish(self) -> None:
        """Score what is left."""
        if self.added > self._scored:
            self._score(1)

    def known(self, behind: int = 0) -> int:
        """How many, from the first, have logits without waiting for the last so many batches."""
        last = list(self._begun)[max(len(self._begun) - behind, 0) :]
        return self._scored - sum(count for count, _ in last)

    def idle(self) -> bool:
        """Whether no batch is under way in the pool."""
        return all(logits.done() for _, logits in self._begun)

    def close(self) -> None:
        """Leave out what is not begun, and wait for what is."""
        wait([logits for _, logits in self._begun if not logits.cancel()])

    def take(self, count: int) -> list[float]:
        """The logits of the next so many, which are no more taken after that."""
        while len(self._done) < count:
            _, logits = self._begun.popleft()
            self._done.extend(logits.result().tolist())
        return [self._done.popleft() for _ in range(count)]

    def _score(self, least: int) -> None:
        """Score batches for as long as at least so many wait."""
        pixels = torch.cat(self._waiting)
        while len(pixels) >= least:
            part = pixels[: self._size]
            self._begun.append((len(part), self._begin(part)))
            self._scored += len(part)
            pixels = pixels[self._size :]
        self._waiting = [pixels] if len(pixels) else []

    def _begin(self, pixels: Tensor) -> Future[Tensor]:
        if not self._pool:
            (done := Future[Tensor]()).set_result(self._logits(pixels))
            return done
        threads = torch.get_num_threads()

        def score() -> Tensor:
            # Each thread of Python has a number of its own, which changes the logits' bits.
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            return self._logits(pixels)

        return self._pool.submit(score)


def _captured(function: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """The function as one CUDA graph, for tensors of the example's shape; for one thread at a time."""
    with torch.inference_mode():
        given = example.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # What a first call sets up stays outside of the graph.
        with torch.cuda.stream(side):
            for _ in range(2):
                function(given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(given)

    def run(pixels: Tensor) -> Tensor:
        given.copy_(pixels)
        graph.replay()
        return result.clone()

    return run


def fast_precision(device: torch.device) -> str:
    """Name "bf16" where the device multiplies matrices in it by units of its own, else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu":
        # Older versions of torch do not tell.
        capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"
    return "fp32"


def best_size(model: nn.Module) -> tuple[int, dict[int, float]]:
    """The smallest of SIZES whose rate is within a tenth of the best on this machine, and images per second.

    The model is one that is `ready`. Larger sizes are not tried where two in a row were no faster, or where a
    batch takes seconds.
    """
    rates: dict[int, float] = {}
    for size in SIZES:
        batches = Batches(model, size)
        if batches.size < size:
            continue
        pixels = batches._random()
        # The first call allocates memory and chooses kernels.
        batches(pixels[:1])
        seconds = min(_seconds(batches, pixels) for _ in range(3))
        rates[size] = size / seconds
        best = max(rates, key=rates.__getitem__)
        if seconds > PATIENCE or SIZES.index(size) - SIZES.index(best) >= 2:
            break
    return next(size for size in rates if rates[size] >= ENOUGH * max(rates.values())), rates


def _seconds(batches: Batches, pixels: Tensor) -> float:
    """How long a batch takes, on a CPU as far as this process works at it.

    By the clock, a machine with other work too would favour small batches, which more often go undisturbed.
    """
    times = time.perf_counter(), time.thread_time(), time.process_time()
    batches(pixels).sum().item()
    wall, own, of_all = (
        now() - then for now, then in zip((time.perf_counter, time.thread_time, time.process_time), times)
    )
    # What one thread does alone, the others wait for.
    return max(own, of_all / torch.get_num_threads()) if batches.device.type == "cpu" else wall
