"""What test_numpy_module.py runs where there is no torch: dgs_numpy against the formulas in plain NumPy."""

from __future__ import annotations

import sys
import tracemalloc
from itertools import product

import dgs_numpy
import ml_dtypes
import numpy as np
import pytest

DTYPES = ("float32", "float64", "float16", ml_dtypes.bfloat16)
ORDERS, RULES = ("align_first", "project_first"), ("positive", "full", "conflict")


def draw(*shape, dtype="float64", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def computing(dtype):
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


# The formulas, in the type of what they are given


def project_align(grad, harmful, beneficial=None, *, alignment=1.0, eps=1e-6, order=ORDERS[0], rule=RULES[0]):
    x, eps, alignment = grad, grad.dtype.type(eps), grad.dtype.type(alignment)
    pull = 0 if beneficial is None else alignment * np.minimum(beneficial, 0)
    if order == "align_first":
        x = x + pull
    h = np.maximum(harmful, 0) if rule == "positive" else harmful
    u = h / (np.sqrt((h * h).sum(-1, keepdims=True)) + eps)
    inner = (x * u).sum(-1, keepdims=True)
    out = x - (np.minimum(inner, 0) if rule == "conflict" else inner) * u
    return out + pull if order == "project_first" else out


def adamw(param, grad, average, square, step, lr, betas, eps, weight_decay, maximize):
    grad = -grad if maximize else grad
    average = betas[0] * average + (1 - betas[0]) * grad
    square = betas[1] * square + (1 - betas[1]) * grad**2
    root = np.sqrt(square / (1 - betas[1] ** step)) + eps
    return param * (1 - lr * weight_decay) - lr / (1 - betas[0] ** step) * average / root, average, square


def surgery_head(
    features,
    teacher,
    text,
    labels,
    heads,
    alignment,
    order,
    eps,
    reference_batch_size,
    role="project",
    offsets=None,
    distillation=0.0,
):
    """The published graph, its gradients written out."""
    (w, b), (v, a), (u, c) = heads
    batch = len(labels)
    counted = reference_batch_size or batch

    def branch(x, weight, bias, shift=0.0):
        own = x @ weight + bias
        z = own + shift
        loss = np.maximum(z, 0) - z * labels + np.log1p(np.exp(-abs(z)))
        return own, loss.mean(), 1 / (1 + np.exp(-z)) - labels

    cz, text_loss, cr = branch(text, u, c)
    shift = (0 if role == "project" else cz) + (0 if offsets is None else offsets)
    (z, loss, r), (tz, _, tr) = branch(features, w, b, shift), branch(teacher, v, a)
    beneficial = np.minimum(tr[:, None] / counted * v, 0)
    grad = project_align(
        r[:, None] / batch * w,
        cr[:, None] / counted * u * (role != "expert"),
        beneficial,
        alignment=alignment / batch,
        eps=eps,
        order=order,
    )
    aligned = (features * beneficial).sum(1).mean()
    own = r @ features / batch, r.mean(), cr @ text / batch, cr.mean()
    distance = features - teacher
    grad = grad + distillation / (features.shape[1] * batch) * distance
    pull = distillation / 2 * (distance**2).mean()
    return loss, text_loss, aligned, z, cz, tz, grad, *own, pull


def spectral_entropy(images):
    x = images.astype(np.float64) / (255 if images.dtype == np.uint8 else 1)
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    batch, height, width = luma.shape
    patches = luma[:, : height // 32 * 32, : width // 32 * 32]
    patches = patches.reshape(batch, height // 32, 32, width // 32, 32).swapaxes(2, 3)
    energy = abs(np.fft.fft2(patches)) ** 2
    share = energy / (energy.sum((-2, -1), keepdims=True) + 1e-12)
    return -(share * np.log2(share + 1e-12)).sum((-2, -1)).reshape(batch, -1)


def assert_accurate(out, formula, arrays) -> None:
    """At most twice the error of plain NumPy in the computing type, and a rounding of the result."""
    dtype = out.dtype
    exact = formula(*(None if x is None else x.astype(np.float64) for x in arrays))
    plain = formula(*(None if x is None else x.astype(computing(x.dtype)) for x in arrays)).astype(dtype)
    error, theirs = (np.linalg.norm(x.astype(np.float64) - exact) for x in (out, plain))
    unit = float(ml_dtypes.finfo(dtype).eps)
    assert error <= 2 * theirs + 2 * unit * np.linalg.norm(arrays[0].astype(np.float64))


# project_align


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (64, 5), (9, 768), (2, 100_003)])
def test_project_align(dtype, shape):
    for aligned, (order, rule) in product((True, False), product(ORDERS, RULES)):
        grad, harmful, beneficial = draw(3, *shape, dtype=dtype)
        arrays = (grad, harmful, beneficial if aligned else None)
        options = {"alignment": 0.7, "order": order, "rule": rule}
        out = dgs_numpy.project_align(*arrays, **options)
        assert out.dtype == grad.dtype and out.shape == shape
        assert_accurate(out, lambda *x, o=options: project_align(*x, **o), arrays)


def test_rows_where_they_lie():
    """Views with a stride between rows, one row for all, any number of axes: read as they are."""
    plain = draw(6, 40, seed=1)
    wide = np.zeros((12, 90))
    wide[::2, 7:47] = plain
    column = np.zeros((3, 5))
    column[:, 2] = draw(3)
    for grad in (wide[::2, 7:47], plain[::-1], plain[2:3], plain[4], plain.reshape(2, 3, 40), column[:, 2:3]):
        for harmful in (grad, draw(grad.shape[-1], seed=2), draw(1, grad.shape[-1], seed=3)):
            if harmful.ndim > grad.ndim:
                continue
            out = dgs_numpy.project_align(grad, harmful, -harmful)
            np.testing.assert_allclose(out, project_align(grad, harmful, -harmful), rtol=1e-12, atol=1e-14)
    assert dgs_numpy.project_align(np.zeros((0, 4)), np.ones(4)).shape == (0, 4)


def test_not_finite_stays_visible():
    for bad, which in product((np.nan, np.inf), range(3)):
        inputs = draw(3, 4, 24)
        inputs[which, 2, 5] = -bad if which == 2 else bad
        out = dgs_numpy.project_align(*inputs)
        assert np.isfinite(out[[0, 1, 3]]).all() and not np.isfinite(out[2]).all()


def test_threads_do_not_change_the_result():
    grad, harmful = draw(2, 3, 500_000, dtype="float32")
    before, results = dgs_numpy.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            dgs_numpy.set_num_threads(threads)
            assert dgs_numpy.get_num_threads() == threads
            results.append(dgs_numpy.project_align(grad, harmful))
    finally:
        dgs_numpy.set_num_threads(before)
    assert all((results[0] == other).all() for other in results)
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        dgs_numpy.set_num_threads(0)


# Lists

SHAPES = [(3, 4), (700,), (1,), (200, 1000), (0,), (5, 5)]
GROUPS = ["a", "b", "a", "c", "b", "a"]


def lists(kinds, dtype):
    return [
        [draw(*s, dtype=dtype, seed=10 * kind + i) for i, s in enumerate(SHAPES)] for kind in range(kinds)
    ]


def rows_of(arrays):
    """Every layer's numbers end to end, in order of first appearance."""
    return [
        np.concatenate([x.ravel() for x, g in zip(arrays, GROUPS) if g == group]) for group in ("a", "b", "c")
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_project_align_in_place(dtype):
    for order, rule in product(ORDERS, RULES):
        grads, harmful, beneficial = lists(3, dtype)
        before = rows_of([g.copy() for g in grads])
        options = {"alignment": 0.3, "order": order, "rule": rule}
        sums = dgs_numpy.project_align_(grads, harmful, beneficial, groups=GROUPS, **options)
        assert sums.shape == (3, 6) and sums.dtype == computing(dtype)
        for i, row in enumerate(zip(before, rows_of(harmful), rows_of(beneficial))):
            assert_accurate(rows_of(grads)[i], lambda *x, o=options: project_align(*x, **o), row)
            g, h, b = (x.astype(np.float64) for x in row)
            h, b = (np.maximum(h, 0) if rule == "positive" else h), np.minimum(b, 0)
            want = [g @ h, h @ h, g @ g, b @ h, b @ b, g @ b]
            size = [
                np.linalg.norm(x) * np.linalg.norm(y)
                for x, y in ((g, h), (h, h), (g, g), (b, h), (b, b), (g, b))
            ]
            assert (abs(sums[i] - want) <= 1e-6 * np.array(size)).all()


def test_every_array_is_its_own_layer():
    grads, harmful = lists(2, "float64")
    want = [project_align(g.ravel(), h.ravel()).reshape(g.shape) for g, h in zip(grads, harmful)]
    assert dgs_numpy.project_align_(grads, tuple(harmful)).shape == (len(SHAPES), 6)
    for got, exact in zip(grads, want):
        np.testing.assert_allclose(got, exact, rtol=1e-12, atol=1e-14)
    assert dgs_numpy.project_align_([], []).shape == (0, 6)


@pytest.mark.parametrize("maximize", [False, True])
def test_surgery_adamw(maximize):
    params, grads, averages, squares, harmful, beneficial = lists(6, "float64")
    squares = [x**2 for x in squares]
    hyper = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1, "maximize": maximize}
    surgery = {"alignment": 0.4, "order": "project_first", "rule": "full"}
    want = [
        adamw(p, project_align(g, h, b, **surgery), m, s, 7, **hyper)
        for p, g, m, s, h, b in zip(*map(rows_of, (params, grads, averages, squares, harmful, beneficial)))
    ]
    kept = [g.copy() for g in grads]
    dgs_numpy.surgery_adamw_(
        params, grads, averages, squares, 7, harmful, beneficial, groups=GROUPS, **hyper, **surgery
    )
    for i, exact in enumerate(zip(*want)):
        for got, layer in zip(rows_of((params, averages, squares)[i]), exact):
            np.testing.assert_allclose(got, layer, rtol=1e-10, atol=1e-13)
    assert all((g == k).all() for g, k in zip(grads, kept))


# surgery_head


def head_problem(batch, dim, dtype):
    f, t, c = draw(3, batch, dim, dtype=dtype)
    weights = draw(3, dim, seed=1) / dim**0.5
    return f, t, c, np.arange(batch) % 2, [(w, 0.1 * i) for i, w in enumerate(weights)]


@pytest.mark.parametrize("dtype, tolerance", list(zip(DTYPES, (2e-5, 1e-12, 2e-3, 1e-2))))
@pytest.mark.parametrize("batch, dim", [(1, 1), (33, 768), (300, 7)])
def test_surgery_head(dtype, tolerance, batch, dim):
    f, t, c, labels, heads = head_problem(batch, dim, dtype)
    published = ("project", None, 0.0)
    expert, both = (("expert", draw(batch, seed=2), 0.3), ("both", None, 5.0))
    for order, reference_batch_size, extra in (
        ("align_first", None, published),
        ("project_first", 32, published),
        ("align_first", 32, expert),
        ("project_first", None, both),
    ):
        options = {
            "alignment": 0.3,
            "order": order,
            "eps": 1e-6,
            "reference_batch_size": reference_batch_size,
        } | dict(zip(("text", "offsets", "distillation"), extra))
        flat = [x for head in heads for x in head]
        out = dgs_numpy.surgery_head(f, t, c, labels, *flat, **options)
        wide = [x.astype(np.float64) for x in (f, t, c)]
        for name, got, want in zip(out._fields, out, surgery_head(*wide, labels, heads, *options.values())):
            error = np.linalg.norm(np.asarray(got, np.float64) - want)
            # Terms of that size may cancel: in a loss, and at D = 1, where all of the gradient is removed.
            least = 1 if name.endswith("loss") else 1 / batch if name == "features_grad" else 0
            assert error <= tolerance * max(np.linalg.norm(want), least), name
        assert out.features_grad.dtype == f.dtype and out.image_logits.dtype == computing(dtype)


def test_surgery_head_layouts():
    """Rows apart are read where they lie; weights of nn.Linear's shape, lists and numbers are all heads."""
    f, t, c, labels, heads = head_problem(6, 40, "float32")
    want = dgs_numpy.surgery_head(f, t, c, labels, *(x for head in heads for x in head))
    wide = np.zeros((12, 90), np.float32)
    wide[::2, 7:47] = f
    as_torch = [x for w, b in heads for x in (w[None].astype(np.float32), [b])]
    got = dgs_numpy.surgery_head(wide[::2, 7:47], t, c, labels.tolist(), *as_torch)
    for x, y in zip(got, want):
        np.testing.assert_array_equal(x, y)


def test_surgery_head_without_captions_and_without_rows():
    f, t, _, labels, heads = head_problem(6, 40, "float64")
    flat = [x for head in heads[:2] for x in head]
    out = dgs_numpy.surgery_head(f, t, None, labels, *flat, None, None)
    assert out.text_loss == 0 and out.text_logits is None and out.text_weight_grad is None
    want = surgery_head(f, t, f, labels, [*heads[:2], (np.zeros(40), 0.0)], 0.2, "align_first", 1e-6, None)
    np.testing.assert_allclose(out.features_grad, want[6], rtol=1e-12, atol=1e-15)
    empty = dgs_numpy.surgery_head(f[:0], t[:0], None, labels[:0], *flat, None, None)
    assert (
        empty.image_loss == 0 and empty.features_grad.shape == (0, 40) and not empty.image_weight_grad.any()
    )


# spectral_entropy


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_spectral_entropy(dtype):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (70, 130, 3)).astype("uint8")
    # This patch is constant.
    image[:32, :32] = 77
    image = image if dtype == "uint8" else image.astype(dtype) / np.float32(255)
    interleaved = np.stack([image, image[::-1]]).transpose(0, 3, 1, 2)
    for images in (interleaved, np.ascontiguousarray(interleaved), interleaved[:, :, 3:, 5:]):
        got = dgs_numpy.spectral_entropy(images)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, spectral_entropy(images), atol=2e-4)
    assert abs(dgs_numpy.spectral_entropy(interleaved)[0, 0]) < 1e-4
    assert dgs_numpy.spectral_entropy(interleaved[:, :, :31]).shape == (2, 0)


def test_no_matrix_is_copied():
    """NumPy tells tracemalloc what it allocates: results, and small vectors beside them."""
    grad, harmful, beneficial = draw(3, 256, 1000, dtype="float32")
    rows = grad[:, 100:900]
    weight = np.ones(1000)
    heads = [weight, 0.0] * 3
    for call, allocated in (
        (lambda: dgs_numpy.project_align(grad, harmful, beneficial), grad.nbytes),
        (lambda: dgs_numpy.project_align(rows, rows, harmful[0, :800]), rows.nbytes),
        (lambda: dgs_numpy.project_align_([grad], [harmful], [beneficial]), 0),
        (lambda: dgs_numpy.surgery_adamw_([grad], [grad], [harmful], [beneficial], 1, [grad]), 0),
        (lambda: dgs_numpy.surgery_head(grad, harmful, beneficial, np.ones(256), *heads), grad.nbytes),
    ):
        tracemalloc.start()
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert result is not None and allocated <= peak < allocated + 100_000


def test_torch_is_not_imported():
    assert "torch" not in sys.modules
