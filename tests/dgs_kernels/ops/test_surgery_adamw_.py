"""surgery_adamw_ on every backend: the surgery's formula followed by AdamW's, and SurgeryAdamW as a whole."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
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


class Lists(NamedTuple):
    """What surgery_adamw_ takes, in its order."""

    params: list[Tensor]
    grads: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]
    harmful: list[Tensor]
    beneficial: list[Tensor]

    def map(self, change) -> Lists:
        return Lists(*(change(tensors) for tensors in self))

    @property
    def written(self) -> list[list[Tensor]]:
        return [self.params, self.averages, self.squares]


def drawn(device, dtype=torch.float32, steps_so_far=4.0):
    """Lists of a run under way."""
    params, grads, averages, harmful, beneficial = (
        draw(dtype=dtype, device=device, seed=s) for s in range(5)
    )
    squares = [t.square() for t in draw(dtype=dtype, device=device, seed=5)]
    steps = [torch.tensor(steps_so_far) for _ in params]
    return Lists(params, grads, averages, squares, steps, harmful, beneficial)


def call(lists, beneficial=True, groups=GROUPS, part="all", sums=None, scale=None, **options):
    chosen = {"alignment": 0.7, "order": "align_first", "rule": "positive"} | HYPER | options
    if sums is None:
        param, *_ = lists.params
        dtype = torch.promote_types(param.dtype, torch.float32)
        sums = torch.full((max(groups) + 1, 6), torch.nan, dtype=dtype, device=param.device)
    run(
        *(lists if beneficial else lists._replace(beneficial=[])),
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
    wide = lists.map(lambda tensors: [t.to(dtype) for t in tensors])
    grads = reference.project_align_(
        wide.grads, wide.harmful, wide.beneficial if beneficial else None, GROUPS, eps=SURGERY_EPS, **surgery
    )
    return adamw(wide, grads, **chosen)


def adamw(lists, grads, **options):
    """The lists params, exp_avgs, exp_avg_sqs after a step along `grads`."""
    results = [
        reference.adamw_step(*tensors, int(step) + 1, **options)
        for *tensors, step in zip(lists.params, grads, lists.averages, lists.squares, lists.steps)
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
        copies = lists.map(clones)
        call(copies, **options)
        for name in ("grads", "harmful", "beneficial"):
            assert all(torch.equal(a, b) for a, b in zip(getattr(copies, name), getattr(lists, name)))
        assert all(step == 5 for step in copies.steps)
        for ours, theirs, wants in zip(copies.written, plain, exact):
            for out, there, want in zip(ours, theirs, wants):
                assert out.dtype == dtype
                units = (0.5 if out.numel() >= 100 else 2.0) * (8 if dtype == torch.float64 else 1)
                rounding = units * torch.finfo(dtype).eps * (want.norm() + want.numel() ** 0.5)
                error = (out.double() - want).norm()
                assert error <= 2 * (there.double() - want).norm() + rounding


@everywhere
def test_sums_are_those_of_project_align_(backend):
    lists = drawn(backend)
    want = project_align_(clones(lists.grads), lists.harmful, lists.beneficial, groups=GROUPS)
    torch.testing.assert_close(call(lists), want, rtol=1e-6, atol=1e-6)


@everywhere
def test_apply_takes_the_sums_it_is_given(backend):
    lists = drawn(backend)
    whole, applied, foreign = (lists.map(clones) for _ in range(3))
    sums = call(whole)
    call(applied, part="apply", sums=sums)
    torch.testing.assert_close(applied.written, whole.written)

    # Other processes would have added their sums here.
    sums[:, [0, 3]] *= 3
    call(foreign, part="apply", sums=sums)
    wide = lists.map(doubles)
    edited = reference.project_align_(
        wide.grads, wide.harmful, wide.beneficial, GROUPS, alignment=0.7, eps=SURGERY_EPS
    )
    params, *_ = adamw(wide, thrice_removed(wide.grads, wide.beneficial, edited, 0.7), **HYPER)
    torch.testing.assert_close(doubles(foreign.params), params, rtol=2e-5, atol=2e-5)


@everywhere
@pytest.mark.parametrize(
    "change", ["strided parameter", "other strides", "float32 state", "tensor alignment"]
)
def test_layouts_and_mixed_dtypes(backend, change):
    lists = drawn(backend)
    options = {}
    if change == "strided parameter":
        lists.params[0] = lists.params[0].repeat_interleave(2, dim=1)[:, ::2]
    if change == "other strides":
        lists.grads[0] = lists.grads[0].t().contiguous().t()
        lists.squares[4] = lists.squares[4].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if change == "float32 state":
        narrow = ("params", "grads", "harmful", "beneficial")
        halves = {name: [t.bfloat16() for t in getattr(lists, name)] for name in narrow}
        lists = lists._replace(**halves)
    if change == "tensor alignment":
        options = {"scale": torch.tensor(0.35, device=backend), "alignment": 2.0}
    exact = formula(lists)
    call(lists, **options)
    for tensors, wants in zip(lists.written, exact):
        for out, want in zip(tensors, wants):
            tolerance = 1e-2 if out.dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [None, *backends.BACKENDS])
def test_no_tensors(name, monkeypatch):
    if name:
        monkeypatch.setenv(backends.VARIABLE, name)
    hyper = (1.0, 0.9, 0.9, 0.0, 1e-8, False)
    # These two layers have no tensors.
    sums = torch.full((2, 6), torch.nan)
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
    bad = 4
    lists.grads[bad].view(-1)[0] = torch.nan
    call(lists)
    for group, param, average in zip(GROUPS, lists.params, lists.averages):
        if group != GROUPS[bad]:
            assert param.isfinite().all() and average.isfinite().all()
    assert lists.params[bad].isnan().any() and lists.squares[bad].isnan().any()


@everywhere
def test_lists_of_which_one_tensor_is_not_aligned(backend):
    lists = drawn(backend).map(lambda tensors: tensors[:1])
    want = lists.map(clones)
    call(want, groups=[0])
    for placed in aligned_but_one(*lists):
        # Steps are counted on the host, and lie anywhere.
        placed = Lists(*placed)._replace(steps=clones(lists.steps))
        call(placed, groups=[0])
        torch.testing.assert_close(placed.written, want.written)


def test_operator():
    lists = drawn("cpu").map(lambda tensors: tensors[:4])
    for scale in (None, torch.tensor(0.5)):
        arguments = (*lists, [0, 1, 1, 0], torch.zeros(2, 6), scale, 0.7, 1e-6, "align_first", "full", "all")
        opcheck(torch.ops.dgs.surgery_adamw_.default, (*arguments, 0.1, 0.9, 0.99, 0.01, 1e-8, False))


@everywhere
@pytest.mark.parametrize("order, rule", [("align_first", "positive"), ("project_first", "conflict")])
def test_optimizer_equals_hook_and_adamw(backend, order, rule):
    """Against OptimizerSurgery on AdamW(foreach=True), in float32: what differs is rounding alone."""
    weights = draw(device=backend)
    runs = []
    for fused in (True, False):
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        options = {"alignment": 0.4, "order": order, "rule": rule}
        if fused:
            optimizer = surgery = SurgeryAdamW(params, lr=0.01, **options)
        else:
            optimizer = torch.optim.AdamW(params, lr=0.01, foreach=True)
            surgery = OptimizerSurgery(optimizer, **options)
        runs.append((params, optimizer, surgery))
    for step in range(3):
        for params, optimizer, surgery in runs:
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
    (ours, *_), (theirs, *_) = runs
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("params", draw(SHAPES[::-1]), "params must have the shapes of grads"),
        ("averages", draw(SHAPES[:2]), "exp_avgs must have the shapes of grads"),
        ("squares", [t.to("meta") for t in draw()], "exp_avg_sqs must be on cpu"),
        ("steps", [torch.zeros(1)] * len(SHAPES), "steps must be 9 0-dim float tensors on the CPU"),
        ("harmful", draw(SHAPES[:2]), "harmful must have 9 tensors"),
    ],
)
def test_errors(name, value, message):
    with pytest.raises(ValueError, match=message):
        call(drawn("cpu")._replace(**{name: value}))


@everywhere
def test_tensors_may_have_taken_different_steps(backend):
    lists = drawn(backend)
    for i, step in enumerate(lists.steps):
        step.fill_(i * i)
    params, *_ = formula(lists)
    call(lists)
    assert [int(step) for step in lists.steps] == [i * i + 1 for i in range(len(GROUPS))]
    torch.testing.assert_close(doubles(lists.params), params, rtol=2e-5, atol=2e-5)


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
    params, grads, *_ = drawn("cpu").map(doubles)
    parameters = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(parameters, **{**HYPER, "foreach": True})
    state = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for step in (1, 2, 3):
        for p, g in zip(parameters, grads):
            p.grad = g * step
        optimizer.step()
        state = [reference.adamw_step(p, g * step, m, v, step, **HYPER) for (p, m, v), g in zip(state, grads)]
    torch.testing.assert_close([p.detach() for p in parameters], [p for p, _, _ in state], rtol=1e-14, atol=0)
