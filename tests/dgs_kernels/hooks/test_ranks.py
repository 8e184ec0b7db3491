"""A rank that never steps: told of where `process_group=` has it, and no matter where it does not."""

from __future__ import annotations

import os
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dgs_kernels.hooks import ranks
from tests.dgs_kernels.hooks.training_loops import (
    HOOKS,
    STEPS,
    Hook,
    Net,
    assert_same,
    batch,
    on_parameters,
    plain,
    weights,
)
from tests.support.fresh import FORKSERVER


def beside_a_silent_rank(rank: int, folder: str) -> None:
    """Rank 0 leaves what `trained` gives of each hook in a group of its own and in one that has both."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks.PATIENCE = timedelta(seconds=0.1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    # All processes make all groups.
    groups = {"alone": dist.new_group([0])}
    groups |= {kind: dist.new_group([0, 1], timeout=timedelta(seconds=0.5)) for kind in HOOKS[1:]}
    if rank == 0:
        found = {}
        for kind in HOOKS[1:]:
            found["alone", kind] = trained(kind, groups["alone"])
            found["both", kind] = trained(kind, groups[kind])
        torch.save(found, f"{folder}/found.pt")
        store.set("done", "")
    store.wait(["done"], timedelta(seconds=60))


def trained(kind: str, group: dist.ProcessGroup) -> tuple[list[torch.Tensor], str, str, float]:
    """Weights, the warnings, the error, and the seconds that it took."""
    model, error, begin = Net(), "", time.monotonic()
    hook = Hook(kind, model, process_group=group)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            for step in range(STEPS):
                hook.backward(model, batch(step))
                hook.optimizer.step()
                hook.optimizer.zero_grad()
        except RuntimeError as failure:
            error = str(failure)
    words = "\n".join(str(warning.message) for warning in said if warning.category is UserWarning)
    return weights(model), words, error, time.monotonic() - begin


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    processes = [FORKSERVER.Process(target=beside_a_silent_rank, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return torch.load(f"{folder}/found.pt")


@on_parameters
def test_a_silent_rank_of_the_group_is_named_in_time(found, kind):
    _, warned, error, seconds = found["both", kind]
    assert "ranks [1] of process_group= have not come to this step within 0.1 seconds" in warned
    assert "ranks [0, 1] of process_group= did not come to this step together" in error and "\n" not in error
    assert seconds < 10


@on_parameters
def test_a_silent_rank_beside_the_group_is_no_matter(found, kind):
    trained, warned, error, _ = found["alone", kind]
    assert not warned and not error
    assert_same(trained, plain(kind))
