"""surgery_adamw_ on every backend: the surgery's formula followed by AdamW's, and SurgeryAdamW as a whole."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.library import opcheck

from dgs_kernels import OptimizerSurgery, SurgeryAdamW, backends, project_align_, reference
from dgs_kernels.ops.surgery_adamw_ import run
from dgs_kernels.reference import ORDERS, RULES
from tests.conftest import on_backends
from tests.dgs_kernels.ops.lists import (
    GROUPS,
    SHAPES,
    aligned_but_one,
    clones,
    doubles,
    draw,
    thrice_removed,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = list(product(ORDERS, RULES))
HYPER = {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-5, "maximize": False}
SURGERY_EPS = 0.02
everywhere = on_backends("surgery_adamw_")


def drawn(device, dtype=torch.float32, steps_so_far=4.0):
    """params, grads, exp_avgs, exp_avg_sqs, steps, harmful, beneficial of a run under way."""
    params, grads, averages, harmful, beneficial = (
        draw(dtype=dtype, device=device, seed=s) for s in range(5)
    )
    squares = [t.square() for t in draw(dtype=dtype, device=device, seed=5)]
    steps = [torch.tensor(steps_so_far) for _ in params]
    return params, grads, averages, squares, steps, harmful, beneficial


def call(lists, beneficial=True, groups=GROUPS, part="all", sums=None, scale=None, **options):
    chosen = {"alignment": 0.7, "order": "align_first", "rule": "positive"} | HYPER | options
    params, *_ = lists
    if sums is None:
        dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        sums = torch.full((max(groups) + 1, 6), torch.nan, dtype=dtype, device=params[0].device)
    run(
        *lists[:6],
        lists[6] if beneficial else [],
        list(groups),
        sums,
        scale,
        chosen["alignment"],
        SURGERY_EPS,
        chosen["order"],
        chosen["rule"],
        part,
        chosen["lr"],
        *chosen["betas"],
        chosen["weight_decay"],
        chosen["eps"],
        chosen["maximize"],
    )
    return sums


def formula(lists, beneficial=True, dtype=torch.float64, **options):
    """The lists params, exp_avgs, exp_avg_sqs after the step, computed in `dtype` by the two formulas."""
    chosen = {"alignment": 0.7, "order": "align_first", "rule": "positive"} | HYPER | options
    surgery = {name: chosen.pop(name) for name in ("alignment", "order", "rule")}
    params, grads, averages, squares, steps, harmful, b = [[t.to(dtype) for t in ts] for ts in lists]
    grads = reference.project_align_(
        grads, harmful, b if beneficial else None, GROUPS, eps=SURGERY_EPS, **surgery
    )
    results = [
        reference.adamw_step(*tensors, int(step) + 1, **chosen)
        for *tensors, step in zip(params, grads, averages, squares, steps)
    ]
    return [list(tensors) for tensors in zip(*results)]


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order, rule", OPTIONS)
def test_accuracy(backend, dtype, order, rule, nan_filled):
    """At most twice the error of the formulas in plain PyTorch in the same dtype, and half a unit."""
    for beneficial, maximize in ((True, False), (False, True)):
        lists = drawn(backend, dtype)
        options = {"beneficial": beneficial, "order": order, "rule": rule, "maximize": maximize}
        exact, plain = formula(lists, **options), formula(lists, dtype=dtype, **options)
        written = [clones(ts) for ts in lists]
        call(written, **options)
        for i in (1, 5, 6):
            assert all(torch.equal(a, b) for a, b in zip(written[i], lists[i]))
        assert all(step == 5 for step in written[4])
        for ours, theirs, wants in zip((written[0], written[2], written[3]), plain, exact):
            for out, there, want in zip(ours, theirs, wants):
                assert out.dtype == dtype
                units = (0.5 if out.numel() >= 100 else 2.0) * (8 if dtype == torch.float64 else 1)
                rounding = units * torch.finfo(dtype).eps * (want.norm() + want.numel() ** 0.5)
                error = (out.double() - want).norm()
                assert error <= 2 * (there.double() - want).norm() + rounding


@everywhere
def test_sums_are_those_of_project_align_(backend):
    lists = drawn(backend)
    want = project_align_(clones(lists[1]), lists[5], lists[6], groups=GROUPS)
    torch.testing.assert_close(call(lists), want, rtol=1e-6, atol=1e-6)


@everywhere
def test_apply_takes_the_sums_it_is_given(backend):
    lists = drawn(backend)
    whole, applied, foreign = ([clones(ts) for ts in lists] for _ in range(3))
    sums = call(whole)
    call(applied, part="apply", sums=sums)
    torch.testing.assert_close(applied[:4], whole[:4])

    sums[:, [0, 3]] *= 3  # as if other processes had added theirs
    call(foreign, part="apply", sums=sums)
    params, grads, averages, squares, steps, harmful, beneficial = map(doubles, lists)
    edited = reference.project_align_(grads, harmful, beneficial, GROUPS, alignment=0.7, eps=SURGERY_EPS)
    edited = thrice_removed(grads, beneficial, edited, 0.7)
    for out, p, g, m, v, step in zip(foreign[0], params, edited, averages, squares, steps):
        want = reference.adamw_step(p, g, m, v, int(step) + 1, **HYPER)[0]
        torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)


@everywhere
@pytest.mark.parametrize(
    "change", ["strided parameter", "other strides", "float32 state", "tensor alignment"]
)
def test_layouts_and_mixed_dtypes(backend, change):
    lists = drawn(backend)
    options = {}
    if change == "strided parameter":
        lists[0][0] = lists[0][0].repeat_interleave(2, dim=1)[:, ::2]
    if change == "other strides":
        lists[1][0] = lists[1][0].t().contiguous().t()
        lists[3][4] = lists[3][4].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if change == "float32 state":
        lists = [[t.bfloat16() for t in ts] if i in (0, 1, 5, 6) else ts for i, ts in enumerate(lists)]
    if change == "tensor alignment":
        options = {"scale": torch.tensor(0.35, device=backend), "alignment": 2.0}
    exact = formula(lists)
    call(lists, **options)
    for tensors, wants in zip((lists[0], lists[2], lists[3]), exact):
        for out, want in zip(tensors, wants):
            tolerance = 1e-2 if out.dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [None, *backends.BACKENDS])
def test_no_tensors(name, monkeypatch):
    if name:
        monkeypatch.setenv(backends.VARIABLE, name)
    hyper = (1.0, 0.9, 0.9, 0.0, 1e-8, False)
    sums = torch.full((2, 6), torch.nan)  # of two layers without tensors
    run(*[[]] * 8, sums, None, 1.0, 1e-6, "align_first", "full", "all", *hyper)
    assert torch.equal(sums, torch.zeros(2, 6))


@everywhere
def test_deterministic(backend):
    first, second = drawn(backend), drawn(backend)
    sums = call(first), call(second)
    assert torch.equal(*sums)
    assert all(torch.equal(a, b) for ts, us in zip(first, second) for a, b in zip(ts, us))


@everywhere
def test_a_gradient_that_is_not_finite_is_not_hidden(backend):
    lists = drawn(backend)
    lists[1][4].view(-1)[0] = torch.nan
    call(lists)
    for i, (param, average) in enumerate(zip(lists[0], lists[2])):
        if GROUPS[i] != GROUPS[4]:
            assert param.isfinite().all() and average.isfinite().all()
    assert lists[0][4].isnan().any() and lists[3][4].isnan().any()


@everywhere
def test_lists_of_which_one_tensor_is_not_aligned(backend):
    lists = [ts[:1] for ts in drawn(backend)]
    want = [clones(ts) for ts in lists]
    call(want, groups=[0])
    steps = lists.pop(4)
    for placed in aligned_but_one(*lists):
        call([*placed[:4], clones(steps), *placed[4:]], groups=[0])
        torch.testing.assert_close(placed[:4], want[:4])


def test_operator():
    lists = [ts[:4] for ts in drawn("cpu")]
    for scale in (None, torch.tensor(0.5)):
        arguments = (*lists, [0, 1, 1, 0], torch.zeros(2, 6), scale, 0.7, 1e-6, "align_first", "full", "all")
        opcheck(torch.ops.dgs.surgery_adamw_.default, (*arguments, 0.1, 0.9, 0.99, 0.01, 1e-8, False))


@everywhere
@pytest.mark.parametrize("order, rule", [("align_first", "positive"), ("project_first", "conflict")])
def test_optimizer_equals_hook_and_adamw(backend, order, rule):
    """Against OptimizerSurgery on AdamW(foreach=True), in float32: what differs is rounding alone."""
    weights = draw(device=backend)
    pairs = []
    for fused in (True, False):
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        options = {"alignment": 0.4, "order": order, "rule": rule}
        if fused:
            optimizer = surgery = SurgeryAdamW(params, lr=0.01, **options)
        else:
            optimizer = torch.optim.AdamW(params, lr=0.01, foreach=True)
            surgery = OptimizerSurgery(optimizer, **options)
        pairs.append((params, optimizer, surgery))
    for step in range(3):
        for params, optimizer, surgery in pairs:
            for i, kind in enumerate((surgery.harmful, surgery.beneficial)):
                with kind():
                    directions = draw(device=backend, seed=3 * step + i + 1)
                    sum((p * d).sum() for p, d in zip(params, directions)).backward()
            gradients = draw(device=backend, seed=3 * step + 10)
            for p, g in zip(params, gradients):
                p.grad = g
            optimizer.step()
            if isinstance(optimizer, SurgeryAdamW):
                assert all(
                    torch.equal(p.grad, g) for p, g in zip(params, draw(device=backend, seed=3 * step + 10))
                )
    for a, b in zip(pairs[0][0], pairs[1][0]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, draw(SHAPES[::-1]), "params must have the shapes of grads"),
        (2, draw(SHAPES[:2]), "exp_avgs must have the shapes of grads"),
        (3, [t.to("meta") for t in draw()], "exp_avg_sqs must be on cpu"),
        (4, [torch.zeros(1)] * len(SHAPES), "steps must be 9 0-dim float tensors on the CPU"),
        (5, draw(SHAPES[:2]), "harmful must have 9 tensors"),
    ],
)
def test_errors(place, value, message):
    lists = list(drawn("cpu"))
    lists[place] = value
    with pytest.raises(ValueError, match=message):
        call(lists)


@everywhere
def test_tensors_may_have_taken_different_steps(backend):
    lists, dtype = drawn(backend), torch.float64
    for i, step in enumerate(lists[4]):
        step.fill_(i * i)
    grads = reference.project_align_(
        *(doubles(lists[i]) for i in (1, 5, 6)), GROUPS, alignment=0.7, eps=SURGERY_EPS
    )
    tensors = zip(doubles(lists[0]), grads, doubles(lists[2]), doubles(lists[3]), lists[4])
    want = [
        reference.adamw_step(p, g, m, v, int(step) + 1, **HYPER)[0].to(dtype) for p, g, m, v, step in tensors
    ]
    call(lists)
    assert [int(step) for step in lists[4]] == [i * i + 1 for i in range(len(GROUPS))]
    for out, w in zip(lists[0], want):
        torch.testing.assert_close(out.double(), w, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
def test_capture_is_refused():
    """Steps are counted on the host."""
    lists = drawn("cuda")
    call(lists)
    sums = torch.zeros(max(GROUPS) + 1, 6, device="cuda")
    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="steps are counted on the host"), graph:
        call(lists, sums=sums)


def test_sums_alone_are_not_its_business():
    with pytest.raises(ValueError, match="part must be all or apply"):
        call(drawn("cpu"), part="sums")


def test_reference_is_adamw():
    params, grads, *_ = (doubles(ts) for ts in drawn("cpu"))
    parameters = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(parameters, **{**HYPER, "foreach": True})
    state = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for step in (1, 2, 3):
        for p, g in zip(parameters, grads):
            p.grad = g * step
        optimizer.step()
        state = [reference.adamw_step(p, g * step, m, v, step, **HYPER) for (p, m, v), g in zip(state, grads)]
    torch.testing.assert_close([p.detach() for p in parameters], [p for p, _, _ in state], rtol=1e-14, atol=0)
