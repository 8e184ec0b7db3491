"""Times the variants of an operation side by side, on data that no cache holds, and says on what machine.

An operation's file has a function `case(rows, dim, dtype, device) -> Case`. The harness checks each variant
against the exact result, then runs all of them in turn, round after round, on inputs that rotate, so that
whatever else the machine does falls on all alike. The yardstick is `torch.clone` moving as many bytes. A
variant that is wrong, or raises an error, is reported as such, and the others go on. A kernel that reads
where it must not takes the device along, for the whole process: that is `Lost`.

On a GPU, times are the device's: a kernel that only waits goes first, so that all of a call is enqueued
before the device comes to it. The host's time for a call stands in a column of its own.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import dgs_kernels
from dgs_kernels import backends

# What names of our variants begin with.
OURS = "dgs_kernels"
CLONE, COPY, EAGER, COMPILED = "clone", "copy_ (nothing allocated)", "eager", "torch.compile"
MIN_ROUNDS = 9
# So many times the last cache before memory are read.
BEYOND = 3
HOST_CALLS = 9
# In seconds. Calls of the host that take longer are timed with it.
LONGEST_HEAD_START = 0.05


@dataclass(frozen=True)
class Case:
    """What to time. `variants` take the tensors that `inputs()` makes, `exact` the same in float64.

    `bytes_moved` is the floor: each input read once, each output written once. What a call writes into its
    inputs belongs to the result: `edited` says which, by place, and the call's own result is not looked at.
    They are restored before the check only: a later round edits them further.
    The error of `others` is reported, not judged: how another library rounds is its own affair, as long as a
    thousandth of the largest number is right.
    """

    operation: str
    inputs: Callable[[], tuple[Tensor, ...]]
    bytes_moved: int
    variants: dict[str, Callable[..., Tensor]]
    exact: Callable[..., Tensor]
    edited: tuple[int, ...] = ()
    others: tuple[str, ...] = ()


class Lost(RuntimeError):
    """This process has no device any more; `faults` names the variant that ran last, and what it raised."""

    def __init__(self, name: str, error: RuntimeError) -> None:
        self.faults = {name: f"failed, and the device with it: {first_line(error)}"}
        super().__init__(f"{name} {self.faults[name]}")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"


def answers(device: str) -> bool:
    """Whether the device still does: after an illegal access every call fails, whosever it is."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True


@contextlib.contextmanager
def watched(name: str, device: str) -> Iterator[None]:
    """Raises `Lost` where what runs within loses the device."""
    try:
        yield
    except RuntimeError as error:
        if answers(device):
            raise
        raise Lost(name, error) from error


