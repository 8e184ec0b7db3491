"""OptimizerSurgery and SurgeryAdamW, against the same steps done by hand."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from dgs_kernels import OptimizerSurgery, SurgeryAdamW, reference
from dgs_kernels.reference import ORDERS, RULES
from tests.dgs_kernels.hooks.steps import (
    LAYERS,
    assert_same_weights,
    both,
    grads_of,
    loss_on,
    make,
    plain_step,
    small_model,
    surgery_step,
)


@both
@pytest.mark.parametrize("granularity", LAYERS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_steps_equal_the_formula(kind, granularity, order, rule):
    model, plain = small_model(), small_model()
    optimizer, surgery = make(kind, model, granularity=granularity, order=order, rule=rule, alignment=0.3)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(3):
        surgery_step(model, optimizer, surgery, step)
        plain_step(plain, plain_optimizer, step, granularity, alignment=0.3, order=order, rule=rule)
    assert_same_weights(model, plain)


@pytest.mark.parametrize(
    "optimizer_class, options",
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_any_optimizer(optimizer_class, options):
    model, plain = small_model(), small_model()
    optimizer = optimizer_class(model.parameters(), **options)
    surgery = OptimizerSurgery(optimizer, alignment=0.3)
    plain_optimizer = optimizer_class(plain.parameters(), **options)
    for step in range(3):
        surgery_step(model, optimizer, surgery, step)
        plain_step(plain, plain_optimizer, step, alignment=0.3)
    assert_same_weights(model, plain)


@both
def test_captured_gradients_accumulate_and_the_tasks_stay(kind):
    model, plain = small_model(), small_model()
    optimizer, surgery = make(kind, model, alignment=0.3)
    for micro in range(4):
        loss_on(model, 10 + micro, scale=0.25).backward()
        task = [p.grad.clone() for p in model.parameters()]
        with surgery.harmful():
            loss_on(model, 20 + micro, scale=0.25).backward()
        assert all(torch.equal(p.grad, t) for p, t in zip(model.parameters(), task))
        with surgery.beneficial():
            loss_on(model, 30 + micro, scale=0.25).backward()
    optimizer.step()

    total = [
        [sum(parts) for parts in zip(*(grads_of(plain, base + i, scale=0.25) for i in range(4)))]
        for base in (10, 20, 30)
    ]
    for p, e in zip(plain.parameters(), reference.project_align_(*total, range(5), alignment=0.3)):
        p.grad = e
    torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1).step()
    assert_same_weights(model, plain)


@both
def test_without_captures_it_is_the_plain_optimizer(kind):
    model, plain = small_model(torch.float32), small_model(torch.float32)
    optimizer, _ = make(kind, model)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1, foreach=True)
    for step in range(3):
        for m, o in ((model, optimizer), (plain, plain_optimizer)):
            loss_on(m, step).backward()
            o.step()
            o.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))


@both
def test_alignment_without_anything_harmful(kind):
    model, plain = small_model(), small_model()
    optimizer, surgery = make(kind, model, alignment=0.3)
    with surgery.beneficial():
        loss_on(model, 1).backward()
    loss_on(model, 0).backward()
    optimizer.step()

    for p, g, b in zip(plain.parameters(), grads_of(plain, 0), grads_of(plain, 1)):
        p.grad = g + 0.3 * b.clamp(max=0)
    torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1).step()
    assert_same_weights(model, plain)


@both
def test_a_capture_serves_one_step(kind):
    model, plain = small_model(), small_model()
    optimizer, surgery = make(kind, model)
    surgery_step(model, optimizer, surgery, 0, beneficial=False)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    plain_step(plain, plain_optimizer, 0, beneficial=False)
    for m, o in ((model, optimizer), (plain, plain_optimizer)):
        loss_on(m, 7).backward()
        o.step()
    assert_same_weights(model, plain)
    assert surgery.metrics() is None


@both
def test_parameter_groups_frozen_and_unused_parameters(kind):
    """Groups with options of their own, a layer across two of them, a frozen and two unreached parameters."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"a": nn.Linear(3, 4), "b": nn.Linear(4, 1), "unused": nn.Linear(2, 2), "c": nn.Linear(4, 1)}
    )
    model.double()
    model["a"].bias.requires_grad_(False)
    plain = copy.deepcopy(model)
    x = torch.randn(6, 3, dtype=torch.float64)

    def groups(m):
        decay = [(n, p) for n, p in m.named_parameters() if n.endswith("weight")]
        rest = [(n, p) for n, p in m.named_parameters() if n.endswith("bias")]
        return [{"params": decay, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0, "lr": 0.02}]

    def losses(m):
        hidden = m["a"](x).tanh()
        return (m["b"](hidden) + m["c"](hidden)).square().mean(), m["b"](hidden).sin().mean()

    options = {"granularity": "layer", "rule": "full"}
    if kind == "SurgeryAdamW":
        optimizer = surgery = SurgeryAdamW(groups(model), lr=0.1, **options)
    else:
        optimizer = torch.optim.AdamW(groups(model), lr=0.1)
        surgery = OptimizerSurgery(optimizer, **options)
    plain_optimizer = torch.optim.AdamW(groups(plain), lr=0.1)
    for _ in range(2):
        with surgery.harmful():
            losses(model)[1].backward()
        losses(model)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

        task, harm = losses(plain)
        reached = [plain["a"].weight, plain["b"].weight, plain["b"].bias]
        h = torch.autograd.grad(harm, reached, retain_graph=True)
        task.backward()
        edited = reference.project_align_([p.grad for p in reached], h, None, [0, 1, 1], rule="full")
        for p, e in zip(reached, edited):
            p.grad = e
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert_same_weights(model, plain)
    assert surgery.metrics().layers == ["a", "b"]


