"""pcgrad on every backend against project_align's exact version, both ways; its derivatives and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dgs_kernels import gramian, pcgrad, reference
from dgs_kernels.weightings import weigh
from tests.conftest import on_backends
from tests.dgs_kernels.ops.test_project_align import DTYPES, draw, exact

everywhere = on_backends("pcgrad")


def pairs(*shape, dtype=torch.float32, device="cpu", seed=0):
    """Two gradients that conflict in about two rows of three."""
    first, second = draw(2, *shape, dtype=torch.float64, seed=seed)
    second = second - 0.4 * first / shape[-1] ** 0.5
    return first.to(device, dtype), second.to(device, dtype)


def assert_accurate(out, first, second, eps=1e-6) -> None:
    """At most twice the error of plain PyTorch in the same dtype, and some units in the last place."""
    wide = [x.detach().cpu().double() for x in (first, second)]
    want = exact(*wide, eps=eps, rule="conflict") + exact(*wide[::-1], eps=eps, rule="conflict")
    plain = reference.pcgrad(first, second, eps=eps)
    assert out.shape == plain.shape and out.dtype == plain.dtype and out.is_contiguous()

    def error(x):
        return float(np.linalg.norm((x.cpu().double().numpy() - want).astype(np.float64)))

    units = 0.5 if first.numel() >= 100 else 2.0
    rounding = units * torch.finfo(out.dtype).eps * float(wide[0].norm() + wide[1].norm())
    assert error(out) <= 2 * error(plain) + rounding


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(0, 7), (1, 1), (64, 5), (3, 123), (9, 768), (5, 1023), (9, 4097), (1, 65537)],
    ids=str,
)
def test_accuracy(backend, dtype, shape, nan_filled):
    assert_accurate(pcgrad(*pairs(*shape, dtype=dtype, device=backend)), *pairs(*shape, dtype=dtype))


@everywhere
def test_layouts(backend, nan_filled):
    first, second = pairs(12, 80, device=backend)
    for x, y in (
        (first[::2, :40], second[1::2, 40:]),
        (first[:, ::2], second[:, 1::2]),
        (first[:, :12].t(), second[:, :12]),
        (first.view(3, 4, 80), second.view(4, 3, 80).transpose(0, 1)),
        (first[0], second[0]),
        (first.flatten()[1:-79].view(11, 80), second[:1].expand(11, 80)),
        torch.stack([first, second], 1).unbind(1),
    ):
        assert_accurate(pcgrad(x, y), x, y)


@everywhere
def test_mixed_dtypes_meet_in_the_wider(backend):
    first, second = pairs(4, 96, device=backend)
    for narrow in (torch.bfloat16, torch.float16):
        low = second.to(narrow)
        for out, want in (
            (pcgrad(first, low), pcgrad(first, low.float())),
            (pcgrad(low, first), pcgrad(low.float(), first)),
        ):
            assert out.dtype == torch.float32 and torch.equal(out, want)


@everywhere
def test_rows_without_conflict_are_added(backend):
    first, second = pairs(40, 50, dtype=torch.float64, device=backend)
    out, total = pcgrad(first, second), first + second
    agree = (first * second).sum(1) >= 0
    assert agree.any() and not agree.all()
    assert torch.equal(out[agree], total[agree])
    assert not torch.isclose(out[~agree], total[~agree]).all(1).any()
    zero = torch.zeros_like(first)
    assert torch.equal(pcgrad(first, zero), first) and torch.equal(pcgrad(zero, second), second)


@everywhere
def test_is_the_pcgrad_of_gramians(backend):
    """The same as the weighting of that name makes of every row's own Gramian."""
    first, second = pairs(6, 31, dtype=torch.float64, device=backend)
    objectives = [list(first), list(second)]
    weights = weigh("pcgrad", gramian(objectives), torch.Generator())
    want = weights[:, :1] * first + weights[:, 1:] * second
    torch.testing.assert_close(pcgrad(first, second, eps=1e-14), want, rtol=1e-11, atol=1e-11)


@everywhere
def test_tiny_and_huge_gradients(backend):
    first, second = pairs(8, 64, device=backend)
    for sizes in ((1e-12, 1.0), (1e12, 1.0), (1e-12, 1e12), (1e-7, 1e-7)):
        for eps in (1e-6, 1e-20):
            for x, y in ((first * sizes[0], second * sizes[1]), (first * sizes[1], second * sizes[0])):
                assert_accurate(pcgrad(x, y, eps=eps), x, y, eps)


