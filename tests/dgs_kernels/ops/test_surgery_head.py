"""surgery_head in closed form against the official graph, written naively with autograd."""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs_kernels import SurgeryHead, SurgeryHeadOutput, reference, surgery_head
from dgs_kernels.reference import ORDERS, TEXT_ROLES
from tests.conftest import on_backends
from tests.dgs_kernels.ops.test_project_align import aligned_but_one

DIM = 24
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
everywhere = on_backends("surgery_head")


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


def outcome(function, inputs, weights=(0.9, 0.7, 0.2, 1.3), **options):
    """Losses, logits and the gradients of the weighted sum, by name; gradients of inputs start anew."""
    inputs = [None if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    out = function(*inputs, **options)
    sum(w * loss for w, loss in zip(weights, (*out[:3], out[6]))).backward()
    results = {name: x.detach() for name, x in zip(SurgeryHeadOutput._fields, out) if x is not None}
    for at, name in (
        (0, "features"),
        (2, "text"),
        (4, "image_w"),
        (5, "image_b"),
        (8, "text_w"),
        (9, "text_b"),
    ):
        if inputs[2] is not None or not name.startswith("text"):
            results[name] = inputs[at].grad
    return results


def assert_equal(ours, theirs, tolerance=1e-12, loss_rounding=0.0):
    for name, want in theirs.items():
        assert ours[name].shape == want.shape, name
        difference = (ours[name] - want).norm()
        slack = loss_rounding if name.endswith("_loss") else 0.0
        assert difference <= tolerance * want.norm() + slack, f"{name}: {difference / want.norm():.1e}"


def test_opcheck_of_the_backward():
    inputs = [x.float() if x.is_floating_point() else x for x in problem(3)]
    outputs = torch.ops.dgs.surgery_head(*inputs, 1e-6, "align_first", None, "both", None, 0.3)
    residuals, differences = outputs[2].detach(), outputs[4].detach()
    scales = (torch.tensor(1.0), torch.tensor(0.2))
    for dtype, pull in product(
        (torch.float32, torch.bfloat16), ((None, None, 0.0), (differences, scales[0], 0.3))
    ):
        arguments = (residuals, *(inputs[i].detach() for i in (4, 6, 8)), *scales)
        arguments += (dtype, 1e-6, "align_first", None, *pull)
        torch.library.opcheck(torch.ops.dgs.surgery_head_backward.default, arguments)


# Every backend


def small_kernels(monkeypatch):
    """Triton's kernels for long rows and for many chunks, at sizes that its interpreter can bear."""
    from dgs_kernels.triton import surgery_head as forward
    from dgs_kernels.triton import surgery_head_backward as backward

    for name, value in (("WIDEST_ROW", 16), ("TILE", 64), ("PROGRAMS", 3), ("CHUNK", 16)):
        monkeypatch.setattr(forward, name, value)
    for name, value in (("TILE", 64), ("PROGRAMS", 3), ("PROGRAM_COLUMNS", 16)):
        monkeypatch.setattr(backward, name, value)


def tensors(batch, dim, dtype, device, seed=0):
    """The ten tensors as an implementation takes them: heads and labels in the computing type."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    compute = torch.promote_types(dtype, torch.float32)
    matrices = [draw(batch, dim).to(device, dtype).requires_grad_(i != 1) for i in range(3)]
    labels = (torch.arange(batch) % 2).to(device)
    heads = [(draw(1, n) / n**0.5).view(-1 if n == 1 else 1, n) for n in (dim, 1) * 3]
    heads = [x.flatten() if i % 2 else x for i, x in enumerate(heads)]
    return (
        matrices
        + [labels]
        + [x.to(device, compute).requires_grad_(i not in (2, 3)) for i, x in enumerate(heads)]
    )


def assert_accurate(inputs, **options):
    """At most twice the error of plain PyTorch in the same dtype and units of rounding, of its largest term.

    Losses and bias gradients are one number, whose plain error may be small by luck: they are allowed the
    rounding of the sums that they are made of.
    """
    ours = outcome(surgery_head, inputs, **options)
    exact = [None if x is None else x.detach().cpu().double().requires_grad_(x.requires_grad) for x in inputs]
    want = outcome(reference.official_graph, exact, **options)
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    plain_inputs = [x.detach().cpu().to(dtype).requires_grad_(x.requires_grad) for x in inputs]
    plain = outcome(reference.official_graph, plain_inputs, **options)
    for name, exactly in want.items():
        got = ours[name]
        assert got.is_contiguous() or got.numel() < 2
        error, theirs = ((x.cpu().double() - exactly).norm() for x in (got, plain[name]))
        size = exactly.norm() if exactly.numel() > 9 else max(exactly.norm(), 1.0)
        units = 1 if exactly.numel() >= 100 and dtype != torch.float64 else 8
        allowed = 2 * theirs + units * torch.finfo(got.dtype).eps * size
        assert error <= allowed, f"{name}: {error:.1e}, plain {theirs:.1e}, allowed {allowed:.1e}"


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, dim", [(1, 1), (70, 5), (3, 123), (9, 768), (2, 1023)])
def test_accuracy(backend, dtype, batch, dim, nan_filled):
    inputs = tensors(batch, dim, dtype, backend, seed=batch)
    for order, reference_batch_size, options in (
        (ORDERS[0], None, {}),
        (ORDERS[1], 32, {"text": "expert", "distillation": 0.3}),
    ):
        assert_accurate(inputs, order=order, reference_batch_size=reference_batch_size, **options)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_long_rows_and_many_chunks(backend, dtype, nan_filled, monkeypatch):
    if "triton" in os.environ["DGS_KERNELS_BACKEND"]:
        small_kernels(monkeypatch)
    for batch, dim in ((23, 45), (300, 7)) if backend == "cpu" else ((23, 4097), (5000, 33)):
        inputs = tensors(batch, dim, dtype, backend)
        assert_accurate(inputs, order=ORDERS[0])
        assert_accurate(inputs, order=ORDERS[1], text="both", distillation=0.3)


@everywhere
def test_layouts(backend, nan_filled):
    plain = [x.detach() for x in tensors(6, 40, torch.float32, backend)]
    plain[4].requires_grad_(), plain[8].requires_grad_()

    def found(*inputs):
        """Losses, and the gradients of the heads, which are sums over the matrices."""
        out = surgery_head(*inputs)
        return [*out[:3], *torch.autograd.grad(out.image_loss + 2 * out.text_loss, (inputs[4], inputs[8]))]

    want = found(*plain)
    wide = torch.zeros(12, 81, device=backend)
    for view in (
        lambda x: wide[::2, :40].copy_(x),
        lambda x: wide[:6, 1:41].copy_(x),
        lambda x: wide[:6, ::2][:, :40].copy_(x),
        lambda x: x.t().contiguous().t(),
    ):
        for at in range(3):
            inputs = list(plain)
            inputs[at] = view(plain[at])
            torch.testing.assert_close(found(*inputs), want, rtol=2e-6, atol=2e-6)
    for at in range(1, 3):
        row = plain[at][:1]
        expanded = [*plain[:at], row.expand(6, -1), *plain[at + 1 :]]
        repeated = [*plain[:at], row.repeat(6, 1), *plain[at + 1 :]]
        torch.testing.assert_close(found(*expanded), found(*repeated))


@everywhere
def test_matrices_of_which_one_is_not_aligned(backend, nan_filled):
    plain = [x.detach() for x in tensors(6, 48, torch.float32, backend)]
    for placed in aligned_but_one(plain[:3]):
        dim = placed[0].shape[1]
        heads = [x[:, :dim] if x.dim() == 2 else x for x in plain[4:]]
        want = surgery_head(*(x.contiguous() for x in placed), plain[3], *heads)
        found = surgery_head(*placed, plain[3], *heads)
        torch.testing.assert_close(found[:3], want[:3], rtol=2e-6, atol=2e-6)


@everywhere
def test_mixed_dtypes_meet_in_the_wider(backend):
    inputs = tensors(5, 24, torch.float32, backend)
    want = outcome(surgery_head, inputs)
    mixed = [x.detach().to(torch.bfloat16) if i in (1, 2) else x for i, x in enumerate(inputs)]
    for i, x in enumerate(mixed[1:3]):
        inputs[i + 1] = x.float()
    want, found = outcome(surgery_head, inputs), outcome(surgery_head, mixed)
    assert torch.equal(found["features"], want["features"]) and found["features"].dtype == torch.float32
    wide_heads = [x.detach().double() if i > 3 else x for i, x in enumerate(inputs)]
    assert surgery_head(*wide_heads).image_loss.dtype == torch.float64


@everywhere
def test_no_captions_and_no_rows(backend, nan_filled):
    inputs = tensors(7, 24, torch.float64, backend)
    without = [x.detach() for x in inputs]
    without[2] = None
    without[0].requires_grad_()
    out = surgery_head(*without)
    assert out.text_logits is None and out.text_loss == 0
    (out.image_loss + 0.2 * out.alignment_loss).backward()
    # A caption head whose weight has no positive and no negative part removes nothing.
    for x in (inputs[8], inputs[9]):
        x.detach().zero_()
    want = outcome(surgery_head, inputs, weights=(1.0, 0.0, 0.2, 0.0))["features"]
    torch.testing.assert_close(without[0].grad, want, rtol=1e-12, atol=1e-15)

    empty = tensors(0, 24, torch.float32, backend)
    found = outcome(surgery_head, empty)
    assert [found[n].item() for n in ("image_loss", "text_loss", "alignment_loss")] == [0, 0, 0]
    assert found["features"].shape == (0, 24) and not found["image_w"].any() and not found["text_b"].any()


@everywhere
def test_what_is_not_finite_stays_visible(backend):
    for at, bad in product(range(3), (torch.nan, torch.inf)):
        inputs = tensors(4, 24, torch.float32, backend)
        with torch.no_grad():
            inputs[at][1, 3] = bad
        found = outcome(surgery_head, inputs)
        assert found["features"][[0, 2, 3]].isfinite().all()
        name = ("image_loss", "alignment_loss", "text_loss")[at]
        if bad != bad:
            assert not found["features"][1].isfinite().any() and found[name].isnan()
        if at == 0:
            assert not found["image_w"].isfinite().all()


@everywhere
def test_a_confident_sample_has_a_small_loss(backend):
    """log(1 + e^-|z|) of a large logit would be off by percents, or 0."""
    if os.environ["DGS_KERNELS_BACKEND"] == "eager":
        pytest.skip("PyTorch's own cross-entropy is log(1 + e^-|z|)")
    inputs = [x.detach() for x in tensors(40, 24, torch.float32, backend)]
    for at in (0, 2):
        inputs[at] = torch.zeros_like(inputs[at])
        inputs[at][:, 0] = (2 * inputs[3] - 1) * 15 / inputs[4 + 2 * at][0, 0]
    for bias in (inputs[5], inputs[9]):
        bias.zero_()
    out = surgery_head(*inputs)
    want = torch.full((), -15.0, dtype=torch.float64).exp().log1p()
    for loss in (out.image_loss, out.text_loss):
        assert loss.item() == pytest.approx(want.item(), rel=1e-4)


@everywhere
def test_runs_twice_alike(backend):
    inputs = tensors(65, 77, torch.float32, backend)
    assert_equal(outcome(surgery_head, inputs), outcome(surgery_head, inputs), 0)


# Against the official graph, in float64


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
        inputs[2] = inputs[2] if with_text else None
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
    for name in ("image_logits", "text_logits", "text_loss", "text", "text_w", "alignment_loss"):
        assert torch.equal(expert[name], plain[name]) and torch.equal(both[name], plain[name]), name
    # A text logit as a constant is an offset; so an expert is what offsets do where nothing is projected.
    assert_equal(outcome(surgery_head, inputs, offsets=plain["text_logits"]), both)
    without = [*inputs[:2], None, *inputs[3:]]
    offset = outcome(surgery_head, without, offsets=plain["text_logits"])
    torch.testing.assert_close(offset["features"], expert["features"], rtol=1e-12, atol=0)
    # A pull to the teacher adds its own gradient to that of the features, and changes nothing else.
    pulled = outcome(surgery_head, inputs, distillation=0.3)
    assert torch.equal(pulled["image_loss"], plain["image_loss"])
    difference = (inputs[0] - inputs[1]).detach()
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
    inputs[3] = torch.rand(batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options = {"order": order, "eps": eps, "reference_batch_size": reference_batch_size}
    options |= {"text": text, "distillation": distillation}
    ours = outcome(surgery_head, inputs, weights, **options)
    # A soft label may be all but the probability itself: their difference, which aligns, has few digits then.
    assert_equal(ours, outcome(reference.official_graph, inputs, weights, **options), loss_rounding=1e-16)


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
    (0.9 * out.image_loss + 0.7 * out.text_loss + 0.2 * out.alignment_loss).backward()
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
    offsets = torch.zeros(4, requires_grad=True)
    out = surgery_head(*inputs, text="both", offsets=offsets, distillation=0.3)
    assert not any(x.requires_grad for x in out[3:6])
    (out.image_loss + out.text_loss + out.alignment_loss + out.distillation_loss).backward()
    assert offsets.grad is None
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_result_larger_than_caches(dtype, nan_filled):
    """It is stored past them, 8 MiB and more at once; the same rows one by one are not."""
    rows, dim = 520, 8192 * 4 // dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)
    residuals = torch.randn(3, rows, generator=generator, dtype=wide)
    heads = torch.randn(3, 1, dim, generator=generator, dtype=wide).unbind()
    scale = torch.tensor(0.5, dtype=wide)

    def gradient(chosen):
        # The reference batch and the scales make a row's result independent of how many there are.
        scales = (scale * chosen.shape[1], scale * chosen.shape[1])
        options = (dtype, 1e-6, "align_first", 32, None, None, 0.0)
        return torch.ops.dgs.surgery_head_backward(chosen, *heads, *scales, *options)

    together = gradient(residuals)
    assert together.nbytes >= 8 << 20
    for row in (0, 15, 16, 519):
        torch.testing.assert_close(together[row], gradient(residuals[:, row : row + 1])[0])


@pytest.mark.parametrize("name", ["image_loss", "distillation_loss"])
def test_refuses_a_second_derivative(name):
    inputs = problem(3)
    out = surgery_head(*inputs, text="both", distillation=0.3)
    (grad,) = torch.autograd.grad(getattr(out, name), inputs[0], create_graph=True)
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
    offsets = torch.randn(3)
    torch.library.opcheck(op, (*inputs, 1e-6, "align_first", 32, "project", None, 0.0))
    torch.library.opcheck(op, (*inputs, 1e-6, "align_first", 32, "both", offsets, 0.3))
    inputs[2] = None
    torch.library.opcheck(op, (*inputs, 1e-6, "project_first", None, "expert", offsets, 0.0))


@pytest.mark.parametrize(
    "options", [{}, {"text": "expert", "distillation": 0.3}], ids=["published", "expert"]
)
def test_compiles_whole(options):
    head = SurgeryHead(DIM).double()
    features, teacher, text, labels = (x.detach() for x in problem(4)[:4])
    if options:
        options = options | {"offsets": torch.linspace(-1, 1, 4)}

    def step(features):
        out = head(features * 2, teacher, text, labels, **options)
        return out.image_loss + out.text_loss + 0.2 * out.alignment_loss + out.distillation_loss

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
        ({"text": "offset"}, "text must be one of project, expert, both, got 'offset'"),
        ({"distillation": -0.1}, "distillation must be a finite number >= 0, got -0.1"),
        ({"distillation": torch.nan}, "distillation must be a finite number >= 0, got nan"),
        ({"distillation": torch.inf}, "distillation must be a finite number >= 0, got inf"),
        ({"offsets": torch.zeros(2, 1)}, r"offsets must have shape \(2,\), got \(2, 1\)"),
    ],
)
def test_option_errors(options, words):
    with pytest.raises(ValueError, match=words):
        surgery_head(*problem(2), **options)