@both
def test_parameters_added_later_take_part(kind):
    model, late = small_model(), small_model(seed=1)
    optimizer, surgery = make(kind, model, rule="full")
    optimizer.add_param_group({"params": list(late.named_parameters())})
    with surgery.harmful():
        loss_on(late, 0).backward()
    loss_on(late, 0).backward()
    before = [p.detach().clone() for p in late.parameters()]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    for p, b, m in zip(late.parameters(), before, surgery.metrics().removed):
        assert m > 0.99 or p.grad.abs().max() == 0
        assert kind == "SurgeryAdamW" or p.grad.abs().max() < 1e-5 * max(1, b.abs().max())


@both
def test_alignment_may_change_and_be_a_tensor(kind):
    model, plain = small_model(), small_model()
    optimizer, surgery = make(kind, model, alignment=torch.tensor(0.3, dtype=torch.float64))
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    for step, alignment in enumerate((0.3, 0.7)):
        getattr(surgery, "surgery", surgery).alignment = alignment
        surgery_step(model, optimizer, surgery, step)
        plain_step(plain, plain_optimizer, step, alignment=alignment)
    assert_same_weights(model, plain)


def test_hooked_optimizer_state_dict_round_trip():
    model, other = small_model(), small_model()
    optimizer, surgery = make("OptimizerSurgery", model)
    surgery_step(model, optimizer, surgery, 0)
    other_optimizer, other_surgery = make("OptimizerSurgery", other)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    other_optimizer.load_state_dict(state)
    for m, o, s in ((model, optimizer, surgery), (other, other_optimizer, other_surgery)):
        surgery_step(m, o, s, 1)
    assert_same_weights(model, other)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": "first"}, "order must be one of align_first, project_first, got 'first'"),
        ({"rule": "half"}, "rule must be one of positive, full, conflict"),
        ({"granularity": "block"}, "granularity must be one of tensor, layer, model, got 'block'"),
        ({"granularity": "layer"}, 'granularity="layer" needs to know the modules: pass model='),
    ],
)
def test_options_that_do_not_exist(options, message):
    parameters = list(small_model().parameters())
    with pytest.raises(ValueError, match=message):
        OptimizerSurgery(torch.optim.SGD(parameters, lr=0.1), **options)
    with pytest.raises(ValueError, match=message):
        SurgeryAdamW(parameters, **options)


def test_model_names_the_layers():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    surgery = OptimizerSurgery(optimizer, granularity="layer", model=model)
    surgery_step(model, optimizer, surgery, 0)
    assert surgery.metrics().layers == ["0", "2", "4"]
