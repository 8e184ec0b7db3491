"""One forward pass of a stage, from images to losses, and what its optimiser trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgs_kernels import OptimizerSurgery, SurgeryHeadOutput
from dgsnet.config import OptimConfig, SurgeryConfig
from dgsnet.data.nuisances import NUISANCES
from dgsnet.model.dgsnet import DGSNet
from dgsnet.training import drift
from dgsnet.training.experts import LEARNING_RATE, FileExpert
from dgsnet.training.plan import BRANCHES, HEAD

TRAIN_COLUMNS = ("loss", "image_loss", "text_loss", "alignment_loss", "accuracy")


def speed_up(model: DGSNet, optim: OptimConfig) -> DGSNet:
    """Make the model as the settings of precision, memory and compilation say."""
    if optim.precision == "bf16":
        model.set_base_dtype(torch.bfloat16)
    model.set_grad_checkpointing(optim.checkpointing)
    if optim.compile != "no":
        model.compile_blocks(optim.compile)
    return model


class Batch(NamedTuple):
    """What a step is given.

    Attributes:
        pixels: normalised images [B, 3, S, S].
        labels: [B], 0 or 1.
        text: features [B, D], if the step is captioned.
        nuisances: [B, len(NUISANCES)], if there is an expert on files.
        frozen: features [B, D] of the frozen tower, where they are known.
    """

    pixels: Tensor
    labels: Tensor
    text: Tensor | None = None
    nuisances: Tensor | None = None
    frozen: Tensor | None = None


class Found(NamedTuple):
    """What a step finds; all are means over the batch.

    Attributes:
        values: TRAIN_COLUMNS, detached [5].
        harmful: reference loss of layer-wise surgery, where there are captions.
        moments: `drift.moments`, of three branches.
    """

    loss: Tensor
    values: Tensor
    harmful: Tensor | None = None
    moments: Tensor | None = None


# What the head finds, the experts' logits as constants, and the harmful reference loss.
Branches = tuple[SurgeryHeadOutput, Tensor | None, Tensor | None]


class Step(nn.Module):
    """One forward pass of a stage, from images to losses, inside one module as data parallelism needs it.

    Args:
        model: which of its parameters require a gradient is set here.
        stage: HEAD or BRANCHES.
        surgery: settings of the three branches; None trains the student alone, plain LoRA or a linear probe.
        smoothing: `optim.label_smoothing`.
        captioned: whether there are text features.
        expert: the expert on files; it is trained in stage BRANCHES.
    """

    def __init__(
        self,
        model: DGSNet,
        stage: int,
        surgery: SurgeryConfig | None,
        captioned: bool = True,
        expert: FileExpert | None = None,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.model, self.expert = model, expert
        self.surgery = surgery or SurgeryConfig(mode="none")
        self.captioned = captioned and self.surgery.mode != "none"
        self.enter(stage)

    def enter(self, stage: int) -> None:
        """Go to a stage: what requires a gradient is what it trains."""
        self.stage = stage
        for name, parameter in self.model.named_parameters():
            if "lora_" in name or "image_head" in name:
                parameter.requires_grad_(stage == BRANCHES)
        self.model.head.teacher_head.requires_grad_(stage == HEAD)
        # Without captions the text head has no gradient, and data parallelism must not wait for one.
        self.model.head.text_head.requires_grad_(stage == BRANCHES and self.captioned)
        if self.expert is not None:
            self.expert.requires_grad_(stage == BRANCHES)

    def forward(
        self,
        pixels: Tensor,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        nuisances: Tensor | None = None,
        frozen: Tensor | None = None,
    ) -> Found | Tensor:
        """The losses of a `Batch`, given in its parts; of pixels alone, logits [B] of the head that trains.

        An empty batch (all its images damaged, or none for this process in an epoch's last step) counts as a
        black image of no weight, so that this process takes part in what the processes exchange.
        """
        empty = not len(pixels)
        if empty:
            pixels = pixels.new_zeros(1, 3, self.model.image_size, self.model.image_size)
        if labels is None:
            return (self.model.teacher_logits if self.stage == HEAD else self.model.logits)(pixels)
        if empty:
            labels, frozen = labels.new_zeros(1), None
            text = pixels.new_zeros(1, self.model.dim) if self.captioned else None
            nuisances = None if self.expert is None else pixels.new_zeros(1, len(NUISANCES))
        labels = labels + self.smoothing * (0.5 - labels)
        trained = "head" if self.stage == HEAD else self.surgery.mode
        found = LOSSES[trained](self, Batch(pixels, labels, text, nuisances, frozen))
        return Found._make(x if x is None else x * 0 for x in found) if empty else found

    def _teacher_alone(self, batch: Batch) -> Found:
        features = self.model.teacher_features(batch.pixels) if batch.frozen is None else batch.frozen
        return _one_branch(self.model.head.teacher_head, features, batch.labels)

    def _student_alone(self, batch: Batch) -> Found:
        features = batch.frozen
        # Without adapters the student is the frozen tower.
        if features is None or self.model.config.lora_rank:
            features = self.model.student_features(batch.pixels)
        return _one_branch(self.model.head.image_head, features, batch.labels)

    def _branches(self, batch: Batch, by: Callable[..., Branches]) -> Found:
        """The three branches and, if there is one, the expert on files; `by` runs the head."""
        # The teacher comes first, while no activations are kept for backward.
        teacher = self.model.teacher_features(batch.pixels) if batch.frozen is None else batch.frozen
        student = self.model.student_features(batch.pixels)
        # Heads and losses stay in fp32.
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = _wide(student), _wide(teacher)
            nuisance_loss, offsets = student.new_zeros(()), None
            if self.expert is not None and batch.nuisances is not None:
                logits = self.expert(batch.nuisances)
                nuisance_loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
                offsets = logits.detach()
            out, experts, harmful = by(student, teacher, batch, offsets)
            loss = out.image_loss + out.text_loss + self.surgery.alignment * out.alignment_loss
            loss = loss + out.distillation_loss + nuisance_loss
            losses = (loss, out.image_loss, out.text_loss, out.alignment_loss)
            extra = (out.distillation_loss, nuisance_loss)
            moments = drift.moments(extra, student, teacher, out.image_logits, experts, batch.labels)
        return Found(loss, _values(losses, out.image_logits, batch.labels), harmful, moments)

    def _by_feature(self, student: Tensor, teacher: Tensor, batch: Batch, offsets: Tensor | None) -> Branches:
        """The head itself projects the gradient of the features."""
        options = self._options() | {"text": self.surgery.text, "offsets": offsets}
        out = self.model.head(student, teacher, batch.text, batch.labels, **options)
        return out, _sum(out.text_logits, offsets), None

    def _by_layer(self, student: Tensor, teacher: Tensor, batch: Batch, offsets: Tensor | None) -> Branches:
        """The optimiser's hook projects the gradient of every layer; the head aligns.

        The gradient of <student, h>, with the constant harmful directions h = relu(dL_text/dt), is every
        layer's harmful reference: the vector-Jacobian product of the features with h. The beneficial one is
        that of the alignment loss, and needs no pass of its own.
        """
        head, text_head, labels = self.model.head, self.model.head.text_head, batch.labels
        experts, harmful, text_loss = offsets, None, student.new_zeros(())
        if batch.text is not None:
            logits = text_head(batch.text).squeeze(-1)
            text_loss = F.binary_cross_entropy_with_logits(logits, labels)
            with torch.no_grad():
                residuals = (torch.sigmoid(logits) - labels) / len(labels)
                directions = torch.relu(residuals[:, None] * text_head.weight)
            harmful = (student * directions).sum()
            experts = _sum(logits.detach(), offsets)
        added = experts if self.surgery.text == "both" else offsets
        out = head(student, teacher, None, labels, offsets=added, **self._options())
        return out._replace(text_loss=text_loss), experts, harmful

    def _options(self) -> dict[str, Any]:
        return {k: getattr(self.surgery, k) for k in ("order", "eps", "reference_batch_size", "distillation")}


# What a step computes: in stage HEAD, and in stage BRANCHES by mode of surgery.
LOSSES: dict[str, Callable[[Step, Batch], Found]] = {
    "head": Step._teacher_alone,
    "none": Step._student_alone,
    "feature": lambda step, batch: step._branches(batch, step._by_feature),
    "layer": lambda step, batch: step._branches(batch, step._by_layer),
}


def _one_branch(head: nn.Linear, features: Tensor, labels: Tensor) -> Found:
    with torch.autocast(features.device.type, enabled=False):
        logits = head(_wide(features)).squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
    return Found(loss, _values((loss, *loss.new_zeros(3)), logits, labels))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def named_parameters(model: DGSNet) -> list[tuple[str, nn.Parameter]]:
    """What is trained, with A and B of an adapter named as tensors of the module they adapt: one layer."""
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return [(re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name), p) for name, p in named]


def parameter_groups(model: DGSNet, expert: FileExpert | None) -> list[dict[str, Any]]:
    """What the optimiser is given: what is trained in the model, and the expert at its own rate."""
    groups: list[dict[str, Any]] = [{"params": named_parameters(model)}]
    if expert is not None and expert.linear.weight.requires_grad:
        named = [(f"expert.{name}", p) for name, p in expert.named_parameters()]
        groups.append({"params": named, "lr": LEARNING_RATE})
    return groups


def layer_surgery(
    optimizer: torch.optim.Optimizer, surgery: SurgeryConfig, **processes: Any
) -> OptimizerSurgery:
    """Project every adapter's harmful reference out of its gradient before each step.

    The rule is "full": the signs of an adapter's A and B are arbitrary, so that a positive part of their
    gradients means nothing. Positive parts are taken of the features' directions. `processes`: the hook's
    `scaler` and `process_group`.
    """
    return OptimizerSurgery(optimizer, eps=surgery.eps, rule="full", granularity="layer", **processes)


def _values(losses: tuple[Tensor, ...], logits: Tensor, labels: Tensor) -> Tensor:
    accuracy = ((logits > 0) == (labels > 0.5)).float().mean()
    return torch.stack([*losses, accuracy]).detach()
