"""Decisions with a stated error rate: a threshold for a wanted false-positive rate, a temperature, and a band
between "real" and "generated" in which the detector says "unsure". docs/decisions.md has the rules.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dgsnet.config import Crops, check_types
from dgsnet.detection.categories import CONFIDENCE, CategoryRate, category_rates
from dgsnet.errors import UserError
from dgsnet.files import one_line, write_file
from dgsnet.model.description import Description
from dgsnet.model.folders import CALIBRATION_FILE, beside

# Without a calibration: the published rule, and no abstaining.
THRESHOLD = Description.threshold
# Scores are written, calibrated and compared at this many decimals, so that a written row agrees with itself.
DECIMALS = 6

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS = get_args(Precision)
CROPS = get_args(Crops)
# What scores are made with where nothing else is said, by the names in Calibration.
SETTINGS: dict[str, Any] = {"views": 1, "batch": 1, "precision": "fp32", "crops": 1}

# Fields of Calibration that files of earlier versions do not have, and what they were.
LATER: dict[str, Any] = {"categories": [], "raw": False}

# The largest number that a score can be; the negative one is above no score.
MOST_SCORE = sys.float_info.max
# Views of an image, and images of a batch.
MOST = 2**12


def check_setting(name: str, value: Any) -> None:
    """UserError where one of SETTINGS has a value that it cannot have."""
    if choices := {"precision": PRECISIONS, "crops": CROPS}.get(name):
        # True is not 1.
        if repr(value) not in map(repr, choices):
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")
    elif not 1 <= value <= MOST:
        raise UserError(f"{name} is {value}; it must be in 1..{MOST:,}")


@dataclass(frozen=True)
class Source:
    """What a calibration's threshold means for one source of its real images.

    Attributes:
        name: what the user calls it.
        n: its images.
        fpr_upper: upper confidence bound of its rate of real images called generated.
        fpr_observed: share of its images above the threshold.
        threshold: what this source alone would have asked for.
    """

    name: str
    n: int
    fpr_upper: float
    fpr_observed: float
    threshold: float

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class Calibration:
    """How a model's scores become decisions; `calibration.json` of a model folder.

    All probabilities are calibrated ones, sigmoid(logit / temperature), rounded to DECIMALS; of a `raw`
    calibration they are another program's scores, as they are.

    Attributes:
        threshold: above it an image is called generated.
        low: at or below it an image is called real, between the two it is unsure; negative: none is real.
        temperature: what logits are divided by; 1 where no generated images were given.
        fpr: the rate asked for: how many of all real images may be called generated.
        fpr_upper: upper confidence bound of that rate at `threshold`, of the worst source; at most `fpr`.
        fpr_observed: share of the calibration's real images above `threshold`.
        miss_rate: how many of all generated images may be called real; None where none were given.
        miss_upper: upper confidence bound of that rate at `low`; None where none were given.
        unsure_reals: share of the calibration's real images in the band.
        unsure_generated: the same of its generated images; None where none were given.
        tpr_observed: share of its generated images above `threshold`; None where none were given.
        confidence: of the bounds.
        n_reals: real images it rests on.
        n_generated: generated images it rests on.
        views: mosaics averaged per image; the calibration holds for scores made with as many.
        batch: images that go through the network at a time, then and now.
        precision: of the network's weights, one of PRECISIONS, then and now.
        crops: of an image, one of CROPS, then and now.
        sources: of the real images, where there are several.
        categories: how its images of each category fare at `threshold`, where their lists name any.
        raw: whether it is of another program's scores: any finite numbers, of which no probability is made.
    """

    threshold: float
    low: float
    temperature: float
    fpr: float
    fpr_upper: float
    fpr_observed: float
    miss_rate: float | None
    miss_upper: float | None
    unsure_reals: float
    unsure_generated: float | None
    tpr_observed: float | None
    confidence: float
    n_reals: int
    n_generated: int
    views: int = 1
    batch: int = 1
    precision: str = "fp32"
    crops: Crops = 1
    sources: tuple[Source, ...] = ()
    categories: tuple[CategoryRate, ...] = ()
    raw: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        most = MOST_SCORE if self.raw else 1
        if not (-most <= self.low <= self.threshold <= most and (self.raw or self.threshold >= 0)):
            raise ValueError(f"threshold={self.threshold} must be in 0..1 and low={self.low} not above it")
        if not (0 < self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature} must be positive and finite")
        for name in SETTINGS:
            check_setting(name, getattr(self, name))

    def scores(self, logits: Any) -> np.ndarray:
        """What is compared with the threshold, float64 [N], of logits [N]."""
        return _scores(np.asarray(logits, dtype=np.float64), self.temperature, self.raw)

    def values(self) -> dict[str, Any]:
        """All fields as JSON has them; of LATER those that say something."""
        return {name: value for name, value in asdict(self).items() if value or name not in LATER}

    def to_json(self) -> str:
        """The text of calibration.json."""
        return json.dumps(self.values(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """The inverse of to_json; ValueError says what is wrong."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        names = {f.name for f in fields(cls)}
        # There were none of these once.
        later = {name: SETTINGS[name] for name in ("batch", "precision", "crops")}
        values = later | {"sources": []} | LATER | values
        if wrong := sorted(values.keys() ^ names):
            raise ValueError(f"{'unknown' if wrong[0] not in names else 'missing'} field {wrong[0]}")
        try:
            for name, kind in {"sources": Source, "categories": CategoryRate}.items():
                values[name] = tuple(kind(**each) for each in values[name])
        except TypeError:
            raise ValueError(f"{name} are not what calibrate writes") from None
        return cls(**values)


