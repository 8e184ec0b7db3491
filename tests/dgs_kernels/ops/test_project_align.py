"""project_align on every backend against an independent exact version, its autograd and its errors."""

from __future__ import annotations

import warnings
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from dgs_kernels import project_align, reference
from dgs_kernels.reference import ORDERS, RULES
from tests.conftest import interpreted, on_backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = list(product(ORDERS, RULES))
everywhere = on_backends("project_align")


def exact(grad, harmful, beneficial=None, *, alignment=1.0, eps=1e-6, order="align_first", rule="positive"):
    """The formula row by row in NumPy's widest floating-point type: exact beside any type under test."""
    wide = [None if t is None else t.cpu().double().expand(grad.shape).numpy() for t in (harmful, beneficial)]
    harmful, beneficial = (None if t is None else t.astype(np.longdouble) for t in wide)
    out = grad.detach().cpu().double().numpy().astype(np.longdouble)
    for row in np.ndindex(out.shape[:-1]):
        x, h = out[row], harmful[row]
        pull = 0 if beneficial is None else np.longdouble(alignment) * np.minimum(beneficial[row], 0)
        if order == "align_first":
            x = x + pull
        if rule == "positive":
            h = np.maximum(h, 0)
        u = h / (np.sqrt(h @ h) + np.longdouble(eps))
        if not (rule == "conflict" and x @ h >= 0):
            x = x - (x @ u) * u
        out[row] = x + pull if order == "project_first" else x
    return out


def assert_accurate(out, grad, harmful, beneficial, **options) -> None:
    """At most twice the error of plain PyTorch in the same dtype, and half a unit in the last place.

    Over few numbers, plain PyTorch's error may be small by luck: there the allowance is two units.
    """
    assert out.shape == grad.shape and out.dtype == grad.dtype and out.is_contiguous()
    if not out.numel():
        return
    want = exact(grad, harmful, beneficial, **options)
    plain = reference.project_align(grad, harmful, beneficial, **options)

    def error(x):
        return float(np.linalg.norm((x.detach().cpu().double().numpy() - want).astype(np.float64)))

    size = grad.double().norm() + (0 if beneficial is None else beneficial.double().expand(grad.shape).norm())
    units = 0.5 if grad.numel() >= 100 else 2.0
    rounding = units * torch.finfo(grad.dtype).eps * float(size)
    assert error(out) <= 2 * error(plain) + rounding


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (64, 5), (3, 123), (8, 768), (5, 1023), (2, 1024), (1, 4096), (1, 65537)], ids=str
)
def test_accuracy(backend, dtype, shape, nan_filled):
    if interpreted():
        # So long a row still has several parts.
        shape = (shape[0], min(shape[1], 20001))
    for seed, (order, rule) in enumerate(OPTIONS):
        grad, harmful, beneficial = draw(3, *shape, dtype=dtype, device=backend, seed=seed)
        options = {"alignment": 0.7, "order": order, "rule": rule}
        out = project_align(grad, harmful, beneficial, **options)
        assert_accurate(out, grad, harmful, beneficial, **options)
        out = project_align(grad, harmful, **options)
        assert_accurate(out, grad, harmful, None, **options)


def layouts(device):
    """Gradients and directions of 6 rows of 40 in every layout that is not simply contiguous."""
    base = draw(12, 80, device=device, seed=1)
    return {
        "every other row": base[::2, :40],
        "every other column": base[:6, ::2],
        "transposed": draw(40, 6, device=device, seed=2).t(),
        "misaligned": draw(1 + 240, device=device, seed=3)[1:].view(6, 40),
        "one row [D]": draw(40, device=device, seed=4),
        "one row [1, D]": draw(1, 40, device=device, seed=5),
        "one number": draw(1, device=device, seed=6).expand(40),
        "three axes": draw(2, 3, 40, device=device, seed=7),
        "three axes, one a broadcast": draw(2, 1, 40, device=device, seed=8),
        "axes swapped": draw(3, 2, 40, device=device, seed=9).transpose(0, 1),
    }


