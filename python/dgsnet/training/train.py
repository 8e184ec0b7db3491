"""`train`: one call from a configuration to a trained detector. Its errors come before the heavy imports."""

from __future__ import annotations

import contextlib
from pathlib import Path

from dgsnet.config import Config
from dgsnet.errors import UserError
from dgsnet.files import locked
from dgsnet.model.catalogue import check_model
from dgsnet.processes import announced_rank, announced_size
from dgsnet.training import checks


def train(config: Config, out: str | Path, *, resume: bool = False) -> Path:
    """Train a detector.

    Writes into `out`: config.json, metrics.csv, tensorboard/, best/ and last/ (model folders, see
    checkpoint.load_model) and state/ (what a killed run resumes from). docs/training.md describes them.

    Args:
        config: the run.
        out: the run's folder: new or empty, unless resuming.
        resume: go on with the run in `out`, or start it if there is none yet.

    Returns:
        `out`, which every command takes as --model.

    Raises:
        UserError: data, model or configuration cannot be used, `out` is taken, or in use by another process,
            training diverged or ran out of GPU memory; one line with the remedy.

    Example:
        >>> from dgsnet.config import Config, DataConfig
        >>> train(Config(data=DataConfig(train=["photos"])), "runs/mine")  # doctest: +SKIP
        PosixPath('runs/mine')
    """
    out = Path(out)
    # This refuses a launcher that has not started what it was asked for.
    announced_size()
    # The first of a run's processes holds the folder for all of them.
    with contextlib.nullcontext() if announced_rank() else locked(out):
        checks.check_folder(config, out, resume)
        if (out / checks.UPDATE_FILE).is_file():
            raise UserError(f"{out} is an update: go on with its own command, dgsnet update, and --resume")
        checks.check_experts(config)
        checks.degradations(config)
        check_model(config.model, config.preprocess.image_size)
        samples = checks.training_samples(config, config.data.train, "train")
        val_samples = checks.training_samples(config, config.data.val, "val") if config.data.val else []
        if not announced_rank():
            checks.check_pairs(config, samples)
            checks.warn_of_overlaps(samples, val_samples)
            checks.warn_of_shortcuts(config, samples)

        from dgsnet.training.plan import Job
        from dgsnet.training.trainer import fit

        fit(Job(config, out, samples, val_samples))
    return out
