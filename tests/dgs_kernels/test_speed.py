"""Guards against lost speed: every operation against the same call served by eager PyTorch, in turns.

The limits are far below what is reached, and times are processor time, so that a busy machine does not fail.
Where the native library no longer serves a call, the ratio is 1.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import pytest
import torch

import dgs_kernels
from dgs_kernels import backends

pytest.importorskip("pytest_benchmark")
from benchmarks import (
    gramian,
    harness,
    project_align,
    project_align_,
    spectral_entropy,
    surgery_adamw_,
    surgery_head,
)

pytestmark = pytest.mark.benchmark(timer=time.process_time)
ROUNDS = 15

# The benchmark whose inputs are taken, the call, rows and dim, how many times as fast as eager it has to be.
# On one thread of a Xeon it was 10.8, 2.4, 6.4, 8.4, 8.7, 5.3 and 4.3 times as fast, in this order.
GUARDED = {
    "project_align": (
        project_align,
        functools.partial(dgs_kernels.project_align, alignment=0.2),
        (2048, 768),
        3.0,
    ),
    "surgery_head": (surgery_head, surgery_head.step(dgs_kernels.surgery_head), (2048, 768), 1.4),
    "project_align_ on LoRA tensors": (project_align_, project_align_.ours, (144, 768), 2.0),
    "project_align_ on large tensors": (project_align_, project_align_.ours, (8192, 768), 2.5),
    "gramian and combine_": (gramian, gramian.ours, (8192, 768), 3.0),
    "surgery_adamw_": (surgery_adamw_, surgery_adamw_.ours, (144, 768), 2.0),
    "spectral_entropy": (spectral_entropy, dgs_kernels.spectral_entropy, (512, 512), 1.7),
}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def timed(call: Callable, inputs: tuple, times: list[float]) -> None:
    started = time.process_time()
    call(*inputs)
    times.append(time.process_time() - started)


@pytest.mark.parametrize("name", GUARDED)
def test_faster_than_eager(name, benchmark, one_thread, monkeypatch):
    module, call, size, limit = GUARDED[name]
    if reason := backends.obstacle("cpu", module.__name__.split(".")[-1], "cpu"):
        pytest.skip(reason)
    if benchmark.disabled:
        pytest.skip("no times are taken under --benchmark-disable and pytest-xdist")
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    # monkeypatch then also undoes what `through` sets.
    monkeypatch.setenv(backends.VARIABLE, "eager")
    eager = harness.through("eager", call)

    def ours(*inputs) -> None:
        monkeypatch.delenv(backends.VARIABLE)
        call(*inputs)

    inputs = module.case(*size, torch.bfloat16, "cpu").inputs()
    eager_times: list[float] = []
    benchmark.pedantic(
        ours,
        inputs,
        setup=lambda: timed(eager, inputs, eager_times),
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    ratio = statistics.median(eager_times) / benchmark.stats.stats.median
    benchmark.extra_info["speed_over_eager"] = ratio
    assert ratio >= limit, f"only {ratio:.2f} times as fast as eager PyTorch"
