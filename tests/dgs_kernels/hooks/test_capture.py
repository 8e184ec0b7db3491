"""What every hook on parameters shares: capturing, skipped steps, cleaning up, copies and closures."""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from dgs_kernels import ObjectiveSurgery, OptimizerSurgery, SurgeryAdamW
from tests.dgs_kernels.hooks.training_loops import (
    ADAMW,
    SURGERY,
    Hook,
    Net,
    assert_same,
    batch,
    hooks,
    on_parameters,
    plain,
    reference_loss,
    scaled,
    task_loss,
    train,
    weights,
)

removable = pytest.mark.parametrize("kind", SURGERY)


def loss_on(model, number: int) -> torch.Tensor:
    b = batch(number, next(model.parameters()).dtype)
    return task_loss(model(b.x)[0], b)


def stepped_plainly(*numbers: int, dtype=torch.float64) -> list[torch.Tensor]:
    """Weights after plain steps of AdamW on these batches."""
    model = Net(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for number in numbers:
        optimizer.zero_grad()
        loss_on(model, number).backward()
        optimizer.step()
    return weights(model)


def grads(model) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


# Steps that a GradScaler skips ---------------------------------------------------------------------------


@hooks
@pytest.mark.parametrize("overflow", ["task", "harmful"])
def test_a_skipped_fp16_step_leaves_nothing_behind(kind, overflow):
    """An overflow in task or reference skips the step and lowers the scale; what follows does not notice."""
    if kind == "features" and overflow == "harmful":
        return
    model, scaler, hook, step = scaled(kind)
    b = batch(50, torch.float32)
    hook.references(
        model, b, lambda loss: scaler.scale(loss * (torch.inf if overflow == "harmful" else 1)).backward()
    )
    scaler.scale(hook.loss(model, b) * (torch.inf if overflow == "task" else 1)).backward()
    step()
    hook.optimizer.zero_grad()
    assert scaler.get_scale() == 512 and all(map(torch.equal, weights(model), weights(Net(torch.float32))))
    train(hook, model, backward=lambda loss: scaler.scale(loss).backward(), dtype=torch.float32, step=step)
    assert_same(weights(model), plain(kind, dtype=torch.float32), tolerance=1e-4)


@on_parameters
def test_what_a_skipped_step_left_is_not_in_one_without_references(kind):
    model, scaler, hook, step = scaled(kind)
    b = batch(50, torch.float32)
    hook.references(model, b, lambda loss: scaler.scale(loss).backward())
    scaler.scale(hook.loss(model, b) * torch.inf).backward()
    step()
    hook.optimizer.zero_grad()
    scaler.scale(hook.loss(model, b)).backward()
    step()
    assert_same(weights(model), stepped_plainly(50, dtype=torch.float32), tolerance=1e-5)


@on_parameters
def test_a_scale_that_grows_between_steps_loses_nothing(kind):
    model, scaler, hook, step = scaled(kind, growth_interval=1)
    train(hook, model, backward=lambda loss: scaler.scale(loss).backward(), dtype=torch.float32, step=step)
    assert scaler.get_scale() == 8 * 1024
    assert_same(weights(model), plain(kind, dtype=torch.float32), tolerance=1e-4)


@on_parameters
@pytest.mark.parametrize("given", [False, True])
def test_a_scaler_that_is_switched_off_changes_nothing(kind, given):
    model, scaler = Net(), torch.amp.GradScaler("cpu", enabled=False)
    hook = Hook(kind, model, **({"scaler": scaler} if given else {}))
    train(hook, model, step=lambda: scaler.step(hook.optimizer))
    assert_same(weights(model), plain(kind))


@on_parameters
def test_a_scaler_that_surgery_was_not_told_of_is_refused(kind):
    model, scaler = Net(torch.float32), torch.amp.GradScaler("cpu")
    hook = Hook(kind, model)
    hook.backward(model, batch(0, torch.float32), lambda loss: scaler.scale(loss).backward())
    with pytest.raises(RuntimeError, match="pass it as scaler="):
        scaler.step(hook.optimizer)


# Cleaning up ---------------------------------------------------------------------------------------------


def watched(hook, model) -> list[weakref.ref]:
    """Capture every reference; what looks at the tensors that hold them, and does not keep them alive."""
    held = []
    for number, context in enumerate(hook.contexts()):
        with context():
            loss_on(model, 10 + number).backward()
            held += [weakref.ref(p.grad) for p in model.parameters()]
    return held


@removable
def test_remove_makes_it_the_plain_optimizer_again(kind):
    model = Net()
    hook = Hook(kind, model)
    held = watched(hook, model)
    assert all(ref() is not None for ref in held)
    hook.surgery.remove()
    # Their memory is free.
    assert all(ref() is None for ref in held)
    loss_on(model, 0).backward()
    hook.optimizer.step()
    # What is captured from now on belongs to no surgery.
    watched(hook, model)
    hook.optimizer.zero_grad()
    loss_on(model, 2).backward()
    hook.optimizer.step()
    assert_same(weights(model), stepped_plainly(0, 2))
    # A second removal does nothing.
    hook.surgery.remove()
    copy.deepcopy(hook.optimizer)


@on_parameters
def test_a_step_frees_what_was_captured_for_it(kind):
    model = Net()
    hook = Hook(kind, model)
    held = watched(hook, model)
    loss_on(model, 0).backward()
    hook.optimizer.step()
    assert hook.surgery.metrics() is not None
    assert all(ref() is None for ref in held)


@on_parameters
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_interrupt_inside_a_capture_leaves_nothing_of_it(kind, error):
    """`.grad` is the task's again, the other reference stays, and what was interrupted can be run again."""
    model, same = Net(), Net()
    hook, undisturbed = Hook(kind, model), Hook(kind, same)
    b = batch(0)
    harmful, beneficial = hook.contexts()
    loss_on(model, 0).backward()
    task = grads(model)
    for context, x in ((harmful, b.x_harmful), (beneficial, b.x_beneficial)):
        with context():
            reference_loss(model(x)[0]).backward()
    with pytest.raises(error), beneficial():
        reference_loss(model(b.x)[0]).backward()
        raise error
    assert all(map(torch.equal, grads(model), task))
    with beneficial():
        reference_loss(model(b.x_beneficial)[0]).backward()
    hook.optimizer.step()

    undisturbed.backward(same, b)
    undisturbed.optimizer.step()
    assert_same(weights(model), weights(same))


@on_parameters
def test_what_an_interrupted_capture_had_gathered_is_gone_too(kind):
    """Half a gradient is none: the step is the plain one."""
    model = Net()
    hook = Hook(kind, model)
    context = hook.contexts()[0]
    with context():
        loss_on(model, 10).backward()
    with pytest.raises(KeyboardInterrupt), context():
        raise KeyboardInterrupt
    loss_on(model, 0).backward()
    hook.optimizer.step()
    assert hook.surgery.metrics() is None
    assert_same(weights(model), stepped_plainly(0))


@removable
def test_clear_forgets_what_was_captured(kind):
    model = Net()
    hook = Hook(kind, model)
    held = watched(hook, model)
    hook.surgery.clear()
    assert all(ref() is None for ref in held)
    loss_on(model, 0).backward()
    hook.optimizer.step()
    assert_same(weights(model), stepped_plainly(0))


# Misuse --------------------------------------------------------------------------------------------------


@on_parameters
def test_misuse_raises_and_leaves_the_hook_usable(kind):
    model = Net()
    hook = Hook(kind, model)
    first, second = hook.contexts()
    name = "objective" if kind == "objectives" else "harmful"
    with pytest.raises(RuntimeError, match="no gradient of this optimizer's parameters arrived"), first():
        pass
    nested = pytest.raises(RuntimeError, match=rf"inside {name}\(\): capture one after the other")
    with nested, first(), second():
        pass
    with pytest.raises(RuntimeError, match=rf"step\(\) inside {name}\(\): leave the context"), first():
        hook.optimizer.step()
    hook.references(model, batch(0))
    with pytest.raises(RuntimeError, match="no gradient of this optimizer's parameters arrived"), first():
        loss_on(Net(), 0).backward()
    hook.surgery.clear() if kind in SURGERY else hook.surgery.surgery.clear()
    train(hook, model)
    assert_same(weights(model), plain(kind))


@on_parameters
def test_sparse_gradients_are_refused(kind):
    embedding = nn.Embedding(4, 3, sparse=True)
    hook = Hook(kind, embedding)
    context = hook.contexts()[0]
    refused = pytest.raises(TypeError, match=r"the gradient of 0\.0 is sparse.*Embedding\(sparse=False\)")
    with refused, context():
        embedding(torch.tensor([1])).sum().backward()
    assert embedding.weight.grad is None
    # Nothing of the refused capture is left, and a dense one works.
    with context():
        (embedding.weight * 2).sum().backward()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"the gradient of 0\.0 is sparse"):
        hook.optimizer.step()


