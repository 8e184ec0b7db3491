"""OptimizerSurgery and SurgeryAdamW in loops of one process, against the same computation done plainly."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from dgs_kernels import OptimizerSurgery, SurgeryAdamW, reference
from dgs_kernels.reference import ORDERS, RULES

SIZES = {"tensor": None, "layer": [0, 0, 1, 1], "model": [0, 0, 0, 0]}


def small_model(dtype=torch.float64, seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def batch(seed, dtype=torch.float64, n=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), x.square().sum(1, keepdim=True).sin().to(dtype)


def loss_on(model, seed, scale=1.0, **options):
    x, y = batch(seed, next(model.parameters()).dtype, **options)
    return (model(x) - y).square().mean() * scale


def grads_of(model, seed, **options):
    return list(torch.autograd.grad(loss_on(model, seed, **options), list(model.parameters())))


def plain_step(model, optimizer, step, groups, beneficial=True, **options) -> None:
    """The step done by hand: three gradients, the reference formula, the plain optimiser."""
    params = list(model.parameters())
    g, h, b = (grads_of(model, 3 * step + i) for i in range(3))
    groups = list(range(len(params))) if groups is None else groups
    edited = reference.project_align_(g, h, b if beneficial else None, groups, **options)
    for p, e in zip(params, edited):
        p.grad = e
    optimizer.step()
    optimizer.zero_grad()


def surgery_step(model, optimizer, surgery, step, beneficial=True) -> None:
    with surgery.harmful():
        loss_on(model, 3 * step + 1).backward()
    if beneficial:
        with surgery.beneficial():
            loss_on(model, 3 * step + 2).backward()
    loss_on(model, 3 * step).backward()
    optimizer.step()
    optimizer.zero_grad()


def make(kind, model, lr=0.05, weight_decay=0.1, **options):
    """(optimizer, surgery) of one of the two kinds."""
    named = model.named_parameters()
    if kind == "SurgeryAdamW":
        optimizer = SurgeryAdamW(named, lr=lr, weight_decay=weight_decay, **options)
        return optimizer, optimizer
    optimizer = torch.optim.AdamW(named, lr=lr, weight_decay=weight_decay, foreach=True)
    return optimizer, OptimizerSurgery(optimizer, **options)


both = pytest.mark.parametrize("kind", ["OptimizerSurgery", "SurgeryAdamW"])


def assert_same(model, other, tolerance=1e-9):
    """AdamW divides by the gradient's size: where surgery leaves only rounding, that is what it magnifies."""
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@both
@pytest.mark.parametrize("granularity", SIZES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_steps_equal_the_formula(kind, granularity, order, rule):
    model, plain = small_model(), small_model()
    optimizer, surgery = make(kind, model, granularity=granularity, order=order, rule=rule, alignment=0.3)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(3):
        surgery_step(model, optimizer, surgery, step)
        plain_step(plain, plain_optimizer, step, SIZES[granularity], alignment=0.3, order=order, rule=rule)
    assert_same(model, plain)


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
        plain_step(plain, plain_optimizer, step, None, alignment=0.3)
    assert_same(model, plain)


@pytest.mark.parametrize(
    "options",
    [{"maximize": True}, {"betas": (0.7, 0.9)}, {"betas": (0.9, 0.8)}, {"eps": 0.3}, {"weight_decay": 0.5}],
    ids=str,
)
def test_options_of_adamw_belong_to_its_groups(options):
    """Of the second group here, and the first has the usual ones."""

    def groups(model):
        return [{"params": model[0].parameters()}, {"params": model[2].parameters(), **options}]

    model, plain = small_model(), small_model()
    optimizer = SurgeryAdamW(groups(model), lr=0.05, alignment=0.3)
    plain_optimizer = torch.optim.AdamW(groups(plain), lr=0.05)
    for step in range(3):
        surgery_step(model, optimizer, optimizer, step)
        plain_step(plain, plain_optimizer, step, None, alignment=0.3)
    assert_same(model, plain)


def test_maximize_of_surgery_adamw():
    model, plain = small_model(), small_model()
    optimizer = SurgeryAdamW(model.parameters(), lr=0.05, maximize=True)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, maximize=True)
    for step in range(2):
        surgery_step(model, optimizer, optimizer, step)
        plain_step(plain, plain_optimizer, step, None)
    assert_same(model, plain)


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
    for p, e in zip(plain.parameters(), reference.project_align_(*total, range(4), alignment=0.3)):
        p.grad = e
    torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1).step()
    assert_same(model, plain)


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
    assert_same(model, plain)


