"""What breaks without each of torch's private functions that the way past its dispatcher needs."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import dgs_kernels
from dgs_kernels import backends, private_torch

ROWS = torch.tensor([[3.0, 4.0], [1.0, -2.0]])
HARMFUL = torch.tensor([1.0, -1.0])


@pytest.fixture(autouse=True)
def native(monkeypatch):
    if reason := backends.obstacle("cpu", "project_align", "cpu"):
        pytest.skip(reason)
    monkeypatch.delenv(backends.VARIABLE, raising=False)


def is_seen_by_modes() -> bool:
    """A mode that counts, traces or fakes operators is told of ours."""
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        dgs_kernels.project_align(ROWS, HARMFUL)
    return "dgs.project_align.default" in seen


def is_in_profiles() -> bool:
    """The profiler names the operation, not what it is made of."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dgs_kernels.project_align(ROWS, HARMFUL)
    return any(event.key == "dgs::project_align" for event in profile.key_averages())


def is_mapped() -> bool:
    """`torch.func`'s transforms see an operator that they can map, not tensors that have no memory."""
    try:
        mapped = torch.func.vmap(lambda row: dgs_kernels.project_align(row, HARMFUL))(ROWS)
    except (RuntimeError, ValueError):
        return False
    return torch.allclose(mapped, dgs_kernels.project_align(ROWS, HARMFUL), atol=1e-5)


def carries_tangents() -> bool:
    """A forward derivative is not lost."""
    with forward_ad.dual_level():
        out = dgs_kernels.project_align(forward_ad.make_dual(ROWS, torch.ones_like(ROWS)), HARMFUL)
        return forward_ad.unpack_dual(out).tangent is not None


@pytest.mark.parametrize(
    "function, behaviour",
    [
        ("dispatch_modes", is_seen_by_modes),
        ("profiled", is_in_profiles),
        ("transformed", is_mapped),
        ("forward_mode", carries_tangents),
    ],
)
def test_what_breaks_without(function, behaviour, monkeypatch):
    assert behaviour()
    monkeypatch.setattr(private_torch, function, lambda: False)
    assert not behaviour()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_direction_that_requires_grad_leaves_no_graph(backend, monkeypatch):
    """By whichever way the result came: as it is, of two types, or through torch's dispatcher."""
    monkeypatch.setenv(backends.VARIABLE, backend)

    class Subclass(torch.Tensor):
        pass

    for harmful in (HARMFUL.clone(), HARMFUL.double(), HARMFUL.clone().as_subclass(Subclass)):
        assert not dgs_kernels.project_align(ROWS, harmful.requires_grad_()).requires_grad


def test_fake_tensors_are_seen():
    with FakeTensorMode() as mode:
        assert dgs_kernels.project_align(mode.from_tensor(ROWS), mode.from_tensor(HARMFUL)).shape == (2, 2)


def test_no_other_file_uses_what_is_torchs_own():
    folder = backends.Path(dgs_kernels.__file__).parent
    for path in folder.rglob("*.py"):
        if path.name != "private_torch.py" and path.parent.name != "hooks":
            text = path.read_text()
            assert "torch._C." not in text and "forward_ad._" not in text, path
