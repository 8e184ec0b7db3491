"""On a GPU: first calls and failed launches of a process, host threads, pools of memory, large clusters."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from dgs_kernels import backends, project_align_, surgery_head
from tests.dgs_kernels.ops import first_call
from tests.dgs_kernels.ops.lists import assert_accurate, clones, draw
from tests.dgs_kernels.ops.surgery_heads import problem
from tests.dgs_kernels.ops.test_on_device import CYCLES, EVERY_OPERATION, adamw, head, in_eager
from tests.dgs_kernels.ops.test_on_device import backend as backend

pytestmark = pytest.mark.gpu


def in_a_process(module: str, argument: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"tests.dgs_kernels.ops.{module}", argument]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("name", first_call.NAMES)
def test_the_first_call_of_a_process_is_captured(name):
    done = in_a_process("first_call", name)
    assert done.returncode == 0, done.stderr[-2000:]
    if name == "adamw":
        assert re.fullmatch(r"surgery_adamw_: .*AdamW\(capturable=True\)\n", done.stdout)


def test_a_failed_launch_is_one_line_and_the_next_call_works():
    done = in_a_process("lost_launch", "invalidated")
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.fullmatch(r".*(launch failed|Triton Error).*previous error during capture\n", done.stdout)


def test_a_lost_device_is_said_and_the_next_process_works():
    assert "device-side assert" in in_a_process("lost_launch", "lost").stdout
    done = in_a_process("first_call", "rows")
    assert done.returncode == 0, done.stderr[-2000:]


@EVERY_OPERATION
def test_threads_of_the_host_with_streams_of_their_own(operation, monkeypatch):
    want, found = in_eager(operation, monkeypatch), {}

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                results = operation("cuda")
            torch.cuda.current_stream().synchronize()
            found[number] = results

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]
    for results in found.values():
        torch.testing.assert_close(results, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("numbers", [9 * 8192, 12 * 8192 + 5, 16 * 8192])
def test_layers_of_more_than_eight_blocks(dtype, numbers):
    shapes, groups = [(numbers - 100,), (8,), (100,)], (0, 1, 0)
    grads, harmful, beneficial = (draw(shapes, dtype, "cuda", seed) for seed in range(3))
    before = clones(grads)
    options = {"alignment": 0.7, "order": "align_first", "rule": "positive"}
    project_align_(grads, harmful, beneficial, groups=groups, **options)
    assert_accurate(grads, before, harmful, beneficial, groups, **options)


def test_a_table_that_another_stream_still_uses_is_let_go():
    """By more lists than are kept, while the first stream has not come to it yet."""
    sources = [draw(device="cuda", seed=seed) for seed in range(3)]
    want, found = clones(sources[0]), clones(sources[0])
    project_align_(want, *sources[1:], alignment=0.4)
    torch.cuda.synchronize()
    slow, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(slow):
        torch.cuda._sleep(CYCLES)
        project_align_(found, *sources[1:], alignment=0.4)
    with torch.cuda.stream(other):
        for i in range(80):
            project_align_(draw([(i + 1,)], device="cuda"), draw([(i + 1,)], device="cuda"))
        noise = [torch.full((1 << 18,), 7, dtype=torch.int64, device="cuda") for _ in range(8)]
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, want))
    del noise


@EVERY_OPERATION
def test_memory_of_a_pool(operation, monkeypatch):
    want = in_eager(operation, monkeypatch)
    pool = torch.cuda.MemPool()
    for _ in range(2):
        with torch.cuda.use_mem_pool(pool):
            found = operation("cuda")
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_expandable_segments():
    code = """
import torch
from tests.dgs_kernels.ops import test_on_device as on
for operation in (on.rows, on.head, on.layers, on.adamw, on.entropy):
    assert all(x.isfinite().all() for x in operation("cuda"))
torch.cuda.empty_cache()
"""
    settings = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_large_batch_with_distillation(monkeypatch):
    options = {"text": "both", "distillation": 0.3}
    found = []
    for name in (os.environ[backends.VARIABLE], "eager"):
        monkeypatch.setenv(backends.VARIABLE, name)
        batch = problem(8192, dtype=torch.float32).map(lambda x: x.cuda())
        out = surgery_head(*batch, **options)
        (out.image_loss + out.text_loss + 0.2 * out.alignment_loss + out.distillation_loss).backward()
        found.append([batch.features.grad, batch.image_weight.grad, batch.text_weight.grad])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("operation", [head, adamw])
def test_the_call_after_one_that_failed(operation, monkeypatch):
    """What is refused leaves no error behind that a later call would meet."""
    want = in_eager(operation, monkeypatch)
    with pytest.raises((ValueError, TypeError)):
        project_align_([torch.ones(3, device="cuda")], [torch.ones(4, device="cuda")])
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    torch.testing.assert_close(operation("cuda"), want, rtol=1e-4, atol=1e-4)
