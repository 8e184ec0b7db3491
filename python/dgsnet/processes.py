"""What a process knows of the others of its run: how many there are, its share of the cores, its parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings

from dgsnet.errors import UserError

# By launcher: torchrun and accelerate, Intel MPI and MPICH, Open MPI, MVAPICH.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
MOST_WORKERS = 16


def announced_size() -> int:
    """How many processes the launcher says it has started for this run.

    Raises:
        UserError: a launcher was asked for several and has started one.
    """
    # What accelerate sets for a group, and then starts one process that has no rank in it.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and not _announced(RANKS):
        raise UserError(
            "accelerate launch was asked for several processes and has started one, as it does on CPUs: use "
            "torchrun --nproc_per_node N -m dgsnet train ..."
        )
    return int(_announced(SIZES) or 1)


def announced_rank() -> int:
    """The number of this process among those of its run."""
    return int(_announced(RANKS) or 0)


def _announced(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def default_workers() -> int:
    """Data-loading processes that fit the machine: this process's share of the cores that it may use."""
    return min(MOST_WORKERS, max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and the limits of its container."""
    from joblib import cpu_count

    return cpu_count()


def start_worker(number: int, silent: bool = False) -> None:
    """A DataLoader's `worker_init_fn`: the process ends with its parent, and one alone of a loader warns.

    Args:
        number: of this process among the loader's.
        silent: whether another loader's processes, at the same work, have given the warnings already.
    """
    follow_parent()
    if number or silent:
        warnings.simplefilter("ignore")


def follow_parent() -> None:
    """End this child process with its parent, which may be killed while the child waits for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
