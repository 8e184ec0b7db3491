"""The frozen backbone beside the fine-tuned model: whose column is whose, and where there is none."""

from dataclasses import replace

import pytest
from dgsnet.detection.decisions import calibrate
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.evaluation import baseline
from dgsnet.evaluation.baseline import frozen_detector
from dgsnet.evaluation.results import Evaluation, Score


def scores(above):
    """Two generators; so many of either's four generated images are above all real ones and the threshold."""
    return [
        Score(f"{generator}{label}{i}", generator, label, 0.9 if label and i < count else 0.3 - 0.2 * label)
        for generator, count in zip(("b", "a"), above)
        for label in (0, 1)
        for i in range(3 + label)
    ]


def test_the_tuned_and_the_frozen_stand_in_pairs():
    assert baseline.rows(Evaluation(scores((4, 3)))) == []
    rows = baseline.rows(Evaluation(scores((4, 3)), frozen=Evaluation(scores((2, 1)))))
    titles = ("accuracy", "AUC", "TPR@1%", "TPR@5%")
    assert rows[0] == ["generator", *(f"{t}{which}" for t in titles for which in ("", ", frozen"))]
    assert [row[0] for row in rows[1:]] == ["a", "b", "mean"]
    values = [[cell.split(" ")[0] for cell in row[1:]] for row in rows[1:]]
    assert values == [
        ["85.7", "57.1", "75.0", "25.0", "75.0", "25.0", "75.0", "25.0"],
        ["100.0", "71.4", "100.0", "50.0", "100.0", "50.0", "100.0", "50.0"],
        ["92.9", "64.3", "87.5", "37.5", "87.5", "37.5", "87.5", "37.5"],
    ]


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("model", {"lora_rank": 0}, "model.lora_rank=0"),
        ("surgery", {"mode": "none"}, "surgery.mode=none"),
        ("optim", {"head_epochs": 0}, "optim.head_epochs=0"),
    ],
)
def test_a_model_without_stage_1_has_none(model, part, change, named):
    detector = Detector.load(model, "cpu")
    detector.config = replace(detector.config, **{part: replace(getattr(detector.config, part), **change)})
    with pytest.raises(UserError, match=f"this model was trained with {named}: "):
        frozen_detector(detector)


def test_it_keeps_the_views_and_has_no_calibration(model):
    detector = Detector.load(model, "cpu", views=3)
    detector.calibration = calibrate(range(-200, 0), fpr=0.05)
    frozen = frozen_detector(detector)
    assert (frozen.views, frozen.calibration) == (3, None) and detector.calibration is not None