@both
def test_a_capture_serves_one_step(kind):
    model, plain = small_model(), small_model()
    optimizer, surgery = make(kind, model)
    surgery_step(model, optimizer, surgery, 0, beneficial=False)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    plain_step(plain, plain_optimizer, 0, None, beneficial=False)
    for m, o in ((model, optimizer), (plain, plain_optimizer)):
        loss_on(m, 7).backward()
        o.step()
    assert_same(model, plain)
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
    assert_same(model, plain)
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
        plain_step(plain, plain_optimizer, step, None, alignment=alignment)
    assert_same(model, plain)


@both
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("strength", [0.3, 30.0])  # the second turns the sign of an inner product
def test_metrics(kind, order, rule, strength):
    model = small_model()
    g, h, b = (grads_of(model, i) for i in range(3))
    optimizer, surgery = make(kind, model, granularity="layer", alignment=strength, order=order, rule=rule)
    assert surgery.metrics() is None
    surgery_step(model, optimizer, surgery, 0)
    metrics = surgery.metrics()
    assert metrics.layers == ["0", "2"]
    for i, layer in enumerate(([0, 1], [2, 3])):
        g_, h_, b_ = (torch.cat([t[j].flatten() for j in layer]) for t in (g, h, b))
        h_ = h_.clamp(min=0) if rule == "positive" else h_
        pull = strength * b_.clamp(max=0)
        x = g_ + pull if order == "align_first" else g_
        left = reference.project_align(x[None], h_[None], rule="full" if rule == "positive" else rule)[0]
        want = {
            "cosine": torch.cosine_similarity(g_, h_, dim=0),
            "removed": 1 - left.square().sum() / x.square().sum(),
            "conflict": g_ @ h_ < 0,
            "alignment": pull.norm() / g_.norm(),
        }
        for name, value in want.items():
            torch.testing.assert_close(getattr(metrics, name)[i], value, rtol=1e-9, atol=1e-9)
    assert metrics.conflict_rate == metrics.conflict.double().mean()
    scalars = metrics.scalars()
    assert scalars["surgery/cosine/0"] == pytest.approx(float(metrics.cosine[0]))
    assert scalars["surgery/conflict_rate"] == pytest.approx(float(metrics.conflict_rate))
    assert len(scalars) == 1 + 4 * 2


@both
@pytest.mark.parametrize("zero", ["harmful", "task"])
def test_metrics_of_a_zero_gradient_are_numbers(kind, zero):
    model = small_model()
    optimizer, surgery = make(kind, model)
    with surgery.harmful():
        loss_on(model, 1, scale=zero != "harmful").backward()
    loss_on(model, 0, scale=zero != "task").backward()
    optimizer.step()
    metrics = surgery.metrics()
    assert not metrics.cosine.any() and not metrics.removed.any() and not metrics.conflict.any()


@both
def test_metrics_are_of_the_step_whatever_alignment_becomes(kind):
    model, alignment = small_model(), torch.tensor(0.3, dtype=torch.float64)
    optimizer, surgery = make(kind, model, alignment=alignment)
    surgery_step(model, optimizer, surgery, 0)
    before = surgery.metrics().alignment
    alignment.fill_(9.0)
    assert before.any() and torch.equal(surgery.metrics().alignment, before)


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
    assert_same(model, plain)

    resumed = small_model()
    resumed.load_state_dict(plain.state_dict())
    again, surgery_again = make("SurgeryAdamW", resumed)
    again.load_state_dict(copy.deepcopy(plain_optimizer.state_dict()))
    surgery_step(resumed, again, surgery_again, 1)
    surgery_step(model, optimizer, surgery, 1)
    assert_same(resumed, model)


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
    assert_same(model, other)


def test_remove():
    model, plain = small_model(), small_model()
    optimizer, surgery = make("OptimizerSurgery", model)
    with surgery.harmful():
        loss_on(model, 1).backward()
    surgery.remove()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    for m, o in ((model, optimizer), (plain, plain_optimizer)):
        loss_on(m, 0).backward()
        o.step()
        o.zero_grad()
    assert_same(model, plain)
    with surgery.harmful():  # what is captured now is nobody's
        loss_on(model, 1).backward()
    for m, o in ((model, optimizer), (plain, plain_optimizer)):
        loss_on(m, 2).backward()
        o.step()
    assert_same(model, plain)
    copy.deepcopy(optimizer)


