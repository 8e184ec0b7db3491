"""Before the first step: processes, precision and the size of a batch."""

import pytest
import torch
from dgsnet.config import Config
from dgsnet.errors import UserError
from dgsnet.training.setup import accelerator_for, largest_batch
from dgsnet.training.step import Step
from dgsnet.training.train import train

from tests.support.runs import settings


def test_processes_that_are_in_no_group_are_refused(dataset, tmp_path, monkeypatch):
    # The machine has an accelerator, but no group of processes.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    refused = pytest.raises(UserError, match="2 processes were started, but this one is in a group of 1")
    with refused, accelerator_for(settings(dataset), tmp_path):
        pass


def test_the_largest_batch_is_searched_downwards(dataset, monkeypatch):
    """Whatever is trained: the three branches, with and without experts, or the student alone."""
    device = torch.device("cpu")
    assert largest_batch(settings(dataset), device, start=5) == 5
    forward = Step.forward

    def with_little_memory(self, pixels, labels, *others):
        if len(pixels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, pixels, labels, *others)

    monkeypatch.setattr(Step, "forward", with_little_memory)
    for changes in (
        {},
        {"surgery_mode": "layer"},
        {"surgery_mode": "none"},
        {"surgery_text": "expert", "data_nuisances": "files"},
    ):
        assert largest_batch(settings(dataset, **changes), device, start=5) == 4


def test_batch_size_auto_needs_a_gpu_and_is_kept_by_a_resumed_run(dataset, tmp_path, finished, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = settings(dataset, optim_batch_size="auto")
    with pytest.raises(UserError, match=r"batch_size=auto .* no GPU"):
        train(config, tmp_path / "run")
    assert train(config, finished, resume=True) == finished
    assert Config.load(finished / "config.json").optim.batch_size == 8


def test_fp16_without_a_gpu_is_refused(dataset, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="precision=fp16 needs a GPU"):
        train(settings(dataset, optim_precision="fp16"), tmp_path / "run")
