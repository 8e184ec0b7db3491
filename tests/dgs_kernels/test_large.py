"""More than 2^31 numbers in one tensor, where 32-bit indices wrap around: bfloat16, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgs_kernels import backends, project_align, project_align_, reference, surgery_head

pytestmark = pytest.mark.slow

# A power of two, so that means over all rows and over one repetition round alike.
ROWS, DIM, REPETITIONS = 2731, 768, 1024
NEEDED = 12 * 2**30  # two tensors of 4 GiB, and room for everybody else
assert ROWS * DIM * REPETITIONS > 2**31


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(scope="module")
def rows() -> Iterator[Tensor]:
    """[ROWS * REPETITIONS, DIM]: the same rows over and over, so that all of a result is known."""
    if reason := backends.obstacle("cpu", "project_align", "cpu"):
        pytest.skip(f"eager PyTorch would need several times the memory; {reason}")
    if not Path("/proc/meminfo").exists() or available_bytes() < NEEDED:
        pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of available memory")
    yield draw(ROWS, DIM, seed=0).repeat(REPETITIONS, 1)


def assert_repeats(large: Tensor, small: Tensor) -> None:
    """Bit by bit, and four numbers at a time: to compare is most of the work here."""
    assert small.isfinite().all()
    large, small = large.view(torch.int64), small.view(torch.int64)
    for i, part in enumerate(large.split(ROWS)):
        assert torch.equal(part, small), f"repetition {i} of {REPETITIONS}"


def assert_rounded(out: Tensor, exact: Tensor) -> None:
    """Equal but for the rounding to bfloat16 and that of sums in float32."""
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)


def test_many_rows(rows):
    harmful, beneficial = draw(2, DIM, seed=1)
    out = project_align(rows, harmful, beneficial, alignment=0.3)
    small = project_align(rows[:ROWS], harmful, beneficial, alignment=0.3)
    assert_repeats(out, small)
    exact = (t.double() for t in (rows[:ROWS], harmful, beneficial))
    assert_rounded(small, reference.project_align(*exact, alignment=0.3))


def test_one_long_row(rows):
    """A row with its neighbouring numbers as harmful direction: sums are 1024 times those of a period."""
    flat, period = rows.view(-1), ROWS * DIM
    out = project_align(flat[:-1], flat[1:], rule="full")
    once, after = flat[:period].double(), flat[1 : period + 1].double()
    k = (once @ after) / (after @ after)  # the one product that is missing at the end changes nothing here
    exact = once - k * after
    for begin in (0, 511 * period, 1022 * period):
        assert_rounded(out[begin : begin + period], exact)
    assert_rounded(out[-period + 1 :], exact[:-1])


def test_one_long_tensor_in_place(rows):
    grads = draw(ROWS, DIM, seed=2).repeat(REPETITIONS, 1)
    once, harmful = grads[:ROWS].double(), rows[:ROWS].double()
    sums = project_align_([grads], [rows], rule="full")
    exact = (
        torch.stack([(once * harmful).sum(), (harmful * harmful).sum(), (once * once).sum()]) * REPETITIONS
    )
    torch.testing.assert_close(sums[0, :3].double(), exact, rtol=1e-5, atol=1e-5 * exact.max().item())
    small = grads[:ROWS].clone()
    assert_rounded(small, once - exact[0] / exact[1] * harmful)
    assert_repeats(grads, small)


def test_heads(rows):
    weights, labels = draw(3, DIM, seed=3).float().unsqueeze(1) / DIM**0.5, torch.arange(ROWS) % 2
    heads = [x for weight in weights for x in (weight, torch.zeros(1))]

    def outcome(features: Tensor, repetitions: int) -> tuple[Tensor, Tensor]:
        leaf = features.detach().requires_grad_()
        y = labels.repeat(repetitions)
        out = surgery_head(leaf, features, features, y, *heads, reference_batch_size=32)
        (repetitions * (out.image_loss + 0.2 * out.alignment_loss)).backward()
        return torch.stack(out[:3]).detach(), leaf.grad

    small_losses, small = outcome(rows[:ROWS], 1)
    losses, large = outcome(rows, REPETITIONS)
    torch.testing.assert_close(losses, small_losses, rtol=1e-5, atol=1e-6)
    assert_repeats(large, small)
