"""What torch is told of a result before there is one: shape, type, strides and device are those that come."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only

import dgs_kernels
from tests.dgs_kernels.ops.lists import draw

# No two of these types promote to the third.
TYPES = (torch.float16, torch.float32, torch.float64)
SHAPES = ((3, 5), (7,))


def described(results: object) -> list[tuple]:
    return [
        (x.shape, x.dtype, x.stride(), x.device) for x in tree_flatten(results)[0] if isinstance(x, Tensor)
    ]


def assert_foretold(function, *arguments: object) -> None:
    """The results of fake arguments are described as those of the real ones."""
    with FakeTensorMode() as mode:
        fake = described(function(*tree_map_only(Tensor, mode.from_tensor, arguments)))
    assert fake == described(function(*arguments))


def of_types(shapes, types, seed=0) -> list[Tensor]:
    return [t.to(dtype) for t, dtype in zip(draw(shapes, seed=seed), types)]


@pytest.mark.parametrize("types", list(permutations(TYPES)), ids=str)
def test_project_align(types):
    grad, harmful, beneficial = of_types([(2, 5, 3), (3,), (5, 1, 3)], types)
    assert_foretold(dgs_kernels.project_align, grad.transpose(0, 1), harmful, beneficial.expand(5, 2, 3))


@pytest.mark.parametrize("types", list(permutations(TYPES)), ids=str)
def test_lists(types):
    """Wherever in the lists the widest type is."""
    first, second, third = (draw(SHAPES, seed=seed) for seed in range(3))
    for at in range(2):
        lists = [list(x) for x in (first, second, third)]
        for tensors, dtype in zip(lists, types):
            tensors[at] = tensors[at].to(dtype)
        products = dgs_kernels.gramian(lists)
        sums = dgs_kernels.project_align_([t.clone() for t in lists[0]], *lists[1:])
        assert products.dtype == sums.dtype == torch.float64
        assert_foretold(lambda *x: dgs_kernels.gramian(x, groups=["a", "a"]), *lists)
        assert_foretold(dgs_kernels.project_align_, *lists)
        assert_foretold(lambda g, *x: dgs_kernels.combine_(g, x, torch.ones(2)) or g, *lists)


@pytest.mark.parametrize("types", list(permutations(TYPES)), ids=str)
@pytest.mark.parametrize("distillation", [0.0, 0.3])
def test_surgery_head(types, distillation):
    """The operator's further results are what its backward is given."""
    features, teacher, text = of_types([(3, 5)] * 3, types)
    heads = [x for seed, dtype in enumerate(types) for x in of_types([(1, 5), (1,)], [dtype] * 2, seed)]

    def step(features, teacher, text, labels, *heads):
        leaves = [x.detach().requires_grad_() for x in (features, text, *heads[:2], *heads[4:])]
        arguments = (leaves[0], teacher, leaves[1], labels, *leaves[2:4], *heads[2:4], *leaves[4:])
        operator = torch.ops.dgs.surgery_head(
            *arguments, 1e-6, "align_first", None, "project", None, distillation
        )
        out = dgs_kernels.surgery_head(*arguments, distillation=distillation)
        (out.image_loss + 2 * out.text_loss + 0.3 * out.alignment_loss).backward()
        return operator, out, [x.grad for x in leaves]

    assert_foretold(step, features, teacher, text, torch.tensor([1, 0, 1]), *heads)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, *TYPES], ids=str)
def test_spectral_entropy(dtype):
    images = torch.rand(2, 3, 70, 100).to(dtype)
    for patch_size in (32, 8):
        assert_foretold(lambda x, size=patch_size: dgs_kernels.spectral_entropy(x, size), images)


def test_what_is_refused_is_refused_of_fake_tensors():
    with FakeTensorMode() as mode:
        x, y = (mode.from_tensor(torch.ones(shape)) for shape in ((2, 3), (3, 2)))
        for call in (
            lambda: dgs_kernels.project_align(x, y),
            lambda: dgs_kernels.project_align_([x], [y]),
            lambda: dgs_kernels.gramian([[x], [y]]),
            lambda: dgs_kernels.combine_([y], [[x], [x]], torch.ones(2)),
            lambda: dgs_kernels.spectral_entropy(x),
        ):
            with pytest.raises(ValueError, match="must"):
                call()
