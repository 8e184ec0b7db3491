"""surgery_adamw_: the CUDA kernels on the CPU against the reference in float64."""

from ctypes import addressof

import pytest
import torch

from dgs_kernels import reference
from tests.csrc.cuda_on_host import host
from tests.csrc.cuda_on_host.host import (
    DTYPES,
    LIBRARY,
    NEW_STREAM,
    call,
    launches,
    make,
    order_of_threads,
    struct,
)
from tests.csrc.cuda_on_host.lists import LAYERS, MAKE_TABLES, make_list, tensor_list, thrice_removed

# This fixture runs around every case.
__all__ = ["order_of_threads"]

Rates = struct("""
    f64: size eps
""")
AdamW = struct("""
    f64: lr beta1 beta2 weight_decay eps
    i32: maximize
    ptr: rates
    i32: all_alike
""")


def adamw_case(sizes, groups, dtype, *, launched, maximize=False, steps=(3,), foreign_sums=False):
    """`steps`: of every tensor, or of all alike."""
    surgery = dict(alignment=0.2, order="align_first", rule="positive")
    lr, betas, eps, weight_decay = 1e-2, (0.9, 0.99), 1e-4, 0.1
    lists = make_list(sizes, dtype)
    state = [[make(n, dtype=dtype, seed=90 + 10 * i + k) for i, n in enumerate(sizes)] for k in range(3)]
    state[2] = [t.abs() for t in state[2]]
    each = steps if len(steps) > 1 else steps * len(sizes)

    def expected(to):
        columns = [[t.to(to) for t in column] for column in lists]
        grads = reference.project_align_(*columns, groups, **surgery)
        if foreign_sums:
            grads = thrice_removed(columns[0], columns[2], grads, 0.2)
        tensors = zip(*([t.to(to) for t in column] for column in state))
        options = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        return [
            reference.adamw_step(p, g, m, v, step, **options)
            for (p, m, v), g, step in zip(tensors, grads, each)
        ]

    exact, plain = expected(torch.float64), expected(dtype)
    names = ["grad", "harmful", "beneficial", "param", "exp_avg", "exp_avg_sq"]
    roots = [(1 - betas[1] ** step) ** 0.5 for step in steps]
    rates = (Rates * len(steps))(
        *(Rates(lr / (1 - betas[0] ** step) * root, eps * root) for step, root in zip(steps, roots))
    )
    options = AdamW(lr, *betas, weight_decay, eps, maximize, addressof(rates), len(steps) == 1)
    part = "apply" if foreign_sums else "all"
    arguments, sums, _keep = tensor_list(dict(zip(names, lists + state)), groups, part=part, **surgery)
    if foreign_sums:
        sums.copy_(reference.layer_sums(*lists, groups, surgery["rule"]))
        sums[:, [0, 3]] *= 3
    before = launches()
    call("surgery_adamw_", arguments, options, stream=NEW_STREAM())
    assert launches() - before == MAKE_TABLES + launched
    for results, es, ps in zip(zip(*state), exact, plain):
        for name, result, e, p in zip(names[3:], results, es, ps):
            host.check(result, e, p, size=4.0, what=f"{name} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [[768, 32, 512, 16, 64], [768, 1, 513, 0, 65]], ids=["even", "odd"])
def test_adamw_in_one_launch(dtype, sizes):
    adamw_case(sizes, LAYERS, dtype, launched=1)


def test_adamw_with_sums_of_elsewhere():
    adamw_case([96, 5, 64, 7, 32], LAYERS, torch.float32, launched=1, foreign_sums=True)


@pytest.mark.slow
def test_adamw_of_a_layer_of_many_chunks():
    adamw_case([8192 * 11, 100, 32], [0, 0, 1], torch.float32, launched=1)


def test_adamw_maximizes():
    adamw_case([96, 5], [0, 0], torch.float32, launched=1, maximize=True)


def test_adamw_of_tensors_that_have_taken_different_steps():
    adamw_case([96, 5, 64, 7, 32], [1, 0, 2, 1, 0], torch.float32, launched=2, steps=(1, 2, 3, 5, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adamw_in_two_launches(dtype):
    """However small the cache is: AdamW takes no turns."""
    LIBRARY.shim_set_largest_cluster(1)
    LIBRARY.shim_set_cache_bytes(1)
    adamw_case([20000, 1, 4096], [0, 0, 1], dtype, launched=2)