def broadcasts(shape, target):
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape[::-1], target[::-1]))


@everywhere
def test_layouts(backend, nan_filled):
    names = layouts(backend)
    flat = {n: t for n, t in names.items() if n in list(names)[:7]}
    for grads, directions in ((flat, flat), (names, names)):
        shape = (6, 40) if grads is flat else (2, 3, 40)
        for grad in (g for g in grads.values() if g.shape == shape):
            fitting = [d for d in directions.values() if broadcasts(d.shape, shape)]
            for harmful, other in zip(fitting, fitting[1:] + fitting[:1]):
                for beneficial in (harmful.flip(-1), other):
                    out = project_align(grad, harmful, beneficial, alignment=0.5)
                    assert_accurate(out, grad, harmful, beneficial, alignment=0.5)


def aligned_but_one(matrices):
    """Rows of 48 at multiples of 16 numbers, save one matrix's address or stride, and then rows of 40."""
    buffers = [matrix.new_empty(2 * matrix.numel()) for matrix in matrices]
    places = [[(0, 64, 48)] * len(buffers) for _ in range(2 * len(buffers))] + [[(0, 64, 40)] * len(buffers)]
    for i in range(len(buffers)):
        places[2 * i][i], places[2 * i + 1][i] = (1, 64, 48), (0, 56, 48)
    for place in places:
        placed = zip(buffers, place, matrices)
        yield [
            buffer.as_strided((len(matrix), dim), (stride, 1), offset).copy_(matrix[:, :dim])
            for buffer, (offset, stride, dim), matrix in placed
        ]


@everywhere
def test_matrices_of_which_one_is_not_aligned(backend, nan_filled):
    """Triton's kernels ask all matrices one question."""
    matrices = draw(3, 5, 48, device=backend)
    for placed in aligned_but_one(matrices):
        assert_accurate(project_align(*placed), *placed)


@everywhere
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_few_rows(backend, rows, nan_filled):
    matrices = draw(3, rows, 7, device=backend)
    assert_accurate(project_align(*matrices), *matrices)


@everywhere
def test_mixed_dtypes_meet_in_the_wider(backend):
    grad = draw(4, 96, dtype=torch.bfloat16, device=backend)
    harmful, beneficial = draw(2, 96, device=backend, seed=1)
    out = project_align(grad, harmful, beneficial.half(), alignment=0.3)
    want = project_align(grad.float(), harmful, beneficial.half().float(), alignment=0.3).bfloat16()
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)


@everywhere
def test_alignment_may_be_a_tensor(backend):
    grad, harmful, beneficial = draw(3, 5, 33, dtype=torch.float64, device=backend)
    for dtype in (torch.float64, torch.float32):
        alignment = torch.tensor(0.25, dtype=dtype, device=backend)
        out = project_align(grad, harmful, beneficial, alignment=alignment)
        torch.testing.assert_close(
            out, project_align(grad, harmful, beneficial, alignment=0.25), rtol=1e-14, atol=1e-14
        )


@everywhere
@pytest.mark.parametrize("order,rule", OPTIONS)
def test_not_finite_stays_visible(backend, order, rule):
    for bad, which in product((float("nan"), float("inf")), range(3)):
        inputs = draw(3, 4, 24, device=backend)
        # The beneficial part is the negative one.
        inputs[which, 2, 5] = -bad if which == 2 else bad
        if rule == "conflict" and which == 1:
            # The infinite harmful row has to conflict.
            inputs[0, 2, 5] = -1.0
        out = project_align(*inputs, order=order, rule=rule)
        assert out[[0, 1, 3]].isfinite().all()
        assert not out[2].isfinite().all(), f"{bad} in input {which} was lost"


@everywhere
def test_zero_harmful_rows_remove_nothing(backend):
    grad = draw(3, 50, device=backend)
    for rule in RULES:
        assert torch.equal(project_align(grad, torch.zeros(50, device=backend), rule=rule), grad)
    # This harmful row has no positive part.
    assert torch.equal(project_align(grad, -grad.abs()), grad)


