"""Processes for tests that kill them: forked from a clean one, so that no lock of the tests' own dies too.

tqdm's lock is shared by all processes forked after the first progress bar. A process that is killed while it
holds the lock stops every later bar, forever.
"""

from __future__ import annotations

import multiprocessing
from types import ModuleType

import pytest

FORKSERVER = multiprocessing.get_context("forkserver")
# What commands import when called, for seconds in each process otherwise: scikit-learn alone brings pandas.
FORKSERVER.set_forkserver_preload(
    [
        "dgsnet.cli",
        "dgsnet.audit.shortcuts",
        "dgsnet.detection.scoring",
        "dgsnet.evaluation.evaluate",
        "dgsnet.training.trainer",
        "docstring_parser",
        "pyarrow.parquet",
        "sklearn.metrics",
        "tests.support.one_thread",
        "torch.distributed.fsdp",
        "torch.utils.tensorboard",
    ]
)


def forked(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Forks from the clean process what the module would start as a new one."""
    patch.setattr(module, "get_context", lambda method: FORKSERVER)
