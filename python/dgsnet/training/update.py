"""`dgsnet update`: a trained detector learns new generators, held by gradients on images of the old ones."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dgsnet.config import CONFIG_FILE, Config
from dgsnet.data.items import Item, find_samples
from dgsnet.data.pairs import attach_twins, find_pairs
from dgsnet.detection import arguments
from dgsnet.detection.decisions import SETTINGS
from dgsnet.detection.overlap import warn_of_training_images
from dgsnet.errors import UserError
from dgsnet.evaluation.changes import compare, per_image, table
from dgsnet.evaluation.evaluate import evaluate, find_suites
from dgsnet.files import file_sha256, locked, one_line, write_file
from dgsnet.model.catalogue import check_model
from dgsnet.model.folders import WEIGHTS_FILE, model_folder, read_model_config
from dgsnet.processes import announced_size
from dgsnet.training.checks import UPDATE_FILE, check_folder, training_samples

Rule = Literal["gem", "conflict", "replay", "none"]
REPLAY_SHARE = 0.5
# Of every this many images of a generator and class one is kept out of the update, to report on.
HELD_OUT = 5
# Names of what is reported on, unless --test is given.
NEW, OLD = "new", "old"
CHANGES_FILE, IMAGES_FILE = "changes.json", "changes.csv"


def update(
    model: str | Path,
    data: list[str],
    replay: list[str],
    out: str | Path,
    *,
    rule: Rule = "conflict",
    margin: float = 0.0,
    test: list[str] | None = None,
    lr: float | None = None,
    steps: int | None = None,
    replay_share: float = REPLAY_SHARE,
    seed: int | None = None,
    pinned: str | None = None,
    allow_lost: bool = False,
    resume: bool = False,
    pretrained: arguments.Pretrained = None,
) -> Path:
    """Teach a trained detector new generators, without losing the old ones; report what changed.

    Writes a run as `dgsnet train` does, without a calibration, and what the update gained and lost. Adapters
    and the student's head are trained on its own loss, the binary cross-entropy of the image branch, with a
    new optimiser and otherwise the settings of the model's training. Every step takes a batch of new images
    and, beside it, replayed ones. docs/updating.md has the rules.

    Args:
        model: a model folder, or the folder of a training run; it is left as it is.
        data: labelled images of the new generators.
        replay: labelled images of the old ones, real and generated.
        out: the new run's folder; must be new or empty unless --resume is given.
        rule: what the replayed images do to a step. gem - no old generator's loss may rise; conflict - new
            and old gradients lose what conflicts; replay - the mean of both losses; none - nothing.
        margin: of gem, 0 or more: how far every step's gradient has to point along each old generator's, as a
            share of what it would if it were as long as the new images' and pointed there.
        test: labelled images to report gains and losses on, none of them trained on; NAME=PATH names a suite.
            A fifth of --data and --replay is kept out for it if not given; of an empty list, in Python,
            nothing is reported.
        lr: learning rate; that of the model's training if not given.
        steps: optimiser steps; one pass over the new images if not given.
        replay_share: share of a step's images that are replayed.
        seed: decides order, augmentation, dropout and what is replayed; that of the model's training if not
            given.
        pinned: list of labelled images whose decision may not change for the worse; every checkpoint is
            tested on them, and pins.json says which of them it loses. An update that has lost one at its end
            is complete, says so, and ends with exit code 3.
        allow_lost: end with exit code 0 even so.
        resume: go on where an update was stopped or killed, with the same options. Starts it if there is none
            in --out.

    Returns:
        `out`, which every command takes as --model.

    Raises:
        UserError: model, data or settings cannot be used, `out` is taken or in use; one line with the remedy.
        PinsLost: pinned images are lost. All else is done.
    """
    out = Path(out)
    if announced_size() > 1:
        raise UserError("dgsnet update runs in a single process: start it without torchrun or accelerate")
    if rule not in get_args(Rule):
        raise UserError(f"rule {rule!r} is unknown; choose one of {', '.join(get_args(Rule))}")
    if not 0 < replay_share < 1:
        raise UserError(f"replay_share is {replay_share:g}; it must lie between 0 and 1")
    if not 0 <= margin < math.inf:
        raise UserError(f"margin is {margin:g}; it must be 0 or more")
    if margin and rule != "gem":
        raise UserError(f"margin is of --rule gem; the rule is {rule}")
    folder = model_folder(model)
    if {Path(model).resolve(), folder.resolve()} & {out.resolve(), *out.resolve().parents}:
        raise UserError(f"--out {out} lies in the model's own folder: give a new folder")
    with locked(out):
        before = read_model_config(folder, pretrained)
        config = _configuration(before, [*data, *(replay if rule != "none" else ())], lr, seed)
        new, old = _samples(config, data, replay, rule)
        suites = None if test is None else find_suites(test) if test else {}
        if suites is None:
            (new, new_out), (old, old_out) = (hold_out(samples, config.seed) for samples in (new, old))
            suites = {name: kept for name, kept in ((NEW, new_out), (OLD, old_out)) if kept}
        if steps is not None:
            if steps < 1:
                raise UserError(f"steps is {steps}; it must be 1 or more")
            optim = config.optim
            # A run is saved with what was found.
            assert optim.batch_size != "auto"
            epochs = math.ceil(steps / math.ceil(len(new) / (optim.batch_size * optim.accumulation)))
            config = changed(config, optim=changed(optim, epochs=epochs, max_steps=steps))
        record = {
            "model": str(model),
            "weights": file_sha256(folder / WEIGHTS_FILE)[:16],
            "rule": rule,
            "replay_share": f"{replay_share:g}",
            "margin": f"{margin:g}",
        }
        check_update(config, out, record, resume)
        check_model(config.model, config.preprocess.image_size)

        from dgsnet.detection.detector import Detector
        from dgsnet.model.checkpoint import load_model, trained_on, trained_state
        from dgsnet.training.pins import Pins, find_pins, settle
        from dgsnet.training.plan import Job
        from dgsnet.training.replay import Update
        from dgsnet.training.trainer import fit

        pins = None
        if pinned:
            pins = Pins(find_pins(pinned), Detector.load(model, pretrained=pretrained), out)
        started = Update(
            trained_state(load_model(folder, pretrained=config.model.pretrained)[0]),
            trained_on(folder),
            old,
            rule,
            ratio=replay_share / (1 - replay_share),
            seed=config.seed,
            record=record,
            pins=pins,
            margin=margin,
            pairs=find_pairs(old) if config.data.pairs else None,
        )
        write_file(out / UPDATE_FILE, (json.dumps(record, indent=2) + "\n").encode())
        fit(Job(config, out, new, [], started))
        if suites:
            report(model, out, suites, pretrained=config.model.pretrained)
        if pins:
            device = next(pins.before.model.parameters()).device
            model_and_config = load_model(out, device=device, pretrained=config.model.pretrained)
            settle(pins, *model_and_config, allow_lost=allow_lost)
    return out


def _configuration(config: Config, data: list[str], lr: float | None, seed: int | None) -> Config:
    """The settings of the model's training, for the student's loss alone and one pass over the new images."""
    try:
        return changed(
            config,
            seed=config.seed if seed is None else seed,
            data=changed(
                config.data, train=data, val=[], captions="none", nuisances="none", balance="none", cap=0
            ),
            optim=changed(config.optim, lr=config.optim.lr if lr is None else lr, epochs=1, max_steps=0),
            surgery=changed(config.surgery, mode="none", text="project", distillation=0.0),
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _samples(
    config: Config, data: Sequence[str], replay: Sequence[str], rule: Rule
) -> tuple[list[Item], list[Item]]:
    """New and old images. Without replayed ones the new images have to be of both classes."""
    old = training_samples(config, list(replay), "train")
    if rule == "none":
        new = training_samples(config, list(data), "train")
    else:
        found = {root: find_samples(root, "train") for root in data}
        if config.data.pairs:
            found = {root: attach_twins(samples, root) for root, samples in found.items()}
        new = [sample for samples in found.values() for sample in samples]
    known = {_place(sample) for sample in old}
    if both := [sample for sample in new if _place(sample) in known]:
        raise UserError(
            f"{len(both)} images are in --data and in --replay, such as {both[0].path}: leave the new ones "
            "out of --replay"
        )
    return new, old


def _place(item: Item) -> tuple[str, int | None, int]:
    return os.path.realpath(item.file), item.group, item.offset


def hold_out(samples: list[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """Those to train on, and of every HELD_OUT of a generator and class one to report on, by the seed.

    The twins of the latter go with them.
    """
    cells: dict[tuple[str, int], list[int]] = {}
    for place, sample in enumerate(samples):
        cells.setdefault((sample.generator, int(sample.label == 1)), []).append(place)
    out: set[int] = set()
    for (generator, label), places in cells.items():
        rng = np.random.default_rng([seed, label, *generator.encode(errors="surrogateescape")])
        out.update(rng.permutation(places)[: len(places) // HELD_OUT].tolist())
    paths = {samples[place].path for place in out}
    twins = {samples[place].twin for place in out}
    out |= {place for place, sample in enumerate(samples) if sample.twin in paths or sample.path in twins}
    kept = [sample for place, sample in enumerate(samples) if place not in out]
    return kept, [samples[place] for place in sorted(out)]


def check_update(config: Config, out: Path, record: dict[str, str], resume: bool) -> None:
    """As check_folder, and that what is there is this update."""
    path = out / UPDATE_FILE
    if resume and path.is_file():
        try:
            before = {"margin": "0"} | json.loads(path.read_bytes())
            other = [name for name in record if name != "model" and before[name] != record[name]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)}): start in a new folder") from None
        if other:
            name = other[0]
            raise UserError(
                f"cannot resume {out} with {name}={record[name]}, it was started with "
                f"{one_line(before[name], 80)}: give the same options, or start in a new folder"
            )
    elif resume and (out / CONFIG_FILE).is_file():
        raise UserError(f"--out {out} holds a run that is no update: give another folder")
    check_folder(config, out, resume)


def report(
    model: str | Path, out: Path, suites: dict[str, list[Item]], *, pretrained: str | None = None
) -> None:
    """Measure both models on the same images; print what changed, and write it into `out`.

    Both decide at the threshold of the first one's calibration, which the second does not have.
    """
    from dgsnet.detection.detector import Detector
    from dgsnet.model.checkpoint import load_model

    before = Detector.load(model, pretrained=pretrained)
    device = next(before.model.parameters()).device
    updated = load_model(out, device=device, pretrained=pretrained)
    how: dict[str, Any] = {name: getattr(before, name) for name in SETTINGS}
    after = Detector(*updated, before.calibration, **how)
    workers = after.config.data.workers
    measured = [
        evaluate(detector, suites, journal=out / "state" / f"{name}.jsonl", workers=workers)
        for name, detector in (("before", before), ("after", after))
    ]
    warn_of_training_images(out, [s for samples in suites.values() for s in samples], measured[1].hashes)
    old, new = (evaluation.scores for evaluation in measured)
    threshold = before.threshold
    groups = compare(old, new, threshold)
    if not groups:
        raise UserError("none of the images to report on could be read")
    content: dict[str, Any] = {
        "model": str(model),
        "threshold": threshold,
        "calibrated": before.calibration is not None,
        "groups": [group.to_dict() for group in groups],
    }
    write_file(out / IMAGES_FILE, per_image(old, new, threshold).encode(errors="surrogateescape"))
    write_file(out / CHANGES_FILE, (json.dumps(content, indent=2) + "\n").encode())
    print(table(groups))
    whose = f"the threshold of {model}" if before.calibration else f"since {model} is not calibrated"
    print(
        f"both decide at {threshold:g}, {whose}. {out} has no calibration: its scores are others, so set its "
        f"own threshold with dgsnet calibrate --model {out} --reals ..."
    )
