"""ObjectiveSurgery in loops of one process, against the same computation done plainly."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from dgs_kernels import ObjectiveSurgery, reference
from dgs_kernels.hooks.objectives import RUNNING_SUM
from dgs_kernels.hooks.weightings import NAMES, weigh
from tests.dgs_kernels.training_loops import every_product

LAYERS = {"tensor": [0, 1, 2, 3], "layer": [0, 0, 1, 1], "model": [0, 0, 0, 0]}


def small_model(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def losses(model, step: int, count: int = 3, part: slice = slice(None)) -> list[torch.Tensor]:
    """`count` losses on one batch that pull apart; means over the rows of `part`."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64).to(dtype)[part]
    y = model(x)
    aims = torch.randn(count, 3, generator=generator, dtype=torch.float64).to(dtype)
    return [(1 + k) * (y - aim).square().mean() for k, aim in enumerate(aims)]


def gradients(model, *args, **options) -> list[list[torch.Tensor]]:
    params = list(model.parameters())
    return [
        list(torch.autograd.grad(loss, params, retain_graph=True)) for loss in losses(model, *args, **options)
    ]


def make(weighting="pcgrad", granularity="model", dtype=torch.float64, **options):
    model = small_model(dtype)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, ObjectiveSurgery(optimizer, weighting, granularity, **options)


def capture(surgery, of: list[torch.Tensor], names=None, factor=1.0) -> None:
    for loss, name in zip(of, names or itertools.repeat(None)):
        with surgery.objective(name):
            (loss * factor).backward(retain_graph=True)


def combination(objectives, weighting, layers, generator=None) -> list[torch.Tensor]:
    """The formulas: a Gramian, weights, weighted sums."""
    gramian = reference.gramian(objectives, layers)
    weights = weigh(weighting, gramian, generator or torch.Generator().manual_seed(0))
    return reference.combine_(objectives[0], objectives, weights, layers)


