"""What ObjectiveSurgery refuses: unknown options, losses captured twice, contexts in the wrong place."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from dgs_kernels import ObjectiveSurgery
from tests.dgs_kernels.hooks.losses import capture, losses, make, small_model

REPEATED = "is the sum of the others"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["exact", "running"])
def test_a_loss_captured_twice_is_refused(mode, dtype):
    model, optimizer, surgery = make(mode=mode, dtype=dtype)
    loss = losses(model, 0, 1)[0]
    capture(surgery, [loss, loss])
    with pytest.raises(RuntimeError, match=REPEATED):
        optimizer.step()

    model, optimizer, surgery = make(mode=mode, dtype=dtype)
    capture(surgery, losses(model, 0))
    # A framework runs its own backward on the total.
    sum(losses(model, 0)).backward()
    with pytest.raises(RuntimeError, match=f"'.grad' {REPEATED}"):
        optimizer.step()


@pytest.mark.parametrize("mode", ["exact", "running"])
def test_losses_that_are_nearly_alike_are_not_refused(mode):
    model, optimizer, surgery = make(mode=mode)
    whole = losses(model, 0, 1)[0]
    capture(surgery, [whole, 1.05 * whole, 0 * whole])
    optimizer.step()


def test_zeros_left_in_grad_are_refused():
    model, optimizer, surgery = make()
    for _ in range(2):
        capture(surgery, losses(model, 0))
        if model[0].weight.grad is not None:
            with pytest.raises(RuntimeError, match="set_to_none=True"):
                optimizer.step()
            return
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    raise AssertionError


class Remembers:
    """As TorchJD's stateful weightings."""

    def reset(self): ...

    def __call__(self, gramian): ...


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"weighting": "pc_grad"},
            "weighting must be one of mean, ogd, .*, a callable .* or a list of these, got 'pc_grad'",
        ),
        *(
            ({"weighting": weighting}, "weighting must be one of")
            for weighting in (None, 3, ("mean", "ogd"), torch.ones(2), ["mean", 3])
        ),
        ({"weighting": Remembers}, "weighting is the class Remembers: pass an instance"),
        (
            {"weighting": ["mean"], "granularity": "layer"},
            "one for each of the 3 layers \\(0, 2, 4\\), got 1",
        ),
        ({"weighting": []}, "one for each of the 1 layers \\(model\\), got 0"),
        ({"weighting": Remembers(), "granularity": "layer"}, "a list of 3, one for each layer"),
        *(
            ({"granularity": granularity}, "granularity must be one of tensor, layer, model, got")
            for granularity in ("row", None, 1)
        ),
        *(({"mode": mode}, "mode must be one of exact, running, got") for mode in ("walking", None)),
        ({"weighting": "mgda", "mode": "running"}, "it needs weighting=\"pcgrad\", got 'mgda'"),
        ({"seed": "x"}, "seed must be an integer, got str"),
        ({"seed": None}, "seed must be an integer, got NoneType"),
    ],
)
def test_options_that_do_not_exist(options, message):
    model = small_model()
    optimizer = torch.optim.SGD(model.named_parameters())
    with pytest.raises((ValueError, TypeError), match=f"^ObjectiveSurgery: .*{message}"):
        ObjectiveSurgery(optimizer, **options)
    # The optimiser carries no hook of a surgery that was never made.
    copy.deepcopy(optimizer)
    losses(model, 0, 1)[0].backward()
    optimizer.step()


def test_a_weighting_that_remembers_may_serve_one_layer():
    make(Remembers(), "model", seed=np.int64(3))


def test_misuse_of_contexts():
    model, optimizer, surgery = make()
    with pytest.raises(RuntimeError, match="capture one after the other"), surgery.objective():
        capture(surgery, losses(model, 0, 1))
    with pytest.raises(RuntimeError, match="leave the context first"), surgery.objective():
        optimizer.step()
    with pytest.raises(RuntimeError, match="no gradient of this optimizer's parameters arrived"):
        capture(surgery, [torch.ones((), requires_grad=True) * 2])
    for name in (".grad", "sum so far"):
        with pytest.raises(ValueError, match=f"{name!r} is what .* take another name"):
            capture(surgery, losses(model, 0, 1), [name])
    capture(surgery, losses(model, 0, 64))
    with pytest.raises(RuntimeError, match=r"more than 64 objectives .*name them"):
        capture(surgery, losses(model, 0, 1))
    # The step uses all 64 objectives.
    optimizer.step()
    assert len(surgery.metrics().objectives) == 64


def test_a_removed_surgery_combines_nothing():
    model, _, surgery = make()
    capture(surgery, losses(model, 0))
    surgery.remove()
    surgery.combine()
    assert all(p.grad is None for p in model.parameters())
