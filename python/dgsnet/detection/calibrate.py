"""`dgsnet calibrate`: a model's threshold, from images whose class is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from dgsnet.config import Crops
from dgsnet.data.items import Item
from dgsnet.data.scores import read_scores
from dgsnet.detection import arguments
from dgsnet.detection.decisions import (
    Calibration,
    Precision,
    calibrate,
    load_calibration,
    save_calibration,
    summary,
    with_categories,
)
from dgsnet.detection.detector import Detector
from dgsnet.detection.engine import Engine, answers
from dgsnet.detection.overlap import images_of_class, warn_of_both_labels, warn_of_training_images
from dgsnet.errors import UserError
from dgsnet.model.folders import holds_rule


def calibrate_command(
    model: Annotated[str | None, arguments.A_MODEL] = None,
    reals: list[list[str]] | None = None,
    generated: list[str] | None = None,
    scores: str | None = None,
    out: str | None = None,
    fpr: float = 0.01,
    miss_rate: float | None = None,
    views: int = 1,
    batch: int | None = None,
    precision: Precision | None = None,
    crops: Crops | None = None,
    replace: bool = False,
    device: arguments.Device = None,
    workers: arguments.Workers = None,
    engine: arguments.Engine = "local",
    pretrained: arguments.Pretrained = None,
) -> None:
    """Set a model's threshold for a false-positive rate, from images whose class is known.

    Writes calibration.json into the model's folder; `dgsnet predict` then says generated, real or unsure. Or,
    with --scores and --out, the threshold of another program's scores, into a folder of its own.

    Args:
        reals: real images like those to be decided on: files, folders (searched recursively), glob patterns.
            Of a labelled dataset its real images are taken. Given again for each further source: the rate
            then holds for each of them.
        generated: generated images; needed for calibrated probabilities and a bound on misses. Of a labelled
            dataset its generated images are taken.
        scores: CSV of another program's scores of images whose class is known, in place of --model and
            --reals: columns path, score (any number, higher for generated images), label (real or generated)
            and, where known, source (the rate then holds for each) and category.
        out: with --scores, folder for the threshold, which evaluate, predict and monitor take as --model.
        fpr: how many of all real images may be called generated.
        miss_rate: how many of all generated images may be called real; as fpr if not given.
        views: mosaics averaged per image, then and whenever the model is used.
        batch: images that go through the network at a time, then and whenever the model is used. If not
            given, the smallest of 1, 2, 4, ... 64 whose speed on this machine is within a tenth of the best.
        precision: of the network's weights, then and whenever the model is used; if not given, bf16 where the
            device has units for it, else fp32.
        crops: what a score is the mean over, then and whenever the model is used: 1 is the centre crop, 5 it
            and the four corners, tiles as many as cover the image, 64 at most; if not given, what the model's
            configuration says.
        replace: put the new calibration in the place of one that the model has.
    """
    if scores is not None:
        others = (model, reals, generated, batch, precision, crops, device, workers, pretrained)
        return _of_table(scores, out, others, fpr, miss_rate, replace)
    if not model or not reals or out:
        raise UserError("give --model and --reals, or --scores and --out; see dgsnet calibrate --help")
    _check_new(model, replace)
    sources = {" ".join(paths): images_of_class(paths, 0) for paths in reals}
    if len(sources) < len(reals):
        raise UserError("--reals names a source twice")
    fakes = images_of_class(generated, 1) if generated else []
    items = [item for found in (*sources.values(), fakes) for item in found]
    warn_of_training_images(model, items)
    warn_of_both_labels(items)
    # An older calibration must not decide how these scores are made.
    how: dict[str, Any] = {"views": views, "batch": batch, "precision": precision, "crops": crops}
    detector = Detector.load(model, device, calibrated=False, pretrained=pretrained, **how)
    detector = detector.fastest(batch, precision)
    found = [*_known(detector, [*sources.items(), (None, fakes)], engine, workers)]
    result = _calibration(
        found,
        sources,
        fpr=fpr,
        miss_rate=miss_rate,
        views=views,
        batch=detector.batches.size,
        precision=detector.precision,
        crops=detector.crops,
    )
    print(summary(result))
    print(f"written to {save_calibration(model, result)}")


def _check_new(folder: str, replace: bool) -> None:
    if not replace and (before := load_calibration(folder)):
        raise UserError(
            f"{folder} is calibrated already (threshold {before.threshold:.6f} from {before.n_reals} real "
            "images): give --replace to calibrate it anew"
        )


def _of_table(
    scores: str, out: str | None, others: Sequence[Any], fpr: float, miss_rate: float | None, replace: bool
) -> None:
    """`calibrate_command` of another program's scores."""
    if not out or any(other is not None for other in others):
        raise UserError("--scores goes with --out, --fpr, --miss_rate and --replace, and with nothing else")
    folder = Path(out)
    if holds_rule(folder):
        _check_new(out, replace)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {out} is in use: give a new folder, or one that calibrate --scores has made")
    found, unknown = [], 0
    for row in read_scores(scores):
        if row.label is None:
            unknown += 1
        else:
            found.append(Known(row.score, None if row.label else row.source, row.category))
    sources = dict.fromkeys(known.source for known in found if known.source is not None) or {"": None}
    result = _calibration(found, sources, fpr=fpr, miss_rate=miss_rate, raw=True)
    if unknown:
        print(f"{scores}: {unknown} of {unknown + len(found)} rows have no label and are left out")
    print(summary(result))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"written to {save_calibration(out, result)}")


class Known(NamedTuple):
    """An image whose class is known.

    Attributes:
        score: logit, or another program's score.
        source: of a real image; None: it is generated.
    """

    score: float
    source: str | None
    category: str


def _known(
    detector: Detector,
    groups: Sequence[tuple[str | None, Sequence[Item]]],
    engine: Engine,
    workers: int | None,
) -> Iterator[Known]:
    """The images that can be read of each source, and of the generated ones (None)."""
    from tqdm import tqdm

    places = [(source, item) for source, items in groups for item in items]
    items = [item for _, item in places]
    errors = []
    with tqdm(total=len(items), unit="image", disable=None) as progress:
        scored = answers(detector.job(), items, engine=engine, workers=workers)
        # Every answer is taken, so that the engine comes to its end.
        for answer, (source, item) in zip(scored, places):
            logits, error = answer.logits[""]
            if error:
                errors.append(error)
            else:
                yield Known(logits[0], source, item.category)
            progress.set_postfix_str(detector.waiting(), refresh=False)
            progress.update()
    for error in errors:
        print(f"left out: {error}")


def _calibration(found: Sequence[Known], sources: Iterable[str], **how: Any) -> Calibration:
    """`calibrate` on images of these sources, with its rates by category."""
    reals: dict[str, list[float]] = {source: [] for source in sources}
    generated: list[float] = []
    for score, source, _ in found:
        (generated if source is None else reals[source]).append(score)
    result = calibrate(reals, generated or None, **how)
    labels = [int(source is None) for _, source, _ in found]
    return with_categories(result, [k.score for k in found], labels, [k.category for k in found])