def assert_grads(model, want, **tolerance) -> None:
    for p, grad in zip(model.parameters(), want):
        torch.testing.assert_close(p.grad, grad, **tolerance)


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
        for p, grad in zip(
            plain.parameters(),
            combination(gradients(plain, step), weighting, LAYERS[granularity], generator),
        ):
            p.grad = grad
        plain_optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_mean_is_the_mean_loss():
    model, optimizer, surgery = make("mean", "tensor")
    capture(surgery, losses(model, 0))
    optimizer.step()
    plain = small_model()
    (sum(losses(plain, 0)) / 3).backward()
    assert_grads(model, [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("task_first", [True, False])
def test_what_stands_in_grad_is_the_first_objective(task_first):
    model, optimizer, surgery = make("gem")
    task, *others = losses(model, 0, 4)
    if task_first:
        task.backward(retain_graph=True)
    capture(surgery, others)
    if not task_first:
        task.backward()
    optimizer.step()
    assert surgery.metrics().objectives == [".grad", "objective 0", "objective 1", "objective 2"]
    assert_grads(model, combination(gradients(small_model(), 0, 4), "gem", [0] * 4))


def test_micro_batches_of_a_name_add_up():
    model, optimizer, surgery = make(every_product)
    names = ["a", "b", "c"]
    for part in (slice(0, 4), slice(4, 8)):
        capture(surgery, losses(model, 0, part=part), names, 0.5)
    optimizer.step()
    assert surgery.metrics().objectives == names
    assert_grads(model, combination(gradients(small_model(), 0), every_product, [0] * 4))


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
    want = combination(gradients(model, 0), "upgrad", [0] * 4)
    assert_grads(model, want)
    with pytest.raises(RuntimeError, match="objective\\(\\) after combine"):
        capture(surgery, losses(model, 0))
    clip_grad_norm_(model.parameters(), 0.01)
    found = surgery.metrics()
    optimizer.step()
    norm = torch.cat([w.reshape(-1) for w in want]).norm()
    assert_grads(model, [w * 0.01 / (norm + 1e-6) for w in want])
    assert surgery.metrics() is found  # what combine() found, for the step that it was made for
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
            want = combination(gradients(before, step), every_product, [0] * 4)
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
    capture(surgery, first if task else [*first, last])
    assert list(surgery._captured) == [RUNNING_SUM]  # one gradient, and while another is captured two
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
        assert_grads(model, combination(gradients(small_model(), 0, 2), "pcgrad", [0] * 4))


def test_running_mode_with_a_scaler():
    """PCGrad does not see the scale; an overflow of one loss skips the step, and nothing of it stays."""
    model, optimizer, _ = make(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    surgery = ObjectiveSurgery(optimizer, mode="running", scaler=scaler)
    for factor in (torch.inf, 1.0):
        first, second, task = losses(model, 0)
        capture(surgery, [scaler.scale(first), scaler.scale(second * factor)])
        scaler.scale(task).backward()
        before = copy.deepcopy(model)
        scaler.step(optimizer)
        scaler.update()
        if factor == 1:
            objectives = gradients(before, 0)
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
    surgery = ObjectiveSurgery(torch.optim.SGD(model.trunk.parameters()), "mgda")
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
        return image + low + high, conv(x).sin().mean() - low  # the second does not reach the last

    objectives = []
    for loss in both():
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        objectives.append([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)])
    capture(surgery, both())
    optimizer.step()
    for p, want in zip(params, combination(objectives, "pcgrad", [0] * 4)):
        torch.testing.assert_close(p.grad, want)
        assert p.grad.dtype == p.dtype


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
    sum(losses(model, 0)).backward()  # a framework's own backward, on the total
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


def test_a_weighting_for_each_layer():
    model, optimizer, surgery = make(["mean", every_product], "layer")
    capture(surgery, losses(model, 0))
    optimizer.step()
    objectives = gradients(small_model(), 0)
    first = combination([g[:2] for g in objectives], "mean", [0, 0])
    second = combination([g[2:] for g in objectives], every_product, [0, 0])
    assert_grads(model, first + second)


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
            "one for each of the 2 layers \\(0, 2\\), got 1",
        ),
        ({"weighting": []}, "one for each of the 1 layers \\(model\\), got 0"),
        ({"weighting": Remembers(), "granularity": "layer"}, "a list of 2, one for each layer"),
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
    copy.deepcopy(optimizer)  # it carries no hook of a surgery that was never made
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
    assert not surgery._captured
    capture(surgery, losses(model, 0, 16))
    with pytest.raises(RuntimeError, match=r"more than 16 objectives .*name them"):
        capture(surgery, losses(model, 0, 1))
    with pytest.raises(TypeError, match=r"surgery\.remove"):
        copy.deepcopy(optimizer)
    surgery.remove()
    losses(model, 0, 1)[0].backward()
    optimizer.step()
    assert_grads(model, gradients(small_model(), 0, 1)[0])


def test_metrics():
    model, optimizer, surgery = make("pcgrad", "layer")
    capture(surgery, losses(model, 0), ["a", "b", "c"])
    optimizer.step()
    found = surgery.metrics()
    gramian = reference.gramian(gradients(small_model(), 0), LAYERS["layer"])
    torch.testing.assert_close(found.gramian, gramian)
    torch.testing.assert_close(found.weights, weigh("pcgrad", gramian, torch.Generator().manual_seed(0)))
    assert found.layers == ["0", "2"] and found.objectives == ["a", "b", "c"]
    pairs = [(g, i, j) for g in range(2) for i, j in itertools.combinations(range(3), 2)]
    rate = sum(gramian[pair] < 0 for pair in pairs) / len(pairs)
    assert 0 < rate < 1
    torch.testing.assert_close(found.conflict_rate, rate.float())
    numbers = found.scalars("s")
    assert len(numbers) == 1 + 2 * (3 + 3)
    cosine = gramian[1, 0, 2] / (gramian[1, 0, 0] * gramian[1, 2, 2]).sqrt()
    assert numbers["s/cosine/a, c/2"] == pytest.approx(cosine.item(), rel=1e-5)
    assert numbers["s/weight/b/0"] == pytest.approx(found.weights[0, 1].item(), rel=1e-5)
    assert numbers["s/conflict_rate"] == pytest.approx(rate.item())


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
