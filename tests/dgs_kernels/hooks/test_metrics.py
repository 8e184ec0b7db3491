"""What hooks say that a step's surgery did, against the gradients themselves, whatever their size."""

from __future__ import annotations

import itertools

import pytest
import torch

from dgs_kernels import ObjectiveSurgery, OptimizerSurgery, SurgeryAdamW, reference
from dgs_kernels.hooks.weightings import weigh
from dgs_kernels.reference import ORDERS, RULES
from tests.dgs_kernels.hooks.steps import LAYERS, both, grads_of, loss_on, make, small_model, surgery_step

# The gradients of this step conflict in two of the three layers.
STEP = 9


@both
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
# The second strength turns the sign of an inner product.
@pytest.mark.parametrize("strength", [0.3, 30.0])
def test_definitions(kind, order, rule, strength):
    model = small_model()
    grads = [grads_of(model, 3 * STEP + i) for i in range(3)]
    # Such a large eps leaves something of the harmful part.
    eps = 0.02
    options = {"alignment": strength, "order": order, "rule": rule}
    options["surgery_eps" if kind == "SurgeryAdamW" else "eps"] = eps
    optimizer, surgery = make(kind, model, granularity="layer", **options)
    assert surgery.metrics() is None
    surgery_step(model, optimizer, surgery, STEP)
    metrics = surgery.metrics()
    assert metrics.layers == ["0", "2", "4"]
    for i, layer in enumerate(([0, 1], [2], [3, 4])):
        task, harmful, beneficial = (torch.cat([g[j].flatten() for j in layer]) for g in grads)
        harmful = harmful.clamp(min=0) if rule == "positive" else harmful
        pull = strength * beneficial.clamp(max=0)
        x = task + pull if order == "align_first" else task
        rule_of_h = "full" if rule == "positive" else rule
        left = reference.project_align(x[None], harmful[None], rule=rule_of_h, eps=eps)[0]
        want = {
            "cosine": torch.cosine_similarity(task, harmful, dim=0),
            "removed": 1 - left.square().sum() / x.square().sum(),
            "conflict": task @ harmful < 0,
            "alignment": pull.norm() / task.norm(),
        }
        for name, value in want.items():
            torch.testing.assert_close(getattr(metrics, name)[i], value, rtol=1e-9, atol=1e-9)


def test_scalars_have_the_name_of_their_layer():
    model = small_model()
    optimizer, surgery = make("OptimizerSurgery", model, granularity="layer", rule="full")
    surgery_step(model, optimizer, surgery, STEP)
    metrics = surgery.metrics()
    scalars = metrics.scalars("s")
    want = {
        f"s/{name}/{layer}": float(value)
        for name in ("cosine", "removed", "conflict", "alignment")
        for layer, value in zip(("0", "2", "4"), getattr(metrics, name))
    }
    assert len(set(metrics.cosine.tolist())) == 3 and 0 < metrics.conflict_rate < 1
    assert scalars == pytest.approx(want | {"s/conflict_rate": float(metrics.conflict.double().mean())})
    assert metrics.scalars().keys() == {f"surgery{name[1:]}" for name in scalars}


@both
@pytest.mark.parametrize("zero", ["harmful", "task"])
def test_a_zero_gradient_makes_zeros(kind, zero):
    model = small_model()
    optimizer, surgery = make(kind, model)
    with surgery.harmful():
        loss_on(model, 1, scale=zero != "harmful").backward()
    loss_on(model, 0, scale=zero != "task").backward()
    optimizer.step()
    metrics = surgery.metrics()
    assert not any(getattr(metrics, name).any() for name in ("cosine", "removed", "conflict", "alignment"))


@pytest.mark.parametrize("change", ["alignment", "order", "rule", "eps"])
def test_metrics_are_of_the_step_whatever_the_options_become(change):
    alignment = torch.tensor(0.3, dtype=torch.float64)
    model = small_model()
    optimizer, surgery = make("OptimizerSurgery", model, alignment=alignment, rule="conflict")
    surgery_step(model, optimizer, surgery, 0)
    before = surgery.metrics().scalars()
    if change == "alignment":
        alignment.fill_(9.0)
    else:
        setattr(surgery, change, {"order": "project_first", "rule": "full", "eps": 9.0}[change])
    assert surgery.metrics().scalars() == before
    surgery_step(model, optimizer, surgery, 0)
    assert surgery.metrics().scalars() != before


# Small and large gradients -------------------------------------------------------------------------------

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# These vectors have the lengths 13, 7 and 3.
FIRST, SECOND, THIRD = (3.0, -4.0, 12.0), (-2.0, 6.0, 3.0), (1.0, 2.0, 2.0)
SIZES = [10.0**n for n in range(-30, 31, 5)]


def drawn(dtype, *sizes: float) -> tuple[torch.nn.Parameter, list[torch.Tensor]]:
    """A parameter, and gradients of these sizes for it."""
    scaled = [torch.tensor(v, dtype=torch.float64) * s for v, s in zip((FIRST, SECOND, THIRD), sizes)]
    return torch.nn.Parameter(torch.zeros(3, dtype=dtype)), [v.to(dtype) for v in scaled]


