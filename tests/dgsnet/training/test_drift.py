"""Drift, kernel alignment and residual correlation against their plain definitions on the whole data."""

import math

import numpy as np
import pytest
import torch
from dgsnet.training import drift


def over_batches(sizes, *tensors, losses=(0.0, 0.0)):
    """The summary of all rows, taken batch by batch and weighted as training weighs them."""
    total, start = 0, 0
    for size in sizes:
        part = [x[start : start + size] if x is not None else None for x in tensors]
        total = total + size / sum(sizes) * drift.moments(tuple(map(torch.tensor, losses)), *part)
        start += size
    return drift.summary(total)


@pytest.fixture
def rows():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 24, 40) + 1
    return student, teacher, torch.randn(24), torch.randn(24), (torch.arange(24) % 3 == 0).float()


@pytest.mark.parametrize("sizes", [(24,), (10, 11, 3)])
def test_drift_and_correlation_do_not_depend_on_the_batches(rows, sizes):
    student, teacher, image, expert, labels = rows
    found = over_batches(sizes, *rows)
    means = student.mean(0), teacher.mean(0)
    assert found["prior/drift"] == pytest.approx(((means[0] - means[1]).norm() / means[1].norm()).item())
    residuals = [(torch.sigmoid(z) - labels).numpy() for z in (image, expert)]
    for r in residuals:
        for label in (0, 1):
            r[labels == label] -= r[labels == label].mean()
    assert found["expert/residual_correlation"] == pytest.approx(np.corrcoef(*residuals)[0, 1])


def test_alignment_is_one_for_rotated_and_scaled_features(rows):
    student, *others = rows
    rotation = torch.linalg.qr(torch.randn(40, 40))[0]
    found = over_batches((8, 16), student, 3 * student @ rotation + 7, *others[1:])
    assert found["prior/cka"] == pytest.approx(1, abs=1e-5)


def test_alignment_is_unbiased_at_any_batch_size():
    """Of independent features it is 0, where the plain estimator is near 1 at few rows of many numbers."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1600, 32)
    shared = 0.7 * student + 0.3 * teacher
    labels = torch.zeros(1600)
    for batch in (8, 100):
        arguments = (labels, None, labels)
        assert abs(over_batches([batch] * (1600 // batch), student, teacher, *arguments)["prior/cka"]) < 0.03
        found = over_batches([batch] * (1600 // batch), student, shared, *arguments)["prior/cka"]
        # Tr(cov^T cov) / sqrt(...), with independent standard normal features: 0.49 / 0.58.
        assert found == pytest.approx(0.49 / 0.58, abs=0.03)


def test_what_cannot_be_told_is_nan(rows):
    student, teacher, image, _, labels = rows
    found = over_batches((3, 3), student, teacher, image, None, labels)
    assert all(
        math.isnan(found[name]) for name in ("prior/cka", "expert/residual_correlation", *drift.LOSSES)
    )
    assert found["prior/drift"] > 0
    single = over_batches((8, 8), student, teacher, image, image, torch.ones(24), losses=(0.5, 0.25))
    assert single["expert/residual_correlation"] == pytest.approx(1)
    assert (single["distillation_loss"], single["nuisance_loss"]) == (0.5, 0.25)