def calibrate(
    reals: Any,
    generated: Any = None,
    *,
    fpr: float = 0.01,
    miss_rate: float | None = None,
    confidence: float = CONFIDENCE,
    views: int = 1,
    batch: int = 1,
    precision: str = "fp32",
    crops: Crops = 1,
    raw: bool = False,
) -> Calibration:
    """Find threshold, temperature and band from scores of images whose class is known.

    The threshold is an order statistic of the real images' scores: as many of them lie above it as the
    Clopper-Pearson upper bound allows. If real images to come are like these, at most `fpr` of them are
    called generated, with the given confidence over the choice of the calibration images, whatever the
    distribution of scores (Wilks 1941, tolerance limits). Of several sources the highest of their thresholds
    is taken, and with the same confidence the rate holds for all of them at once. docs/decisions.md has the
    rules.

    Args:
        reals: logits of real images, [N] floats; or such by the names of their sources.
        generated: logits of generated images, [M] floats; without them the temperature is 1, and nothing is
            known of misses.
        fpr: how many of all real images may be called generated.
        miss_rate: how many of all generated images may be called real; None is `fpr`.
        confidence: with which both hold.
        views, batch, precision, crops: what the logits were made with; recorded.
        raw: they are no logits but scores of any kind, higher for generated images, and stay as they are.

    Raises:
        UserError: too few images for the rates, or generated images that score no higher than real ones.

    >>> rng = np.random.default_rng(0)
    >>> result = calibrate(rng.normal(-2, 1, 1000), rng.normal(2, 1, 1000), fpr=0.05)
    >>> result.fpr_upper <= 0.05, 0 < result.low < result.threshold < 1
    (True, True)
    """
    by_source = dict(reals) if isinstance(reals, Mapping) else {"": reals}
    by_source = {name: np.asarray(logits, dtype=np.float64) for name, logits in by_source.items()}
    reals = np.concatenate([*by_source.values(), []])
    generated = np.asarray([] if generated is None else generated, dtype=np.float64)
    miss_rate = fpr if miss_rate is None else miss_rate
    for name, rate in {"fpr": fpr, "miss_rate": miss_rate, "confidence": confidence}.items():
        if not 0 < rate < 1:
            raise UserError(f"{name} is {rate}; it must lie between 0 and 1")
    if raw and len(generated):
        _check_order(reals, generated)
    temperature = fit_temperature(reals, generated) if len(generated) and not raw else 1.0
    real_scores, generated_scores = (np.sort(_scores(x, temperature, raw)) for x in (reals, generated))

    above = {
        name: _allowed(len(logits), fpr, confidence, f"real images{name and f' of {name}'}", "fpr")
        for name, logits in by_source.items()
    }
    scores = {name: np.sort(_scores(logits, temperature, raw)) for name, logits in by_source.items()}
    own = {name: float(scores[name][::-1][allowed]) for name, allowed in above.items()}
    threshold = max(own.values())
    sources = tuple(
        Source(
            name,
            n=len(of_source),
            # Where others have set the threshold, it is a fixed number to this source's images.
            fpr_upper=_upper_bound(
                above[name] if own[name] == threshold else wrong, len(of_source), confidence
            ),
            fpr_observed=wrong / len(of_source),
            threshold=own[name],
        )
        for name, of_source in scores.items()
        for wrong in [int((of_source > threshold).sum())]
    )
    if len(generated):
        below = _allowed(len(generated), miss_rate, confidence, "generated images", "miss_rate")
        last = float(generated_scores[below])
        low = math.nextafter(last, -math.inf) if raw else round(last - 10**-DECIMALS, DECIMALS)
    else:
        none = -MOST_SCORE if raw else -(10**-DECIMALS)
        low = min(_lower_limit(of_source, fpr, confidence, none) for of_source in scores.values())
    low = min(low, threshold)

    def share(condition: np.ndarray) -> float | None:
        return float(condition.mean()) if len(condition) else None

    return Calibration(
        threshold=float(threshold),
        low=float(low),
        temperature=temperature,
        fpr=fpr,
        fpr_upper=max(source.fpr_upper for source in sources),
        fpr_observed=float((real_scores > threshold).mean()),
        miss_rate=miss_rate if len(generated) else None,
        miss_upper=_upper_bound(below, len(generated), confidence) if len(generated) else None,
        unsure_reals=float(((real_scores > low) & (real_scores <= threshold)).mean()),
        unsure_generated=share((generated_scores > low) & (generated_scores <= threshold)),
        tpr_observed=share(generated_scores > threshold),
        confidence=confidence,
        n_reals=len(reals),
        n_generated=len(generated),
        views=views,
        batch=batch,
        precision=precision,
        crops=crops,
        sources=sources if len(sources) > 1 else (),
        raw=raw,
    )


