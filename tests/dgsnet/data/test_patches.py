"""Patch selection against its definition in plain NumPy, on every backend of the entropy."""

import time

import numpy as np
import pytest
import torch
from dgsnet.data.patches import (
    enlarged_size,
    mosaics,
    permutations,
    select_patches,
    selected_boxes,
    splitmix64,
)
from PIL import Image

from dgs_kernels import backends, spectral_entropy
from tests.conftest import on_backends
from tests.support.pictures import channels_first, picture


def entropy_loop(image, size=32):
    """The definition, patch by patch, for uint8 [H, W, 3]; float64."""
    weights = np.array([0.299, 0.587, 0.114])
    entropies = []
    for top in range(0, image.shape[0] // size * size, size):
        for left in range(0, image.shape[1] // size * size, size):
            luma = image[top : top + size, left : left + size] @ weights / 255
            energy = np.abs(np.fft.fft2(luma)) ** 2
            share = energy / (energy.sum() + 1e-12)
            entropies.append(-(share * np.log2(share + 1e-12)).sum())
    return np.array(entropies)


def patches_of(image, size=32):
    """Row-major [rows * columns, size, size, 3] of what is left after the cut."""
    rows, columns = image.shape[0] // size, image.shape[1] // size
    cut = image[: rows * size, : columns * size]
    return cut.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)


@pytest.mark.parametrize(
    "height, width, size", [(64, 96, 32), (257, 300, 32), (50, 41, 8), (30, 30, 5), (9, 9, 1)]
)
def test_entropy_equals_the_definition(height, width, size):
    image = picture(height, width)
    expected = entropy_loop(image, size)
    found = spectral_entropy(channels_first(image), size)
    assert found.dtype == torch.float32 and found.shape == (1, len(expected))
    np.testing.assert_allclose(found[0], expected, atol=3e-6)
    exact = spectral_entropy(channels_first(image).double() / 255, size)
    np.testing.assert_allclose(exact[0], expected, atol=1e-12)


def assert_chosen(mosaic, image, low, high):
    """The mosaic [3, S, S] holds the patches of lowest and highest entropy by the definition."""
    order = np.argsort(entropy_loop(image), kind="stable")
    expected = patches_of(image)[np.concatenate([order[:low], order[len(order) - high :]])]
    found = patches_of(mosaic.permute(1, 2, 0).cpu().numpy())
    assert sorted(p.tobytes() for p in found) == sorted(p.tobytes() for p in expected)


@pytest.mark.parametrize("num_patches, low", [(49, 24), (16, 7), (4, 1), (1, 0), (64, 31)])
def test_mosaic_holds_the_least_and_the_most_complex_patches(num_patches, low):
    image = picture(333, 415)
    mosaic = select_patches(channels_first(image), num_patches=num_patches, seed=3)
    side = 32 * round(num_patches**0.5)
    assert mosaic.shape == (1, 3, side, side) and mosaic.dtype == torch.uint8
    assert_chosen(mosaic[0], image, low, num_patches - low)


@on_backends("spectral_entropy")
def test_every_backend_chooses_the_same_patches(backend):
    pictures = [picture(320, 288, seed) for seed in range(2)]
    images = torch.cat([channels_first(image) for image in pictures]).to(backend)
    for mosaic, image in zip(select_patches(images, seed=[3, 4]), pictures, strict=True):
        assert_chosen(mosaic, image, 24, 25)
    assert select_patches(images[:0], 32, 4, seed=0).shape == (0, 3, 64, 64)


def test_shuffle_depends_on_the_seed_alone():
    images = torch.cat([channels_first(picture(256, 256, seed)) for seed in range(2)])
    both = select_patches(images, seed=[5, 6])
    assert torch.equal(both[:1], select_patches(images[:1], seed=5))
    assert torch.equal(both[1:], select_patches(images[1:], seed=torch.tensor(6)))
    assert not torch.equal(both[1:], select_patches(images[1:], seed=5))


def test_permutations_are_uniform():
    found = permutations(torch.arange(2000), 8)
    assert (found.sort(dim=1).values == torch.arange(8)).all()
    counts = torch.stack([(found == value).sum(0) for value in range(8)])
    assert ((counts - 250).abs() < 90).all()


def test_random_numbers_outlive_versions_and_machines():
    # SplitMix64's published outputs for this seed.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = splitmix64(torch.tensor([1234567]), 4)
    assert [x % 2**64 for x in found[0].tolist()] == published


def test_equal_patches_are_chosen_in_row_major_order():
    image = np.full((32, 32 * 6, 3), 200, np.uint8)
    for i in range(6):
        image[:, 32 * i : 32 * (i + 1)] = 10 * i
    found = patches_of(
        select_patches(channels_first(image), num_patches=4, seed=0)[0].permute(1, 2, 0).numpy()
    )
    # One of the least complex, three of the most complex: the first, and the last three.
    assert sorted(found[:, 0, 0, 0].tolist()) == [0, 30, 40, 50]


@pytest.mark.parametrize(
    "height, width", [(1, 1), (10, 10), (31, 64), (100, 100), (223, 224), (64, 500), (1, 3000)]
)
@pytest.mark.parametrize("patch_size, num_patches", [(32, 49), (16, 9)])
def test_enlargement_is_the_smallest_that_suffices(height, width, patch_size, num_patches):
    def count(h, w):
        return (h // patch_size) * (w // patch_size)

    new_height, new_width = enlarged_size(height, width, patch_size, num_patches)
    if count(height, width) >= num_patches:
        assert (new_height, new_width) == (height, width)
        return
    assert count(new_height, new_width) >= num_patches
    # The side that reaches a whole number of patches has the exact scale, the other's is rounded.
    scale = min(new_height / height, new_width / width)
    smaller = np.linspace(1, scale, 4000)[:-2]
    assert all(count(int(s * height + 1e-9), int(s * width + 1e-9)) < num_patches for s in smaller)
    assert abs(new_height / new_width - height / width) <= height / width * (
        0.6 / new_height + 0.6 / new_width
    )


def test_small_images_are_enlarged_bicubically():
    image = picture(60, 90)
    mosaic = select_patches(channels_first(image), num_patches=49, seed=0)
    height, width = enlarged_size(60, 90, 32, 49)
    large = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    # Pillow's bicubic kernel has a = -0.5 and torch's -0.75, so the grids are compared, not the bytes.
    assert len(patches_of(large)) >= 49
    chosen = patches_of(mosaic[0].permute(1, 2, 0).numpy())
    distance = [np.abs(patches_of(large).astype(int) - p).mean(axis=(1, 2, 3)).min() for p in chosen]
    assert max(distance) < 6


def test_wrong_arguments_are_named():
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\] .*, got \[3, 64, 64\]"):
        select_patches(image[0], seed=0)
    with pytest.raises(ValueError, match="patch_size"):
        select_patches(image, 0, seed=0)
    with pytest.raises(ValueError, match="square number, got 50"):
        select_patches(image, num_patches=50, seed=0)
    with pytest.raises(ValueError, match="one per image"):
        select_patches(image, seed=[1, 2])
    with pytest.raises(ValueError, match="at least 1"):
        select_patches(image[..., :0], seed=0)


def test_equal_patches_of_different_images_stay_with_their_images():
    cut = [torch.full((count, 32, 32, 3), shade, dtype=torch.uint8) for shade, count in enumerate((5, 4, 9))]
    found = mosaics(torch.cat(cut), torch.tensor([5, 4, 9]), 4, seeds=torch.arange(3))
    assert found.shape == (3, 3, 64, 64)
    assert (found == torch.arange(3)[:, None, None, None]).all()
    none = mosaics(cut[0][:0], torch.tensor([], dtype=torch.int64), 4, seeds=torch.arange(0))
    assert none.shape == (0, 3, 64, 64)


def test_selection_is_at_least_eight_times_as_fast_per_core_as_the_loop():
    """The whole selection, as it is usually written in NumPy: entropies, ranking, shuffle and mosaic."""
    image = picture(512, 512)

    def loop(image):
        patches, order = patches_of(image), np.argsort(entropy_loop(image), kind="stable")
        chosen = np.concatenate([order[:24], order[-25:]])
        np.random.default_rng(0).shuffle(chosen)
        rows = [np.concatenate(patches[chosen[i : i + 7]], axis=1) for i in range(0, 49, 7)]
        return np.concatenate(rows)

    def ours(image):
        return select_patches(channels_first(image), seed=0)

    best = {loop: np.inf, ours: np.inf}
    for _ in range(20):
        for function in best:
            start = time.process_time()
            function(image)
            best[function] = min(best[function], time.process_time() - start)
    # Eager PyTorch, which serves where nothing could be compiled, is about five times as fast.
    compiled = not backends.obstacle("cpu", "spectral_entropy", "cpu")
    assert best[loop] >= (8 if compiled else 3) * best[ours], best


@pytest.mark.parametrize("shape", [(90, 41), (41, 100), (50, 47), (64, 64)])
def test_boxes_of_an_enlarged_image_are_in_pixels_of_the_one_given(shape):
    """Across and down by ratios of their own, which rounding makes differ."""
    height, width = enlarged_size(*shape, 32, 9)
    assert height > shape[0]
    boxes = selected_boxes(torch.rand(1, 3, *shape), 32, 9, seed=1)[0]
    one = torch.tensor([32 * shape[1] / width, 32 * shape[0] / height], dtype=torch.float64)
    torch.testing.assert_close(boxes[:, 2:] - boxes[:, :2], one.expand(9, 2))
    places = boxes[:, :2] / one
    torch.testing.assert_close(places, places.round(), rtol=0, atol=1e-9)
    assert places.unique(dim=0).shape == (9, 2)
    assert places.min() >= 0 and (places < torch.tensor([width // 32, height // 32])).all()
