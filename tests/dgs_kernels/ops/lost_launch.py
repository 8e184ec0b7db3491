"""Launches that fail, in a process of their own: `python -m tests.dgs_kernels.ops.lost_launch HOW`.

"invalidated": a capture that something has made invalid refuses every launch; what comes after it works.
"lost": after an assertion on the device nothing works any more. Prints the error of the failed call.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from torch import Tensor

from dgs_kernels import project_align
from tests.dgs_kernels.ops.lists import draw


def said(rows: list[Tensor]) -> str:
    try:
        project_align(*rows)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("no error where no launch is possible")


def invalidated(rows: list[Tensor]) -> str:
    words = ""
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        # This call makes sure that there is memory.
        project_align(*rows)
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        try:
            project_align(*rows)
        except RuntimeError as error:
            words = str(error)
    # The context did not come to its end.
    torch.cuda.set_stream(torch.cuda.default_stream())
    return words


def lost(rows: list[Tensor]) -> str:
    with contextlib.suppress(RuntimeError):
        torch.ones(4, device="cuda")[torch.tensor([9], device="cuda")]
        torch.cuda.synchronize()
    return said(rows)


def main(how: str) -> None:
    rows = [draw([(64, 96)], device="cuda", seed=seed)[0] for seed in range(3)]
    want = project_align(*rows).cpu()
    if how == "lost":
        print(lost(rows))
        return
    print(invalidated(rows))
    torch.testing.assert_close(project_align(*rows).cpu(), want, rtol=0, atol=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
