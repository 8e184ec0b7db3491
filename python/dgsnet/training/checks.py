"""Checks of a run's folder, settings and data, made before anything heavy is imported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgsnet.config import CONFIG_FILE, Config, read_config
from dgsnet.data.captions import attach_captions
from dgsnet.data.items import Item, find_samples
from dgsnet.data.pairs import attach_twins, find_pairs
from dgsnet.detection.overlap import warn_of_both_labels, warn_of_shared_images
from dgsnet.errors import UserError
from dgsnet.files import LOCK_FILE
from dgsnet.model.catalogue import has_text

if TYPE_CHECKING:
    from dgsnet.data.distortions import Degradations

# Settings that a resumed run may change, because they do not decide its weights.
FREE_SETTINGS = (
    "data.workers",
    "data.prefetch",
    "data.cache",
    "optim.parallel",
    "checkpoint_every",
    "log_every",
)

# In the folder of an update: what of its options is in no configuration.
UPDATE_FILE = "update.json"

# What a look for shortcuts before training may cost.
SHORTCUT_IMAGES = 2**10
SHORTCUT_SECONDS = 2.0
# The same of a look for files that are there twice; other processes wait for it.
OVERLAP_SECONDS = 60.0


def check_folder(config: Config, out: Path, resume: bool) -> None:
    """Refuse a folder that is taken, and a resumption with other settings; nothing is written yet."""
    saved = out / CONFIG_FILE
    taken = out.exists() and any(entry.name != LOCK_FILE for entry in out.iterdir())
    if taken and not resume:
        raise UserError(f"--out {out} is not empty: give another folder, or --resume to go on with its run")
    if resume and saved.is_file():
        before, now = read_config(saved).flat(), config.flat()
        for name, value in now.items():
            # It is kept.
            found = name == "optim.batch_size" and value == "auto"
            if value != before[name] and name not in FREE_SETTINGS and not found:
                raise UserError(
                    f"cannot resume {out} with {name}={value}, it was started with {before[name]}: leave "
                    "the setting out, or start a new run"
                )
    if not config.data.train:
        nothing = f" ({out} holds no run to resume)" if resume else ""
        raise UserError(f"no training images: name a dataset with --data.train{nothing}")


def check_experts(config: Config) -> None:
    """Refuse captions without a text tower, and experts or distillation without the three branches."""
    given = {
        f"surgery.text={config.surgery.text}": config.surgery.text != "project",
        f"surgery.distillation={config.surgery.distillation:g}": config.surgery.distillation > 0,
        f"data.nuisances={config.data.nuisances}": uses_nuisances(config),
    }
    used = next((name for name, value in given.items() if value), None)
    if used and not uses_surgery(config):
        raise UserError(
            f"{used} needs the three branches: leave it out, or set surgery.mode to feature or layer and "
            "model.lora_rank above 0"
        )
    name = config.model.name
    if uses_text(config) and not has_text(name):
        raise UserError(
            f"{name} has no text tower to read data.captions={config.data.captions}: set data.captions=none, "
            "or choose a model of open_clip"
        )
    if config.surgery.text != "project" and not (uses_text(config) or uses_nuisances(config)):
        captions = "give captions" if has_text(name) else "choose a model with a text tower and give captions"
        raise UserError(
            f"surgery.text={config.surgery.text} has no expert with data.captions=none: {captions}, or set "
            "data.nuisances=files"
        )


def degradations(config: Config) -> Degradations | None:
    """What `augment` says, None if nothing; UserError says what is wrong with a step."""
    from dgsnet.data.distortions import PRESETS, Degradations

    words = [*PRESETS[config.augment.preset], *config.augment.steps]
    try:
        return Degradations.parse(words) if words else None
    except ValueError as error:
        raise UserError(f"augment.steps: {error}") from None


def training_samples(config: Config, roots: list[str] | str, split: str) -> list[Item]:
    """All samples of a split, with captions where the text branch needs them."""
    roots = [roots] if isinstance(roots, str) else roots
    found = {root: find_samples(root, split) for root in roots}
    if split == "train":
        labels = {sample.label for samples in found.values() for sample in samples}
        if len(labels) == 1:
            kind = "generated" if labels == {1} else "real"
            raise UserError(
                f"{', '.join(roots)}: all training images are {kind}; training needs both classes"
            )
        if config.data.pairs:
            found = {root: attach_twins(s, root) for root, s in found.items()}
        if uses_text(config):
            found = {root: attach_captions(s, config.data.captions, root) for root, s in found.items()}
    return [sample for samples in found.values() for sample in samples]


def check_pairs(config: Config, samples: list[Item]) -> None:
    """With `data.pairs`, say in one line on stderr how many images have no twin; UserError if none has."""
    if not config.data.pairs:
        return
    alone = np.setdiff1d(np.arange(len(samples)), find_pairs(samples))
    if len(alone) == len(samples):
        raise UserError(
            "data.pairs: no training image has a twin: give twins.csv, the column twin, or the same name in "
            "the folders of real and of generated images"
        )
    if len(alone):
        print(
            f"dgsnet: data.pairs: {len(alone)} of {len(samples)} training images have no twin, such as "
            f"{samples[alone[0]].path}; they are trained on alone",
            file=sys.stderr,
        )


def warn_of_overlaps(training: list[Item], validation: list[Item]) -> None:
    """Warn in a line each on stderr of files in both, and of files with both labels."""
    warn_of_shared_images(training, validation, seconds=OVERLAP_SECONDS)
    warn_of_both_labels([*training, *validation], seconds=OVERLAP_SECONDS)


def warn_of_shortcuts(config: Config, samples: list[Item]) -> None:
    """Warn in one line on stderr if the files give the labels away and there is no expert on files.

    A sample of the files is read, for seconds at most; `dgsnet audit` reads all.
    """
    if uses_nuisances(config):
        return
    from dgsnet.audit.audit import audit, shown

    try:
        found = audit(samples, most=SHORTCUT_IMAGES, seconds=SHORTCUT_SECONDS)
    except UserError:
        # Too few can be read; training will report them.
        return
    files, names = found.shortcuts.files, found.shortcuts.strongest
    if files.found or names:
        alone = f", {names[0]} alone {shown(found.shortcuts.nuisances[names[0]])}" if names else ""
        print(
            f"dgsnet: warning: the files give the label away: AUC {shown(files)}{alone}, of "
            f"{len(found.labels)} images; the detector will learn that first. Look with dgsnet audit, "
            "re-encode or balance, or give --surgery.text expert --data.nuisances files",
            file=sys.stderr,
        )


def uses_surgery(config: Config) -> bool:
    """Without adapters no gradient enters the encoder, so there is nothing to edit."""
    return config.surgery.mode != "none" and config.model.lora_rank > 0


def uses_text(config: Config) -> bool:
    return uses_surgery(config) and config.data.captions != "none"


def uses_nuisances(config: Config) -> bool:
    return config.data.nuisances != "none"
