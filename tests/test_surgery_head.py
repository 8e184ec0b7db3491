"""surgery_head in closed form against the official graph, written naively with autograd."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs_kernels import SurgeryHead, reference, surgery_head
from dgs_kernels.reference import ORDERS

DIM = 24


def problem(batch, *, labels="mixed", logits=None, dtype=torch.float64, seed=0):
    """The ten tensors of a batch, those that are trained requiring grad; `logits` sets their size."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, batch, DIM, generator=generator, dtype=dtype)
    weights = torch.randn(3, 1, DIM, generator=generator, dtype=dtype) / DIM**0.5
    biases = torch.randn(3, 1, generator=generator, dtype=dtype) / 10
    if logits is not None:  # bring every sample's logit to +-logits
        biases.zero_()
        z = (features * weights).sum(-1, keepdim=True)
        features *= logits / z.abs()
    y = {
        "mixed": torch.arange(batch) % 2,
        "real": torch.zeros(batch, dtype=torch.long),
        "generated": torch.ones(batch, dtype=torch.long),
    }[labels]
    image, teacher, text = (x.clone() for x in features)
    heads = [x.clone().requires_grad_() for pair in zip(weights, biases) for x in pair]
    return [image.requires_grad_(), teacher, text.requires_grad_(), y, *heads]