@everywhere
@pytest.mark.parametrize("order,rule", OPTIONS)
def test_result_is_orthogonal_to_harmful(backend, order, rule):
    grad, harmful = draw(2, 6, 300, dtype=torch.float64, device=backend)
    out = project_align(grad, harmful, rule=rule, order=order, eps=1e-15)
    direction = harmful.clamp(min=0) if rule == "positive" else harmful
    inner = (out * direction).sum(1) / direction.norm(dim=1)
    if rule == "conflict":
        kept = (grad * harmful).sum(1) >= 0
        assert kept.any() and not kept.all()
        assert torch.equal(out[kept], grad[kept])
        inner = inner[~kept]
    assert inner.abs().max() < 1e-12


@everywhere
def test_tiny_and_huge_directions(backend):
    grad = draw(2, 64, device=backend)
    for size in (1e-12, 1e12):
        harmful = draw(64, device=backend, seed=1) * size
        for eps in (1e-6, 1e-20):
            assert_accurate(project_align(grad, harmful, eps=eps), grad, harmful, None, eps=eps)


@everywhere
def test_deterministic(backend):
    grad, harmful, beneficial = draw(3, 65, 771, device=backend)
    assert torch.equal(*(project_align(grad, harmful, beneficial) for _ in range(2)))


def test_threads_do_not_change_the_result():
    before, results = torch.get_num_threads(), []
    grad, harmful, beneficial = draw(3, 4096, 257)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(project_align(grad, harmful, beneficial))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 20),
    dim=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    option=st.sampled_from(OPTIONS),
    harmful_rows=st.booleans(),
    beneficial_rows=st.sampled_from([None, False, True]),
    offset=st.integers(0, 7),
    seed=st.integers(0, 99),
)
def test_any_shape(rows, dim, dtype, option, harmful_rows, beneficial_rows, offset, seed):
    def tensor(rows, seed):
        flat = draw(offset + rows * dim, dtype=dtype, seed=seed)
        return flat[offset:].view(rows, dim)

    grad = tensor(rows, seed)
    harmful = tensor(rows if harmful_rows else 1, seed + 1)
    beneficial = None if beneficial_rows is None else tensor(rows if beneficial_rows else 1, seed + 2)
    options = {"order": option[0], "rule": option[1], "alignment": 0.9}
    assert_accurate(project_align(grad, harmful, beneficial, **options), grad, harmful, beneficial, **options)


# Autograd


