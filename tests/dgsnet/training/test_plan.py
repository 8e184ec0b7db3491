"""Optimiser steps cut into micro-batches: the mean over their images, whatever the split."""

import itertools

import numpy as np
import pytest
from dgsnet.config import OptimConfig
from dgsnet.training.plan import StepPlan, dropout_seed, lr_factor


def test_dropout_differs_with_seed_step_and_process():
    keys = list(itertools.product(range(4), repeat=3))
    assert len({dropout_seed(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("images", "batch_size", "accumulation", "world"),
    [(32, 8, 1, 1), (33, 8, 1, 1), (33, 4, 2, 3), (50, 8, 2, 2), (7, 32, 4, 2), (1, 8, 1, 1)],
)
def test_a_step_is_the_mean_over_its_images(images, batch_size, accumulation, world):
    order = list(np.random.default_rng(0).permutation(images))
    per_step = batch_size * accumulation * world
    plans = [StepPlan(per_step, batch_size, rank, world) for rank in range(world)]
    for plan in plans:
        plan.set(order)
    steps = len(plans[0].steps)
    assert all(len(plan.steps) == steps for plan in plans)
    seen = 0
    for number in range(steps):
        size = plans[0].steps[number][0]
        micro = [plan.steps[number][1] for plan in plans]
        # All processes run in step.
        assert len({len(batches) for batches in micro}) == 1
        weight = {i: m.weight / len(m.indices) / world for ms in micro for m in ms for i in m.indices}
        assert sorted(weight) == sorted(order[seen : seen + size])
        assert list(weight.values()) == pytest.approx([1 / size] * size)
        assert max(len(m.indices) for ms in micro for m in ms) <= batch_size
        shares = [sum(len(m.indices) for m in ms) for ms in micro]
        assert max(shares) - min(shares) <= 1
        seen += size
    assert seen == images
    for plan in plans:
        assert [m.indices for _, ms in plan.steps for m in ms] == list(plan)
        for limit in (1, steps - 1, steps + 1):
            plan.set(order, limit=limit)
            assert len(plan.steps) == min(limit, steps)


@pytest.mark.parametrize(
    ("pairs", "alone", "batch_size", "accumulation", "world"),
    [
        (16, 0, 8, 1, 1),
        (17, 5, 8, 1, 1),
        (20, 1, 4, 2, 3),
        (9, 9, 3, 3, 2),
        (2, 9, 2, 1, 2),
        (1, 0, 8, 1, 2),
    ],
)
def test_pairs_stay_in_one_micro_batch(pairs, alone, batch_size, accumulation, world):
    rng = np.random.default_rng(1)
    images = 2 * pairs + alone
    units = np.full((pairs + alone, 2), -1)
    units[:pairs], units[pairs:, 0] = np.arange(2 * pairs).reshape(-1, 2), np.arange(2 * pairs, images)
    units = rng.permutation(units)
    per_step = batch_size * accumulation * world
    plans = [StepPlan(per_step, batch_size, rank, world) for rank in range(world)]
    for plan in plans:
        plan.set(units)
    seen = []
    for number, (size, _) in enumerate(plans[0].steps):
        micro = [plan.steps[number][1] for plan in plans]
        assert len({len(batches) for batches in micro}) == 1 and size <= per_step
        batches = [m.indices for ms in micro for m in ms]
        assert max(map(len, batches)) <= batch_size
        for batch in batches:
            assert all((i ^ 1) in batch for i in batch if i < 2 * pairs)
        weights = [m.weight / len(m.indices) / world for ms in micro for m in ms if m.indices]
        assert weights == pytest.approx([1 / size] * len(weights)) and sum(map(len, batches)) == size
        seen += [i for batch in batches for i in batch]
    assert sorted(seen) == list(range(images))
    # Steps are filled but for the last: at most one image is missing, since a pair did not fit.
    assert all(size >= per_step - 1 for size, _ in plans[0].steps[:-1])


def test_the_learning_rate_rises_and_falls():
    constant = [lr_factor(OptimConfig(), step, 10) for step in range(10)]
    assert constant == [1.0] * 10
    warm = [lr_factor(OptimConfig(warmup=0.4), step, 10) for step in range(10)]
    assert warm == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)
    cosine = [lr_factor(OptimConfig(warmup=0.2, schedule="cosine"), step, 10) for step in range(12)]
    assert cosine[:3] == pytest.approx([0.5, 1, 1]) and cosine[6] == pytest.approx(0.5)
    assert cosine[2:10] == sorted(cosine[2:10], reverse=True) and cosine[9] == pytest.approx(0.0381, abs=1e-3)
    # These are more steps than were counted on.
    assert cosine[10:] == pytest.approx([0, 0], abs=1e-12)
    assert lr_factor(OptimConfig(warmup=0.9, schedule="cosine"), 0, 1) == 1
