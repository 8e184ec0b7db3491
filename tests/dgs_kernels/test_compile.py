"""torch.compile(fullgraph=True) with Inductor, the compiler that users get, on every operation."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dgs_kernels
from dgs_kernels.ops.surgery_adamw_ import run as surgery_adamw_

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"),
]
DIM = 24


@pytest.fixture(autouse=True, scope="module")
def in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        yield
    torch._dynamo.reset()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(function: Callable[..., object], *inputs: Tensor) -> None:
    """Results, gradients and edits in place of the compiled function are those of the function."""
    outcomes = []
    for call in (function, torch.compile(function, fullgraph=True, dynamic=False)):
        arguments = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        result = call(*arguments)
        results = list(result) if isinstance(result, tuple | list) else [result]
        if results[0].requires_grad:
            sum(r.sum() for r in results if r.requires_grad).backward()
        outcomes.append([*results, *arguments, *(t.grad for t in arguments if t.requires_grad)])
    for ours, compiled in zip(*outcomes):
        torch.testing.assert_close(compiled, ours, rtol=1e-5, atol=1e-6)


def test_project_align():
    def function(x, harmful, beneficial):
        return dgs_kernels.project_align(x.sin(), harmful, beneficial, alignment=0.3).square()

    assert_same(function, draw(4, DIM).requires_grad_(), draw(DIM, seed=1), draw(4, DIM, seed=2))


def test_gradient_surgery():
    def function(x, harmful, beneficial):
        features, alignment = dgs_kernels.gradient_surgery(x.sin(), harmful, beneficial)
        return features.square().sum() + 0.2 * alignment

    assert_same(function, draw(4, DIM).requires_grad_(), draw(4, DIM, seed=1), draw(4, DIM, seed=2))


def test_surgery_head():
    head = dgs_kernels.SurgeryHead(DIM)
    teacher, text = draw(2, 4, DIM, seed=3)

    def function(x, labels):
        out = head(x.sin(), teacher, text, labels, reference_batch_size=32)
        return out.image_loss + out.text_loss + 0.2 * out.alignment_loss

    assert_same(function, draw(4, DIM).requires_grad_(), torch.tensor([0.0, 1, 1, 0]))


def test_project_align_in_place():
    def function(a, b, harmful):
        grads = [a, b]
        sums = dgs_kernels.project_align_(grads, [harmful, harmful * 2], groups=[0, 0])
        return sums * 2, a + 1

    assert_same(function, draw(3, 5), draw(3, 5, seed=1), draw(3, 5, seed=2))


def test_gramian_and_combine_in_place():
    def function(a, b, c):
        objectives = [[a * 2, b], [c, c.sin()]]
        products = dgs_kernels.gramian(objectives, groups=[0, 0])
        dgs_kernels.combine_([a, b], objectives, products.sum(1), groups=[0, 0])
        return products, a + 1, b

    assert_same(function, draw(3, 5), draw(3, 5, seed=1), draw(3, 5, seed=2))


def test_surgery_adamw():
    def function(param, grad, average, square, harmful):
        step, sums = torch.zeros(()), torch.zeros(1, 6)
        lists = ([param], [grad * 2], [average], [square], [step], [harmful], [])
        surgery = ([0], sums, None, 0.2, 1e-6, "align_first", "positive", "all")
        surgery_adamw_(*lists, *surgery, 1e-2, 0.9, 0.999, 0.01, 1e-8, False)
        return param + 1, step, sums

    tensors = [draw(3, 5, seed=i) for i in range(5)]
    tensors[3] = tensors[3].square()
    assert_same(function, *tensors)


def test_spectral_entropy():
    def function(images):
        return dgs_kernels.spectral_entropy(images * 0.5) * 2

    assert_same(function, draw(2, 3, 64, 64).sigmoid())


def test_training_step():
    """A layer and the head, compiled as a user would, trained for a few steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU())
    head = dgs_kernels.SurgeryHead(DIM)
    pixels, teacher, text = draw(3, 8, DIM, seed=5)
    labels = torch.arange(8) % 2

    def losses(model, head, compiled):
        def step():
            out = head(model(pixels), teacher, text, labels)
            return out.image_loss + out.text_loss + 0.2 * out.alignment_loss

        step = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=0.01)
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = step()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        return torch.stack(history)

    ours = losses(copy.deepcopy(model), copy.deepcopy(head), compiled=False)
    compiled = losses(model, head, compiled=True)
    assert ours[-1] < ours[0]
    torch.testing.assert_close(compiled, ours, rtol=1e-4, atol=1e-5)
