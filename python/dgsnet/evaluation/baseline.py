"""The frozen backbone with the linear head that stage 1 trained on it, beside the fine-tuned model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dgsnet.errors import UserError
from dgsnet.evaluation.results import Evaluation

if TYPE_CHECKING:
    from dgsnet.detection.detector import Detector

# Its name among an evaluation's variants, in the table of logits.
FROZEN = "frozen backbone"
MEASURES = {"accuracy": "accuracy", "auc": "AUC", "tpr_at_1": "TPR@1%", "tpr_at_5": "TPR@5%"}


def frozen_detector(detector: Detector) -> Detector:
    """The same detector without adapters, with the head of stage 1 and without a calibration.

    Raises:
        UserError: the model was trained without stage 1.
    """
    import torch

    from dgsnet.detection.detector import Detector
    from dgsnet.model.onnx_network import OnnxNetwork

    if isinstance(detector.model, OnnxNetwork):
        raise UserError("--frozen needs the model folder: an .onnx holds no backbone without adapters")
    config = detector.config
    for name, lacking in (
        ("model.lora_rank=0", not config.model.lora_rank),
        ("surgery.mode=none", config.surgery.mode == "none"),
        ("optim.head_epochs=0", not config.optim.head_epochs),
    ):
        if lacking:
            raise UserError(
                "--frozen needs the linear head that stage 1 trains on the frozen backbone, and this model "
                f"was trained with {name}: train one with model.lora_rank=0, and evaluate it by itself"
            )

    frozen = detector.model.merged(torch.float32, teacher=True)
    names = ("batch", "precision", "crops")
    how: dict[str, Any] = {name: getattr(detector, name) for name in names}
    beside = Detector(frozen, config, None, detector.views, **how)
    beside.again = detector.again and partial(_frozen_again, detector.again)
    return beside


def _frozen_again(again: Callable[[], Detector]) -> Detector:
    return frozen_detector(again())


def caption(_: Evaluation) -> str:
    """What the table shows."""
    return (
        "The image tower without adapters and the linear head that stage 1 of training fitted to it, on the "
        "same images, uncalibrated: what fine-tuning added, or took."
    )


def rows(evaluation: Evaluation) -> list[list[str]]:
    """Rows of generator and either's measures with intervals, the mean last, under a head; [] for none."""
    if evaluation.frozen is None:
        return []
    head = [f"{title}{which}" for title in MEASURES.values() for which in ("", ", frozen")]
    pairs = [
        *zip(evaluation.of(), evaluation.frozen.of()),
        (evaluation.mean_of(), evaluation.frozen.mean_of()),
    ]
    return [["generator", *head]] + [
        [evaluation.title(tuned), *(r.bounded(key) for key in MEASURES for r in (tuned, frozen))]
        for tuned, frozen in pairs
    ]
