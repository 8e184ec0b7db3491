"""What the demo measures: ranking, ranking where the shortcut misleads, and what is left of CLIP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dgsnet import builtin
from dgsnet.config import Config
from dgsnet.data.images import read_image
from dgsnet.data.items import Item, find_samples
from dgsnet.data.preprocess import Preprocessor
from dgsnet.evaluation.results import Evaluation, Score
from dgsnet.model.dgsnet import DGSNet
from dgsnet.training.drift import cka

BATCH = 256
# Crops of the training photographs that no run trains on: their seed is no run's.
CROPS, CROPS_SEED = 480, 10**6


@dataclass
class Exam:
    """What detectors are measured with, decoded and encoded once.

    Attributes:
        pixels: inputs [K, 3, S, S] that are crops of theirs, one image after the other.
        counts: crops of each sample.
        frozen: features [K, D] of the inputs in the frozen tower.
        crops: inputs [M, 3, S, S] of real crops of photographs that the tiny CLIP knows.
        contents: [M], what each shows, as a row of `names`.
        names: [C, D], the frozen text tower's unit feature of every content.
    """

    samples: list[Item]
    pixels: Tensor
    counts: list[int]
    frozen: Tensor
    crops: Tensor
    contents: Tensor
    names: Tensor


@dataclass
class Measures:
    """What was measured of a detector.

    Attributes:
        conflicting: mean over decoders of the AUC on `conflicting` images.
        zero_shot: share of crops whose content is the nearest of all contents' captions.
        cka: linear centred kernel alignment of its features with the frozen ones, crop by crop.
    """

    evaluation: Evaluation
    conflicting: float
    zero_shot: float
    cka: float


@torch.inference_mode()
def prepare(data: Path, split: str, config: Config) -> Exam:
    """The exam on a split of a dataset below `data`, for models of this configuration."""
    preprocess = Preprocessor(config.preprocess)
    samples = find_samples(data / split)
    model = DGSNet(replace(config.model, lora_rank=0)).eval()
    files = builtin.make_files("train", "nearest", 0, CROPS, seed=CROPS_SEED, compressed=0.5)
    images, captions = zip(*files)
    qualities, contents = zip(*(caption.split(" photo of ") for caption in captions))
    names, words = sorted(set(contents)), sorted(set(qualities))
    texts = model.text_features([f"{quality} photo of {name}" for name in names for quality in words])
    parts = [preprocess.crops(read_image(sample.path)) for sample in samples]
    pixels = torch.cat(parts)
    return Exam(
        samples,
        pixels,
        counts=[len(part) for part in parts],
        frozen=_features(model, pixels),
        crops=torch.stack([preprocess(read_image(image)) for image in images]),
        contents=torch.tensor([names.index(content) for content in contents]),
        names=F.normalize(F.normalize(texts, dim=1).unflatten(0, (len(names), -1)).mean(dim=1), dim=1),
    )


@torch.inference_mode()
def measure(model: DGSNet, exam: Exam) -> Measures:
    """Measure a detector, on the CPU, in evaluation mode."""
    # It is faster, and detectors score with it.
    merged = model.merged(torch.float32)
    features = _features(merged, exam.pixels) if model.config.lora_rank else exam.frozen
    logits = model.head.image_head(features).squeeze(1).double()
    scores = [
        Score(sample.path, sample.generator, int(sample.label == 1), of_crops.mean().sigmoid().item())
        for sample, of_crops in zip(exam.samples, logits.split(exam.counts))
    ]
    return Measures(
        Evaluation(scores),
        conflicting=Evaluation([score for score in scores if conflicting(score)]).mean()["auc"],
        zero_shot=zero_shot(_features(merged, exam.crops), exam),
        cka=cka(features, exam.frozen),
    )


def conflicting(score: Score) -> bool:
    """Whether an image contradicts the shortcut of task "jpeg": a generated JPEG file, or a real PNG file."""
    return score.path.endswith(".jpg") == (score.label == 1)


def zero_shot(features: Tensor, exam: Exam) -> float:
    """Share of the crops, given their features [M, D], whose content is that of the nearest text."""
    found = (features @ exam.names.T).argmax(dim=1)
    return (found == exam.contents).double().mean().item()


def _features(model: DGSNet, pixels: Tensor) -> Tensor:
    return torch.cat([model.student_features(part) for part in pixels.split(BATCH)])