def outcome(function, inputs, weights=(1.0, 1.0, 0.2), **options):
    """Losses, logits and the gradients of the weighted sum, by name; gradients of inputs start anew."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    out = function(*inputs, **options)
    sum(w * loss for w, loss in zip(weights, out[:3])).backward()
    names = ("image_loss", "text_loss", "alignment_loss", "image_logits", "text_logits", "teacher_logits")
    results = {name: x.detach() for name, x in zip(names, out)}
    for at, name in (
        (0, "features"),
        (2, "text"),
        (4, "image_w"),
        (5, "image_b"),
        (8, "text_w"),
        (9, "text_b"),
    ):
        results[name] = inputs[at].grad
    return results


def assert_equal(ours, theirs, tolerance=1e-12):
    for name, want in theirs.items():
        assert ours[name].shape == want.shape, name
        difference = (ours[name] - want).norm()
        assert difference <= tolerance * want.norm(), f"{name}: {difference / want.norm():.1e}"


@pytest.mark.parametrize("reference_batch_size", [None, 32])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [1, 2, 32, 257])
def test_equals_the_official_graph(batch, order, reference_batch_size):
    for labels, logits in product(("mixed", "real", "generated"), (None, 50.0, 800.0)):
        inputs = problem(batch, labels=labels, logits=logits, seed=batch)
        options = {"order": order, "reference_batch_size": reference_batch_size}
        ours = outcome(surgery_head, inputs, **options)
        assert_equal(ours, outcome(reference.official_graph, inputs, **options))


@given(
    batch=st.integers(1, 9),
    order=st.sampled_from(ORDERS),
    eps=st.sampled_from([1e-12, 1e-6, 1e-2]),
    reference_batch_size=st.sampled_from([None, 1, 7, 65536]),
    weights=st.tuples(*[st.sampled_from([0.0, 0.2, 1.0, 65536.0])] * 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_weights(batch, order, eps, reference_batch_size, weights, seed):
    """The gradients that arrive at the losses carry weights and scales; the surgery follows them."""
    inputs = problem(batch, seed=seed)
    inputs[3] = torch.rand(batch, dtype=torch.float64)  # soft labels
    options = {"order": order, "eps": eps, "reference_batch_size": reference_batch_size}
    ours = outcome(surgery_head, inputs, weights, **options)
    assert_equal(ours, outcome(reference.official_graph, inputs, weights, **options))


def test_orders_differ():
    inputs = problem(6)
    first, second = (outcome(surgery_head, inputs, order=order)["features"] for order in ORDERS)
    assert (first - second).norm() > 1e-6 * first.norm()


@pytest.mark.parametrize("order", ORDERS)
def test_reference_batch_size_ignores_batch_ranks_and_accumulation(order):
    inputs = problem(48)
    options = {"order": order, "reference_batch_size": 32}
    whole = outcome(surgery_head, inputs, **options)
    parts = [
        outcome(surgery_head, [x[i : i + 16] for x in inputs[:4]] + inputs[4:], **options)
        for i in (0, 16, 32)
    ]
    for name in ("image_loss", "text_loss", "alignment_loss", "image_w", "text_w"):
        torch.testing.assert_close(whole[name], sum(p[name] for p in parts) / 3, rtol=1e-12, atol=0)
    for name in ("features", "text"):
        torch.testing.assert_close(whole[name], torch.cat([p[name] for p in parts]) / 3, rtol=1e-12, atol=0)


def test_reference_batch_size_is_the_official_strength_at_that_batch():
    inputs = problem(32)
    official = outcome(surgery_head, inputs)
    assert_equal(outcome(surgery_head, inputs, reference_batch_size=32), official)
    # Without it the alignment of each row fades as 1/B: a batch made of four copies pulls a quarter as much.
    copies = [torch.cat([x] * 4) for x in inputs[:4]] + inputs[4:]
    torch.testing.assert_close(
        outcome(surgery_head, copies)["alignment_loss"], official["alignment_loss"] / 4
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64])
def test_labels_of_any_type(dtype):
    inputs = problem(5)
    want = outcome(surgery_head, inputs)
    inputs[3] = inputs[3].to(dtype)
    assert_equal(outcome(surgery_head, inputs), want, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_of_any_type(dtype):
    """Half features with float32 heads, as under autocast: float32 arithmetic, gradients in their types."""
    inputs = [x.float() if x.is_floating_point() else x for x in problem(32)]
    for i in range(3):
        inputs[i] = inputs[i].detach().to(dtype).requires_grad_(inputs[i].requires_grad)
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = surgery_head(*leaves)
    (out.image_loss + out.text_loss + 0.2 * out.alignment_loss).backward()
    assert all(x.dtype == torch.float32 for x in out)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    want = outcome(reference.official_graph, exact)
    for at, name in ((0, "features"), (2, "text"), (4, "image_w"), (8, "text_w")):
        got = leaves[at].grad
        assert got.dtype == inputs[at].dtype
        tolerance = 2 * torch.finfo(got.dtype).eps
        assert (got.double() - want[name]).norm() <= tolerance * want[name].norm(), name
    torch.testing.assert_close(out.alignment_loss.double(), want["alignment_loss"], rtol=1e-5, atol=1e-7)


def test_without_captions_there_is_no_projection():
    inputs = problem(7)
    inputs[2] = None
    out = surgery_head(*inputs)
    assert out.text_logits is None and out.text_loss == 0
    (out.image_loss + out.text_loss + 0.2 * out.alignment_loss).backward()
    got, image_head = inputs[0].grad.clone(), inputs[4].grad.clone()
    assert not inputs[8].grad.any()

    plain = problem(7)
    seen, alignment = reference.gradient_surgery(
        plain[0], torch.zeros(DIM, dtype=torch.float64), beneficial_of(plain)
    )
    logits = torch.nn.functional.linear(seen, plain[4], plain[5]).squeeze(1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, plain[3].double())
    (loss + 0.2 * alignment).backward()
    torch.testing.assert_close(got, plain[0].grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(image_head, plain[4].grad, rtol=1e-12, atol=1e-15)


def beneficial_of(inputs):
    teacher = inputs[1].clone().requires_grad_()
    logits = torch.nn.functional.linear(teacher, inputs[6], inputs[7]).squeeze(1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, inputs[3].double())
    return torch.autograd.grad(loss, teacher)[0]


def test_only_what_is_trained_receives_a_gradient():
    inputs = problem(4)
    inputs[1].requires_grad_()
    out = surgery_head(*inputs)
    assert not any(x.requires_grad for x in out[3:])
    (out.image_loss + out.text_loss + out.alignment_loss).backward()
    assert [x.grad is not None for x in inputs if x.is_floating_point()] == [
        *(True, False, True),
        *(True, True),
        *(False, False),
        *(True, True),
    ]


def test_one_loss_alone():
    for name, trained in (("image_loss", (0, 4)), ("text_loss", (2, 8)), ("alignment_loss", (0,))):
        inputs, others = problem(4), problem(4)
        getattr(surgery_head(*inputs), name).backward()
        out = dict(zip(("image_loss", "text_loss", "alignment_loss"), reference.official_graph(*others)))
        out[name].backward()
        for at in trained:
            torch.testing.assert_close(inputs[at].grad, others[at].grad, rtol=1e-12, atol=0)


def test_no_grad_and_empty():
    with torch.no_grad():
        assert not surgery_head(*problem(3)).image_loss.requires_grad
    inputs = problem(0)
    out = surgery_head(*inputs)
    assert [x.item() for x in out[:3]] == [0, 0, 0] and out.image_logits.shape == (0,)
    (out.image_loss + out.text_loss + out.alignment_loss).backward()
    assert inputs[0].grad.shape == (0, DIM) and not inputs[4].grad.any()


def test_deterministic():
    inputs = problem(257, dtype=torch.float32)
    assert_equal(outcome(surgery_head, inputs), outcome(surgery_head, inputs), 0)


def test_not_finite_stays_visible():
    for at in range(3):
        inputs = problem(4)
        with torch.no_grad():
            inputs[at][1, 3] = float("nan")
        grad = outcome(surgery_head, inputs)["features"]
        assert grad[[0, 2, 3]].isfinite().all() and not grad[1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
def test_on_a_gpu_without_synchronisation(order):
    inputs = problem(257)
    moved = [x.detach().cuda().requires_grad_(x.requires_grad) for x in inputs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = outcome(surgery_head, moved, order=order)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = outcome(reference.official_graph, inputs, order=order)
    assert_equal({name: x.cpu() for name, x in ours.items()}, want)


def test_refuses_a_second_derivative():
    inputs = problem(3)
    out = surgery_head(*inputs)
    (grad,) = torch.autograd.grad(out.image_loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_module():
    torch.manual_seed(0)
    head = SurgeryHead(DIM)
    assert [n for n, p in head.named_parameters() if not p.requires_grad] == [
        "teacher_head.weight",
        "teacher_head.bias",
    ]
    features, teacher, text, labels = (x.detach() for x in problem(8, dtype=torch.float32)[:4])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        out = head(features, teacher, text, labels, order="project_first", reference_batch_size=32)
        optimizer.zero_grad()
        (out.image_loss + out.text_loss).backward()
        optimizer.step()
        losses.append((out.image_loss + out.text_loss).item())
    assert losses[-1] < 0.7 * losses[0]
    torch.testing.assert_close(head.image_head(features).squeeze(1), head(features, teacher, None, labels)[3])


def test_opcheck():
    inputs = [x.float() if x.is_floating_point() else x for x in problem(3)]
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    op = torch.ops.dgs.surgery_head.default
    torch.library.opcheck(op, (*inputs, 1e-6, "align_first", 32))
    inputs[2] = None
    torch.library.opcheck(op, (*inputs, 1e-6, "project_first", None))


def test_compiles_whole():
    head = SurgeryHead(DIM).double()
    features, teacher, text, labels = (x.detach() for x in problem(4)[:4])

    def step(features):
        out = head(features * 2, teacher, text, labels)
        return out.image_loss + out.text_loss + 0.2 * out.alignment_loss

    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    step(ours).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    "at,value,words",
    [
        (0, torch.zeros(4), r"features must be \[B, D\]"),
        (1, torch.zeros(3, DIM), r"teacher_features must have shape \(4, 24\), got \(3, 24\)"),
        (2, torch.zeros(4, DIM, device="meta"), "text_features is on meta and features on cpu"),
        (3, torch.zeros(4, 1), r"labels must have shape \(4,\), got \(4, 1\)"),
        (4, torch.zeros(DIM), r"image_weight must have shape \(1, 24\), got \(24,\)"),
        (7, torch.zeros(()), r"teacher_bias must have shape \(1,\)"),
        (8, None, "text_weight is needed with text_features"),
    ],
)
def test_errors(at, value, words):
    inputs = problem(4)
    inputs[at] = value
    with pytest.raises(ValueError, match=words):
        surgery_head(*inputs)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"order": "first"}, "order must be one of"),
        ({"eps": 0.0}, "eps must be > 0"),
        ({"reference_batch_size": 0}, "reference_batch_size must be >= 1, got 0"),
    ],
)
def test_option_errors(options, words):
    with pytest.raises(ValueError, match=words):
        surgery_head(*problem(2), **options)
