"""The table of docs/hooks.md, which the tests of loops make: what each hook does in each loop."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from tests.dgs_kernels.hooks.training_loops import HOOKS

DOCUMENT = Path(__file__).parents[3] / "docs" / "hooks.md"
BEGIN, END = "<!-- table -->\n", "\n<!-- end of table -->"
WRITE = "DGS_WRITE_TABLE"
# The rows, in order, by the file that tests them.
LOOPS = {
    "test_loops.py": {
        "plain": "plain loop",
        "accumulation": "gradient accumulation",
        "clip_before": "gradient clipping, then surgery",
        "clip_after": "surgery, then gradient clipping",
        "fp16": "fp16 autocast with `GradScaler`",
        "fused_scaler": "fused optimiser with `GradScaler`, gradients not unscaled",
        "bf16": "bf16 autocast",
        "checkpointing": "activation checkpointing",
        "compile": "`torch.compile(model, fullgraph=True)`",
        "closure": "`optimizer.step(closure)`",
        "closures": "`torch.optim.LBFGS`",
        "muon": "`torch.optim.Muon`",
    },
    "test_two_ranks.py": {
        "ddp": "DDP",
        "ddp_no_sync": "DDP, accumulation under `no_sync`",
        "ddp_two_backwards": "DDP, several backwards of one forward",
        "ddp_one_forward": "the same, the task's first, with `process_group=`",
        "ddp_captures": "DDP, references not through the wrapper",
        "by_hand": "every gradient reduced by the loop itself",
        "by_hand_captures": "the task's only",
        "fsdp2": "FSDP2",
        "fsdp2_scaler": "FSDP2 with `GradScaler`",
        "fsdp2_no_sync": "FSDP2, `set_requires_gradient_sync(False)`",
        "fsdp2_without_model": "FSDP2, hook without `model=`",
        "trainer_fsdp2": "HF Trainer with FSDP2",
        "trainer_fsdp2_no_sync": "HF Trainer with FSDP2, accumulation without `sync_each_batch`",
    },
    "test_frameworks.py": {
        "accelerate": "accelerate, accumulation and clipping",
        "accelerate_wrapper": "accelerate's wrapped optimiser",
        "lightning": "Lightning, automatic optimisation",
        "lightning_manual": "Lightning, manual optimisation",
        "trainer": "HF Trainer",
        "open_clip": "open_clip's `train_one_epoch`",
        "deepspeed": "DeepSpeed, ZeRO 1 and 2",
    },
}
cells: dict[tuple[str, str], str] = {}


def works(loop: str, kind: str) -> None:
    cells[loop, kind] = "right"


def is_refused(loop: str, kind: str, error, remedy: str) -> None:
    assert remedy in str(error)
    cells[loop, kind] = f"raises: {remedy}"


@contextlib.contextmanager
def refused(loop: str, kind: str, remedy: str, error=RuntimeError):
    with pytest.raises(error) as raised:
        yield
    is_refused(loop, kind, raised.value, remedy)


def check(file: str) -> None:
    """The rows that a file's tests found are the documented ones; with DGS_WRITE_TABLE=1 they are written.

    Where tests were chosen, what those found is compared.
    """
    loops = LOOPS[Path(file).name]
    head, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    documented, tail = rest.split(END)
    names, rule, *rows = documented.splitlines()
    written = dict(zip((loop for part in LOOPS.values() for loop in part), rows, strict=True))
    found = {
        loop: f"| {' | '.join([name, *(cells.get((loop, kind), '-') for kind in HOOKS)])} |"
        for loop, name in loops.items()
    }
    whole = loops.keys() <= {loop for loop, _ in cells}
    if os.environ.get(WRITE):
        assert whole, f"{WRITE}=1 needs all tests of the file"
        table = "\n".join([names, rule, *(written | found).values()])
        DOCUMENT.write_text(head + BEGIN + table + END + tail, encoding="utf-8")
        return
    for loop in loops:
        row = written[loop].strip("| ").split(" | ")
        for kind, cell in zip(HOOKS, row[1:], strict=True):
            assert cells.get((loop, kind), cell) == cell, f"run this file with {WRITE}=1"
        assert not whole or found[loop] == written[loop], f"run this file with {WRITE}=1"
