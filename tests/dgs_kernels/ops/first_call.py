"""An operation in a captured graph, as the first call of ours in a process.

`python -m tests.dgs_kernels.ops.first_call NAME` captures it, replays it and compares with eager PyTorch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import dgs_kernels
from dgs_kernels import backends
from tests.dgs_kernels.ops.lists import draw

NAMES = ("rows", "head", "layers", "gramian", "combine", "adamw", "entropy")


def prepared(name: str, device: str) -> Callable[[], list[Tensor]]:
    """The call, whose arguments are there already; once only, as some are edited."""
    rows = [draw([(64, 96)], device=device, seed=seed)[0] for seed in range(3)]
    lists = [draw(device=device, seed=seed) for seed in range(3)]
    labels = torch.ones(64, device=device)
    weights = torch.tensor([0.3, -1.2, 0.7], device=device)
    heads = [t for i in range(3) for t in (rows[0][i : i + 1], rows[0][i, :1])]

    def head() -> list[Tensor]:
        return [x for x in dgs_kernels.surgery_head(*rows, labels, *heads) if x is not None]

    def layers() -> list[Tensor]:
        return [dgs_kernels.project_align_(*lists, alignment=0.3), *lists[0]]

    def combine() -> list[Tensor]:
        grads = [torch.full_like(t, float("nan")) for t in lists[0]]
        dgs_kernels.combine_(grads, lists, weights)
        return grads

    def adamw() -> list[Tensor]:
        capturable = {"capturable": device == "cuda"}
        return stepped(torch.optim.AdamW, dgs_kernels.OptimizerSurgery, lists, **capturable)

    calls = {
        "rows": lambda: [dgs_kernels.project_align(*rows, alignment=0.3)],
        "head": head,
        "layers": layers,
        "gramian": lambda: [dgs_kernels.gramian(lists)],
        "combine": combine,
        "adamw": adamw,
        "entropy": lambda: [dgs_kernels.spectral_entropy(rows[0].view(1, 3, 32, 64))],
    }
    return calls[name]


def stepped(make: Callable, surgery_of: Callable, lists: list[list[Tensor]], **options: bool) -> list[Tensor]:
    """The parameters after a step of AdamW with surgery; lists: parameters, harmful and task gradients."""
    params = [torch.nn.Parameter(t) for t in lists[0]]
    # A large eps: what the surgery leaves of a single number is the noise of rounding.
    optimizer = make(params, lr=0.1, eps=1e-2, **options)
    surgery = surgery_of(optimizer)
    with torch.enable_grad(), surgery.harmful():
        sum((p * h).sum() for p, h in zip(params, lists[1])).backward()
    for p, g in zip(params, lists[2]):
        p.grad = g.clone()
    optimizer.step()
    return [p.detach() for p in params]


def surgery_adamw(device: str) -> Callable[[], list[Tensor]]:
    """The step of "adamw" in one kernel, which no graph may contain."""
    lists = [draw(device=device, seed=seed) for seed in range(3)]
    return lambda: stepped(dgs_kernels.SurgeryAdamW, lambda optimizer: optimizer, lists)


@torch.no_grad()
def main(name: str) -> None:
    call, refused = prepared(name, "cuda"), surgery_adamw("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if name == "adamw":
            try:
                refused()
            except RuntimeError as error:
                print(error)
            else:
                raise AssertionError("SurgeryAdamW was captured, which counts its steps on the host")
        found = call()
    graph.replay()
    if name == "adamw":
        torch.testing.assert_close(found, surgery_adamw("cuda")(), rtol=1e-4, atol=1e-4)
    os.environ[backends.VARIABLE] = "eager"
    torch.testing.assert_close(found, prepared(name, "cuda")(), rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main(*sys.argv[1:])
