"""What test_cmake.py runs where there is no torch: what dgs_numpy refuses, and in which words."""

from __future__ import annotations

import dgs_numpy
import numpy as np
import pytest

ONE = np.full((3, 4), 0.5)


def read_only():
    x = ONE.copy()
    x.flags.writeable = False
    return x


def misaligned():
    return np.frombuffer(b"\0" * 33, np.uint8)[1:].view(np.float64)


def align(grad=ONE, harmful=ONE, beneficial=None, **options):
    dgs_numpy.project_align(grad, harmful, beneficial, **options)


def align_list(**changes):
    dgs_numpy.project_align_(**{"grads": [ONE.copy()], "harmful": [ONE]} | changes)


def step(**changes):
    lists = {name: [ONE.copy()] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "harmful")}
    dgs_numpy.surgery_adamw_(**lists | {"step": 1} | changes)


def head(features=ONE, teacher=ONE, text=None, labels=(0, 1, 1), **options):
    dgs_numpy.surgery_head(features, teacher, text, labels, *[ONE[0], 0.5] * 2, None, None, **options)


def entropy(shape=(1, 3, 64, 64), dtype="uint8", step=1):
    dgs_numpy.spectral_entropy(np.ones(shape, dtype)[..., ::step])


@pytest.mark.parametrize(
    "function, changes, error, words",
    [
        (align, {"grad": [1.0]}, TypeError, "grad must be a numpy array, got list"),
        (align, {"grad": np.ones(())}, ValueError, r"grad must be \[..., D\] with D >= 1, got \(\)"),
        (align, {"grad": np.ones((3, 0))}, ValueError, "D >= 1"),
        (align, {"grad": ONE.astype(int)}, TypeError, "grad must be float32, float64, .* got int64"),
        (align, {"grad": ONE.astype(">f8")}, TypeError, "got >f8"),
        (align, {"grad": misaligned()}, ValueError, "grad is not aligned to its dtype"),
        (align, {"grad": ONE.T}, ValueError, "numbers of a row of grad .* pass numpy.ascontiguousarray"),
        (align, {"harmful": np.ones(5)}, ValueError, r"harmful .* grad's shape \(3, 4\) .* got \(5,\)"),
        (align, {"beneficial": ONE[:2]}, ValueError, "beneficial must have grad's shape"),
        (align, {"harmful": ONE.astype("f")}, TypeError, "grad's dtype float64, got float32"),
        (align, {"order": "last"}, ValueError, "order must be one of align_first, .* got 'last'"),
        (align, {"rule": "none"}, ValueError, "rule must be one of positive, .* got 'none'"),
        (align, {"eps": 0}, ValueError, "eps must be > 0, got 0.0"),
        (align_list, {"grads": ONE}, TypeError, "grads must be a list of numpy arrays, got ndarray"),
        (align_list, {"harmful": []}, ValueError, "harmful must have 1 arrays, got 0"),
        (align_list, {"harmful": [ONE[:2]]}, ValueError, r"harmful\[0\] must have shape \(3, 4\), got"),
        (align_list, {"harmful": [ONE.astype("f")]}, TypeError, r"harmful\[0\] must be float64 as the"),
        (align_list, {"grads": [ONE.T]}, ValueError, r"grads\[0\] must be C-contiguous"),
        (align_list, {"grads": [read_only()]}, ValueError, r"grads\[0\] is edited in place, but it is read"),
        (align_list, {"groups": [1, 2]}, ValueError, "groups must name the layer of 1 arrays"),
        (step, {"step": 0}, ValueError, "step counts from 1, got 0"),
        (step, {"exp_avgs": []}, ValueError, "exp_avgs must have 1 arrays, got 0"),
        (step, {"params": [read_only()]}, ValueError, r"params\[0\] is edited in place"),
        (head, {"features": ONE[0]}, ValueError, r"features must be \[B, D\] with D >= 1, got \(4,\)"),
        (head, {"teacher": ONE[:2]}, ValueError, r"teacher_features must have features' shape \(3, 4\)"),
        (head, {"teacher": ONE.astype("f")}, TypeError, "features' dtype float64, got float32"),
        (head, {"text": ONE}, ValueError, "text_features, text_weight and text_bias must be given together"),
        (head, {"labels": [0, 1]}, ValueError, r"labels must be 3 numbers, got shape \(2,\)"),
        (head, {"labels": ["a"] * 3}, TypeError, "labels must be real numbers, got <U1"),
        (head, {"reference_batch_size": 0}, ValueError, "reference_batch_size must be >= 1, got 0"),
        (entropy, {"shape": (1, 4, 64, 64)}, ValueError, r"images must be \[B, 3, H, W\]"),
        (entropy, {"dtype": "float64"}, TypeError, "images must be uint8 or float32, got float64"),
        (entropy, {"step": 2}, ValueError, "images must be planar or have the three channels"),
    ],
)
def test_errors(function, changes, error, words):
    function()
    with pytest.raises(error, match=words):
        function(**changes)
