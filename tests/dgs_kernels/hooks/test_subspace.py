"""ReferenceSubspace against explicit projections in float64, and the methods that it is made for."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dgs_kernels import ReferenceSubspace
from tests.dgs_kernels.hooks.steps import LAYERS, grads_of, loss_on, small_model

DOCUMENT = Path(__file__).parents[3] / "docs" / "hooks.md"


def by_layer(grads, granularity):
    """One vector for each layer, float64."""
    layers = list(LAYERS[granularity])
    return [
        torch.cat([g.double().flatten() for g, its in zip(grads, layers) if its == layer])
        for layer in dict.fromkeys(layers)
    ]


def without_span(grad, references):
    """A vector without its part in the span of the rows."""
    return grad - torch.linalg.pinv(references, rtol=1e-6) @ (references @ grad)


def on_vector(rank, numbers, dtype=torch.float32, **options):
    """A parameter of its own, whose step of 1 shows the edited gradient."""
    w = torch.nn.Parameter(torch.zeros(numbers, dtype=dtype))
    optimizer = torch.optim.SGD([w], lr=1.0)
    return w, optimizer, ReferenceSubspace(rank, optimizer, **options)


def see(subspace, w, rows):
    for row in rows:
        with subspace.reference():
            (w * row).sum().backward()


def edited(w, optimizer, grad):
    before = w.detach().clone()
    w.grad = grad.clone()
    optimizer.step()
    return before - w.detach()


@pytest.mark.parametrize("granularity", LAYERS)
@pytest.mark.parametrize("rule", ["full", "conflict"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_steps_leave_the_span_of_all_references(granularity, rule, dtype, tolerance):
    """References come over three steps; a bias of one number is spanned by the first."""
    model = small_model(dtype)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    subspace = ReferenceSubspace(20, optimizer, granularity, rule=rule)
    rows = []
    for step in range(3):
        for seed in (100 + step, 200 + step):
            rows.append(by_layer(grads_of(model, seed), granularity))
            task = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            with subspace.reference():
                for _ in range(2):
                    loss_on(model, seed, scale=0.5).backward()
            assert all(a is None is b or torch.equal(a, b) for a, b in zip(task, grads_now(model)))
        before = [p.detach().clone() for p in model.parameters()]
        loss_on(model, step).backward()
        task = by_layer(grads_now(model), granularity)
        optimizer.step()
        optimizer.zero_grad()
        moved = by_layer([(b - p.detach()) / 0.1 for b, p in zip(before, model.parameters())], granularity)
        found = subspace.metrics()
        for i, (grad, got, references) in enumerate(zip(task, moved, map(torch.stack, zip(*rows)))):
            conflicts = bool(grad @ references.sum(0) < 0)
            assert bool(found.conflict[i]) == conflicts
            want = without_span(grad, references) if conflicts or rule == "full" else grad
            scale = float(grad.norm())
            torch.testing.assert_close(got, want, rtol=0, atol=tolerance * scale * 10)
            share = 1 - want.square().sum() / grad.square().sum()
            torch.testing.assert_close(found.removed[i].double(), share, rtol=0, atol=1e-4)
            assert found.rank[i] == min(len(rows), len(grad))


def grads_now(model):
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("numbers, rank, count, apart", [(12, 6, 300, 0.01), (9000, 6, 6, 1e-4)])
def test_the_basis_stays_orthonormal(numbers, rank, count, apart):
    """References of very different lengths, near each other: a full basis turns 294 times, one fills once."""
    torch.manual_seed(0)
    w, _, subspace = on_vector(rank, numbers)
    common = torch.randn(numbers)
    see(subspace, w, (10.0 ** (i % 7 - 3) * (common + apart * torch.randn(numbers)) for i in range(count)))
    basis = subspace.state_dict()["basis"][0].double()
    assert (basis @ basis.T - torch.eye(rank)).abs().max() < 2e-7


def test_a_full_basis_keeps_the_dominant_directions():
    """Against the SVD of all references, in an order in which the weak ones come first."""
    torch.manual_seed(0)
    numbers, strong = 9000, torch.linalg.qr(torch.randn(9000, 3))[0].T
    rows = torch.cat([0.05 * torch.randn(10, numbers) / numbers**0.5, torch.randn(20, 3) @ strong])
    rows += 0.01 * torch.randn_like(rows) / numbers**0.5
    w, optimizer, subspace = on_vector(3, numbers)
    see(subspace, w, rows)
    top = torch.linalg.svd(rows.double(), full_matrices=False)[2][:3]
    basis = subspace.state_dict()["basis"][0].double()
    cosines = torch.linalg.svdvals(basis @ top.T)
    assert cosines.min() > 0.9999
    assert edited(w, optimizer, top[1].float()).norm() < 0.02
    assert subspace.metrics().rank.tolist() == [3]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_more_directions_than_a_kernel_takes(dtype, tolerance):
    torch.manual_seed(0)
    rows, grad = torch.randn(40, 300).to(dtype), torch.randn(300).to(dtype)
    w, optimizer, subspace = on_vector(40, 300, dtype)
    see(subspace, w, rows)
    got = edited(w, optimizer, grad).double()
    want = without_span(grad.double(), rows.double())
    assert (got - want).norm() < tolerance * grad.double().norm()
    assert subspace.metrics().rank.tolist() == [40]


@pytest.mark.parametrize("rank", [2, 3])
def test_a_conflict_is_one_with_the_sum_of_the_references(rank):
    """Which conflicts with the first one where the gradient does not, also when the basis has turned."""
    rows = torch.tensor([[1.0, 0, 0], [-3, 1, 0], [0, 5, 0]])
    w, optimizer, subspace = on_vector(rank, 3, rule="conflict")
    see(subspace, w, rows)
    for grad, conflicts in (([1.0, 0, 2], True), ([-1.0, 0, 2], False), ([0.0, -1, 2], True)):
        got = edited(w, optimizer, torch.tensor(grad))
        torch.testing.assert_close(got, torch.tensor([0.0, 0, 2] if conflicts else grad), rtol=0, atol=1e-5)
        assert bool(subspace.metrics().conflict) == conflicts


def test_what_lies_in_the_span_adds_no_direction():
    torch.manual_seed(0)
    rows = torch.randn(3, 1000)
    w, optimizer, subspace = on_vector(8, 1000)
    see(subspace, w, [*rows, torch.zeros(1000), *(torch.randn(20, 3) @ rows)])
    edited(w, optimizer, torch.randn(1000))
    assert subspace.metrics().rank.tolist() == [3]
    half, optimizer, subspace = on_vector(8, 1000, torch.bfloat16)
    see(subspace, half, [*rows.bfloat16(), *(torch.randn(5, 3) @ rows).bfloat16()])
    edited(half, optimizer, torch.randn(1000).bfloat16())
    assert subspace.metrics().rank.tolist() == [3]


def test_resumes_to_the_same_bits():
    def loop(model, optimizer, subspace, steps):
        for step in steps:
            with subspace.reference():
                loss_on(model, 50 + step).backward()
            loss_on(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()

    def start():
        model = small_model(torch.float32)
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.05)
        return model, optimizer, ReferenceSubspace(3, optimizer, "layer", rule="conflict")

    one = start()
    loop(*one, range(5))
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in one], saved)
    loop(*one, range(5, 10))
    saved.seek(0)
    other = start()
    for part, state in zip(other, torch.load(saved, weights_only=True)):
        part.load_state_dict(state)
    loop(*other, range(5, 10))
    assert all(map(torch.equal, one[0].parameters(), other[0].parameters()))
    plain = small_model(torch.float32)
    assert not any(map(torch.equal, one[0].parameters(), plain.parameters()))


def test_unreached_parameters_and_clear():
    """What no reference reaches is not edited; without a basis the step is plain."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    subspace = ReferenceSubspace(2, optimizer, "model")
    with subspace.reference():
        model[0].weight.square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    loss_on(model, 0).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    moved = [b - p.detach() for b, p in zip(before, model.parameters())]
    torch.testing.assert_close(moved[1:], grads[1:])
    assert (moved[0] * before[0]).sum().abs() < 1e-12 < (grads[0] * before[0]).sum().abs()
    subspace.clear()
    optimizer.zero_grad()
    loss_on(model, 0).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))
    assert subspace.metrics() is None


