"""`dgsnet monitor`: whether a calibration's promise still holds, on reviewed images as they come.

A test martingale for each source: it bets on each real image that more than the promised share of them is
called generated. While the promise holds its capital has a mean of at most 1 at any time, so it ever reaches
1 / level with a probability of at most the level, however often one looks (Ville 1939). docs/monitoring.md
has the formula.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dgsnet.config import check_types
from dgsnet.data.cells import row_writer, unguarded
from dgsnet.data.images import ImageError, check_regular
from dgsnet.data.items import LABELS
from dgsnet.detection.decisions import Calibration, decide, load_calibration
from dgsnet.errors import UserError
from dgsnet.files import one_line, open_own, write_file
from dgsnet.model.folders import CALIBRATION_FILE, beside, holds_rule

MONITOR_FILE = "monitor.json"
# Probability of an alarm, ever and in any source, while every promise holds.
LEVEL = 0.05
# Rates bet on, spaced evenly in their logarithm between the promised one and 1.
BETS = 64
# Exit code after an alarm.
ALARM = 3
ALARMED = (
    "dgsnet: warning: reviewed images have shown that the calibration of {} does not hold: nothing is called "
    "generated until it is calibrated anew (dgsnet calibrate --replace)"
)
COLUMNS = ("path", "decision", "truth", "source")
TRUTH = {"real": 0, "0": 0, "generated": 1, "1": 1}
DECISIONS = ("real", "unsure", "generated")

_appending = threading.Lock()


@dataclass(frozen=True)
class Watched:
    """What is known of one source.

    Attributes:
        name: what reviewed.csv calls it; "" where it has no such column.
        images: reviewed real images.
        false_positives: of them, how many were called generated.
        e_value: the most that the test's capital ever was, of 1 at the beginning.
        level: the share of LEVEL that this source has; there is an alarm from an e_value of 1 / level.
    """

    name: str
    images: int
    false_positives: int
    e_value: float
    level: float

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def alarm(self) -> bool:
        return self.e_value * self.level >= 1


@dataclass(frozen=True)
class Monitor:
    """What reviewed images say of a calibration; `monitor.json` of a model folder.

    Attributes:
        alarm: whether the promise is broken in some source.
        images, false_positives: reviewed real images, and how many of them were called generated.
        e_value: of the source that is nearest to its alarm, on a scale on which that is at 1 / LEVEL.
        promised: the calibration's `fpr`.
        calibration: a hash of calibration.json.
        begin, end: the bytes of reviewed.csv that are about this calibration.
        read: a hash of all bytes up to `end`.
        sources: each by itself, in the order of their first images.
    """

    alarm: bool
    images: int
    false_positives: int
    e_value: float
    promised: float
    calibration: str
    begin: int
    end: int
    read: str
    sources: tuple[Watched, ...]

    def __post_init__(self) -> None:
        check_types(self)

    def to_json(self) -> str:
        """The text of monitor.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


def log_e_values(images: Any, wrong: Any, promised: float) -> np.ndarray:
    """Logarithm of the test's capital after so many images of which so many were called generated.

    The mean over BETS constant bets, "diversified Kelly betting" of Waudby-Smith and Ramdas (2024): one on
    the rate q multiplies its capital by 1 + l (x - p), where x is 1 for a false positive and else 0, p is
    promised, and l = (q - p) / (p (1 - p)).

    Args:
        images, wrong: [N] counts, or one.
        promised: p, in 0..1.

    >>> float(log_e_values(100, 1, 0.01).round(2)), float(log_e_values(100, 10, 0.01).round(2))
    (-1.54, 12.64)
    """
    rates = promised ** (1 - (np.arange(BETS) + 0.5) / BETS)
    gains, losses = np.log(rates / promised), np.log1p(-rates) - np.log1p(-promised)
    wrong = np.asarray(wrong, np.float64)[..., None]
    right = np.asarray(images, np.float64)[..., None] - wrong
    return np.logaddexp.reduce(wrong * gains + right * losses, axis=-1) - np.log(BETS)


def levels(sources: int, named: bool) -> np.ndarray:
    """The share of LEVEL that each source has, in the order of their first images.

    LEVEL / (j (j + 1)) for the j-th, which together are at most LEVEL however many may come.
    """
    order = np.arange(1, sources + 1)
    return LEVEL / (order * (order + 1)) if named else np.full(sources, LEVEL)


