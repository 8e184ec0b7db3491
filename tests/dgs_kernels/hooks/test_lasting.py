"""Captured gradients that serve several steps: `harmful(steps=n)`, `objective(name, steps=n)`."""

from __future__ import annotations

import pytest
import torch

from dgs_kernels import ObjectiveSurgery, OptimizerSurgery, reference
from tests.dgs_kernels.hooks import losses
from tests.dgs_kernels.hooks.steps import LAYERS, both, grads_of, loss_on, make, small_model

OPTIONS = {"rule": "full", "order": "project_first", "alignment": 0.3, "granularity": "layer"}


@both
def test_a_kept_gradient_serves_as_if_captured_again(kind):
    """Harmful ones for three steps, beneficial ones for two, over eight steps; then none is left."""
    model, twin = small_model(), small_model()
    optimizer, surgery = make(kind, model, **OPTIONS)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.1)
    kept: dict[str, list] = {}
    cosines: dict[str, torch.Tensor] = {}
    for step in range(9):
        for name, context, every in (("harmful", surgery.harmful, 3), ("beneficial", surgery.beneficial, 2)):
            if step % every == 0 and step < 6:
                seed = 50 + 2 * step + (name == "harmful")
                with context(steps=every):
                    loss_on(model, seed).backward()
                fresh = grads_of(twin, seed)
                if name in kept:
                    cosines[name] = torch.stack([
                        torch.cosine_similarity(
                            torch.cat([fresh[i].flatten() for i in at]),
                            torch.cat([kept[name][i].flatten() for i in at]),
                            dim=0,
                        )
                        for at in ([0, 1], [2], [3, 4])
                    ])  # fmt: skip
                kept[name] = fresh
        loss_on(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        grads = grads_of(twin, step)
        if step < 6:
            arguments = kept["harmful"], kept["beneficial"], LAYERS["layer"]
            named = {n: OPTIONS[n] for n in ("rule", "order", "alignment")}
            grads = reference.project_align_(grads, *arguments, **named)
        for p, grad in zip(twin.parameters(), grads):
            p.grad = grad
        plain.step()
        for ours, theirs in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        if step < 6:
            found = surgery.metrics().refresh_cosine
            assert found.keys() == cosines.keys()
            for name, value in cosines.items():
                torch.testing.assert_close(found[name], value)
        else:
            assert surgery.metrics() is None


@pytest.mark.parametrize("first", ["memory", "task"])
def test_kept_objectives_keep_their_place(first):
    """GEM's first objective is the same in steps with and without a new memory; none is written."""
    model, optimizer, surgery = losses.make("gem")
    twin = losses.small_model()
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    kept = None
    for step in range(5):
        names = ["memory", "task"] if first == "memory" else ["task", "memory"]
        of, of_twin = losses.losses(model, step, 2), losses.gradients(twin, step, 2)
        for name, gradient in zip(("memory", "task"), of_twin):
            if name == "memory" and step % 2 == 0:
                kept = gradient
            gradients = {"memory": kept, "task": of_twin[1]}
        for name in names:
            if name == "task" or step % 2 == 0:
                with surgery.objective(name, steps=2 if name == "memory" else 1):
                    of[name == "task"].backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
        assert surgery.metrics().objectives == names
        want = losses.combination([gradients[name] for name in names], "gem", [0] * 5)
        for p, grad in zip(twin.parameters(), want):
            p.grad = grad
        plain.step()
        for ours, theirs in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(ours, theirs)


def test_the_loops_own_gradient_beside_kept_ones():
    """Without a task's gradient a kept one makes no step by itself."""
    model, optimizer, surgery = losses.make("gem")
    with surgery.objective("memory", steps=3):
        losses.losses(model, 0)[0].backward()
    losses.losses(model, 1)[1].backward()
    optimizer.step()
    optimizer.zero_grad()
    assert surgery.metrics().objectives == [".grad", "memory"]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_clear_forgets_what_is_kept():
    model, optimizer, surgery = losses.make("gem")
    with surgery.objective("memory", steps=3):
        losses.losses(model, 0)[0].backward()
    losses.losses(model, 0)[1].backward()
    optimizer.step()
    assert surgery.captured
    surgery.clear()
    assert not surgery.captured


@pytest.mark.parametrize("overflow", [False, True])
def test_a_skipped_step_costs_a_kept_gradient_nothing(overflow):
    """It is unscaled once, and stays when another step overflows and lowers the scale."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    surgery = OptimizerSurgery(optimizer, rule="full", scaler=scaler)

    def step(bad=False):
        scaler.scale((w * torch.tensor([3.0, 5.0])).sum() * (torch.inf if bad else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    with surgery.harmful(steps=2):
        scaler.scale(w[0] * 7).backward()
    step()
    torch.testing.assert_close(w.detach(), torch.tensor([1.0, -3.0]))
    if overflow:
        step(bad=True)
        assert scaler.get_scale() == 4
    step()
    torch.testing.assert_close(w.detach(), torch.tensor([1.0, -8.0]))
    step()
    torch.testing.assert_close(w.detach(), torch.tensor([-2.0, -13.0]))


def test_what_cannot_be_kept():
    model, optimizer, surgery = losses.make()
    for steps, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="steps must be"):
            surgery.objective("a", steps=steps).__enter__()
    with pytest.raises(ValueError, match="needs a name"):
        surgery.objective(steps=2).__enter__()
    running = ObjectiveSurgery(optimizer, mode="running")
    with pytest.raises(ValueError, match='mode="exact"'):
        running.objective("a", steps=2).__enter__()
    references = OptimizerSurgery(optimizer)
    with pytest.raises(ValueError, match=r"harmful.*steps must be 1 or more"):
        references.harmful(steps=0)
    scaled = ObjectiveSurgery(optimizer, scaler=torch.amp.GradScaler("cpu"))
    for name, steps in (("a", 2), ("b", 1)):
        with scaled.objective(name, steps=steps):
            losses.losses(model, 0)[steps].backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="cannot use kept gradients"):
        scaled.combine()