@everywhere
@pytest.mark.parametrize("which", [0, 1])
def test_not_finite_stays_visible(backend, which):
    for dim, bad in ((24, float("nan")), (24, float("inf")), (24, -float("inf")), (16400, float("nan"))):
        inputs = torch.stack(pairs(2, dim, device=backend))
        inputs[which, 1, 5] = bad
        out = pcgrad(*inputs)
        assert out[0].isfinite().all()
        assert not out[1].isfinite().all(), f"{bad} in a row of {dim} was lost"


@everywhere
def test_deterministic(backend):
    first, second = pairs(65, 771, device=backend)
    assert torch.equal(pcgrad(first, second), pcgrad(first, second))


def test_threads_do_not_change_the_result():
    before, results = torch.get_num_threads(), []
    inputs = [pairs(4096, 257), pairs(2, 65537)]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([pcgrad(*x) for x in inputs])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


# Where it is differentiated, compiled or watched


def test_gradients():
    inputs = tuple(x.requires_grad_() for x in pairs(4, 5, dtype=torch.float64, seed=2))
    agree = (inputs[0] * inputs[1]).sum(1) >= 0
    assert agree.any() and not agree.all()
    assert gradcheck(pcgrad, inputs)
    assert gradgradcheck(pcgrad, inputs)
    assert gradcheck(pcgrad, (inputs[0].detach(), inputs[1]))
    with torch.no_grad():
        assert not pcgrad(*inputs).requires_grad


def test_transforms_and_tangents():
    first, second = pairs(4, 5, dtype=torch.float64)
    want = pcgrad(first, second)
    torch.testing.assert_close(torch.func.vmap(pcgrad)(first, second), want)
    _, moved = torch.func.jvp(pcgrad, (first, second), (first, second))
    # Both as long again: but for eps, so is the result.
    torch.testing.assert_close(moved, want, rtol=1e-5, atol=1e-5)


def test_opcheck():
    op = torch.ops.dgs.pcgrad.default
    first, second = pairs(2, 3, 6)
    torch.library.opcheck(op, (first, second, 1e-6))
    torch.library.opcheck(op, (first.transpose(0, 1), second.bfloat16().transpose(0, 1), 1e-6))


@pytest.mark.parametrize("differentiated", [False, True])
def test_compiles_whole(differentiated):
    first, second = pairs(4, 16)
    compiled = torch.compile(lambda x, y: pcgrad(2 * x, y).square(), fullgraph=True, backend="aot_eager")
    x, ours = (first.clone().requires_grad_(differentiated) for _ in range(2))
    out, want = compiled(x, second), pcgrad(2 * ours, second).square()
    torch.testing.assert_close(out, want)
    if differentiated:
        out.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(x.grad, ours.grad)


def test_torch_sees_the_operator_where_it_watches():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pcgrad(*pairs(2, 3))
    assert any(event.key == "dgs::pcgrad" for event in profile.key_averages())


def test_subclasses_are_tensors_too():
    class Marked(torch.Tensor):
        pass

    first, second = pairs(3, 4)
    marked = pcgrad(first.as_subclass(Marked), second.as_subclass(Marked))
    assert torch.equal(marked, pcgrad(first, second))


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"first": torch.zeros(())}, ValueError, r"first must be \[..., D\] with D >= 1, got shape \(\)"),
        ({"first": torch.zeros(3, 0)}, ValueError, "first must be .*D >= 1"),
        ({"second": torch.zeros(4)}, ValueError, r"second must have first's shape \(3, 4\), got \(4,\)"),
        ({"second": torch.zeros(1, 4)}, ValueError, "second must have first's shape"),
        (
            {"second": torch.zeros(3, 4).long()},
            TypeError,
            "second must be of torch.float32, .*, got torch.int64",
        ),
        ({"second": torch.zeros(3, 4, device="meta")}, ValueError, "second is on meta and first on cpu"),
        ({"eps": 0.0}, ValueError, "eps must be > 0, got 0.0"),
    ],
)
def test_errors(changes, error, words):
    arguments = {"first": torch.zeros(3, 4), "second": torch.zeros(3, 4)} | changes
    with pytest.raises(error, match=f"pcgrad: {words}"):
        pcgrad(**arguments)
