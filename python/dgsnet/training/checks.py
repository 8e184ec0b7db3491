"""What can be told of a run before anything heavy is imported: about its folder, settings and data."""

from __future__ import annotations

from pathlib import Path

from dgsnet.config import CONFIG_FILE, Config, read_config
from dgsnet.data.captions import attach_captions
from dgsnet.data.samples import Sample, find_samples
from dgsnet.errors import UserError
from dgsnet.files import LOCK_FILE

# Settings that a resumed run may change, because they do not decide its weights.
FREE_SETTINGS = (
    "data.workers",
    "data.prefetch",
    "data.cache",
    "optim.parallel",
    "checkpoint_every",
    "log_every",
)


def check_folder(config: Config, out: Path, resume: bool) -> None:
    """Refuse a folder that is taken, and a resumption with other settings; nothing is written yet."""
    saved = out / CONFIG_FILE
    taken = out.exists() and any(entry.name != LOCK_FILE for entry in out.iterdir())
    if taken and not resume:
        raise UserError(f"--out {out} is not empty: give another folder, or --resume to go on with its run")
    if resume and saved.is_file():
        before, now = read_config(saved).flat(), config.flat()
        for name, value in now.items():
            found = name == "optim.batch_size" and value == "auto"  # and is kept
            if value != before[name] and name not in FREE_SETTINGS and not found:
                raise UserError(
                    f"cannot resume {out} with {name}={value}, it was started with {before[name]}: leave "
                    "the setting out, or start a new run"
                )
    if not config.data.train:
        nothing = f" ({out} holds no run to resume)" if resume else ""
        raise UserError(f"no training images: name a dataset with --data.train{nothing}")


def training_samples(config: Config, roots: list[str] | str, split: str) -> list[Sample]:
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
        if uses_text(config):
            found = {root: attach_captions(s, config.data.captions, root) for root, s in found.items()}
    return [sample for samples in found.values() for sample in samples]


def uses_surgery(config: Config) -> bool:
    """Without adapters no gradient enters the encoder, so there is nothing to edit."""
    return config.surgery.mode != "none" and config.model.lora_rank > 0


def uses_text(config: Config) -> bool:
    return uses_surgery(config) and config.data.captions != "none"
