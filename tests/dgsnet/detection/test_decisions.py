"""Thresholds keep the rates they promise, temperatures are the right ones, and a calibration decides."""

import json
import math

import numpy as np
import pytest
from dgsnet.detection.decisions import Calibration, calibrate, decide, fit_temperature, summary
from dgsnet.errors import UserError
from scipy import stats

REPEATS = 600


def plausible(count, repeats, expected):
    return stats.binomtest(count, repeats, expected).pvalue > 1e-4


@pytest.mark.parametrize(("n", "fpr", "confidence"), [(299, 0.01, 0.95), (500, 0.05, 0.95), (90, 0.1, 0.8)])
def test_the_asked_rate_is_exceeded_as_rarely_as_promised(n, fpr, confidence):
    # Logits of the standard logistic distribution have uniform probabilities: the true rate above t is 1 - t.
    rng = np.random.default_rng(0)
    drawn = [calibrate(rng.logistic(size=n), fpr=fpr, confidence=confidence) for _ in range(REPEATS)]
    assert all(c.fpr_upper <= fpr and c.fpr_observed <= fpr for c in drawn)
    exceeded = sum(1 - c.threshold > fpr for c in drawn)
    above = round(drawn[0].fpr_observed * n)
    # This is exact for an order statistic.
    expected = stats.beta.sf(fpr, above + 1, n - above)
    assert expected <= 1 - confidence
    assert plausible(exceeded, REPEATS, expected)
    # One real image more above it, and the promise would not hold.
    assert stats.beta.sf(fpr, above + 2, n - above - 1) > 1 - confidence
    # The lower end of the band, without generated images: as rarely is the true rate below the one asked for.
    assert sum(1 - c.low < fpr for c in drawn) <= stats.binom.ppf(0.9999, REPEATS, 1 - confidence)


def test_the_rate_holds_for_all_sources_at_once_as_often_as_promised():
    """Also where all sources are alike, and any of them may turn out to be the worst."""
    rng = np.random.default_rng(6)
    for shifts in ((0, 0, 0), (-3, 0, 1)):
        exceeded = 0
        for _ in range(REPEATS):
            sources = {
                f"{i}": rng.logistic(shift, size=n)
                for i, (shift, n) in enumerate(zip(shifts, (90, 200, 120)))
            }
            c = calibrate(sources, fpr=0.05)
            assert c.threshold == max(s.threshold for s in c.sources)
            assert c.threshold == max(calibrate(logits, fpr=0.05).threshold for logits in sources.values())
            rates = stats.logistic.sf(math.log(c.threshold / (1 - c.threshold)), loc=shifts)
            exceeded += max(rates) > 0.05
        assert exceeded <= stats.binom.ppf(0.9999, REPEATS, 0.05)


def test_two_sources_that_set_the_threshold_together_are_promised_alike():
    """What is above it was chosen by either's images, whichever comes first."""
    logits, generated = np.random.default_rng(9).normal(-2, 1, 200).round(1), np.full(60, 4.0)
    c = calibrate({"one": logits, "copy": logits.copy()}, generated, fpr=0.05)
    one, copy = c.sources
    assert one.threshold == copy.threshold == c.threshold
    assert one.fpr_upper == copy.fpr_upper > one.fpr_observed


def test_sources_are_reported_each():
    rng = np.random.default_rng(7)
    quiet, loud, fakes = rng.normal(-3, 1, 400), rng.normal(0, 1, 300), rng.normal(3, 1, 300)
    c = calibrate({"quiet": quiet, "loud": loud}, fakes, fpr=0.05)
    assert [s.name for s in c.sources] == ["quiet", "loud"] and [s.n for s in c.sources] == [400, 300]
    pooled = calibrate(np.concatenate([quiet, loud]), fakes, fpr=0.05)
    assert pooled.temperature == c.temperature and pooled.threshold < c.threshold and pooled.sources == ()
    scores = {
        name: np.round(1 / (1 + np.exp(-x / c.temperature)), 6)
        for name, x in (("quiet", quiet), ("loud", loud))
    }
    for source in c.sources:
        assert source.fpr_observed == (scores[source.name] > c.threshold).mean()
        assert source.fpr_observed < source.fpr_upper <= 0.05
    assert c.threshold == c.sources[1].threshold > c.sources[0].threshold
    # No score is above the threshold.
    assert c.sources[0].fpr_upper == pytest.approx(stats.beta.ppf(0.95, 1, 400))
    assert c.fpr_upper == c.sources[1].fpr_upper
    # Pooled, the loud source would have had more than was asked for.
    assert (scores["loud"] > pooled.threshold).mean() > 0.08
    assert Calibration.from_json(c.to_json()) == c
    older = json.loads(pooled.to_json())
    # Older calibrations have no sources.
    del older["sources"]
    assert Calibration.from_json(json.dumps(older)) == pooled
    said = summary(c)
    assert said.index("loud: at most") < said.index("quiet: at most 0.75% (0.00% of 400)")
    # Without generated images the band ends where it ends for the quietest source.
    alone = {name: calibrate(x, fpr=0.05) for name, x in (("quiet", quiet), ("loud", loud))}
    both = calibrate({"quiet": quiet, "loud": loud}, fpr=0.05)
    assert both.low == alone["quiet"].low < alone["loud"].low
    with pytest.raises(UserError, match=r"^20 real images of loud are too few"):
        calibrate({"quiet": quiet, "loud": loud[:20]}, fpr=0.05)


