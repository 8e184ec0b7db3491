"""surgery_head on every backend, against the published graph in float64, and its errors."""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch

from dgs_kernels import SurgeryHead, reference, surgery_head
from dgs_kernels.reference import ORDERS
from tests.conftest import on_backends
from tests.dgs_kernels.ops.surgery_heads import DIM, assert_accurate, assert_equal, outcome, problem, tensors
from tests.dgs_kernels.ops.test_project_align import aligned_but_one

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
everywhere = on_backends("surgery_head")


def small_kernels(monkeypatch):
    """Triton's kernels for long rows and for many chunks, at sizes that its interpreter can bear."""
    from dgs_kernels.triton import surgery_head as forward
    from dgs_kernels.triton import surgery_head_backward as backward

    for name, value in (("WIDEST_ROW", 16), ("TILE", 64), ("PROGRAMS", 3), ("CHUNK", 16)):
        monkeypatch.setattr(forward, name, value)
    for name, value in (("TILE", 64), ("PROGRAMS", 3), ("PROGRAM_COLUMNS", 16)):
        monkeypatch.setattr(backward, name, value)


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
    plain = tensors(6, 40, torch.float32, backend).detached()
    weights = plain.image_weight.requires_grad_(), plain.text_weight.requires_grad_()

    def found(**replaced):
        """Losses, and the gradients of the heads, which are sums over the matrices."""
        out = surgery_head(*plain._replace(**replaced))
        losses = out.image_loss, out.text_loss, out.alignment_loss
        return [*losses, *torch.autograd.grad(out.image_loss + 2 * out.text_loss, weights)]

    want = found()
    wide = torch.zeros(12, 81, device=backend)
    for view in (
        lambda x: wide[::2, :40].copy_(x),
        lambda x: wide[:6, 1:41].copy_(x),
        lambda x: wide[:6, ::2][:, :40].copy_(x),
        lambda x: x.t().contiguous().t(),
    ):
        for name in ("features", "teacher", "text"):
            placed = view(getattr(plain, name))
            torch.testing.assert_close(found(**{name: placed}), want, rtol=2e-6, atol=2e-6)
    for name in ("teacher", "text"):
        row = getattr(plain, name)[:1]
        repeated = found(**{name: row.repeat(6, 1)})
        torch.testing.assert_close(found(**{name: row.expand(6, -1)}), repeated)


@everywhere
def test_matrices_of_which_one_is_not_aligned(backend, nan_filled):
    features, teacher, text, labels, *heads = tensors(6, 48, torch.float32, backend).detached()
    for placed in aligned_but_one((features, teacher, text)):
        dim = placed[0].shape[1]
        cut = [x[:, :dim] if x.dim() == 2 else x for x in heads]
        want = surgery_head(*(x.contiguous() for x in placed), labels, *cut)
        found = surgery_head(*placed, labels, *cut)
        for loss in ("image_loss", "text_loss", "alignment_loss"):
            torch.testing.assert_close(getattr(found, loss), getattr(want, loss), rtol=2e-6, atol=2e-6)


@everywhere
def test_mixed_dtypes_meet_in_the_wider(backend):
    inputs = tensors(5, 24, torch.float32, backend)
    teacher, text = inputs.teacher.detach().bfloat16(), inputs.text.detach().bfloat16()
    inputs = inputs._replace(teacher=teacher.float(), text=text.float())
    want = outcome(surgery_head, inputs)
    found = outcome(surgery_head, inputs._replace(teacher=teacher, text=text))
    assert torch.equal(found["features"], want["features"]) and found["features"].dtype == torch.float32
    features, teacher, text, labels, *heads = inputs.detached()
    wide = surgery_head(features, teacher, text, labels, *(x.double() for x in heads))
    assert wide.image_loss.dtype == torch.float64


@everywhere
def test_no_captions_and_no_rows(backend, nan_filled):
    inputs = tensors(7, 24, torch.float64, backend)
    without = inputs.detached()._replace(text=None)
    without.features.requires_grad_()
    out = surgery_head(*without)
    assert out.text_logits is None and out.text_loss == 0
    (out.image_loss + 0.2 * out.alignment_loss).backward()
    # A caption head whose weight has no positive and no negative part removes nothing.
    for x in (inputs.text_weight, inputs.text_bias):
        x.detach().zero_()
    want = outcome(surgery_head, inputs, weights=(1.0, 0.0, 0.2, 0.0))["features"]
    torch.testing.assert_close(without.features.grad, want, rtol=1e-12, atol=1e-15)

    empty = tensors(0, 24, torch.float32, backend)
    found = outcome(surgery_head, empty)
    assert [found[n].item() for n in ("image_loss", "text_loss", "alignment_loss")] == [0, 0, 0]
    assert found["features"].shape == (0, 24) and not found["image_weight"].any()
    assert not found["text_bias"].any()


