"""surgery_head in closed form against the official graph, written naively with autograd, in float64."""

from __future__ import annotations

from itertools import product
from operator import itemgetter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs_kernels import SurgeryHead, reference, surgery_head
from dgs_kernels.reference import ORDERS, TEXT_ROLES
from tests.dgs_kernels.ops.surgery_heads import DIM, assert_equal, outcome, problem


@pytest.mark.parametrize("reference_batch_size", [None, 32])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [1, 2, 32, 257])
@pytest.mark.parametrize("served_by", ["eager", "best"])
def test_equals_the_official_graph(served_by, batch, order, reference_batch_size, monkeypatch):
    # PyTorch's cross-entropy of a saturated logit is log(1 + e^-|z|), where the compiled kernels take log1p:
    # they alone may differ by the rounding of that sum.
    loss_rounding = torch.finfo(torch.float64).eps
    if served_by == "eager":
        monkeypatch.setenv("DGS_KERNELS_BACKEND", "eager")
        loss_rounding = 0.0
    for labels, logits in product(("mixed", "real", "generated"), (None, 50.0, 800.0)):
        inputs = problem(batch, labels=labels, logits=logits, seed=batch)
        options = {"order": order, "reference_batch_size": reference_batch_size}
        ours = outcome(surgery_head, inputs, **options)
        official = outcome(reference.official_graph, inputs, **options)
        assert_equal(ours, official, loss_rounding=loss_rounding)


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("text", TEXT_ROLES)
@pytest.mark.parametrize("served_by", ["eager", "best"])
def test_experts_and_distillation_equal_the_official_graph(served_by, text, with_text, monkeypatch):
    if served_by == "eager":
        monkeypatch.setenv("DGS_KERNELS_BACKEND", "eager")
    for batch, order, reference_batch_size in product((1, 37), ORDERS, (None, 32)):
        inputs = problem(batch, seed=batch)
        offsets = torch.linspace(-3, 3, batch, dtype=torch.float64)
        inputs = inputs if with_text else inputs._replace(text=None)
        for options in (
            {"offsets": offsets, "distillation": 0.3},
            {"offsets": offsets},
            {"distillation": 7.0},
            {},
        ):
            options |= {"text": text, "order": order, "reference_batch_size": reference_batch_size}
            official = outcome(reference.official_graph, inputs, **options)
            if not with_text:
                del official["text_logits"]
            ours = outcome(surgery_head, inputs, **options)
            assert ours.keys() == official.keys()
            assert_equal(ours, official)


def test_what_experts_and_distillation_do():
    """Each option alone, against what it promises in words."""
    inputs = problem(12)
    plain = outcome(surgery_head, inputs)
    expert, both = (outcome(surgery_head, inputs, text=text) for text in ("expert", "both"))
    for name in ("image_logits", "text_logits", "text_loss", "text", "text_weight", "alignment_loss"):
        assert torch.equal(expert[name], plain[name]) and torch.equal(both[name], plain[name]), name
    # A text logit as a constant is an offset; so an expert is what offsets do where nothing is projected.
    assert_equal(outcome(surgery_head, inputs, offsets=plain["text_logits"]), both)
    offset = outcome(surgery_head, inputs._replace(text=None), offsets=plain["text_logits"])
    torch.testing.assert_close(offset["features"], expert["features"], rtol=1e-12, atol=0)
    # A pull to the teacher adds its own gradient to that of the features, and changes nothing else.
    pulled = outcome(surgery_head, inputs, distillation=0.3)
    assert torch.equal(pulled["image_loss"], plain["image_loss"])
    difference = (inputs.features - inputs.teacher).detach()
    assert pulled["distillation_loss"] == pytest.approx(
        (0.3 / (2 * DIM) * difference.square().sum() / 12).item()
    )
    torch.testing.assert_close(pulled["features"] - plain["features"], 1.3 * 0.3 / (DIM * 12) * difference)
    assert plain["distillation_loss"] == 0