def test_only_optimizers_are_hooked():
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got Net"):
        OptimizerSurgery(Net())


# Copies --------------------------------------------------------------------------------------------------

COPIES = (copy.deepcopy, copy.copy, pickle.dumps, lambda o: torch.save(o, io.BytesIO()))


@pytest.mark.parametrize("action", COPIES)
def test_a_copy_without_its_surgery_is_refused(action):
    """Of two hooks on one optimiser, too, whichever is removed first."""
    for last in range(2):
        optimizer = torch.optim.SGD(Net().parameters())
        surgeries = [OptimizerSurgery(optimizer), ObjectiveSurgery(optimizer)]
        for surgery in (surgeries[1 - last], surgeries[last]):
            with pytest.raises(TypeError, match=r"call surgery.remove\(\) first"):
                action(optimizer)
            surgery.remove()
        action(optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_surgery_adamw_is_copied_with_its_surgery(copied):
    def step(model, optimizer, number):
        with optimizer.harmful():
            loss_on(model, 10 + number).backward()
        loss_on(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()

    model = Net()
    optimizer = SurgeryAdamW(model.named_parameters(), **ADAMW, granularity="layer", rule="full")
    step(model, optimizer, 0)
    other, its_optimizer = copied((model, optimizer))
    step(model, optimizer, 1)
    step(other, its_optimizer, 1)
    assert_same(weights(other), weights(model))
    assert its_optimizer.metrics().layers == ["backbone.0", "backbone.2", "backbone.3", "head"]
    # The context captures the copy's parameters, not the original's.
    with its_optimizer.harmful():
        loss_on(other, 0).backward()
    with pytest.raises(RuntimeError, match="no gradient of this optimizer's"), its_optimizer.harmful():
        loss_on(model, 0).backward()


# Closures ------------------------------------------------------------------------------------------------


@on_parameters
@pytest.mark.parametrize("keyword", [False, True])
def test_closures(kind, keyword):
    """A closure runs with gradients on, and the step returns what it does."""
    model, same = Net(), Net()
    hook, other = Hook(kind, model), Hook(kind, same)
    losses = []

    def closure():
        hook.optimizer.zero_grad()
        hook.references(model, batch(0))
        losses.append(hook.loss(model, batch(0)))
        losses[-1].backward()
        return losses[-1]

    with torch.no_grad():
        returned = hook.optimizer.step(closure=closure) if keyword else hook.optimizer.step(closure)
    other.backward(same, batch(0))
    other.optimizer.step()
    assert [returned] == losses
    assert_same(weights(model), weights(same))