@everywhere
def test_what_is_not_finite_stays_visible(backend):
    losses = {"features": "image_loss", "teacher": "alignment_loss", "text": "text_loss"}
    for name, bad in product(losses, (torch.nan, torch.inf)):
        inputs = tensors(4, 24, torch.float32, backend)
        with torch.no_grad():
            getattr(inputs, name)[1, 3] = bad
        found = outcome(surgery_head, inputs)
        assert found["features"][[0, 2, 3]].isfinite().all()
        if bad != bad:
            assert not found["features"][1].isfinite().any() and found[losses[name]].isnan()
        if name == "features":
            assert not found["image_weight"].isfinite().all()


@everywhere
def test_a_confident_sample_has_a_small_loss(backend):
    """log(1 + e^-|z|) of a large logit would be off by percents, or 0."""
    if os.environ["DGS_KERNELS_BACKEND"] == "eager":
        pytest.skip("PyTorch's own cross-entropy is log(1 + e^-|z|)")
    inputs = tensors(40, 24, torch.float32, backend).detached()
    for x, weight, bias in (
        (inputs.features, inputs.image_weight, inputs.image_bias),
        (inputs.text, inputs.text_weight, inputs.text_bias),
    ):
        x.zero_()[:, 0] = (2 * inputs.labels - 1) * 15 / weight[0, 0]
        bias.zero_()
    out = surgery_head(*inputs)
    want = torch.full((), -15.0, dtype=torch.float64).exp().log1p()
    for loss in (out.image_loss, out.text_loss):
        assert loss.item() == pytest.approx(want.item(), rel=1e-4)


@everywhere
def test_runs_twice_alike(backend):
    inputs = tensors(65, 77, torch.float32, backend)
    assert_equal(outcome(surgery_head, inputs), outcome(surgery_head, inputs), 0)


def test_opcheck_of_the_backward():
    inputs = problem(3).floats()
    outputs = torch.ops.dgs.surgery_head(*inputs, 1e-6, "align_first", None, "both", None, 0.3)
    residuals, differences = outputs[2].detach(), outputs[4].detach()
    weights = (x.detach() for x in (inputs.image_weight, inputs.teacher_weight, inputs.text_weight))
    matrices = (residuals, *weights)
    scales = (torch.tensor(1.0), torch.tensor(0.2))
    for dtype, pull in product(
        (torch.float32, torch.bfloat16), ((None, None, 0.0), (differences, scales[0], 0.3))
    ):
        arguments = (*matrices, *scales, dtype, 1e-6, "align_first", None, *pull)
        torch.library.opcheck(torch.ops.dgs.surgery_head_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64])