def test_as_rarely_are_generated_images_called_real():
    rng = np.random.default_rng(1)
    # The count allowed is the largest whose Clopper-Pearson bound fits.
    k = next(k for k in range(200) if stats.beta.ppf(0.95, k + 2, 200 - k - 1) > 0.1)
    missed = 0
    for _ in range(REPEATS):
        # One high real image puts the threshold above the band.
        reals = np.append(rng.logistic(-5, size=60), 4.0)
        c = calibrate(reals, rng.logistic(size=200), fpr=0.05, miss_rate=0.1)
        assert c.miss_upper == pytest.approx(stats.beta.ppf(0.95, k + 1, 200 - k)) and c.miss_upper <= 0.1
        assert 0 < c.low < c.threshold
        missed += stats.logistic.cdf(c.temperature * math.log(c.low / (1 - c.low))) > 0.1
    assert plausible(missed, REPEATS, stats.beta.sf(0.1, k + 1, 200 - k))


def test_as_many_generated_images_are_called_real_as_the_bound_allows():
    rng = np.random.default_rng(5)
    reals, generated = rng.normal(-1, 1, 500), rng.normal(1, 1, 400)
    c = calibrate(reals, generated, fpr=0.05)
    assert c.low < c.threshold
    scores = np.round(1 / (1 + np.exp(-generated / c.temperature)), 6)
    assert decide(scores, c).count("real") == stats.binom.ppf(0.05, 400, 0.05) - 1


def test_the_band_lies_between_the_two_errors():
    rng = np.random.default_rng(2)
    reals, generated = rng.normal(-1, 1, 2000), rng.normal(1, 1, 1500)
    c = calibrate(reals, generated, fpr=0.02, miss_rate=0.05)
    calls = [decide(1 / (1 + np.exp(-x / c.temperature)), c) for x in (reals, generated)]
    assert calls[0].count("generated") / 2000 == c.fpr_observed <= 0.02
    assert 0.02 < calls[1].count("real") / 1500 <= c.miss_upper <= 0.05
    assert calls[0].count("unsure") / 2000 == c.unsure_reals > 0.1
    assert calls[1].count("unsure") / 1500 == c.unsure_generated > 0.1
    assert calls[1].count("generated") / 1500 == c.tpr_observed
    # Classes far apart leave nothing to be unsure of.
    apart = calibrate(reals - 20, generated + 20, fpr=0.02, miss_rate=0.05)
    assert apart.low == apart.threshold and apart.unsure_reals == 0


@pytest.mark.parametrize("steps", [4, 12, 40])
def test_the_promise_holds_where_images_share_scores(steps):
    """As decisions see them: so many levels, of which the highest have about the rate that is asked for."""
    rng = np.random.default_rng(steps)
    levels, weights = np.sort(rng.normal(size=steps)), rng.dirichlet(np.full(steps, 0.6))
    probabilities = np.round(1 / (1 + np.exp(-levels)), 6)
    exceeded = 0
    for _ in range(REPEATS):
        c = calibrate(rng.choice(levels, 200, p=weights), fpr=0.05)
        assert c.n_reals == 200 and c.fpr_observed <= c.fpr_upper <= 0.05
        exceeded += weights[probabilities > c.threshold].sum() > 0.05
    assert exceeded <= stats.binom.ppf(0.9999, REPEATS, 0.05)


