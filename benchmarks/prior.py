"""What training leaves of CLIP's prior, step by step: plain LoRA, the surgery with two rules, experts.

The built-in tiny CLIP learns the balanced built-in training images (docs/builtin.md) with the demo's settings
and one draw of crops, at two learning rates, without and with the official dropout. It is measured on real
crops that it is not trained on, of photographs that it knows: zero-shot accuracy of their content, linear CKA
of its features with the frozen ones, and drift, how far the mean feature has moved from the frozen one, over
the latter's norm.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from dgsnet import builtin
from dgsnet.config import Config, SurgeryConfig
from dgsnet.data.captions import attach_captions
from dgsnet.data.items import find_samples
from dgsnet.data.loading import ImageDataset, collate
from dgsnet.data.preprocess import Preprocessor
from dgsnet.demo.measure import Exam, prepare, zero_shot
from dgsnet.model.dgsnet import DGSNet
from dgsnet.processes import usable_cores
from dgsnet.training.drift import cka
from dgsnet.training.plan import BRANCHES, HEAD
from dgsnet.training.step import Step, parameter_groups
from torch import Tensor

from dgs_kernels import gradient_surgery

# Seeds of a learning rate and dropout; the demo's own has more, as runs differ much there.
SEEDS, DEMO_SEEDS = range(2), range(6)
RATES, DROPOUTS = (4e-3, 1e-4), (0.0, 0.8)
# The batch, and the steps at which a run is measured.
BATCH, STEPS = 16, (0, 20, 60)
# How the teacher's head is trained, on frozen features.
HEAD_STEPS, HEAD_RATE = 100, 4e-3
DISTILLATION = 0.3
METHODS = ("LoRA", "project, positive", "project, full", "expert", "expert, distillation")


class Images:
    """Training images in memory: pixels, labels, and what the frozen towers say of them."""

    def __init__(self, config: Config) -> None:
        root = config.data.train[0]
        samples = attach_captions(find_samples(root), "auto", root)
        dataset = ImageDataset(samples, Preprocessor(config.preprocess), train=True)
        batch = collate([dataset[i] for i in range(len(samples))])
        model = DGSNet(replace(config.model, lora_rank=0))
        self.pixels, self.labels = batch["pixels"], batch["labels"]
        self.frozen = torch.cat([model.teacher_features(part) for part in self.pixels.split(256)])
        self.text = model.text_features(batch["captions"])

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Pixels, labels, text and frozen features of one random batch after another, for ever."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for index in torch.randperm(len(self.labels), generator=generator).split(BATCH):
                yield self.pixels[index], self.labels[index], self.text[index], self.frozen[index]


def surgery_of(method: str, surgery: SurgeryConfig) -> SurgeryConfig:
    """Settings of `dgsnet train` for a method; the rule is no setting, see `ruled_loss`."""
    if method == "LoRA":
        return replace(surgery, mode="none")
    if method.startswith("expert"):
        return replace(surgery, text="expert", distillation=DISTILLATION * method.endswith("distillation"))
    return surgery


def ruled_loss(
    model: DGSNet,
    surgery: SurgeryConfig,
    rule: str,
    pixels: Tensor,
    labels: Tensor,
    text: Tensor,
    frozen: Tensor,
) -> Tensor:
    """The loss of the three branches with any rule of `gradient_surgery`, whose `positive` is the paper's."""
    head, scale = model.head, surgery.reference_batch_size or len(labels)
    text_logits, teacher_logits = head.text_head(text).squeeze(1), head.teacher_head(frozen).squeeze(1)
    with torch.no_grad():
        harmful = (text_logits.sigmoid() - labels)[:, None] / scale * head.text_head.weight
        beneficial = (teacher_logits.sigmoid() - labels)[:, None] / scale * head.teacher_head.weight
    features, alignment = gradient_surgery(
        model.student_features(pixels), harmful, beneficial, eps=surgery.eps, order=surgery.order, rule=rule
    )
    logits = head.image_head(features).squeeze(1)
    losses = (F.binary_cross_entropy_with_logits(z, labels) for z in (logits, text_logits))
    return sum(losses, surgery.alignment * alignment)


def train_head(step: Step, images: Images, seed: int) -> None:
    """Stage 1, the teacher's head."""
    optimizer = torch.optim.Adam(parameter_groups(step.model, None), lr=HEAD_RATE)
    for batch in itertools.islice(images.batches(seed), HEAD_STEPS):
        step(*batch[:3], None, batch[3])[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def run(method: str, config: Config, images: Images, exam: Exam) -> dict:
    """Train once, measuring at STEPS."""
    torch.manual_seed(config.seed)
    model, surgery = DGSNet(config.model, with_text=False), surgery_of(method, config.surgery)
    frozen = model.teacher_features(exam.crops)
    step = Step(model, HEAD, surgery)
    train_head(step, images, config.seed)
    step.enter(BRANCHES)
    optimizer = torch.optim.Adam(parameter_groups(model, None), lr=config.optim.lr)
    found = [measured(model, exam, frozen)]
    for number, batch in enumerate(itertools.islice(images.batches(config.seed), STEPS[-1]), 1):
        if method == "project, full":
            loss = ruled_loss(model, surgery, "full", *batch)
        else:
            loss = step(*batch[:3], None, batch[3])[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number in STEPS:
            found.append(measured(model, exam, frozen))
    return {key: [row[key] for row in found] for key in found[0]}


@torch.no_grad()
def measured(model: DGSNet, exam: Exam, frozen: Tensor) -> dict[str, float]:
    model.eval()
    features = model.student_features(exam.crops)
    model.train()
    drift = (features - frozen).mean(dim=0).norm() / frozen.mean(dim=0).norm()
    return {
        "zero_shot": zero_shot(features, exam),
        "cka": cka(features, frozen),
        "drift": drift.item(),
    }


@cache
def materials(data: Path) -> tuple[Config, Images, Exam]:
    """The demo's configuration, and what all runs of a process train on and are measured with."""
    torch.set_num_threads(1)
    config = builtin.demo_config(data)
    return config, Images(config), prepare(data, "val", config)


def row(data: Path, seed: int, rate: float, dropout: float, method: str) -> dict:
    config, images, exam = materials(data)
    config = replace(
        config,
        seed=seed,
        optim=replace(config.optim, lr=rate),
        model=replace(config.model, lora_dropout=dropout),
    )
    setting = {"method": method, "lr": rate, "dropout": dropout, "seed": seed, "steps": STEPS}
    return {"benchmark": "prior", "device": "cpu"} | setting | run(method, config, images, exam)


def results(arguments: argparse.Namespace) -> list[dict]:
    """A row for each run; as many at a time as there are cores, of one thread each."""
    found = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(usable_cores(), context) as pool:
        data = builtin.write_dataset(folder, splits=("train", "val"), compressed=(0.5, 0.5))
        jobs = [
            (data, seed, rate, dropout, method)
            for rate, dropout in itertools.product(RATES, DROPOUTS)
            for seed in (DEMO_SEEDS if (rate, dropout) == (RATES[0], DROPOUTS[0]) else SEEDS)
            for method in METHODS
        ]
        for made in pool.map(row, *zip(*jobs)):
            found.append(made)
            name = "{method}, lr {lr:g}, dropout {dropout:g}, seed {seed}".format(**made)
            last = ", ".join(f"{key} {made[key][-1]:.3f}" for key in ("zero_shot", "cka", "drift"))
            print(f"{name}: {last}", flush=True)
    return found
