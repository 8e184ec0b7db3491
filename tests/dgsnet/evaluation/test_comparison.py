"""Several detectors on the same images, side by side."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from dgsnet.detection.decisions import calibrate, save_calibration
from dgsnet.errors import UserError
from dgsnet.evaluation.comparison import Comparison, auc_influence, write
from dgsnet.evaluation.evaluate import evaluate_command
from dgsnet.evaluation.results import Evaluation, Score
from scipy.stats import binomtest, norm
from sklearn.metrics import roc_auc_score

from tests.support.tables import read_csv
from tests.support.tiny import CROP, save_tiny


def drawn(rng, generators, shared=False):
    """Labels, scores of two detectors that are alike, and names; real images of all or of each generator."""
    rows = []
    for g in range(generators):
        for label in (0, 1) if g == 0 or not shared else (1,):
            name = "photos" if shared and not label else f"g{g}"
            for _ in range(60):
                common = rng.normal(0.7 * label)
                rows.append((label, name, *(common + 0.5 * rng.normal(size=2)).round(1)))
    return rows


def evaluations(rows):
    return {
        name: Evaluation(
            [Score(f"{i}", row[1], row[0], float(norm.cdf(row[2 + k]))) for i, row in enumerate(rows)]
        )
        for k, name in enumerate(("old", "new"))
    }


def test_influences_are_delongs():
    """Against his definition, by loops over pairs of images."""
    rows = drawn(np.random.default_rng(0), 1)
    labels, scores = np.array([row[0] for row in rows]), np.array([row[2:] for row in rows])
    found = [auc_influence(labels, column) for column in scores.T]
    x, y = scores[labels == 1], scores[labels == 0]
    kernel = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    assert [auc for auc, _ in found] == pytest.approx(kernel.mean(axis=(0, 1)).tolist())
    assert found[0][0] == pytest.approx(roc_auc_score(labels, scores[:, 0]))
    covariance = np.cov(kernel.mean(1).T) / len(x) + np.cov(kernel.mean(0).T) / len(y)
    influences = np.stack([influence for _, influence in found])
    np.testing.assert_allclose(influences @ influences.T, covariance, rtol=1e-12)
    assert math.isnan(auc_influence(labels[labels == 1], scores[labels == 1, 0])[0])


@pytest.mark.parametrize("shared", [False, True])
def test_intervals_of_a_difference_are_as_wide_as_it_varies(shared):
    """Of one AUC and of the mean over generators, whether they share their real images or not."""
    rng = np.random.default_rng(1)
    found = [Comparison(evaluations(drawn(rng, 3, shared))).differences() for _ in range(60)]
    for place, of in enumerate(("mean AUC", "AUC", "AUC", "AUC")):
        of_place = [differences[place] for differences in found]
        assert {d.of for d in of_place} == {of} and {d.test for d in of_place} == {"DeLong"}
        said = np.mean([(d.high - d.low) / (2 * norm.ppf(0.975)) for d in of_place])
        assert said == pytest.approx(np.std([d.value for d in of_place]), rel=0.3)
        assert np.mean([d.p_value < 0.05 for d in of_place]) < 0.2


def test_decisions_are_compared_by_mcnemar_at_each_ones_threshold():
    rows = drawn(np.random.default_rng(2), 1)
    pair = evaluations(rows)
    pair["new"].calibrated_threshold = 0.8
    right = [
        np.array([(s.probability > at) == s.label for s in e.scores])
        for e, at in zip(pair.values(), (0.5, 0.8))
    ]
    compared = Comparison(pair)
    (real,) = [d for d in compared.differences() if d.of == "accuracy, real"]
    labels = np.array([row[0] for row in rows])
    gained, lost = (int((a & ~b)[labels == 0].sum()) for a, b in (right[::-1], right))
    assert real.value == pytest.approx((gained - lost) / 60) and real.low < real.value < real.high
    assert real.p_value == pytest.approx(binomtest(gained, gained + lost).pvalue)
    called = [np.array([s.probability > at for s in e.scores]) for e, at in zip(pair.values(), (0.5, 0.8))]
    found = compared.disagreements()
    assert {score.path for score, _ in found} == {str(i) for i in np.flatnonzero(called[0] != called[1])}
    apart = [abs(each["old"] - each["new"]) for _, each in found]
    assert apart == sorted(apart, reverse=True)


def test_models_are_measured_once_and_set_side_by_side(model, data, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "mine")
    other = save_tiny(tmp_path / "other", CROP, seed=1)
    calibration = calibrate(np.random.default_rng(0).normal(size=99), fpr=0.4)
    save_calibration(other / "best", calibration)
    out = tmp_path / "o"
    evaluate_command(
        [str(data)], [str(tmp_path / "mine"), f"second={other}"], str(out), robustness=["jpeg:20"]
    )
    printed = capsys.readouterr()
    assert "side by side:" in printed.out and "DeLong" in printed.out and "McNemar" in printed.out
    assert printed.err.count("left out") + printed.out.count("left out") == 1
    single = tmp_path / "single"
    evaluate_command([str(data)], str(other), str(single), robustness=["jpeg:20"])
    for name in ("scores.csv", "metrics.json"):
        assert (single / name).read_bytes() == (out / "second" / name).read_bytes()
    document = json.loads((out / "comparison.json").read_text())
    assert list(document["models"]) == ["mine", "second"]
    second = document["models"]["second"]
    assert (second["threshold"], second["calibrated"]) == (calibration.threshold, True)
    metrics = json.loads((single / "metrics.json").read_text())
    assert second["mean"]["auc"] == metrics["mean"]["auc"]
    assert second["robustness"]["jpeg:20"]["auc"] == metrics["robustness"]["jpeg:20"]["mean"]["auc"]
    rows = {name: read_csv(out / name / "scores.csv")[:23] for name in ("mine", "second")}
    calls = [
        [float(row["probability"] or "nan") > at for row in rows[name]]
        for name, at in (("mine", 0.5), ("second", calibration.threshold))
    ]
    unlike = [row["path"] for row, *pair in zip(rows["mine"], *calls) if pair[0] != pair[1]]
    assert sorted(found["path"] for found in document["disagreements"]) == sorted(unlike) and unlike
    page = (out / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "{{" not in page
    assert page.count("<img ") == min(len(unlike), 12)
    sections = (out / "comparison.md").read_text().split("\n## ")
    # What files alone tell is an AUC, and stands beside those.
    beside = [
        text.partition("\n")[0] for text in sections if "| generator | mine | second | files alone |" in text
    ]
    assert len(beside) == 1 and beside[0].startswith("AUC")
    # Nothing is scored anew.
    before = (out / "mine" / "scores.jsonl").read_bytes()
    (data / "alpha/0_real/0.png").write_bytes(b"no picture any more")
    evaluate_command(
        [str(data)], [str(tmp_path / "mine"), f"second={other}"], str(out), robustness=["jpeg:20"]
    )
    assert (out / "mine" / "scores.jsonl").read_bytes() == before


def test_no_name_is_markup(tmp_path):
    generator = "<img src=x>[a](http://b)"
    rows = [(label, generator, *scores) for label, _, *scores in drawn(np.random.default_rng(3), 1)]
    write(tmp_path, Comparison(dict(zip(("<img src=y>", "[c](http://d)"), evaluations(rows).values()))))
    text, page = ((tmp_path / name).read_text() for name in ("comparison.md", "report.html"))
    assert "<img src" not in text + page and "&lt;img src=x" in text and "&lt;img src=y" in page
    assert not re.search(r"[^\\\\]\]\(http", text) and r"\[c\](http://d)" in text


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        (["a/run", "b/run"], "two models are called 'run'; tell them apart as NAME=b/run"),
        (["a", "..=b"], r"'\.\.' cannot be the name of a folder"),
        (["a", "x/y=b"], "cannot be the name of a folder"),
        (["a", "=b"], "'' cannot be the name of a folder"),
    ],
)
def test_names_of_models_are_names_of_folders(models, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        evaluate_command([str(tmp_path)], models, str(tmp_path / "o"))
    assert not (tmp_path / "o").exists()