def test_ties_never_raise_the_rate():
    scores = np.repeat([0.0, 1.0, 2.0], 200)
    c = calibrate(scores, fpr=0.05)
    assert c.fpr_observed == 0 and c.threshold == round(1 / (1 + math.exp(-2)), 6)
    saturated = calibrate(np.full(100, 60.0), fpr=0.05)
    assert saturated.threshold == 1 and decide([1.0], saturated) == ["real"]


@pytest.mark.parametrize(("fpr", "needed"), [(0.05, 59), (0.01, 299), (0.001, 2995)])
def test_too_few_images_are_told_with_how_many_are_needed(fpr, needed):
    scores = np.random.default_rng(0).normal(size=needed)
    with pytest.raises(UserError, match=f"^{needed - 1} real .* at least {needed} are needed"):
        calibrate(scores[1:], fpr=fpr)
    assert calibrate(scores, fpr=fpr).fpr_observed == 0
    with pytest.raises(UserError, match=f"^3 generated .* at least {needed} are needed.*miss_rate"):
        calibrate(scores, [5.0, 6.0, 7.0], fpr=fpr)
    with pytest.raises(UserError, match="0 real images are too few"):
        calibrate([], fpr=fpr)


def test_impossible_requests_are_one_line():
    scores = np.random.default_rng(0).normal(size=500)
    for wrong in ({"fpr": 0}, {"fpr": 1.5}, {"fpr": math.nan}, {"confidence": 1}):
        with pytest.raises(UserError, match="must lie between 0 and 1"):
            calibrate(scores, **wrong)
    with pytest.raises(UserError, match="swapped"):
        calibrate(scores + 1, scores)


def test_the_temperature_is_the_one_the_labels_were_drawn_with():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 4, 40000)
    generated = rng.random(40000) < 1 / (1 + np.exp(-logits / 2.5))
    assert fit_temperature(logits[~generated], logits[generated]) == pytest.approx(2.5, rel=0.04)
    # Fewer images of one class weigh as much as the others.
    assert fit_temperature(logits[~generated], logits[generated][::10]) == pytest.approx(2.5, rel=0.1)


def test_the_temperature_minimises_the_log_loss():
    rng = np.random.default_rng(4)
    reals, generated = rng.normal(-3, 5, 300), rng.normal(2, 5, 200)

    def loss(t):
        smooth = [1 / 302, 1 / 202]
        return sum(
            np.mean((1 - e) * np.logaddexp(0, s * z / t) + e * np.logaddexp(0, -s * z / t))
            for z, s, e in ((reals, 1, smooth[0]), (generated, -1, smooth[1]))
        )

    fitted = fit_temperature(reals, generated)
    grid = np.exp(np.linspace(-3, 4, 2000))
    assert loss(fitted) <= min(map(loss, grid)) + 1e-9
    # Separated classes do not make the scores certain.
    assert 0.05 < fit_temperature(np.full(50, -1.0), np.full(50, 1.0)) < 1


def test_decide():
    c = calibrate(np.random.default_rng(0).normal(-2, 1, 400), fpr=0.05)
    low, high = c.low, c.threshold
    assert 0 < low < high < 1
    assert decide([0, low, low + 2e-6, high, high + 2e-6, 1, math.nan], c) == [
        "real",
        "real",
        "unsure",
        "unsure",
        "generated",
        "generated",
        "",
    ]
    # What is written with six decimals decides as what was computed.
    assert decide([high + 4e-7], c) == decide([high], c)
    assert decide(np.float32([0.5, 0.500001, np.nan])) == ["real", "generated", ""]
    assert decide(0.7) == ["generated"]


def test_a_calibration_in_words():
    c = Calibration(
        threshold=0.7,
        low=0.3,
        temperature=1.25,
        fpr=0.05,
        fpr_upper=0.04,
        fpr_observed=0.03,
        miss_rate=0.1,
        miss_upper=0.09,
        unsure_reals=0.11,
        unsure_generated=0.12,
        tpr_observed=0.8,
        confidence=0.9,
        n_reals=400,
        n_generated=300,
    )
    assert summary(c).splitlines() == [
        "above 0.700000: generated. Of all real images at most 4.00% with 90% confidence "
        "(3.00% of the 400 here)",
        "at or below 0.300000: real. Of all generated images at most 9.00% with 90% confidence (300 here)",
        "between: unsure. 11.0% of the real images here, 12.0% of the generated",
        "80.0% of the generated images here are found; temperature 1.250",
    ]