def test_with_a_scaler():
    """Several references before an update; one overflows and lowers the scale; a skipped step costs none."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    w, optimizer, subspace = on_vector(4, 3, scaler=scaler)
    rows = torch.tensor([[1.0, 0, 0], [1.0, 2, 0], [0, 0, torch.inf]])

    def step(bad=False):
        w.detach().zero_()
        scaler.scale((w * torch.tensor([1.0, 2, 3 * (torch.inf if bad else 1)])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return w.detach().clone()

    for row in rows:
        with subspace.reference():
            scaler.scale((w * row).nan_to_num(posinf=torch.inf).sum()).backward()
    torch.testing.assert_close(step(), torch.tensor([0.0, 0, -3]))
    assert scaler.get_scale() == 4 and subspace.metrics().rank.tolist() == [2]
    step(bad=True)
    assert scaler.get_scale() == 2
    torch.testing.assert_close(step(), torch.tensor([0.0, 0, -3]))
    # Unscaled: what a reference weighs does not depend on the scale.
    factor = subspace.state_dict()["layers"]["0.0"]["factor"]
    assert float(factor.square().sum()) == pytest.approx(6)


def test_a_resumed_basis_is_of_what_references_reached():
    """And one that an older version saved, which has nothing else."""

    def start():
        params = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 3)]
        optimizer = torch.optim.SGD(params, lr=1.0)
        return params, optimizer, ReferenceSubspace(2, optimizer, "model")

    (w, _), _, subspace = start()
    see(subspace, w, [torch.tensor([3.0, 4])])
    state = subspace.state_dict()
    model = {key: of[(slice(1),) * of.dim()] for key, of in state["layers"]["model"].items()}
    older = {"rank": 2, "layers": {"model": model}, "basis": {0: state["basis"][0]}}
    for saved in (state, older):
        (w, v), optimizer, again = start()
        again.load_state_dict(saved)
        (w.sum() + v.sum()).backward()
        optimizer.step()
        torch.testing.assert_close(w.detach(), torch.tensor([-0.16, 0.12]))
        assert float(again.metrics().removed) == pytest.approx(1.96 / 2) and again.metrics().rank == 1


def examples():
    text = DOCUMENT.read_text().partition("## A subspace of references")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("method", ["A-GEM", "OGD", "OGPSA"])
def test_the_examples_are_the_methods(method):
    (code,) = [block for block in examples() if method in block]
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4).double()
    old_x, old_y = torch.randn(3, 6).double(), torch.randint(4, (3,))
    x, y = torch.randn(5, 6).double(), torch.randint(4, (5,))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1.0)
    batches = [(old_x[i : i + 1], old_y[i : i + 1]) for i in range(3)]
    names = {"ReferenceSubspace": ReferenceSubspace, "loss": F.cross_entropy, "model": model, "step": 0}
    names |= {"optimizer": optimizer, "old_x": old_x, "old_y": old_y, "old_batches": batches}

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])

    if method == "A-GEM":
        references = [F.cross_entropy(model(old_x), old_y)]
    elif method == "OGD":
        references = [model(one[None])[0, label] for one, label in zip(old_x, old_y)]
    else:
        references = [F.cross_entropy(model(a), b) for a, b in batches]
    references = torch.stack([*map(gradient, references)])
    grad = gradient(F.cross_entropy(model(x), y))
    if method == "A-GEM":
        (reference,) = references
        inner = (grad @ reference).clamp(max=0)
        want = grad - inner / (reference @ reference) * reference
    else:
        want = without_span(grad, references)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    exec(code, names)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(moved, want)


def test_refusals():
    w, optimizer, subspace = on_vector(2, 3)
    for rank, error in ((0, ValueError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(error, match="rank must be"):
            ReferenceSubspace(rank, optimizer)
    with pytest.raises(ValueError, match="rule must be"):
        ReferenceSubspace(2, optimizer, rule="positive")
    with pytest.raises(ValueError, match="track_update is not supported"):
        ReferenceSubspace(2, optimizer, track_update=True)
    with pytest.raises(TypeError, match=r"ReferenceSubspace.*alignment"):
        ReferenceSubspace(2, optimizer, alignment=1.0)
    see(subspace, w, [torch.tensor([1.0, 0, 0])])
    state = subspace.state_dict()
    for bad in (torch.nan, torch.inf, 1e30):
        with pytest.raises(ValueError, match=r"0\.0 has NaN or infinity.*nothing was added"):
            see(subspace, w, [torch.tensor([0.0, bad, 0])])
    assert torch.equal(subspace.state_dict()["basis"][0], torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
    with pytest.raises(RuntimeError, match="no gradient of this optimizer"), subspace.reference():
        pass
    with pytest.raises(RuntimeError, match=r"step\(\) inside reference"), subspace.reference():
        optimizer.step()
    w.sum().backward()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(w.sum()).backward()
    with pytest.raises(RuntimeError, match="pass it as scaler="):
        scaler.step(optimizer)
    for other, match in (
        (on_vector(3, 3), "of rank 2, this one of rank 3"),
        (on_vector(2, 4), r"parameter 0 is \(2, 3\), expected \(2, 4\)"),
        (on_vector(2, 3, granularity="model"), "the same granularity and names"),
    ):
        with pytest.raises(ValueError, match=match):
            other[2].load_state_dict(state)
        assert not other[2].captured
    with pytest.raises(ValueError, match="has no basis, layers"):
        subspace.load_state_dict({"rank": 2})
