"""spectral_entropy on every backend against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs_kernels import BackendError, backends, reference, spectral_entropy
from tests.conftest import on_backends

everywhere = on_backends("spectral_entropy")


def picture(*shape, seed=0, device="cpu"):
    """uint8 images [..., H, W] of noise whose strength varies from patch to patch, none included."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(shape[-1], generator=generator).round(decimals=1).sort().values * 200
    noise = (torch.rand(*shape, generator=generator) - 0.5) * strength
    return (noise + 128).round().clamp(0, 255).to(torch.uint8).to(device)


def exact(images):
    """[B, patches] by the definition, patch by patch, in NumPy's float64."""
    pixels = images.cpu().double().numpy() / (255 if images.dtype == torch.uint8 else 1)
    luma = np.einsum("c,bchw->bhw", [0.299, 0.587, 0.114], pixels)
    out = []
    for image in luma:
        for top in range(0, image.shape[0] - 31, 32):
            for left in range(0, image.shape[1] - 31, 32):
                energy = np.abs(np.fft.fft2(image[top : top + 32, left : left + 32])) ** 2
                share = energy / (energy.sum() + 1e-12)
                out.append(-(share * np.log2(share + 1e-12)).sum())
    return np.array(out).reshape(len(luma), -1)


def assert_accurate(found, images) -> None:
    """At most twice the error of the plain formula in float32 and a unit in the last place of 10 bits."""
    want = exact(images)
    assert found.dtype == torch.float32 and found.shape == want.shape and found.is_contiguous()
    plain = reference.spectral_entropy(images).cpu()
    ours, theirs = (np.abs(x.cpu().double().numpy() - want) for x in (found, plain))
    unit = 10 * torch.finfo(torch.float32).eps
    assert ours.max() <= 2 * theirs.max() + unit and ours.mean() <= 2 * theirs.mean() + unit


@everywhere
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 64, 300), (3, 257, 70), (1, 95, 160)], ids=str)
def test_accuracy(backend, dtype, shape, nan_filled):
    batch, height, width = shape
    images = picture(batch, 3, height, width, device=backend)
    if dtype != torch.uint8:
        images = (images.float() / 255).to(dtype)
    before = images.clone()
    assert_accurate(spectral_entropy(images), images)
    assert torch.equal(images, before)


@everywhere
def test_layouts(backend, nan_filled):
    images = picture(2, 3, 70, 140, device=backend)
    want = spectral_entropy(images)
    flat = torch.zeros(1 + images.numel(), dtype=torch.uint8, device=backend)
    flat[1:] = images.flatten()
    wide = torch.zeros(2, 4, 80, 300, dtype=torch.uint8, device=backend)
    wide[:, :3, :70, 1:281:2] = images
    layouts = {
        "interleaved": images.contiguous(memory_format=torch.channels_last),
        "misaligned": flat[1:].view_as(images),
        "every other column": wide[:, :3, :70, 1:281:2],
        "transposed": images.transpose(2, 3).contiguous().transpose(2, 3),
        "channels first of all": images.transpose(0, 1).contiguous().transpose(0, 1),
    }
    for name, layout in layouts.items():
        assert torch.equal(layout, images), name
        torch.testing.assert_close(spectral_entropy(layout), want, rtol=0, atol=2e-6, msg=name)
    # One decoded image, as the Preprocessor passes it; a crop of one, and one image for a batch.
    decoded = images[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]
    torch.testing.assert_close(spectral_entropy(decoded), want[:1], rtol=0, atol=2e-6)
    assert_accurate(spectral_entropy(decoded[:, :, 3:68, 5:]), decoded[:, :, 3:68, 5:])
    assert_accurate(spectral_entropy(decoded.expand(3, -1, -1, -1)), decoded.expand(3, -1, -1, -1))


@everywhere
def test_one_place_that_is_not_aligned(backend, nan_filled):
    """Triton's kernel asks one question of the address and of all strides but a pixel's."""
    images = picture(2, 3, 32, 64, device=backend)
    want = spectral_entropy(images)
    # These are an offset and the strides of images, channels and rows.
    sizes = (0, 3 * 40 * 80, 40 * 80, 80)
    for odd in range(4):
        offset, *strides = (n + 8 * (i == odd) for i, n in enumerate(sizes))
        placed = images.new_empty(30000).as_strided(images.shape, (*strides, 1), offset).copy_(images)
        torch.testing.assert_close(spectral_entropy(placed), want, rtol=0, atol=2e-6)


@everywhere
def test_energy_as_small_as_eps(backend):
    """Images so dark that what is added to their energy halves its shares."""
    images = picture(1, 3, 64, 96, device=backend).float() / 255
    for darker in (1e-9, 4e-9):
        assert_accurate(spectral_entropy(images * darker), images * darker)


