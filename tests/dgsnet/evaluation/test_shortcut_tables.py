"""How the reports tell of a detector that follows the files."""

import math

import numpy as np
import pytest
from dgsnet.data.nuisances import NUISANCES
from dgsnet.evaluation import shortcut_tables
from dgsnet.evaluation.report import document, markdown, verdict
from dgsnet.evaluation.results import Evaluation, Score, text_table

from tests.dgsnet.evaluation.test_shortcuts import JPEG, images, probability


def evaluation(nuisances=True):
    """Two generators, a detector that follows the files, and distorted scores."""
    scores, rows = [], []
    for generator, share in (("biased", 0.8), ("balanced", 0.5)):
        found, labels, rng = images(100, share)
        values = probability(1 - 2 * found[:, JPEG] + labels + rng.normal(0, 0.5, 200))
        for i, (label, value) in enumerate(zip(labels, values)):
            scores.append(Score(f"{generator}/{i}", generator, int(label), float(value)))
        rows.append(found)
    scores.append(Score("biased/bad", "biased", 1, math.nan, "cannot be read"))
    scores += [Score(s.path, s.generator, s.label, 0.5, "", "", "jpeg:50") for s in scores]
    rows.append(np.full((1, len(NUISANCES)), np.nan))
    return Evaluation(scores, nuisances=np.concatenate(rows) if nuisances else None)


def test_reports_tell_of_it():
    result = evaluation()
    saved = document(result)
    biased = saved["generators"]["biased"]["shortcut"]
    assert biased["conflict_auc"] < biased["agree_auc"] and biased["worst_group"].endswith("conflict")
    assert biased["intervals"]["conflict_auc"][0] <= biased["conflict_auc"]
    both = [saved["generators"][name]["shortcut"] for name in ("biased", "balanced")]
    assert saved["mean"]["shortcut"]["agree_auc"] == pytest.approx(np.mean([g["agree_auc"] for g in both]))
    assert saved["mean"]["shortcut"]["n_agree"] == sum(g["n_agree"] for g in both)
    assert "shortcut" not in saved["robustness"]["jpeg:50"]["mean"]
    (sentence,) = (s for s in verdict(result) if "Files alone" in s)
    conflict, agree = (f"{100 * biased[f'{part}_auc']:.1f}" for part in ("conflict", "agree"))
    assert f"that conflict and that agree: biased (AUC {conflict} and {agree})." in sentence
    assert "## Beside what the files alone say" in markdown(result)
    lines = text_table(shortcut_tables.rows(result, detailed=False)).splitlines()
    assert [line.split()[0] for line in lines] == ["generator", lines[1], "balanced", "biased", "mean"]
    assert lines[3].endswith(f"{biased['n_conflict']:.0f} of 200")


def test_evaluations_without_files_are_as_before():
    result = evaluation(nuisances=False)
    assert result.shortcuts == {} and shortcut_tables.rows(result) == []
    assert "shortcut" not in document(result)["mean"] and "Beside" not in markdown(result)
