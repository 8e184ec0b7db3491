"""The feature hook against an ordinary tensor hook, under everything a training loop puts around it."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from dgs_kernels import gradient_surgery, project_align, reference
from dgs_kernels.reference import ORDERS, RULES


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def feature_grad(function, features, harmful, beneficial, weight=0.2, **options):
    leaf = features.clone().requires_grad_()
    seen, alignment_loss = function(leaf, harmful, beneficial, **options)
    assert torch.equal(seen, features)
    (seen.square().sum() + weight * alignment_loss).backward()
    return leaf.grad, alignment_loss.detach()


@pytest.mark.parametrize("order,rule", list(product(ORDERS, RULES)))
@pytest.mark.parametrize("shape", [(5, 9), (2, 3, 9), (9,)], ids=str)
def test_equals_a_tensor_hook(shape, order, rule):
    features, full = draw(*shape), draw(*shape, seed=1)
    pairs = [(full, -full), (draw(9, seed=2), draw(9, seed=3)), (full, None)]
    if len(shape) > 1:
        pairs.append((full[..., :1, :], full))
    options = {"order": order, "rule": rule, "eps": 0.1}
    for harmful, beneficial in pairs:
        ours = feature_grad(gradient_surgery, features, harmful, beneficial, **options)
        want = feature_grad(reference.gradient_surgery, features, harmful, beneficial, **options)
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-14)


def test_weight_and_loss_scale_arrive_by_the_gradient():
    """Scaling the whole loss scales the result exactly: the surgery is linear in what arrives."""
    features, harmful, beneficial = draw(3, 4, 6)
    leaf = features.clone().requires_grad_()
    seen, alignment_loss = gradient_surgery(leaf, harmful, beneficial)
    loss = seen.square().sum() + 0.3 * alignment_loss
    (plain,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 65536, leaf)
    assert torch.equal(scaled, plain * 65536)
    assert torch.equal(plain, feature_grad(gradient_surgery, features, harmful, beneficial, 0.3)[0])


def test_one_output_unused():
    features, harmful, beneficial = draw(3, 4, 6)
    leaf = features.clone().requires_grad_()
    seen, _ = gradient_surgery(leaf, harmful, beneficial)
    seen.square().sum().backward()
    torch.testing.assert_close(leaf.grad, project_align(2 * features, harmful))

    leaf = features.clone().requires_grad_()
    _, alignment_loss = gradient_surgery(leaf, harmful, beneficial)
    alignment_loss.backward()
    pull = beneficial.clamp(max=0) / 4
    torch.testing.assert_close(leaf.grad, project_align(pull, harmful))

    # An unused alignment loss takes no part, whatever its direction holds.
    leaf = features.clone().requires_grad_()
    seen, _ = gradient_surgery(leaf, harmful, torch.full_like(beneficial, -torch.inf))
    seen.square().sum().backward()
    torch.testing.assert_close(leaf.grad, project_align(2 * features, harmful))

    leaf = features.clone().requires_grad_()
    _, alignment_loss = gradient_surgery(leaf, harmful)
    alignment_loss.backward()
    assert leaf.grad is None or not leaf.grad.any()


def test_directions_are_constants_and_features_need_not_be_trained():
    features, harmful, beneficial = (x.requires_grad_() for x in draw(3, 4, 6).unbind())
    seen, alignment_loss = gradient_surgery(features, harmful, beneficial)
    (seen.sum() + alignment_loss).backward()
    assert features.grad is not None and harmful.grad is None and beneficial.grad is None

    with torch.no_grad():
        seen, alignment_loss = gradient_surgery(features, harmful, beneficial)
    assert torch.equal(seen, features) and not alignment_loss.requires_grad
    constant = features.detach()
    seen, alignment_loss = gradient_surgery(constant, harmful.detach(), beneficial.detach())
    assert not seen.requires_grad and not alignment_loss.requires_grad
    assert float(alignment_loss) == pytest.approx(
        float((constant * beneficial.clamp(max=0)).sum().detach() / 4)
    )


def test_no_rows():
    leaf = torch.zeros(0, 5, requires_grad=True)
    seen, alignment_loss = gradient_surgery(leaf, torch.ones(5), torch.ones(5))
    assert float(alignment_loss) == 0
    (seen.sum() + alignment_loss).backward()
    assert leaf.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_and_half_types(dtype):
    features, harmful, beneficial = draw(3, 8, 32, dtype=dtype)
    weight = draw(32, 1, dtype=torch.float32, seed=5)
    leaf = features.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen, alignment_loss = gradient_surgery(leaf, harmful.float(), beneficial)
        loss = (seen.to(dtype) @ weight.to(dtype)).float().sum() + 0.2 * alignment_loss
    loss.backward()
    assert alignment_loss.dtype == torch.float32 and leaf.grad.dtype == dtype
    exact = reference.alignment_loss(features.double(), beneficial.double())
    torch.testing.assert_close(alignment_loss.double(), exact, rtol=1e-5, atol=1e-6)


def test_grad_scaler_and_accumulation():
    """The result of a scaled, accumulated half step is that of the plain one."""
    features, harmful, beneficial = draw(3, 8, 6, dtype=torch.float32)
    weight = draw(6, 6, dtype=torch.float32, seed=7)

    def grad(parts, scale):
        leaf = weight.clone().requires_grad_()
        for part in torch.arange(8).chunk(parts):
            seen, alignment_loss = gradient_surgery(features[part] @ leaf, harmful[part], beneficial[part])
            loss = seen.square().sum(1).mean() + 0.2 * alignment_loss
            (loss * scale / parts).backward()
        return leaf.grad / scale

    torch.testing.assert_close(grad(4, 2.0**16), grad(1, 1.0), rtol=1e-5, atol=1e-6)


def test_not_finite_gradient_stays_visible():
    features, harmful = draw(2, 3, 4)
    leaf = features.clone().requires_grad_()
    seen, _ = gradient_surgery(leaf, harmful)
    seen.backward(torch.tensor([[1.0] * 4, [float("inf"), 1, 1, 1], [1.0] * 4], dtype=torch.float64))
    assert not leaf.grad[1].isfinite().all() and leaf.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("order,rule", list(product(ORDERS, RULES)))
def test_double_backward(order, rule):
    """What flows back is a function of what arrives, and that function is differentiable."""
    features, harmful, beneficial = draw(3, 3, 5, seed=2)
    leaf = features.clone().requires_grad_()

    def back(grad, weight):
        seen, alignment_loss = gradient_surgery(leaf, harmful, beneficial, order=order, rule=rule)
        outputs = (seen, alignment_loss)
        return torch.autograd.grad(outputs, leaf, (grad, weight), create_graph=True)[0]

    arriving = draw(3, 5, seed=4).requires_grad_()
    assert gradcheck(back, (arriving, torch.tensor(0.7, dtype=torch.float64, requires_grad=True)))


@pytest.mark.gpu
def test_on_a_gpu_without_synchronisation():
    inputs = draw(3, 32, 768)
    want = feature_grad(reference.gradient_surgery, *inputs)
    moved = inputs.cuda()
    leaf = moved[0].clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen, alignment_loss = gradient_surgery(leaf, moved[1], moved[2])
        (seen.square().sum() + 0.2 * alignment_loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close((leaf.grad.cpu(), alignment_loss.detach().cpu()), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_compiles_whole(order):
    features, harmful, beneficial = draw(3, 4, 6)

    def function(features):
        seen, alignment_loss = gradient_surgery(features * 1.0, harmful, beneficial, order=order)
        return seen.square().sum() + 0.2 * alignment_loss

    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    function(ours).backward()
    torch.compile(function, fullgraph=True, backend="aot_eager")(theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_errors_come_with_the_call():
    features = torch.zeros(3, 4, requires_grad=True)
    for arguments, words in (
        ((torch.zeros(5),), "harmful must broadcast"),
        ((torch.zeros(4), torch.zeros(2, 4)), "beneficial must broadcast"),
    ):
        with pytest.raises(ValueError, match=words):
            gradient_surgery(features, *arguments)
    with pytest.raises(ValueError, match="order must be one of"):
        gradient_surgery(features, torch.zeros(4), order="neither")
    with pytest.raises(ValueError, match="rule must be one of"):
        gradient_surgery(features, torch.zeros(4), rule="neither")


def test_several_times_in_one_model():
    """On two layers, one inside a checkpointed region, as two tensor hooks would; nowhere under no_grad."""
    first, second = nn.Linear(6, 3).double(), nn.Linear(3, 4).double()
    x, low, high = draw(8, 6), draw(2, 8, 3, seed=1), draw(2, 8, 4, seed=2)

    def tail(x, surgery):
        x, alignment_loss = surgery(first(x).tanh(), *low)
        return second(x), alignment_loss

    def loss(surgery, call):
        hidden, low_loss = call(tail, x, surgery)
        hidden, high_loss = surgery(hidden, *high, rule="full")
        return hidden.square().mean() + 0.3 * low_loss + 0.2 * high_loss

    params = [*first.parameters(), *second.parameters()]
    want = torch.autograd.grad(loss(reference.gradient_surgery, lambda f, *x: f(*x)), params)
    for call in (lambda f, *x: f(*x), partial(checkpoint, use_reentrant=False)):
        torch.testing.assert_close(torch.autograd.grad(loss(gradient_surgery, call), params), want)
    with torch.no_grad():
        assert not loss(gradient_surgery, lambda f, *x: f(*x)).requires_grad


def test_under_torch_func():
    inputs = draw(3, 8, 4)

    def loss(features, harmful, beneficial):
        seen, alignment_loss = gradient_surgery(features, harmful, beneficial)
        return seen.sin().sum() + 0.3 * alignment_loss

    leaf = inputs[0].clone().requires_grad_()
    want = torch.autograd.grad(loss(leaf, *inputs[1:]), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(*inputs), want)
    rows = [torch.func.grad(loss)(*row) for row in zip(*inputs)]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(*inputs), torch.stack(rows))
    # Forward mode has no gradient to edit.
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda f: loss(f, *inputs[1:]), (inputs[0],), (inputs[0],))
