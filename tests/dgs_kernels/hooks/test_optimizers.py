"""Optimisers and gradients that are not the usual ones, on every hook on parameters."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import pytest
import torch

from dgs_kernels import ObjectiveSurgery, OptimizerSurgery, SurgeryAdamW

HOOKS = {
    "OptimizerSurgery": OptimizerSurgery,
    "ObjectiveSurgery": ObjectiveSurgery,
    "SurgeryAdamW": lambda optimizer: optimizer,
}


def adamw(kind, params, **options):
    return (SurgeryAdamW if kind == "SurgeryAdamW" else torch.optim.AdamW)(params, **options)


def capture(surgery):
    return surgery.objective() if isinstance(surgery, ObjectiveSurgery) else surgery.harmful()


@pytest.mark.parametrize("captured, task", [("sgn", "sum"), ("sum", "sgn"), ("sgn", "sgn")])
@pytest.mark.parametrize("kind", HOOKS)
def test_zeros_that_autograd_makes(kind, captured, task):
    """The gradient of sgn is a zero tensor, which lies nowhere in memory: the step is that of zeros."""

    def trained(**losses):
        p = torch.nn.Parameter(torch.tensor([0.3, -0.7]))
        optimizer = adamw(kind, [p], lr=0.1, weight_decay=0.3)
        surgery = HOOKS[kind](optimizer)
        with capture(surgery):
            losses[captured](p).backward()
        # As an objective in `.grad`, zeros are refused.
        with capture(surgery) if kind == "ObjectiveSurgery" else contextlib.nullcontext():
            losses[task](p).backward()
        optimizer.step()
        return p.detach()

    wanted = trained(sum=torch.sum, sgn=lambda p: (0 * p).sum())
    assert torch.equal(trained(sum=torch.sum, sgn=lambda p: torch.sgn(p).sum()), wanted)
    assert wanted.isfinite().all()


class Ascent(torch.optim.Optimizer):
    """Moves along the gradient, asks the closure for the gradient there, moves back and descends (as SAM)."""

    def __init__(self, params, lr=0.1, radius=0.05):
        super().__init__(params, {"lr": lr, "radius": radius})

    def step(self, closure):
        (group,) = self.param_groups
        (w,) = group["params"]
        shift = group["radius"] * torch.nn.functional.normalize(w.grad, dim=0)
        with torch.no_grad():
            w.add_(shift)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            w.sub_(shift)
            w.sub_(group["lr"] * w.grad)


class Idle(Ascent):
    """Leaves its closure alone."""

    def step(self, closure=None):
        pass


def sharpness_aware(hook, captured):
    """Weights after four steps, each on an edited gradient, or a plain one where nothing is captured."""
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    harmful = torch.tensor([0.3, 0.1, -0.4])
    optimizer = Ascent([w])
    surgery = hook and hook(optimizer)

    def closure():
        optimizer.zero_grad()
        if surgery and captured:
            with surgery.harmful():
                (harmful * w).sum().backward()
        w.pow(4).sum().backward()
        if captured and not surgery:
            unit = harmful / (harmful.norm() + 1e-6)
            w.grad -= (w.grad @ unit) * unit

    for _ in range(4):
        w.grad = w.detach().clone()
        optimizer.step(closure)
    return w.detach()


@pytest.mark.parametrize("hook", [OptimizerSurgery, ObjectiveSurgery])
def test_a_closure_at_weights_that_the_optimizer_moved(hook):
    """It is evaluated when the optimiser asks, so that the gradient is that of the moved weights."""
    torch.testing.assert_close(sharpness_aware(hook, captured=False), sharpness_aware(None, captured=False))


def test_surgery_on_what_the_closure_computes():
    def full(optimizer):
        return OptimizerSurgery(optimizer, rule="full")

    torch.testing.assert_close(sharpness_aware(full, captured=True), sharpness_aware(None, captured=True))


@pytest.mark.parametrize("hook", [OptimizerSurgery, ObjectiveSurgery])
def test_a_closure_that_is_left_alone(hook):
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = Idle([w])
    surgery = hook(optimizer)
    # Without a capture nothing is lost.
    optimizer.step(lambda: None)
    with capture(surgery):
        w.sum().backward()
    with pytest.raises(RuntimeError, match="stepped without its closure"):
        optimizer.step(lambda: None)


SAME_STEPS = ("capturable", "differentiable", "fused")


@pytest.mark.parametrize("option", ["amsgrad", *SAME_STEPS])
def test_options_that_it_does_not_support(option):
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    refused = pytest.raises(ValueError, match=rf"SurgeryAdamW has no {option}: .*use OptimizerSurgery")
    with refused:
        SurgeryAdamW([first], **{option: True})
    with refused:
        SurgeryAdamW([{"params": [first], option: True}])
    optimizer = SurgeryAdamW([first])
    with refused:
        optimizer.add_param_group({"params": [second], option: True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "option, value",
    [("amsgrad", True), ("decoupled_weight_decay", False), *((name, True) for name in SAME_STEPS)],
)
def test_a_state_of_other_steps_is_refused(option, value):
    w = torch.nn.Parameter(torch.ones(2))
    optimizer, other = SurgeryAdamW([w]), torch.optim.AdamW([w], lr=0.3)
    state = copy.deepcopy(other.state_dict())
    state["param_groups"][-1][option] = value
    with pytest.raises(ValueError, match="use OptimizerSurgery"):
        optimizer.load_state_dict(state)
    # Nothing was loaded.
    assert optimizer.param_groups[0]["lr"] != 0.3
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("option", SAME_STEPS)
def test_a_state_of_steps_made_in_another_way_is_loaded_without_the_option(option):
    """The error says how; the further steps are those of the AdamW that left it, with surgery."""

    def trained(optimizer, w, factor):
        (w * torch.tensor([3.0, -0.5]) * factor).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    left = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    other, usual = torch.optim.AdamW(left[:1], lr=0.3), torch.optim.AdamW(left[1:], lr=0.3)
    # A capturable optimiser does not step on the CPU.
    other.param_groups[0][option] = option != "capturable"
    for optimizer, w in zip((other, usual), left):
        trained(optimizer, w, 1.0)
    other.param_groups[0][option] = True
    state = copy.deepcopy(other.state_dict())
    resumed = torch.nn.Parameter(left[1].detach().clone())
    surgery = SurgeryAdamW([resumed], rule="full", eps=1e-12)
    with pytest.raises(ValueError, match=rf"{option}: in the state first, (group\[\"{option}\"\] = False),"):
        surgery.load_state_dict(state)
    state["param_groups"][0][option] = False
    surgery.load_state_dict(state)
    for optimizer, w in ((surgery, resumed), (usual, left[1])):
        trained(optimizer, w, 2.0)
    torch.testing.assert_close(resumed, left[1])
    with surgery.harmful():
        (resumed * torch.tensor([3.0, -0.5])).sum().backward()
    trained(surgery, resumed, 1.0)
    assert surgery.metrics().removed > 0.99


def test_weights_that_decay_with_the_gradient_are_refused():
    w = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"use OptimizerSurgery on torch\.optim\.Adam"):
        SurgeryAdamW([{"params": [w], "decoupled_weight_decay": False}])


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_default_device_other_than_the_parameters(kind, captured):
    """What lives on the host, steps, orders and places, lives there whatever new tensors are on."""

    def trained(device):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = adamw(kind, [w], lr=0.1)
        surgery = HOOKS[kind](optimizer)
        with torch.device(device):
            if captured:
                with capture(surgery):
                    (w * w).sum().backward()
            w.sum().backward()
            optimizer.step()
        assert optimizer.state[w]["step"].device.type == "cpu"
        return w.detach()

    assert torch.equal(trained("meta"), trained("cpu"))


@pytest.mark.parametrize("kind", HOOKS)
def test_an_optimizer_is_freed_with_its_last_name(kind):
    """With its state, as a plain one is: no circle keeps it until the garbage collector runs."""
    w = torch.nn.Parameter(torch.ones(2))

    def dead():
        optimizer = adamw(kind, [w])
        surgery = HOOKS[kind](optimizer)
        with capture(surgery):
            w.sum().backward()
        w.square().sum().backward()
        optimizer.step()
        return weakref.ref(optimizer), weakref.ref(surgery)

    # The first step imports and compiles.
    dead()
    gc.collect()
    gc.disable()
    try:
        assert [reference() for reference in dead()] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("hook", [OptimizerSurgery, ObjectiveSurgery])
def test_an_optimizer_keeps_its_surgery(hook):
    """Nobody has to keep what `OptimizerSurgery(...)` returned; without its optimiser it says so."""
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.5)
    surgery = weakref.ref(hook(optimizer))
    with capture(surgery()):
        w[0].backward()
    w.sum().backward()
    optimizer.step()
    assert surgery().metrics() is not None
    kept = surgery()
    del optimizer
    with pytest.raises(RuntimeError, match="the optimizer of this surgery is gone"), capture(kept):
        pass


def test_a_wrapper_that_edits_gradients():
    """It finds what surgery made if `combine()` came first: the message says that, and it is right."""

    class Clipped(torch.optim.SGD):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

        def step(self):
            torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.01)
            self.optimizer.step()

    w = torch.nn.Parameter(torch.zeros(2))
    wrapper = Clipped(torch.optim.SGD([w], lr=1.0))
    with pytest.raises(TypeError, match=r"pass its \.optimizer; .* call surgery\.combine\(\) first"):
        ObjectiveSurgery(wrapper)
    surgery = ObjectiveSurgery(wrapper.optimizer)
    for factor in (1, 3):
        with surgery.objective():
            (factor * w).sum().backward()
    surgery.combine()
    wrapper.step()
    torch.testing.assert_close(w.detach().norm(), torch.tensor(0.01))
