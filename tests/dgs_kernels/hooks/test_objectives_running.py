"""ObjectiveSurgery with mode="running", against PCGrad between vectors."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch

from dgs_kernels import ObjectiveSurgery
from tests.dgs_kernels.hooks.losses import (
    assert_grads,
    capture,
    combination,
    gradients,
    losses,
    make,
    small_model,
)
from tests.dgs_kernels.hooks.steps import LAYERS

RUNNING_SUM = "sum so far"


def running_sum(objectives) -> list[torch.Tensor]:
    """PCGrad between the sum so far and each gradient in turn, on vectors."""
    flat = [torch.cat([g.reshape(-1) for g in grads]) for grads in objectives]
    total = flat[0]
    for g in flat[1:]:
        inner = (total @ g).clamp(max=0)
        total = total - inner / (g @ g) * g + g - inner / (total @ total) * total
    return [t.view_as(g) for t, g in zip(total.split([g.numel() for g in objectives[0]]), objectives[0])]


@pytest.mark.parametrize("count", [2, 5, 20])
@pytest.mark.parametrize("task", [False, True], ids=["all captured", "last in .grad"])
def test_running_mode(count, task):
    model, optimizer, surgery = make(mode="running")
    want = running_sum(gradients(model, 0, count))
    *first, last = losses(model, 0, count)
    held = []
    for loss in first if task else [*first, last]:
        with surgery.objective():
            loss.backward(retain_graph=True)
            held += [weakref.ref(p.grad) for p in model.parameters()]
    alive = [ref() is not None for ref in held]
    # There is one gradient, which is written over the first.
    assert alive == [True] * 5 + [False] * (len(held) - 5)
    if task:
        last.backward()
    optimizer.step()
    assert_grads(model, want)
    found = surgery.metrics()
    assert found.gramian.shape == (count - 1, 2, 2) and found.objectives == [RUNNING_SUM, "objective"]
    assert found.layers[-1] == (".grad/model" if task else f"objective {count - 1}/model")
    flat = [torch.cat([g.reshape(-1) for g in grads]) for grads in gradients(small_model(), 0, count)]
    torch.testing.assert_close(found.gramian[-1, 1, 1], flat[-1] @ flat[-1])
    if count == 2:
        assert_grads(model, combination(gradients(small_model(), 0, 2), "pcgrad", LAYERS["model"]))


def test_running_mode_with_a_scaler():
    """PCGrad does not see the scale; an overflow of one loss skips the step, and nothing of it stays."""
    model, optimizer, _ = make(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    surgery = ObjectiveSurgery(optimizer, mode="running", scaler=scaler)
    for factor in (torch.inf, 1.0):
        first, second, task = losses(model, 0, 3)
        capture(surgery, [scaler.scale(first), scaler.scale(second * factor)])
        scaler.scale(task).backward()
        before = copy.deepcopy(model)
        scaler.step(optimizer)
        scaler.update()
        if factor == 1:
            objectives = gradients(before, 0, 3)
            assert_grads(model, running_sum(objectives), rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        moved = any((a != b).any() for a, b in zip(model.parameters(), before.parameters()))
        assert moved == (factor == 1) and scaler.get_scale() == 512


def test_running_mode_refuses_what_it_cannot_do():
    model, _, surgery = make(mode="running")
    names = ["a", "b"]
    capture(surgery, losses(model, 0, 2), names)
    with pytest.raises(RuntimeError, match="'a' has joined the running sum"):
        capture(surgery, losses(model, 1, 2), names)
