"""SurgeryAdamW as an AdamW: options of its groups, beside groups without surgery, and its state."""

from __future__ import annotations

import copy

import pytest
import torch

from dgs_kernels import SurgeryAdamW, reference
from tests.dgs_kernels.hooks.steps import (
    assert_same_weights,
    loss_on,
    make,
    plain_step,
    small_model,
    surgery_step,
)


def reference_loss(params: list[torch.Tensor], number: int) -> torch.Tensor:
    """Reaches these parameters and no others."""
    return sum((p * (number + 1.5) + i).sin().sum() for i, p in enumerate(params))


@pytest.mark.parametrize("captured", ["first", "second", "both"])
@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"betas": (0.7, 0.9)},
        {"betas": (0.9, 0.8)},
        {"eps": 0.3},
        {"weight_decay": 0.5},
        {"lr": 0.02},
        {"lr": torch.tensor(0.02, dtype=torch.float64)},
    ],
    ids=str,
)
def test_options_belong_to_their_group_with_surgery_and_without(options, captured):
    """The second group has its own; a group that no reference reaches steps plainly, with its own too."""

    def groups(model):
        first, *others = model.children()
        return [
            {"params": list(first.parameters())},
            {"params": [p for layer in others for p in layer.parameters()], **options},
        ]

    def reached(model):
        first, second = (group["params"] for group in groups(model))
        return {"first": first, "second": second, "both": [*first, *second]}[captured]

    model, plain = small_model(), small_model()
    optimizer = SurgeryAdamW(groups(model), lr=0.05, alignment=0.3)
    plain_optimizer = torch.optim.AdamW(groups(plain), lr=0.05)
    for step in range(3):
        with optimizer.harmful():
            reference_loss(reached(model), step).backward()
        with optimizer.beneficial():
            reference_loss(reached(model), 10 + step).backward()
        loss_on(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()

        params = reached(plain)
        harmful, beneficial = (
            torch.autograd.grad(reference_loss(params, number), params) for number in (step, 10 + step)
        )
        loss_on(plain, step).backward()
        edited = reference.project_align_(
            [p.grad for p in params], harmful, beneficial, range(len(params)), alignment=0.3
        )
        for p, grad in zip(params, edited):
            p.grad = grad
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert_same_weights(model, plain)


def test_maximize():
    """Of all groups, in the single pass that does surgery and step."""
    model, plain = small_model(), small_model()
    optimizer = SurgeryAdamW(model.parameters(), lr=0.05, maximize=True)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, maximize=True)
    for step in range(2):
        surgery_step(model, optimizer, optimizer, step)
        plain_step(plain, plain_optimizer, step)
    assert_same_weights(model, plain)


def test_gradients_are_read_and_not_written():
    model = small_model()
    optimizer = SurgeryAdamW(model.parameters(), lr=0.05)
    with optimizer.harmful():
        loss_on(model, 1).backward()
    loss_on(model, 0).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert optimizer.metrics().removed.any()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before))


def test_state_dicts_are_those_of_adamw():
    model, plain = small_model(), small_model()
    optimizer, surgery = make("SurgeryAdamW", model)
    plain_optimizer = torch.optim.AdamW(plain.named_parameters(), lr=0.05, weight_decay=0.1)
    surgery_step(model, optimizer, surgery, 0)
    plain.load_state_dict(model.state_dict())
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (plain, plain_optimizer)):
        loss_on(m, 5).backward()
        o.step()
        o.zero_grad()
    assert_same_weights(model, plain)

    resumed = small_model()
    resumed.load_state_dict(plain.state_dict())
    again, surgery_again = make("SurgeryAdamW", resumed)
    again.load_state_dict(copy.deepcopy(plain_optimizer.state_dict()))
    surgery_step(resumed, again, surgery_again, 1)
    surgery_step(model, optimizer, surgery, 1)
    assert_same_weights(resumed, model)