def with_categories(
    calibration: Calibration, logits: Any, labels: Sequence[int], categories: Sequence[str]
) -> Calibration:
    """The same with the rates by category of its images: logits [N], labels (0 real, 1 generated), names."""
    called = [name == "generated" for name in decide(calibration.scores(logits), calibration)]
    return replace(calibration, categories=category_rates(categories, labels, called))


def fit_temperature(reals: np.ndarray, generated: np.ndarray) -> float:
    """The T that minimises the log loss of sigmoid(logit / T), both classes weighing the same.

    Guo et al. 2017, with Platt's (1999) smoothed labels, so that classes which the sample happens to separate
    do not make the scores certain.

    Args:
        reals, generated: logits [N] and [M].

    Raises:
        UserError: generated images score no higher than real ones.
    """
    from scipy.optimize import minimize_scalar

    if not generated.mean() > reals.mean():
        raise UserError(
            "the generated images score no higher than the real ones (mean logits "
            f"{generated.mean():.3g} and {reals.mean():.3g}): check that --reals and --generated are not "
            "swapped; if not, this model cannot tell them apart"
        )

    def loss(log_temperature: float) -> float:
        total = 0.0
        for logits, sign in ((reals, -1), (generated, 1)):
            z = sign * logits / math.exp(log_temperature)
            wrong = 1 / (len(logits) + 2)
            total += float(np.mean((1 - wrong) * np.logaddexp(0, -z) + wrong * np.logaddexp(0, z)))
        return total

    # The loss is convex in 1 / T, so it has one minimum in log T as well.
    return float(math.exp(minimize_scalar(loss, bounds=(-7, 7), method="bounded").x))


def _check_order(reals: np.ndarray, generated: np.ndarray) -> None:
    """UserError where scores of generated images are no higher than those of real ones, by their ranks."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([reals, generated]))
    if not ranks[len(reals) :].mean() > ranks[: len(reals)].mean():
        raise UserError(
            "the generated images score no higher than the real ones: a higher score has to mean generated; "
            "turn the signs of the scores around, or correct the labels"
        )


def _scores(logits: np.ndarray, temperature: float, raw: bool = False) -> np.ndarray:
    """What decisions compare: probabilities, or raw scores as they are."""
    from scipy.special import expit

    if raw:
        return logits
    return np.round(expit(logits / temperature), DECIMALS)


def _allowed(n: int, rate: float, confidence: float, kind: str, option: str) -> int:
    """How many of n images may be wrong for the upper confidence bound to stay at or below `rate`."""
    from scipy.stats import binom

    # The bound of k is at most the rate exactly where P(Binomial(n, rate) <= k) <= 1 - confidence.
    allowed = int(binom.ppf(1 - confidence, n, rate)) - 1
    if n == 0 or allowed < 0:
        needed = math.floor(math.log(1 - confidence) / math.log1p(-rate)) + 1
        raise UserError(
            f"{n} {kind} are too few for {option}={rate:g} with {confidence:.0%} confidence: at least "
            f"{needed} are needed; give more, or a larger {option}"
        )
    return allowed


def _upper_bound(wrong: int, n: int, confidence: float) -> float:
    """Clopper and Pearson's one-sided upper bound of a rate observed as wrong / n, with wrong < n."""
    from scipy.stats import beta

    return float(beta.ppf(confidence, wrong + 1, n - wrong))