def matches(number: torch.Tensor, value: torch.Tensor, dtype, *gradients: torch.Tensor) -> bool:
    """Whether a number is known, and then right; otherwise NaN, or 0 where the inner product is.

    It is known if the type that inner products are made in holds the gradients' squared lengths.
    """
    range_of = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    one, other = (g.double() for g in gradients)
    if all(range_of.tiny <= g.square().sum() <= range_of.max for g in (one, other)):
        torch.testing.assert_close(number.double(), value, rtol=1e-5, atol=1e-7)
        return True
    assert number.isnan() or (number == 0 and (one * other).abs().sum() < range_of.tiny)
    return False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make_surgery", [OptimizerSurgery, SurgeryAdamW])
def test_numbers_of_parameters_do_not_depend_on_size(dtype, make_surgery):
    """Every metric is of directions: right wherever the squared lengths are numbers, and never wrong."""
    known = 0
    for task_size, harmful_size in itertools.product(SIZES, SIZES):
        w, (task, harmful, beneficial) = drawn(dtype, task_size, harmful_size, task_size)
        if not all(g.isfinite().all() and g.all() for g in (task, harmful, beneficial)):
            # The type itself does not hold these numbers.
            continue
        adamw = make_surgery is SurgeryAdamW
        given = [w] if adamw else torch.optim.SGD([w], lr=0.1)
        eps = {"surgery_eps" if adamw else "eps": 1e-37}
        surgery = make_surgery(given, rule="full", order="project_first", **eps)
        for context, gradient in ((surgery.harmful, harmful), (surgery.beneficial, -beneficial)):
            with context():
                (w * gradient).sum().backward()
        w.grad = task.clone()
        (surgery if adamw else given).step()
        found = surgery.metrics()
        cosine = torch.cosine_similarity(*(g.double() / g.double().norm() for g in (task, harmful)), dim=0)
        want = {
            "cosine": (cosine, (task, harmful)),
            "removed": (cosine.square(), (task, harmful)),
            "alignment": (beneficial.double().norm() / task.double().norm(), (beneficial, task)),
        }
        for name, (value, of) in want.items():
            known += matches(getattr(found, name)[0], value, dtype, *of)
    assert known >= {torch.float64: 500, torch.float16: 3}.get(dtype, 100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cosines_of_objectives_do_not_depend_on_size(dtype):
    known = 0
    for sizes in itertools.product(SIZES[::2], SIZES[::2], [1.0]):
        w, gradients = drawn(dtype, *sizes)
        if not all(g.isfinite().all() and g.all() for g in gradients):
            continue
        optimizer = torch.optim.SGD([w], lr=0.1)
        surgery = ObjectiveSurgery(optimizer, "mean")
        for gradient in gradients:
            with surgery.objective():
                (w * gradient).sum().backward()
        optimizer.step()
        found = surgery.metrics().cosine[0]
        for (i, one), (j, other) in itertools.product(enumerate(gradients), enumerate(gradients)):
            one, other = one.double() / one.double().norm(), other.double() / other.double().norm()
            known += matches(found[i, j], one @ other, dtype, gradients[i], gradients[j])
    assert known >= {torch.float64: 400, torch.float16: 9}.get(dtype, 100)


# Objectives ----------------------------------------------------------------------------------------------


def test_metrics_of_objectives():
    model = small_model()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    surgery = ObjectiveSurgery(optimizer, "pcgrad", "layer")
    names = ["a", "b", "c", "d"]
    gradients = [grads_of(model, k, scale=k + 1.0) for k in range(4)]
    for k, name in enumerate(names):
        with surgery.objective(name):
            loss_on(model, k, scale=k + 1.0).backward()
    optimizer.step()
    found = surgery.metrics()
    gramian = reference.gramian(gradients, LAYERS["layer"])
    torch.testing.assert_close(found.gramian, gramian)
    torch.testing.assert_close(found.weights, weigh("pcgrad", gramian, torch.Generator().manual_seed(0)))
    assert found.layers == ["0", "2", "4"] and found.objectives == names
    pairs = [(g, i, j) for g in range(3) for i, j in itertools.combinations(range(4), 2)]
    rate = float(sum(gramian[pair] < 0 for pair in pairs) / len(pairs))
    assert 0 < rate < 1 and float(found.conflict_rate) == pytest.approx(rate)
    want = {"s/conflict_rate": rate}
    for g, layer in enumerate(found.layers):
        for i, j in itertools.combinations(range(4), 2):
            cosine = gramian[g, i, j] / (gramian[g, i, i] * gramian[g, j, j]).sqrt()
            want[f"s/cosine/{names[i]}, {names[j]}/{layer}"] = float(cosine)
        want |= {f"s/weight/{name}/{layer}": float(w) for name, w in zip(names, found.weights[g])}
    assert found.scalars("s") == pytest.approx(want)
