"""ObjectiveSurgery in loops of one process, against the same steps done by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from dgs_kernels import ObjectiveSurgery
from dgs_kernels.hooks.weightings import NAMES
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
from tests.dgs_kernels.hooks.training_loops import every_product

MODEL = LAYERS["model"]


@pytest.mark.parametrize("granularity", LAYERS)
@pytest.mark.parametrize("weighting", [*NAMES, every_product])
def test_steps_equal_the_formula(weighting, granularity):
    model, optimizer, surgery = make(weighting, granularity)
    plain = small_model()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        capture(surgery, losses(model, step))
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        combined = combination(gradients(plain, step), weighting, LAYERS[granularity], generator)
        for p, grad in zip(plain.parameters(), combined):
            p.grad = grad
        plain_optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_mean_is_the_mean_loss():
    model, optimizer, surgery = make("mean", "tensor")
    capture(surgery, losses(model, 0))
    optimizer.step()
    plain = small_model()
    (sum(losses(plain, 0)) / 4).backward()
    assert_grads(model, [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("task_first", [True, False])
def test_what_stands_in_grad_is_the_first_objective(task_first):
    model, optimizer, surgery = make("gem")
    task, *others = losses(model, 0, 3)
    if task_first:
        task.backward(retain_graph=True)
    capture(surgery, others)
    if not task_first:
        task.backward()
    optimizer.step()
    assert surgery.metrics().objectives == [".grad", "objective 0", "objective 1"]
    assert_grads(model, combination(gradients(small_model(), 0, 3), "gem", MODEL))


def test_micro_batches_of_a_name_add_up():
    model, optimizer, surgery = make(every_product)
    names = ["a", "b", "c", "d"]
    for part, share in ((slice(0, 3), 3 / 8), (slice(3, 8), 5 / 8)):
        capture(surgery, losses(model, 0, part=part), names, share)
    optimizer.step()
    assert surgery.metrics().objectives == names
    assert_grads(model, combination(gradients(small_model(), 0), every_product, MODEL))


def test_one_or_no_objective_is_a_plain_step():
    for count in (0, 1):
        model, optimizer, surgery = make("mgda")
        capture(surgery, losses(model, 0, count))
        optimizer.step()
        assert surgery.metrics() is None
        if count:
            assert_grads(model, gradients(small_model(), 0, 1)[0], rtol=0, atol=0)
    losses(model, 0, 1)[0].backward()
    optimizer.step()
    assert surgery.metrics() is None


def test_combine_then_clip():
    model, optimizer, surgery = make("upgrad")
    capture(surgery, losses(model, 0))
    surgery.combine()
    want = combination(gradients(model, 0), "upgrad", MODEL)
    assert_grads(model, want)
    with pytest.raises(RuntimeError, match="objective\\(\\) after combine"):
        capture(surgery, losses(model, 0))
    clip_grad_norm_(model.parameters(), 0.01)
    found = surgery.metrics()
    optimizer.step()
    norm = torch.cat([w.reshape(-1) for w in want]).norm()
    assert_grads(model, [w * 0.01 / (norm + 1e-6) for w in want])
    # These are the metrics that combine() found for this step.
    assert surgery.metrics() is found
    optimizer.zero_grad()
    capture(surgery, losses(model, 1))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_with_every_loss_captured(fused):
    """combine() before scaler.step(): the weighting sees true gradients, an overflow skips the step."""
    model = small_model(torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    surgery = ObjectiveSurgery(optimizer, every_product, scaler=scaler)
    for step, factor in ((0, 1.0), (1, torch.inf), (2, 1.0)):
        before = copy.deepcopy(model)
        for k, loss in enumerate(losses(model, step)):
            with surgery.objective():
                scaler.scale(loss * (factor if k == 1 else 1.0)).backward(retain_graph=True)
        surgery.combine()
        scale = scaler.get_scale()
        if factor == 1:
            want = combination(gradients(before, step), every_product, MODEL)
            assert_grads(model, [w * scale for w in want], rtol=1e-4, atol=1e-4 * scale)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any((a != b).any() for a, b in zip(model.parameters(), before.parameters()))
        assert moved == (factor == 1) and scaler.get_scale() == (scale if moved else scale / 2)
    assert all(p.isfinite().all() for p in model.parameters())
    losses(model, 0, 1)[0].backward()
    with pytest.raises(RuntimeError, match="every backward inside objective"):
        surgery.combine()


class TwoHeads(nn.Module):
    """A trunk, two heads that one loss each reaches, a tied, a frozen and an unused parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 2), nn.Linear(6, 3)
        self.tied = nn.Linear(6, 2)
        self.tied.weight = self.first.weight
        self.frozen, self.unused = nn.Linear(5, 6), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.double()

    def losses(self, step):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        hidden = (self.trunk(x) + self.frozen(x)).tanh()
        first = (self.first(hidden) + self.tied(hidden)).square().mean()
        return first, (self.second(hidden) - 1).square().mean(), hidden.sin().mean()


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_heads_that_only_some_losses_reach(granularity):
    """Where a loss does not reach, its gradient is zero; where none does, the optimiser finds none."""
    model, plain = TwoHeads(), TwoHeads()
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if "bias" not in n]},
        {"params": [(n, p) for n, p in model.named_parameters() if "bias" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    surgery = ObjectiveSurgery(optimizer, every_product, granularity)
    capture(surgery, model.losses(0))
    optimizer.step()

    names = [n for n, p in plain.named_parameters() if p.requires_grad and "unused" not in n]
    params = [plain.get_parameter(n) for n in names]
    objectives = [
        [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]
        for grads in (
            torch.autograd.grad(loss, params, None, True, allow_unused=True) for loss in plain.losses(0)
        )
    ]
    layer_names = [n.rpartition(".")[0] if granularity == "layer" else "model" for n in names]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(layer_names))}
    want = combination(objectives, every_product, [numbers[n] for n in layer_names])
    for name, grad in zip(names, want):
        torch.testing.assert_close(model.get_parameter(name).grad, grad)
    for name in ("frozen.weight", "frozen.bias", "unused.weight", "unused.bias"):
        assert model.get_parameter(name).grad is None
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name))