def monitor(
    model: str | Path, reviewed: str | Path | None = None, *, scores: str | Path | None = None
) -> Monitor:
    """Read reviewed images, store what they say in the model's folder, and return it.

    Args:
        model: a model folder, or the folder of a training run, or of `calibrate --scores`; calibrated.
        reviewed, scores: CSV as `monitor_command` takes it, one of the two.

    Raises:
        UserError: there is no calibration, the table is damaged, or lines that were read before have changed.
    """
    calibration = load_calibration(model)
    if calibration is None:
        raise UserError(f"{model} promises nothing: set its threshold with dgsnet calibrate --model {model}")
    if (reviewed is None) == (scores is None):
        raise UserError("give --reviewed or --scores: the images whose truth somebody has found out")
    if scores is not None and not calibration.raw:
        raise UserError(f"{model} decides on probabilities of its network, not on --scores: give --reviewed")
    if scores is None:
        kind, path, judged = REVIEWED, Path(reviewed or ""), _reviewed
    else:
        kind, path, judged = SCORES, Path(scores), partial(_scored, calibration)
    before, name = load_monitor(model), f"{kind.option} {path}"
    try:
        check_regular(path)
        data = path.read_bytes()
    except (OSError, ImageError) as error:
        raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    # A line that is being written is for the next time.
    data = data[: data.rfind(b"\n") + 1]
    begin, now = 0, _hash(beside(model, CALIBRATION_FILE).read_bytes())
    if before:
        if _hash(data[: before.end]) != before.read:
            raise UserError(
                f"{name} does not begin with the lines that were read before: append to those, or "
                f"remove {beside(model, MONITOR_FILE)} to begin anew"
            )
        # Decisions of another calibration say nothing of this one.
        begin = before.begin if before.calibration == now else before.end
    named, rows = _rows(name, data, begin, kind, judged)
    found: dict[str, list[bool]] = {}
    for source, wrong in rows:
        found.setdefault(source, []).append(wrong)
    sources = tuple(
        Watched(name, len(wrong), sum(wrong), _highest(wrong, calibration.fpr), float(level))
        for (name, wrong), level in zip(found.items(), levels(len(found), named))
    )
    result = Monitor(
        alarm=any(source.alarm for source in sources),
        images=sum(source.images for source in sources),
        false_positives=sum(source.false_positives for source in sources),
        e_value=max((source.e_value * source.level / LEVEL for source in sources), default=1.0),
        promised=calibration.fpr,
        calibration=now,
        begin=begin,
        end=len(data),
        read=_hash(data),
        sources=sources,
    )
    write_file(beside(model, MONITOR_FILE), result.to_json().encode())
    return result


def _highest(wrong: list[bool], promised: float) -> float:
    """The most that the capital was after any image; of a hundred digits at most, as JSON has no infinity."""
    logs = log_e_values(np.arange(1, len(wrong) + 1), np.cumsum(wrong), promised)
    return float(np.exp(min(max(0.0, float(logs.max())), 230.0)))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _reviewed(row: Mapping[str, str]) -> tuple[int, bool] | None:
    """The truth of a row of reviewed.csv, and if it was called generated; ValueError where it has none."""
    truth, decision = TRUTH.get(row["truth"]), row["decision"]
    if truth is None or decision not in DECISIONS:
        raise ValueError
    return truth, decision == "generated"


def _scored(calibration: Calibration, row: Mapping[str, str]) -> tuple[int, bool] | None:
    """The same of a row of a table of scores; None where no truth is known yet."""
    label, score = row["label"].strip().lower(), float(unguarded(row["score"]))
    if not math.isfinite(score):
        raise ValueError
    if not label:
        return None
    if label not in LABELS:
        raise ValueError
    return LABELS[label], decide(score, calibration) == ["generated"]


@dataclass(frozen=True)
class _Kind:
    """A table of images whose truth somebody has found out.

    Attributes:
        option: the one that names it.
        columns: those that it must have.
        lacks: what is wrong with a bad row.
    """

    option: str
    columns: tuple[str, ...]
    lacks: str


REVIEWED = _Kind(
    "--reviewed",
    COLUMNS[:3],
    "no decision (real, unsure, generated) or no truth (real, generated)",
)
SCORES = _Kind(
    "--scores",
    ("path", "score", "label"),
    "no finite score or no label (real, generated, or empty if unknown)",
)


