"""`track_update`: what the optimiser made of an edited gradient, against the parameters themselves."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch

from dgs_kernels import ObjectiveSurgery, OptimizerSurgery, SurgeryAdamW
from tests.dgs_kernels.hooks import losses
from tests.dgs_kernels.hooks.steps import LAYERS, both, grads_of, make, small_model, surgery_step

# Up to this cosine a promise counts as kept.
SLACK = 0.01


def cosines(change, directions, layers) -> torch.Tensor:
    """[G, K], layer by layer."""
    numbers = sorted(set(layers))
    flat = [
        [
            torch.cat([t.flatten() for t, layer in zip(tensors, layers) if layer == number])
            for number in numbers
        ]
        for tensors in (change, *directions)
    ]
    rows = [[torch.cosine_similarity(c, d, dim=0) for c, d in zip(flat[0], of)] for of in flat[1:]]
    return torch.stack([torch.stack(row) for row in rows], 1)


@both
@pytest.mark.parametrize("rule", ["positive", "full", "conflict"])
def test_references(kind, rule):
    """Several steps under decay and momentum: the cosine is of the last, the share of all of them."""
    model = small_model()
    optimizer, surgery = make(kind, model, granularity="layer", rule=rule, alignment=0.3, track_update=True)
    held = torch.zeros(3, dtype=torch.float64)
    steps = (9, 4, 2, 7, 5)
    for step in steps:
        harmful, beneficial = (grads_of(model, 3 * step + i) for i in (1, 2))
        before = [p.detach().clone() for p in model.parameters()]
        surgery_step(model, optimizer, surgery, step)
        change = [p.detach() - b for p, b in zip(model.parameters(), before)]
        h = [t.clamp(min=0) if rule == "positive" else t for t in harmful]
        want = cosines(change, [h, [t.clamp(max=0) for t in beneficial]], LAYERS["layer"])
        metrics = surgery.metrics()
        torch.testing.assert_close(metrics.update_cosine, want, rtol=1e-9, atol=1e-9)
        along = want[:, 0]
        held += (along if rule == "conflict" else along.abs()) <= SLACK
    torch.testing.assert_close(metrics.promise_held, held / len(steps))
    scalars = metrics.scalars("s")
    for column, name in enumerate(("harmful", "beneficial")):
        assert scalars[f"s/update_cosine/{name}/2"] == pytest.approx(float(want[1, column]))
    assert scalars["s/promise_held/4"] == pytest.approx(float(held[2] / len(steps)))


def test_sgd_keeps_what_adamw_breaks():
    shares = {}
    for optimizer_class in (torch.optim.SGD, torch.optim.AdamW):
        model = small_model()
        optimizer = optimizer_class(model.named_parameters(), lr=0.05)
        surgery = OptimizerSurgery(optimizer, rule="full", granularity="layer", track_update=True)
        for step in range(6):
            surgery_step(model, optimizer, surgery, step, beneficial=False)
        shares[optimizer_class] = surgery.metrics().promise_held.mean()
        assert not surgery.metrics().update_cosine[:, 1].any()
    assert shares[torch.optim.SGD] == 1 and shares[torch.optim.AdamW] < 0.5


PROMISED = {"gem": slice(1, None), "ogd": slice(1, None), "upgrad": slice(None), "mean": slice(None)}


@pytest.mark.parametrize("count, weighting", [*itertools.product([2, 4], PROMISED), (16, "mgda")])
def test_objectives(count, weighting):
    model, optimizer, surgery = losses.make(weighting, "layer", track_update=True)
    seen, held = [], 0
    for step in range(3):
        gradients = losses.gradients(model, step, count)
        before = [p.detach().clone() for p in model.parameters()]
        losses.capture(surgery, losses.losses(model, step, count))
        optimizer.step()
        optimizer.zero_grad()
        change = [p.detach() - b for p, b in zip(model.parameters(), before)]
        seen.append(cosines(change, gradients, [0, 0, 1, 2, 2]))
        mine = seen[-1][:, PROMISED.get(weighting, slice(None))]
        held = held + ((mine.abs() if weighting == "ogd" else mine) <= SLACK).all(1).double()
    metrics = surgery.metrics()
    torch.testing.assert_close(metrics.update_cosine, seen[-1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(metrics.promise_held, held / 3)
    assert metrics.scalars()["objectives/update_cosine/objective 1/2"] == pytest.approx(float(seen[-1][1, 1]))


def test_every_layer_has_the_promise_of_its_own_weighting():
    model, optimizer, surgery = losses.make(["gem", "mgda", "ogd"], "layer", track_update=True)
    held = 0
    for step in range(4):
        gradients = losses.gradients(model, step, 3)
        before = [p.detach().clone() for p in model.parameters()]
        losses.capture(surgery, losses.losses(model, step, 3))
        optimizer.step()
        optimizer.zero_grad()
        change = [p.detach() - b for p, b in zip(model.parameters(), before)]
        gem, mgda, ogd = cosines(change, gradients, [0, 0, 1, 2, 2])
        held = held + torch.stack([x.max() <= SLACK for x in (gem[1:], mgda, ogd[1:].abs())]).double()
    torch.testing.assert_close(surgery.metrics().promise_held, held / 4)


def test_off_by_default_and_of_steps_with_surgery_only():
    model = small_model()
    optimizer, surgery = make("OptimizerSurgery", model)
    surgery_step(model, optimizer, surgery, 0)
    assert surgery.metrics().update_cosine is None and surgery.metrics().promise_held is None
    assert not any("update" in name or "promise" in name for name in surgery.metrics().scalars())
    plain = torch.optim.SGD(model.parameters())
    losses_of = ObjectiveSurgery(plain, model=model, track_update=True)
    with losses_of.record():
        y = model(torch.ones(2, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="track_update"):
        losses_of.per_sample(y[:, 0])
    with pytest.raises(ValueError, match='track_update needs every gradient: use mode="exact"'):
        ObjectiveSurgery(optimizer, mode="running", track_update=True)


@pytest.mark.parametrize("kind", ["OptimizerSurgery", "SurgeryAdamW"])
def test_tracking_changes_no_weight(kind):
    trained = []
    for track in (False, True):
        model = small_model()
        optimizer, surgery = make(kind, model, track_update=track)
        for step in range(3):
            surgery_step(model, optimizer, surgery, step)
            # A step without surgery comes between two with it.
            if step:
                model(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                assert surgery.metrics() is None
        trained.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *trained))


def test_a_closure_is_measured_from_where_the_step_began():
    """SAM and its kin move the weights before they ask for the gradient."""

    class Ahead(torch.optim.SGD):
        def step(self, closure):
            (p,) = self.param_groups[0]["params"]
            with torch.no_grad():
                p.add_(5.0)
            closure()
            with torch.no_grad():
                p.sub_(5.0)
                p.sub_(p.grad)

    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = Ahead([w], lr=1.0)
    surgery = OptimizerSurgery(optimizer, rule="conflict", track_update=True)

    def closure():
        with surgery.harmful():
            w[0].backward()
        w.grad = None
        (w[0] + w[1]).backward()

    optimizer.step(closure)
    torch.testing.assert_close(surgery.metrics().update_cosine[:, 0], -torch.tensor([0.5]).sqrt())


def test_layers_that_take_part_in_some_steps():
    """A layer's share is of its own steps."""
    one, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([("one", one), ("other", other)], lr=0.1)
    surgery = OptimizerSurgery(optimizer, rule="conflict", track_update=True)
    for step, both_take_part in enumerate((True, False, True)):
        # Under `maximize` what is captured rises.
        optimizer.param_groups[0]["maximize"] = step == 0
        with surgery.harmful():
            (one[0] + other[0] * both_take_part).backward()
        (one[0] + other[0] if both_take_part else one[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert surgery.metrics().layers == ["one", "other"]
    assert surgery.metrics().promise_held.tolist() == pytest.approx([2 / 3, 1 / 2])


def test_adamw_pickled_goes_on_counting():
    model = small_model()
    optimizer = SurgeryAdamW(model.parameters(), rule="full", track_update=True)
    surgery_step(model, optimizer, optimizer, 1)
    copy = pickle.loads(pickle.dumps(optimizer))
    torch.testing.assert_close(copy.metrics().update_cosine, optimizer.metrics().update_cosine)