@given(
    batch=st.integers(1, 9),
    order=st.sampled_from(ORDERS),
    eps=st.sampled_from([1e-12, 1e-6, 1e-2]),
    reference_batch_size=st.sampled_from([None, 1, 7, 65536]),
    weights=st.tuples(*[st.sampled_from([0.0, 0.2, 1.0, 65536.0])] * 4),
    text=st.sampled_from(TEXT_ROLES),
    distillation=st.sampled_from([0.0, 0.3, 100.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_weights(batch, order, eps, reference_batch_size, weights, text, distillation, seed):
    """The gradients that arrive at the losses carry weights and scales; the surgery follows them."""
    inputs = problem(batch, seed=seed)
    labels = torch.rand(batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inputs = inputs._replace(labels=labels)
    options = {"order": order, "eps": eps, "reference_batch_size": reference_batch_size}
    options |= {"text": text, "distillation": distillation}
    ours = outcome(surgery_head, inputs, weights, **options)
    # A soft label may be all but the probability itself: their difference, which aligns, has few digits then.
    assert_equal(ours, outcome(reference.official_graph, inputs, weights, **options), loss_rounding=1e-16)


def of_rows(inputs, change):
    """A batch with other rows and the same heads."""
    rows = {name: change(getattr(inputs, name)) for name in ("features", "teacher", "text", "labels")}
    return inputs._replace(**rows)


def test_orders_differ():
    inputs = problem(6)
    first, second = (outcome(surgery_head, inputs, order=order)["features"] for order in ORDERS)
    assert (first - second).norm() > 1e-6 * first.norm()


@pytest.mark.parametrize("order", ORDERS)
def test_reference_batch_size_ignores_batch_ranks_and_accumulation(order):
    inputs = problem(48)
    options = {"order": order, "reference_batch_size": 32}
    whole = outcome(surgery_head, inputs, **options)
    thirds = [of_rows(inputs, itemgetter(slice(i, i + 16))) for i in (0, 16, 32)]
    parts = [outcome(surgery_head, third, **options) for third in thirds]
    for name in ("image_loss", "text_loss", "alignment_loss", "image_weight", "text_weight"):
        torch.testing.assert_close(whole[name], sum(p[name] for p in parts) / 3, rtol=1e-12, atol=0)
    for name in ("features", "text"):
        torch.testing.assert_close(whole[name], torch.cat([p[name] for p in parts]) / 3, rtol=1e-12, atol=0)


def test_reference_batch_size_is_the_official_strength_at_that_batch():
    inputs = problem(32)
    official = outcome(surgery_head, inputs)
    assert_equal(outcome(surgery_head, inputs, reference_batch_size=32), official)
    # Without it the alignment of each row fades as 1/B: a batch made of four copies pulls a quarter as much.
    copies = outcome(surgery_head, of_rows(inputs, lambda x: torch.cat([x] * 4)))
    torch.testing.assert_close(copies["alignment_loss"], official["alignment_loss"] / 4)


def test_without_captions_there_is_no_projection():
    inputs = problem(7)._replace(text=None)
    out = surgery_head(*inputs)
    assert out.text_logits is None and out.text_loss == 0
    (out.image_loss + out.text_loss + 0.2 * out.alignment_loss).backward()
    assert not inputs.text_weight.grad.any()

    plain = problem(7)
    seen, alignment = reference.gradient_surgery(
        plain.features, torch.zeros(DIM, dtype=torch.float64), beneficial_of(plain)
    )
    logits = torch.nn.functional.linear(seen, plain.image_weight, plain.image_bias).squeeze(1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, plain.labels.double())
    (loss + 0.2 * alignment).backward()
    for name in ("features", "image_weight"):
        ours, theirs = getattr(inputs, name).grad, getattr(plain, name).grad
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def beneficial_of(inputs):
    teacher = inputs.teacher.clone().requires_grad_()
    logits = torch.nn.functional.linear(teacher, inputs.teacher_weight, inputs.teacher_bias).squeeze(1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, inputs.labels.double())
    return torch.autograd.grad(loss, teacher)[0]


def test_torch_func_grad():
    """Gradients of features and heads are those of backward()."""
    head, features = SurgeryHead(5), torch.randn(4, 5)
    teacher, text, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([1.0, 0.0, 1.0, 1.0])

    def loss(parameters, features):
        out = torch.func.functional_call(head, parameters, (features, teacher, text, labels))
        return out.image_loss + out.text_loss + 0.2 * out.alignment_loss

    of_heads, of_features = torch.func.grad(loss, argnums=(0, 1))(dict(head.named_parameters()), features)
    leaf = features.clone().requires_grad_()
    loss(dict(head.named_parameters()), leaf).backward()
    torch.testing.assert_close(of_features, leaf.grad)
    for name, p in head.named_parameters():
        torch.testing.assert_close(of_heads[name], torch.zeros_like(p) if p.grad is None else p.grad)


def test_torch_func_vmap():
    """Gradients of two batches at once, each with its own text and labels and along other axes."""
    head = SurgeryHead(5)
    parameters = dict(head.named_parameters())
    features, text = torch.randn(4, 5, 2), torch.randn(2, 4, 5)
    teacher, labels = torch.randn(4, 5), torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]])

    def loss(parameters, features, text, labels):
        inputs = (features, teacher, text, labels)
        out = torch.func.functional_call(head, parameters, inputs, {"distillation": 0.7})
        return out.image_loss + out.text_loss + 0.2 * out.alignment_loss + out.distillation_loss

    gradients = torch.func.grad(loss, argnums=(0, 1, 2))
    both = torch.func.vmap(gradients, in_dims=(None, 2, 0, 0))(parameters, features, text, labels)
    for i in range(2):
        one = gradients(parameters, features[:, :, i], text[i], labels[i])
        for x, y in zip([*both[0].values(), *both[1:]], [*one[0].values(), *one[1:]], strict=True):
            torch.testing.assert_close(x[i], y)