def test_labels_of_any_type(dtype):
    inputs = problem(5)
    want = outcome(surgery_head, inputs)
    inputs = inputs._replace(labels=inputs.labels.to(dtype))
    assert_equal(outcome(surgery_head, inputs), want, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_of_any_type(dtype):
    """Half features with float32 heads, as under autocast: float32 arithmetic, gradients in their types."""
    inputs = problem(32).floats().map(lambda x: x.to(dtype) if x.shape == (32, DIM) else x)
    leaves = inputs.map(torch.clone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = surgery_head(*leaves)
    (0.9 * out.image_loss + 0.7 * out.text_loss + 0.2 * out.alignment_loss).backward()
    assert all(x.dtype == torch.float32 for x in out)
    want = outcome(reference.official_graph, inputs.map(torch.Tensor.double))
    for name in ("features", "text", "image_weight", "text_weight"):
        got = getattr(leaves, name).grad
        assert got.dtype == getattr(inputs, name).dtype
        tolerance = 2 * torch.finfo(got.dtype).eps
        assert (got.double() - want[name]).norm() <= tolerance * want[name].norm(), name
    torch.testing.assert_close(out.alignment_loss.double(), want["alignment_loss"], rtol=1e-5, atol=1e-7)


def test_only_what_is_trained_receives_a_gradient():
    inputs = problem(4)
    inputs.teacher.requires_grad_()
    offsets = torch.zeros(4, requires_grad=True)
    out = surgery_head(*inputs, text="both", offsets=offsets, distillation=0.3)
    assert not any(x.requires_grad for x in out[3:6])
    (out.image_loss + out.text_loss + out.alignment_loss + out.distillation_loss).backward()
    assert offsets.grad is None
    given = {name for name, x in inputs._asdict().items() if x.grad is not None}
    assert given == {"features", "text", "image_weight", "image_bias", "text_weight", "text_bias"}


def test_one_loss_alone():
    for name, trained in (
        ("image_loss", ("features", "image_weight")),
        ("text_loss", ("text", "text_weight")),
        ("alignment_loss", ("features",)),
    ):
        inputs, others = problem(4), problem(4)
        getattr(surgery_head(*inputs), name).backward()
        out = dict(zip(("image_loss", "text_loss", "alignment_loss"), reference.official_graph(*others)))
        out[name].backward()
        for at in trained:
            ours, theirs = getattr(inputs, at).grad, getattr(others, at).grad
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_no_grad_and_empty():
    with torch.no_grad():
        assert not surgery_head(*problem(3)).image_loss.requires_grad
    inputs = problem(0)
    out = surgery_head(*inputs)
    assert out.image_loss == out.text_loss == out.alignment_loss == 0 and out.image_logits.shape == (0,)
    (out.image_loss + out.text_loss + out.alignment_loss).backward()
    assert inputs.features.grad.shape == (0, DIM) and not inputs.image_weight.grad.any()


def test_deterministic():
    inputs = problem(257, dtype=torch.float32)
    assert_equal(outcome(surgery_head, inputs), outcome(surgery_head, inputs), 0)


def test_not_finite_stays_visible():
    for name in ("features", "teacher", "text"):
        inputs = problem(4)
        with torch.no_grad():
            getattr(inputs, name)[1, 3] = torch.nan
        grad = outcome(surgery_head, inputs)["features"]
        assert grad[[0, 2, 3]].isfinite().all() and not grad[1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
def test_on_a_gpu_without_synchronisation(order):
    inputs = problem(257)
    moved = inputs.map(torch.Tensor.cuda)
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
    (grad,) = torch.autograd.grad(getattr(out, name), inputs.features, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_module():
    torch.manual_seed(0)
    head = SurgeryHead(DIM)
    assert [n for n, p in head.named_parameters() if not p.requires_grad] == [
        "teacher_head.weight",
        "teacher_head.bias",
    ]
    features, teacher, text, labels, *_ = problem(8, dtype=torch.float32).detached()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        out = head(features, teacher, text, labels, order="project_first", reference_batch_size=32)
        optimizer.zero_grad()
        (out.image_loss + out.text_loss).backward()
        optimizer.step()
        losses.append((out.image_loss + out.text_loss).item())
    assert losses[-1] < 0.7 * losses[0]
    logits = head(features, teacher, None, labels).image_logits
    torch.testing.assert_close(head.image_head(features).squeeze(1), logits)


def test_opcheck():
    inputs = problem(3).floats()
    op = torch.ops.dgs.surgery_head.default
    offsets = torch.randn(3)
    torch.library.opcheck(op, (*inputs, 1e-6, "align_first", 32, "project", None, 0.0))
    torch.library.opcheck(op, (*inputs, 1e-6, "align_first", 32, "both", offsets, 0.3))
    without = inputs._replace(text=None)
    torch.library.opcheck(op, (*without, 1e-6, "project_first", None, "expert", offsets, 0.0))


@pytest.mark.parametrize(
    "options", [{}, {"text": "expert", "distillation": 0.3}], ids=["published", "expert"]
)
def test_compiles_whole(options):
    head = SurgeryHead(DIM).double()
    features, teacher, text, labels, *_ = problem(4).detached()
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
    "name, value, words",
    [
        ("features", torch.zeros(4), r"features must be \[B, D\]"),
        ("teacher", torch.zeros(3, DIM), r"teacher_features must have shape \(4, 24\), got \(3, 24\)"),
        ("text", torch.zeros(4, DIM, device="meta"), "text_features is on meta and features on cpu"),
        ("labels", torch.zeros(4, 1), r"labels must have shape \(4,\), got \(4, 1\)"),
        ("image_weight", torch.zeros(DIM), r"image_weight must have shape \(1, 24\), got \(24,\)"),
        ("teacher_bias", torch.zeros(()), r"teacher_bias must have shape \(1,\)"),
        ("text_weight", None, "text_weight is needed with text_features"),
    ],
)
def test_errors(name, value, words):
    with pytest.raises(ValueError, match=words):
        surgery_head(*problem(4)._replace(**{name: value}))


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
