"""What first_call.py captures on a GPU, on the CPU: it can be called, and is the same in eager PyTorch."""

from __future__ import annotations

import pytest
import torch

from dgs_kernels import backends
from tests.dgs_kernels.ops import first_call


@pytest.mark.parametrize("name", first_call.NAMES)
def test_the_calls_that_are_captured(name, monkeypatch):
    found = first_call.prepared(name, "cpu")()
    monkeypatch.setenv(backends.VARIABLE, "eager")
    want = first_call.prepared(name, "cpu")()
    assert all(x.isfinite().all() for x in want)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_surgery_inside_the_step_and_before_it():
    step = first_call.surgery_adamw("cpu")
    torch.testing.assert_close(step(), first_call.prepared("adamw", "cpu")(), rtol=1e-4, atol=1e-4)
