"""More than 2^31 numbers in one tensor and in one list, where 32-bit indices wrap around: bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgs_kernels import (
    backends,
    combine_,
    gramian,
    project_align,
    project_align_,
    reference,
    spectral_entropy,
    surgery_head,
)
from dgs_kernels.ops.surgery_adamw_ import run as surgery_adamw_

pytestmark = pytest.mark.slow

# A power of two, so that means over all rows and over one repetition round alike.
ROWS, DIM, REPETITIONS = 2731, 768, 1024
# On the CPU two tensors of 4 GiB, on a GPU six, and room for everybody else.
NEEDED = {"cpu": 12 * 2**30, "cuda": 32 * 2**30}
assert ROWS * DIM * REPETITIONS > 2**31

ON_GPU = [
    pytest.param((name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu) for name in ("triton", "cuda")
]
PLACES = [pytest.param(("cpu", "cpu"), id="cpu-cpu"), *ON_GPU]


def available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def draw(*shape: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


@pytest.fixture(scope="module", params=PLACES)
def rows(request: pytest.FixtureRequest) -> Iterator[Tensor]:
    """[ROWS * REPETITIONS, DIM]: the same rows over and over, so that all of a result is known."""
    name, device = request.param
    for operation in backends.OPERATIONS:
        if reason := backends.obstacle(name, operation, device):
            pytest.skip(f"eager PyTorch would need several times the memory; {reason}")
    if not Path("/proc/meminfo").exists() or available_bytes(device) < NEEDED[device]:
        pytest.skip(f"needs {NEEDED[device] / 2**30:.0f} GiB of available memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.VARIABLE, name)
        yield draw(ROWS, DIM, seed=0, device=device).repeat(REPETITIONS, 1)


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
    harmful, beneficial = draw(2, DIM, seed=1, device=rows.device)
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
    # The sums miss one product at the end, which changes nothing here.
    k = (once @ after) / (after @ after)
    exact = once - k * after
    for begin in (0, 511 * period, 1022 * period):
        assert_rounded(out[begin : begin + period], exact)
    assert_rounded(out[-period + 1 :], exact[:-1])


def test_one_long_tensor_in_place(rows):
    grads = draw(ROWS, DIM, seed=2, device=rows.device).repeat(REPETITIONS, 1)
    once, harmful = grads[:ROWS].double(), rows[:ROWS].double()
    sums = project_align_([grads], [rows], rule="full")
    exact = (
        torch.stack([(once * harmful).sum(), (harmful * harmful).sum(), (once * once).sum()]) * REPETITIONS
    )
    torch.testing.assert_close(sums[0, :3].double(), exact, rtol=1e-5, atol=1e-5 * exact.max().item())
    small = grads[:ROWS].clone()
    assert_rounded(small, once - exact[0] / exact[1] * harmful)
    assert_repeats(grads, small)


@pytest.mark.parametrize("rows", ON_GPU, indirect=True)
def test_a_list(rows):
    """Tensors of whole repetitions, of three layers: each repetition of a tensor has the same result."""
    once, harmful = draw(ROWS, DIM, seed=2, device=rows.device), rows[:ROWS].double()
    grads = once.repeat(REPETITIONS, 1)
    layers = (0, 1, 0, 2, 1, 0, 2)
    sizes = [ROWS * n for n in (100, 1, 300, 223, 200, 99, 101)]
    assert sum(sizes) == len(rows)
    once = once.double()
    products = torch.stack([(x * y).sum() for x, y in ((harmful, once), (harmful, harmful), (once, once))])
    repetitions = torch.tensor([499, 201, 324], device=rows.device)[:, None]

    lists = list(grads.split(sizes)), list(rows.split(sizes))
    sums = project_align_(*lists, groups=layers, rule="full")
    wanted = products * repetitions
    torch.testing.assert_close(sums[:, :3].double(), wanted, rtol=1e-5, atol=1e-5 * wanted.max().item())
    for tensor in lists[0]:
        small = tensor[:ROWS].clone()
        assert_rounded(small, once - products[0] / products[1] * harmful)
        assert_repeats(tensor, small)

    # Layers of unlike lengths may have been rounded to unlike numbers: all begin again with the first one's.
    grads.copy_(grads[:ROWS].repeat(REPETITIONS, 1))
    once = grads[:ROWS].double()
    found = gramian(lists, groups=layers)
    inner = torch.stack([(x * y).sum() for x in (once, harmful) for y in (once, harmful)]).view(2, 2)
    wanted = inner * repetitions[..., None]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.max().item())

    combine_(lists[0], lists, torch.tensor([0.5, -1.5], device=rows.device), groups=layers)
    for tensor in lists[0]:
        small = tensor[:ROWS].clone()
        assert_rounded(small, 0.5 * once - 1.5 * harmful)
        assert_repeats(tensor, small)


@pytest.mark.parametrize("rows", ON_GPU, indirect=True)
@pytest.mark.parametrize("sizes", [[REPETITIONS], [100, 301, 623]], ids=["one tensor", "a list"])
def test_adamw(rows, sizes):
    params, grads, first, second = (
        draw(ROWS, DIM, seed=seed, device=rows.device).repeat(REPETITIONS, 1) for seed in range(2, 6)
    )
    second.square_()
    once = [t[:ROWS].double() for t in (params, grads, first, second, rows)]
    columns = [list(t.split([ROWS * n for n in sizes])) for t in (params, grads, first, second, rows)]
    steps, sums = [torch.tensor(2.0) for _ in sizes], torch.zeros(1, 6, device=rows.device)
    surgery = ([0] * len(sizes), sums, None, 1.0, 1e-6, "align_first", "full", "all")
    surgery_adamw_(*columns[:4], steps, columns[4], [], *surgery, 0.1, 0.9, 0.99, 0.01, 1e-4, False)
    p, g, m, v, h = once
    g = g - (g * h).sum() / (h * h).sum() * h
    options = dict(lr=0.1, betas=(0.9, 0.99), eps=1e-4, weight_decay=0.01, maximize=False)
    for wanted, tensors in zip(reference.adamw_step(p, g, m, v, 3, **options), (params, first, second)):
        small = tensors[:ROWS].clone()
        torch.testing.assert_close(small.double(), wanted, rtol=2**-8, atol=1e-4)
        assert_repeats(tensors, small)


@pytest.mark.parametrize("rows", ON_GPU, indirect=True)
def test_images(rows):
    image = torch.randint(256, (1, 3, 1024, 1024), generator=torch.Generator().manual_seed(6)).byte()
    found = spectral_entropy(image.to(rows.device).expand(700, -1, -1, -1).contiguous())
    assert image.numel() * 700 > 2**31
    small = found[:1].clone()
    wanted = reference.spectral_entropy(image.double() / 255)
    torch.testing.assert_close(small.double().cpu(), wanted, rtol=1e-4, atol=1e-4)
    assert (found == small).all()


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