@everywhere
def test_extremes(backend):
    flat = torch.tensor([0, 1, 128, 255], dtype=torch.uint8, device=backend)[:, None, None, None]
    entropy = spectral_entropy(flat.expand(4, 3, 32, 32))
    torch.testing.assert_close(entropy, torch.zeros_like(entropy), atol=1e-8, rtol=0)
    # One bright pixel has a flat spectrum: all of the 32 * 32 frequencies alike.
    point = torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=backend)
    point[..., 7, 9] = 255
    torch.testing.assert_close(spectral_entropy(point).cpu(), torch.tensor([[10.0]]), atol=1e-5, rtol=0)
    # One wave has two frequencies alike, or one where it is its own mirror image.
    angle = torch.arange(32, device=backend) * (2 * torch.pi / 32)
    for frequency_x, frequency_y, bits in (
        (3, 0, 1),
        (0, 5, 1),
        (7, 11, 1),
        (-7, 11, 1),
        (16, 0, 0),
        (16, 16, 0),
    ):
        wave = torch.cos(frequency_y * angle[:, None] + frequency_x * angle)
        entropy = spectral_entropy(wave.expand(1, 3, 32, 32))
        torch.testing.assert_close(entropy.cpu(), torch.tensor([[float(bits)]]), atol=1e-5, rtol=0)


@everywhere
def test_empty(backend):
    image = picture(1, 3, 32, 32, device=backend)
    assert spectral_entropy(image[..., :31, :]).shape == (1, 0)
    assert spectral_entropy(image[:0]).shape == (0, 1)


@everywhere
def test_not_finite_stays_in_its_patch(backend):
    images = picture(1, 3, 64, 96, device=backend).float() / 255
    want = spectral_entropy(images)
    for bad in (torch.nan, torch.inf):
        broken = images.clone()
        broken[0, 1, 40, 70] = bad
        found = spectral_entropy(broken)
        assert found.isnan().sum() == 1 and found[0, 5].isnan()
        assert torch.equal(found[0, :5], want[0, :5])


@everywhere
def test_deterministic(backend):
    images = picture(2, 3, 96, 200, device=backend)
    assert torch.equal(spectral_entropy(images), spectral_entropy(images))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), height=st.integers(32, 120), width=st.integers(32, 200), seed=st.integers(0, 99)
)
def test_any_size(batch, height, width, seed):
    images = picture(batch, 3, height, width, seed=seed)
    assert_accurate(spectral_entropy(images), images)


def test_float64_and_other_sizes():
    images = picture(1, 3, 64, 96).double() / 255
    found = spectral_entropy(images)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), exact(images), atol=1e-12)
    torch.testing.assert_close(spectral_entropy(images, 8), reference.spectral_entropy(images, 8))
    assert spectral_entropy(images, 7).shape == (1, 9 * 13)


def test_a_forced_backend_refuses_what_it_cannot_serve(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(backends.VARIABLE, "triton")
    with pytest.raises(BackendError, match="spectral_entropy on cpu: its kernels serve patches of 32 pixels"):
        spectral_entropy(picture(1, 3, 64, 64), 16)


def test_takes_no_part_in_differentiation():
    images = (picture(1, 3, 64, 64).float() / 255).requires_grad_()
    assert not spectral_entropy(images).requires_grad


def test_opcheck():
    op = torch.ops.dgs.spectral_entropy.default
    torch.library.opcheck(op, (picture(2, 3, 64, 96), 32))
    torch.library.opcheck(op, (picture(2, 3, 64, 96).double(), 7))


def test_compiles_whole():
    images = picture(2, 3, 64, 96).float() / 255

    def function(images):
        return spectral_entropy(images * 0.5).mean(1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), function(images))


@pytest.mark.parametrize(
    "images, patch_size, error, words",
    [
        (torch.zeros(3, 64, 64), 32, ValueError, r"images must be \[B, 3, H, W\], got \[3, 64, 64\]"),
        (torch.zeros(1, 1, 64, 64), 32, ValueError, r"got \[1, 1, 64, 64\]"),
        (
            torch.zeros(1, 3, 64, 64, dtype=torch.int32),
            32,
            TypeError,
            "uint8 or floating-point, got torch.int32",
        ),
        (torch.zeros(1, 3, 64, 64), 0, ValueError, "patch_size must be >= 1, got 0"),
    ],
)
def test_errors(images, patch_size, error, words):
    with pytest.raises(error, match=words):
        spectral_entropy(images, patch_size)