def test_copies_and_pickles():
    """A copy of a hooked optimiser would have lost its surgery, so it is refused; SurgeryAdamW keeps it."""
    optimizer, _ = make("OptimizerSurgery", small_model())
    for action in (copy.deepcopy, copy.copy, pickle.dumps, lambda o: torch.save(o, io.BytesIO())):
        with pytest.raises(TypeError, match=r"call surgery.remove\(\) first"):
            action(optimizer)

    model = small_model()
    optimizer, surgery = make("SurgeryAdamW", model, granularity="layer", rule="full")
    surgery_step(model, optimizer, surgery, 0)
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        model2, optimizer2 = copied((model, optimizer))
        assert optimizer2.surgery.optimizer is optimizer2
        surgery_step(model2, optimizer2, optimizer2, 1)
        assert optimizer2.metrics().layers == ["0", "2"]
    surgery_step(model, optimizer, optimizer, 1)
    assert_same(model, model2)


@both
def test_closures(kind):
    model, plain = small_model(), small_model()
    optimizer, surgery = make(kind, model)
    other, other_surgery = make("OptimizerSurgery", plain)

    def closure():
        optimizer.zero_grad()
        with surgery.harmful():
            loss_on(model, 1).backward()
        loss = loss_on(model, 0)
        loss.backward()
        return loss

    want = loss_on(plain, 0).detach()
    surgery_step(plain, other, other_surgery, 0, beneficial=False)
    assert torch.equal(optimizer.step(closure).detach(), want)
    assert_same(model, plain)


def test_an_optimizer_that_evaluates_its_closure_twice_is_refused():
    model = small_model()
    optimizer = torch.optim.LBFGS(model.parameters())
    surgery = OptimizerSurgery(optimizer)

    def closure():
        optimizer.zero_grad()
        with surgery.harmful():
            loss_on(model, 1).backward()
        loss = loss_on(model, 0)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="several times in a step"):
        optimizer.step(closure)


@both
def test_sparse_gradients_are_refused(kind):
    embedding = nn.Embedding(4, 3, sparse=True)
    dense = nn.Embedding.from_pretrained(embedding.weight.detach().clone(), freeze=False)
    optimizer, surgery = make(kind, embedding)
    with pytest.raises(TypeError, match="the gradient of weight is sparse"), surgery.harmful():
        embedding(torch.tensor([1])).sum().backward()
    assert embedding.weight.grad is None
    with surgery.harmful():  # nothing of the refused capture is left, and a dense one works
        dense_loss = (embedding.weight * 2).sum()
        dense_loss.backward()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert dense.weight.grad is None


@both
def test_misuse_raises(kind):
    model = small_model()
    optimizer, surgery = make(kind, model)
    with (
        pytest.raises(RuntimeError, match="no gradient of this optimizer's parameters arrived"),
        surgery.harmful(),
    ):
        pass
    inside = pytest.raises(RuntimeError, match=r"beneficial\(\) inside harmful\(\)")
    with inside, surgery.harmful(), surgery.beneficial():
        pass
    with pytest.raises(RuntimeError, match=r"step\(\) inside harmful\(\)"), surgery.harmful():
        optimizer.step()
    with surgery.harmful():
        loss_on(model, 0).backward()
    with pytest.raises(RuntimeError, match="no gradient of this optimizer's"), surgery.harmful():
        loss_on(small_model(), 0).backward()


@both
def test_an_error_inside_a_capture_leaves_nothing_behind(kind):
    model = small_model()
    optimizer, surgery = make(kind, model)
    with surgery.harmful():
        loss_on(model, 2).backward()
    loss_on(model, 0).backward()
    task = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(KeyError), surgery.harmful():
        loss_on(model, 1).backward()
        raise KeyError
    assert all(torch.equal(p.grad, t) for p, t in zip(model.parameters(), task))
    optimizer.step()
    assert surgery.metrics() is None


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
    assert surgery.metrics().layers == ["0", "2"]


def test_only_optimizers_are_hooked():
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got Sequential"):
        OptimizerSurgery(small_model())


@pytest.mark.parametrize("option", ["amsgrad", "capturable", "differentiable", "fused"])
def test_what_surgery_adamw_does_not_support(option):
    with pytest.raises(ValueError, match=rf"SurgeryAdamW has no {option}: use OptimizerSurgery"):
        SurgeryAdamW(small_model().parameters(), **{option: True})