def _lower_limit(scores: np.ndarray, rate: float, confidence: float, none: float) -> float:
    """The largest of the ascending scores at or above which lie, with this confidence, more than `rate`.

    `none` where there is none of which that can be said.
    """
    from scipy.stats import binom

    above = int(binom.ppf(confidence, len(scores), rate))
    return float(scores[::-1][above]) if above < len(scores) else none


def decide(
    probabilities: Any, calibration: Calibration | None = None, threshold: float = THRESHOLD
) -> list[str]:
    """Names "generated", "real" or "unsure" for each probability; "" for NaN.

    Args:
        probabilities: [N] floats, or one; rounded to DECIMALS before they are compared, but as they are where
            the calibration is `raw`. [N, C]: of an image
            and its copies; where they do not all have the same name, it is "unsure".
        calibration: the rule; None is "generated" above `threshold`, else "real".

    >>> decide([0.2, 0.7, float("nan")])
    ['real', 'generated', '']
    >>> decide([[0.7, 0.9], [0.7, 0.4]])
    ['generated', 'unsure']
    """
    low, high = (calibration.low, calibration.threshold) if calibration else (threshold, threshold)
    rounded = np.atleast_1d(np.asarray(probabilities, dtype=np.float64))
    if not (calibration and calibration.raw):
        rounded = np.round(rounded, DECIMALS)
    names = np.select(
        [np.isnan(rounded), rounded > high, rounded <= low], ["", "generated", "real"], "unsure"
    )
    if names.ndim == 1:
        return names.tolist()
    return [row[0] if len({*row}) == 1 or not row[0] else "unsure" for row in names.tolist()]


def save_calibration(folder: str | Path, calibration: Calibration) -> Path:
    """Store a calibration in a model's folder, or a run's best one, a raw one in its own; returns the file.

    A model that is trained or saved again has none: the folder is replaced as a whole.
    """
    path = Path(folder) / CALIBRATION_FILE if calibration.raw else beside(folder, CALIBRATION_FILE)
    write_file(path, calibration.to_json().encode())
    return path


def load_calibration(folder: str | Path) -> Calibration | None:
    """The calibration of a model folder, or of a run folder's best model; None where there is none.

    Raises:
        UserError: no model there, or a damaged calibration.
    """
    path = beside(folder, CALIBRATION_FILE)
    try:
        return Calibration.from_json(path.read_text())
    except FileNotFoundError:
        return None
    # JSON's and Unicode's errors are ValueErrors too.
    except (ValueError, OverflowError, RecursionError, UserError) as error:
        raise UserError(
            f"{path} is damaged ({one_line(error, 200)}): remove it, or run dgsnet calibrate with --replace"
        ) from None


def summary(calibration: Calibration) -> str:
    """A calibration in words, a line per rule."""
    c = calibration
    sure = f"with {c.confidence:.0%} confidence"

    def shown(score: float) -> str:
        return repr(score) if c.raw else f"{score:.{DECIMALS}f}"

    below = "nothing: real" if c.low == -MOST_SCORE else f"at or below {shown(c.low)}: real"
    lines = [
        f"above {shown(c.threshold)}: generated. Of all real images at most {c.fpr_upper:.2%} {sure} "
        f"({c.fpr_observed:.2%} of the {c.n_reals} here)"
    ]
    for source in sorted(c.sources, key=lambda source: -source.threshold):
        lines.append(
            f"  {source.name}: at most {source.fpr_upper:.2%} ({source.fpr_observed:.2%} of {source.n}); "
            f"alone its threshold would be {shown(source.threshold)}"
        )
    for r in c.categories:
        called = "called generated" if r.label == 0 else "found"
        lines.append(
            f"  {r.name}, {('real', 'generated')[r.label]}: {r.rate:.2%} of {r.n} {called} ({r.low:.2%} to "
            f"{r.high:.2%})"
        )
    if c.n_generated:
        lines += [
            f"{below}. Of all generated images at most {c.miss_upper:.2%} {sure} ({c.n_generated} here)",
            f"between: unsure. {c.unsure_reals:.1%} of the real images here, {c.unsure_generated:.1%} of the "
            "generated",
            f"{c.tpr_observed:.1%} of the generated images here are found"
            + ("" if c.raw else f"; temperature {c.temperature:.3f}"),
        ]
    else:
        unknown = "nothing is known of misses"
        unknown = unknown if c.raw else f"probabilities are not calibrated, and {unknown}"
        lines += [
            f"{below}; between: unsure, {c.unsure_reals:.1%} of the real images here",
            f"no generated images given: {unknown}",
        ]
    if c.threshold == 1 and not c.raw:
        lines.append("no score can lie above 1: nothing will be called generated")
    return "\n".join(lines)