def test_heads_with_an_optimiser_of_their_own_get_their_plain_gradients():
    model, plain = TwoHeads(), TwoHeads()
    optimizer = torch.optim.SGD(model.trunk.parameters())
    surgery = ObjectiveSurgery(optimizer, "mgda")
    capture(surgery, model.losses(0))
    sum(plain.losses(0)).backward()
    for mine, theirs in zip(model.second.parameters(), plain.second.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert all(p.grad is None for p in model.trunk.parameters())


def test_mixed_types_and_layouts():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    params = [conv.weight, conv.bias, nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    params.append(nn.Parameter(torch.ones(2, dtype=torch.float64)))
    optimizer = torch.optim.SGD(params)
    surgery = ObjectiveSurgery(optimizer, "pcgrad")
    x = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)

    def both():
        image, low, high = conv(x).square().mean(), params[2].float().sum(), params[3].sum()
        # The second loss does not reach the last parameter.
        return image + low + high, conv(x).sin().mean() - low

    objectives = []
    for loss in both():
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        objectives.append([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)])
    capture(surgery, both())
    optimizer.step()
    for p, want in zip(params, combination(objectives, "pcgrad", [0] * 4)):
        torch.testing.assert_close(p.grad, want)
        assert p.grad.dtype == p.dtype


def test_a_weighting_for_each_layer():
    model, optimizer, surgery = make(["mean", every_product, "ogd"], "layer")
    capture(surgery, losses(model, 0))
    optimizer.step()
    objectives = gradients(small_model(), 0)
    want = []
    for layer, weighting in ((slice(0, 2), "mean"), (slice(2, 3), every_product), (slice(3, 5), "ogd")):
        of_layer = [grads[layer] for grads in objectives]
        want += combination(of_layer, weighting, [0] * len(of_layer[0]))
    assert_grads(model, want)


def test_a_weighting_stays_with_its_layer_where_losses_reach_only_some():
    model, optimizer, surgery = make(["mean", every_product, "ogd"], "layer")
    last, plain = model[4], small_model()[4]

    def of(layer):
        return layer.weight.square().sum(), layer.weight.sin().sum() + layer.bias.cos().sum()

    capture(surgery, of(last))
    optimizer.step()
    objectives = [
        list(torch.autograd.grad(loss, [*plain.parameters()], materialize_grads=True)) for loss in of(plain)
    ]
    assert_grads(last, combination(objectives, "ogd", [0, 0]))
    assert surgery.metrics().layers == ["4"] and model[0].weight.grad is None


def test_orders_come_from_the_seed_and_can_be_resumed():
    def step(surgery, model, optimizer, number):
        capture(surgery, losses(model, number, 6))
        optimizer.step()
        optimizer.zero_grad()
        return surgery.metrics().weights

    (first, *one), (second, *other), (third, *same) = (make(seed=seed) for seed in (0, 3, 0))
    weights = step(one[1], first, one[0], 0)
    assert not torch.equal(step(other[1], second, other[0], 0), weights)
    assert torch.equal(step(same[1], third, same[0], 0), weights)
    resumed, optimizer, surgery = make(seed=5)
    resumed.load_state_dict(first.state_dict())
    surgery.generator.set_state(one[1].generator.get_state())
    assert torch.equal(step(surgery, resumed, optimizer, 1), step(one[1], first, one[0], 1))


class Waits(TorchDispatchMode):
    """Fails where a tensor's value is asked for: on a GPU, the host would wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "weighting, count",
    [("mean", 4), ("pcgrad", 4), ("ogd", 4), ("gem", 2), ("mgda", 2), ("upgrad", 2), (every_product, 4)],
)
def test_steps_after_the_first_wait_for_nothing(weighting, count):
    model, optimizer, surgery = make(weighting, "layer")
    capture(surgery, losses(model, 0, count))
    optimizer.step()
    optimizer.zero_grad()
    with Waits():
        capture(surgery, losses(model, 1, count))
        surgery.combine()
        surgery.metrics()
    with pytest.raises(AssertionError), Waits():
        bool(torch.ones(()))