def _rows(
    name: str, data: bytes, begin: int, kind: _Kind, judged: Callable[[Mapping[str, str]], Any]
) -> tuple[bool, Iterator[tuple[str, bool]]]:
    """Whether sources are named; of each real image behind `begin` its source, and if it was "generated"."""
    try:
        head, text = data[: data.find(b"\n") + 1].decode("utf-8-sig"), data[begin:].decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8") from None
    columns = next(csv.reader([head]), [])
    if lacking := [column for column in kind.columns if column not in columns]:
        raise UserError(f"{name} has no column {', '.join(lacking)}: its first line names them")
    first = data.count(b"\n", 0, begin) + 1

    def rows() -> Iterator[tuple[str, bool]]:
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            for cells in lines:
                number = first + lines.line_num - 1
                if not cells or (number == 1 and cells == columns):
                    continue
                try:
                    row = dict(zip(columns, cells, strict=True))
                    found = judged(row)
                except ValueError:
                    raise UserError(f"{name}: line {number} has {kind.lacks}: correct it") from None
                if found and found[0] == 0:
                    yield unguarded(row.get("source", "")), found[1]
        except csv.Error as error:
            raise UserError(f"{name} is no CSV ({error}): correct it") from None

    return "source" in columns, rows()


def load_monitor(model: str | Path) -> Monitor | None:
    """What `monitor` has stored of a model; None where nothing is.

    Raises:
        UserError: no model there, or it is damaged.
    """
    path = beside(model, MONITOR_FILE)
    try:
        values = json.loads(path.read_bytes())
        return Monitor(**values | {"sources": tuple(Watched(**source) for source in values["sources"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(
            f"{path} is damaged ({one_line(error, 200)}): remove it, and run dgsnet monitor again"
        ) from None


def alarmed(model: str | Path) -> bool:
    """Whether the calibration that a model has now was found not to hold."""
    found = load_monitor(model)
    if not found or not found.alarm:
        return False
    path = beside(model, CALIBRATION_FILE)
    return path.is_file() and found.calibration == _hash(path.read_bytes())


def append(reviewed: str | Path, name: str, decision: str, truth: str = "real") -> None:
    """Add an image to reviewed.csv, which is made if there is none.

    Raises:
        UserError: it has other columns, or is a link.
    """
    path = Path(reviewed)
    values = {"path": name, "decision": decision, "truth": truth, "source": "page"}
    with _appending, open_own(path, "a+", newline="", encoding="utf-8", errors="replace") as file:
        file.seek(0)
        columns = next(csv.reader([file.readline()]), []) or list(COLUMNS[:3])
        if not {*COLUMNS[:3]} <= {*columns}:
            raise UserError(
                f"--reviewed {path} has other columns than {', '.join(COLUMNS[:3])}: give another"
            )
        write = row_writer(file, lineterminator="\n")
        if file.seek(0, 2) == 0:
            write(columns)
        write(values.get(column, "") for column in columns)


def monitor_command(model: str, reviewed: str | None = None, scores: str | None = None) -> None:
    """Tell whether the promise of a model's calibration still holds, on reviewed images as they come.

    Writes monitor.json into the model's folder. After an alarm it ends with exit code 3, and predict and the
    page say "unsure" in place of "generated" until the model is calibrated anew.

    Args:
        model: a model folder, an .onnx, or the folder of a training run or of calibrate --scores; calibrated.
        reviewed: CSV of images whose truth somebody has found out, with columns path, decision, truth (real
            or generated) and, where known, source; lines are appended to it.
        scores: the same of another program's scores, with columns path, score, label (real or generated;
            empty: not known) and, where known, source; the threshold of --model decides.
    """
    found = monitor(model, reviewed, scores=scores)
    for source in found.sources:
        name = f"{source.name}: " if source.name else ""
        print(
            f"{name}{source.false_positives} of {source.images} real images were called generated, "
            f"{source.false_positives / source.images:.2%} where at most {found.promised:.2%} are promised; "
            f"e-value {source.e_value:.3g}, alarm at {1 / source.level:.3g}{' - ALARM' * source.alarm}"
        )
    if not found.images:
        print("no reviewed real images of this calibration yet")
    if found.alarm:
        given = f"--scores TABLE --out {model}" if holds_rule(model) else f"--model {model}"
        print(
            "the promise does not hold: predict and the page say unsure in place of generated, until dgsnet "
            f"calibrate {given} --replace with images like these"
        )
        sys.exit(ALARM)