@pytest.mark.parametrize("order,rule", OPTIONS)
def test_gradients(order, rule):
    grad, harmful, beneficial = draw(3, 3, 5, dtype=torch.float64, seed=3)
    alignment = torch.tensor(0.6, dtype=torch.float64)
    inputs = (grad.requires_grad_(), alignment.requires_grad_())

    def function(grad, alignment):
        return project_align(grad, harmful, beneficial, alignment=alignment, order=order, rule=rule)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
    assert gradcheck(lambda g: project_align(g, harmful, order=order, rule=rule), inputs[:1])


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_where_alignment_decides_the_conflict(order):
    """One row conflicts before it is aligned alone, the other after it."""
    harmful = torch.tensor([[1.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    beneficial = torch.tensor([[0.0, -1.0], [-1.0, 0.0]], dtype=torch.float64)
    grad = torch.tensor([[-0.3, 0.1], [0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    for alignment in (0.6, torch.tensor(0.6, dtype=torch.float64, requires_grad=True)):

        def function(grad, alignment=alignment):
            return project_align(
                grad, harmful, beneficial, alignment=alignment, order=order, rule="conflict"
            ).sin()

        assert gradcheck(function, grad)
        assert gradgradcheck(function, grad)


def test_directions_are_constants():
    grad, harmful, beneficial = (t.requires_grad_() for t in draw(3, 2, 4).unbind())
    project_align(grad, harmful, beneficial).sum().backward()
    assert grad.grad is not None and harmful.grad is None and beneficial.grad is None


@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule):
    grad, harmful, beneficial = draw(3, 2, 3, 6)
    scale = torch.tensor(0.5)
    op = torch.ops.dgs.project_align.default
    torch.library.opcheck(
        op, (grad.requires_grad_(), harmful[0, 0], beneficial, scale, 0.5, 1e-6, "align_first", rule)
    )
    torch.library.opcheck(
        op, (grad.transpose(0, 1), harmful[0, :1], None, None, 1.0, 1e-6, "project_first", rule)
    )


def test_compiles_whole():
    grad, harmful, beneficial = draw(3, 4, 16)

    def function(grad, harmful, beneficial):
        return project_align(grad * 2, harmful, beneficial, alignment=0.5).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, theirs = grad.clone().requires_grad_(), grad.clone().requires_grad_()
    function(ours, harmful, beneficial).backward()
    compiled(theirs, harmful, beneficial).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_torch_sees_the_operator_where_it_watches():
    """Native functions take a way past torch, but not while a mode, a transform or the profiler is there."""
    grad, harmful = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0])
    with torch._subclasses.FakeTensorMode() as mode:
        assert project_align(mode.from_tensor(grad), mode.from_tensor(harmful)).shape == (1, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        project_align(grad, harmful)
    assert any(event.key == "dgs::project_align" for event in profile.key_averages())
    ours = torch.func.vmap(project_align, in_dims=(0, None))(grad, harmful)
    torch.testing.assert_close(ours, torch.tensor([[0.0, 4.0]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda g: project_align(g, harmful), grad)
    torch.testing.assert_close(traced(2 * grad), torch.tensor([[0.0, 8.0]]), rtol=0, atol=1e-4)


def test_subclasses_are_tensors_too():
    class Marked(torch.Tensor):
        pass

    matrices = draw(3, 3, 4)
    for alignment in (0.3, torch.tensor(0.3)):
        marked = alignment.as_subclass(Marked) if isinstance(alignment, torch.Tensor) else alignment
        result = project_align(*(t.as_subclass(Marked) for t in matrices), alignment=marked)
        assert torch.equal(result, project_align(*matrices, alignment=alignment))


# Errors


@pytest.mark.parametrize(
    "changes,error,words",
    [
        ({"grad": torch.zeros(())}, ValueError, r"grad must be \[..., D\] with D >= 1, got shape \(\)"),
        ({"grad": torch.zeros(3, 0)}, ValueError, "D >= 1"),
        (
            {"grad": torch.zeros(3, 4, dtype=torch.long)},
            TypeError,
            "grad must be of torch.float32, .*, got torch.int64",
        ),
        ({"harmful": torch.zeros(5)}, ValueError, r"harmful must broadcast .*\(3, 4\), got \(5,\)"),
        ({"harmful": torch.zeros(1)}, ValueError, "harmful must broadcast"),
        ({"harmful": torch.zeros(1, 3, 4)}, ValueError, "harmful must broadcast"),
        (
            {"harmful": torch.zeros(4, dtype=torch.long)},
            TypeError,
            "harmful must be of torch.float32, .*, got",
        ),
        ({"beneficial": torch.zeros(2, 4)}, ValueError, "beneficial must broadcast"),
        (
            {"beneficial": torch.zeros(3, 4, device="meta")},
            ValueError,
            "beneficial is on meta and grad on cpu",
        ),
        ({"alignment": torch.zeros(2)}, ValueError, r"0-dim tensor on cpu, got shape \(2,\)"),
        ({"order": "last"}, ValueError, "order must be one of align_first, project_first, got 'last'"),
        ({"rule": "none"}, ValueError, "rule must be one of positive, full, conflict, got 'none'"),
        ({"eps": 0.0}, ValueError, "eps must be > 0, got 0.0"),
    ],
)
def test_errors(changes, error, words):
    arguments = {"grad": torch.zeros(3, 4), "harmful": torch.zeros(4)} | changes
    with pytest.raises(error, match=words):
        project_align(**arguments)