def per_backend(operation: str, device: str, call: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """`call` once for each backend of ours that can serve the operation here."""

    served = [b for b in backends.BACKENDS if b != "eager" and not backends.obstacle(b, operation, device)]
    if not served:
        raise SystemExit(f"no backend but eager serves {operation} on {device}; see dgs_kernels.explain()")
    return {f"{OURS} ({backend})": through(backend, call) for backend in served}


def through(backend: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`call` with every operation served by this backend."""

    def run(*tensors: Tensor) -> Tensor:
        os.environ[backends.VARIABLE] = backend
        return call(*tensors)

    return run


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory; on a shared machine, of all of it."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kibibytes = [int(s.read_text().strip().removesuffix("K")) for s in sizes]
    return max(kibibytes, default=32 * 1024) * 1024


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def rotation(bytes_each: int, device: str) -> int:
    """How many sets of inputs: so many that BEYOND times the cache is read between two uses of one, but at
    most a fifth of the free memory."""
    wanted = 1 - (-BEYOND * cache_bytes(device) // bytes_each)
    return max(2, min(wanted, free_bytes(device) // 5 // bytes_each))


def turns(round: int, calls: int, sets: int) -> list[int]:
    """Which of the sets each call of a round takes: the next one, whatever variant has had the one before."""
    return [(round * calls + place) % sets for place in range(calls)]


def measure(case: Case, device: str, seconds: float) -> dict:
    """Medians and spread of every variant, and ratios; `seconds` is the time for all rounds together."""
    sets = [case.inputs()]
    input_bytes = sum(t.untyped_storage().nbytes() for t in sets[0])
    sets += [case.inputs() for _ in range(rotation(input_bytes, device) - 1)]
    errors, faults = verify(case, sets[0])
    calls = {name: (fn, sets) for name, fn in case.variants.items() if name not in faults}
    ours = list(calls)

    # clone reads half of the bytes it moves and writes the other half.
    half = case.bytes_moved // 2
    sources = [torch.ones(half, dtype=torch.uint8, device=device) for _ in range(rotation(2 * half, device))]
    targets = [torch.empty_like(s) for s in sources]
    calls[CLONE] = (torch.clone, [(s,) for s in sources])
    calls[COPY] = (Tensor.copy_, list(zip(targets, sources)))

    host = {}
    for name, (fn, tensors) in calls.items():
        with watched(name, device):
            host[name] = host_seconds(device, fn, tensors)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    started = time.perf_counter()
    for i in itertools.count():
        if i >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        # What one variant has just read lies in the cache for the next; so do clone's sources for copy_.
        turn = dict(zip(ours, turns(i, len(ours), len(sets))))
        turn |= dict(zip((CLONE, COPY), turns(i, 2, len(sources))))
        for name, (fn, tensors) in calls.items():
            with watched(name, device):
                samples[name].append(timed(device, fn, tensors[turn[name]], head_start=2 * host[name]))

    results = {name: summary(samples[name], case.bytes_moved) for name in calls}
    for name, result in results.items():
        result["max_error"] = errors.get(name)
        result["host_ms"] = host[name] * 1e3
        result["bandwidth_over_clone"] = results[CLONE]["median_ms"] / result["median_ms"]
        if EAGER in results:
            result["speed_over_eager"] = results[EAGER]["median_ms"] / result["median_ms"]
    return {
        "operation": case.operation,
        "bytes_moved": case.bytes_moved,
        "rotated_bytes": input_bytes * len(sets),
        "beyond_cache": input_bytes * (len(sets) - 1) >= BEYOND * cache_bytes(device),
        "card": card() if device == "cuda" else None,
        "variants": results,
        "faults": faults,
    }


def host_seconds(device: str, fn: Callable[..., Tensor], sets: Sequence[tuple[Tensor, ...]]) -> float:
    """Median time of a call on the host, which on a GPU has done no more then than enqueue its work."""
    times = []
    for i in range(HOST_CALLS if device == "cuda" else 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        fn(*sets[i % len(sets)])
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@functools.cache
def cycles_per_second() -> float:
    """Of the kernel that waits: the highest of three rates, once the clock has had time to rise."""
    torch.cuda._sleep(200_000_000)
    rates = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(20_000_000)
        end.record()
        end.synchronize()
        rates.append(20_000_000 / (start.elapsed_time(end) / 1e3))
    return max(rates)


def timed(
    device: str, fn: Callable[..., Tensor], tensors: tuple[Tensor, ...], head_start: float = 0.0
) -> tuple[float, float]:
    """Seconds, and on a CPU those of processor time in all threads: other processes lengthen only the first.

    On a GPU it waits for `head_start` seconds, and a few microseconds more, before it begins with the call.
    """
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(min(head_start + 20e-6, LONGEST_HEAD_START) * cycles_per_second()))
        start.record()
        fn(*tensors)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    result = fn(*tensors)
    times = time.perf_counter() - wall, time.process_time() - cpu
    # Its memory goes back outside of the time.
    del result
    return times


def summary(samples: list[tuple[float, float]], bytes_moved: int) -> dict:
    wall = sorted(w for w, _ in samples)
    median = statistics.median(wall)
    return {
        "median_ms": median * 1e3,
        "p10_ms": wall[len(wall) // 10] * 1e3,
        "p90_ms": wall[len(wall) * 9 // 10] * 1e3,
        "min_ms": wall[0] * 1e3,
        "cpu_median_ms": statistics.median(c for _, c in samples) * 1e3,
        "gb_per_s": bytes_moved / median / 1e9,
        "rounds": len(samples),
    }


def verify(case: Case, tensors: tuple[Tensor, ...]) -> tuple[dict[str, float], dict[str, str]]:
    """Largest error of each variant, and what is wrong with those that are.

    At most twice eager's may it be, or a rounding of the result.
    """
    exact = result_of(case, case.exact, [t.double() if t.is_floating_point() else t for t in tensors])
    largest = exact.abs().max().item()
    errors: dict[str, float] = {}
    faults: dict[str, str] = {}
    rounding = 0.0
    # Eager comes first, for its error.
    for name, fn in sorted(case.variants.items(), key=lambda item: item[0] != EAGER):
        try:
            with watched(name, tensors[0].device.type):
                out = result_of(case, fn, [t.clone() for t in tensors] if case.edited else tensors)
                errors[name] = (out.double() - exact).abs().max().item()
        except Lost:
            raise
        except Exception as error:
            # It may be another library's, or of memory.
            faults[name] = f"failed: {first_line(error)}"
            continue
        rounding = rounding or torch.finfo(out.dtype).eps * largest
        judged = EAGER in errors and name not in case.others
        allowed = 2 * errors[EAGER] + rounding if judged else largest / 1e3
        if not errors[name] <= allowed:
            faults[name] = f"wrong by {errors[name]:.3g}, allowed {allowed:.3g}"
    return errors, faults


def result_of(case: Case, fn: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """What the call returns, or what it makes of the inputs that it edits, end to end."""
    result = fn(*tensors)
    return torch.cat([tensors[i].reshape(-1) for i in case.edited]) if case.edited else result


def machine(device: str) -> dict:
    """Where and with what the numbers were made."""

    def first(text: str, key: str) -> str | None:
        return next(
            (line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(key)), None
        )

    def git(*arguments: str) -> str | None:
        here = Path(__file__).parent
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "system": platform.platform(),
        "cpu": first(cpuinfo, "model name") or platform.processor(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "cache_bytes": cache_bytes(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dgs_kernels": getattr(dgs_kernels, "__version__", None),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
            "card": card(),
        }
    return facts


CARD = (
    *("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("temperature.gpu", "power.draw", "clocks_event_reasons.active"),
)


def card() -> dict[str, str] | None:
    """What the driver says of the first device right now."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(CARD)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(zip(CARD, (value.strip() for value in line.split(","))))


def table(result: dict) -> str:
    columns = f"{'median ms':>11}{'p10':>9}{'p90':>9}{'host ms':>9}{'cpu ms':>9}{'GB/s':>8}"
    lines = [f"{'':28}{columns}{'x clone':>9}{'x eager':>9}"]
    for name, v in result["variants"].items():
        lines.append(
            f"{name:28}{v['median_ms']:11.4f}{v['p10_ms']:9.4f}{v['p90_ms']:9.4f}{v['host_ms']:9.4f}"
            f"{v['cpu_median_ms']:9.3f}{v['gb_per_s']:8.1f}{v['bandwidth_over_clone']:9.2f}"
            f"{v.get('speed_over_eager', math.nan):9.2f}"
        )
    lines += [f"{name:28} {fault}" for name, fault in result["faults"].items()]
    if not result["beyond_cache"]:
        lines.append("note: the rotated inputs fit the cache (too little free memory for more)")
    return "\n".join(lines)
