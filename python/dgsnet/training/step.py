"""One forward pass of a stage, from images to losses, and what its optimiser is told."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dgs_kernels import OptimizerSurgery
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


class Step(nn.Module):
    """One forward pass of a stage, from images to losses, inside one module as data parallelism needs it.

    Args:
        model: the model; which parameters require a gradient is set here.
        stage: HEAD or BRANCHES.
        surgery: settings of the three branches; None trains the student alone, plain LoRA or a linear probe.
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
    ) -> None:
        super().__init__()
        self.model, self.surgery, self.captioned, self.expert = model, surgery, captioned, expert
        self.enter(stage)

    def enter(self, stage: int) -> None:
        """Go to a stage: what requires a gradient is what it trains."""
        self.stage = stage
        for name, parameter in self.model.named_parameters():
            if "lora_" in name or "image_head" in name:
                parameter.requires_grad_(stage == BRANCHES)
        self.model.head.teacher_head.requires_grad_(stage == HEAD)
        # Without captions the text head has no gradient, and data parallelism must not wait for one.
        self.model.head.text_head.requires_grad_(
            stage == BRANCHES and self.surgery is not None and self.captioned
        )
        if self.expert is not None:
            self.expert.requires_grad_(stage == BRANCHES)

    def forward(
        self,
        pixels: Tensor,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        nuisances: Tensor | None = None,
        frozen: Tensor | None = None,
    ) -> tuple[Tensor | None, ...] | Tensor:
        """The loss to differentiate, TRAIN_COLUMNS as one detached tensor [5], for layer-wise surgery the
        harmful reference loss, and with three branches `drift.moments`; means over the batch. Without labels,
        the logits of the head in training. `frozen` [B, D]: the frozen tower's features, where known.

        An empty batch (all its images damaged, or none for this process in an epoch's last step) counts as a
        black image of no weight, so that this process takes part in what the processes exchange.
        """
        empty = not len(pixels)
        if empty:
            pixels = pixels.new_zeros(1, 3, self.model.image_size, self.model.image_size)
        if labels is None:
            return (self.model.teacher_logits if self.stage == HEAD else self.model.logits)(pixels)
        if not empty:
            return self._losses(pixels, labels, text, nuisances, frozen)
        text = pixels.new_zeros(1, self.model.dim) if self.captioned else None
        nuisances = None if self.expert is None else pixels.new_zeros(1, len(NUISANCES))
        found = self._losses(pixels, labels.new_zeros(1), text, nuisances, None)
        return tuple(None if value is None else value * 0 for value in found)

    def _losses(
        self,
        pixels: Tensor,
        labels: Tensor,
        text: Tensor | None,
        nuisances: Tensor | None,
        frozen: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if self.stage == HEAD or self.surgery is None:
            return self._one_branch(pixels, labels, frozen)
        surgery = self.surgery
        # Before the student, while no activations are kept for backward.
        teacher = self.model.teacher_features(pixels) if frozen is None else frozen
        student = self.model.student_features(pixels)
        options = {k: getattr(surgery, k) for k in ("order", "eps", "reference_batch_size", "distillation")}
        harmful = text_logits = offsets = None
        with torch.autocast(pixels.device.type, enabled=False):  # heads and losses stay in fp32
            student, teacher = _wide(student), _wide(teacher)
            nuisance_loss = student.new_zeros(())
            if self.expert is not None and nuisances is not None:
                logits = self.expert(nuisances)
                nuisance_loss = F.binary_cross_entropy_with_logits(logits, labels)
                offsets = logits.detach()
            expert_logits = offsets
            if surgery.mode == "layer":
                text_loss = None
                if text is not None:
                    text_loss, text_logits, harmful = self._harmful(student, text, labels)
                    expert_logits = _sum(text_logits, offsets)
                # Without text features nothing is projected here; the alignment stays.
                offsets = expert_logits if surgery.text == "both" else offsets
                out = self.model.head(student, teacher, None, labels, offsets=offsets, **options)
                out = out if text_loss is None else out._replace(text_loss=text_loss)
            else:
                out = self.model.head(
                    student, teacher, text, labels, text=surgery.text, offsets=offsets, **options
                )
                expert_logits = _sum(out.text_logits, offsets)
            loss = out.image_loss + out.text_loss + surgery.alignment * out.alignment_loss
            loss = loss + out.distillation_loss + nuisance_loss
            moments = drift.moments(
                (out.distillation_loss, nuisance_loss),
                student,
                teacher,
                out.image_logits,
                expert_logits,
                labels,
            )
        losses = (loss, out.image_loss, out.text_loss, out.alignment_loss)
        return loss, _values(losses, out.image_logits, labels), harmful, moments

    def _harmful(self, student: Tensor, text: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The text loss, its logits as constants, and <student, h> with the constant harmful directions
        h = relu(dL_text/dt).

        The gradient of the latter is every layer's harmful reference: the vector-Jacobian product of the
        features with h. The beneficial one is that of the alignment loss, and needs no pass of its own.
        """
        head = self.model.head.text_head
        logits = head(text).squeeze(-1)
        with torch.no_grad():
            residuals = (torch.sigmoid(logits) - labels) / len(labels)
            directions = torch.relu(residuals[:, None] * head.weight)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        return loss, logits.detach(), (student * directions).sum()

    def _one_branch(
        self, pixels: Tensor, labels: Tensor, frozen: Tensor | None
    ) -> tuple[Tensor, Tensor, None, None]:
        teaching = self.stage == HEAD
        if frozen is not None and (teaching or not self.model.config.lora_rank):
            features = frozen
        else:
            features = (self.model.teacher_features if teaching else self.model.student_features)(pixels)
        head = self.model.head.teacher_head if teaching else self.model.head.image_head
        with torch.autocast(pixels.device.type, enabled=False):
            logits = head(_wide(features)).squeeze(-1)
            loss = F.binary_cross_entropy_with_logits(logits, labels)
        return loss, _values((loss, *loss.new_zeros(3)), logits, labels), None, None


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
    optimizer: torch.optim.Optimizer,
    surgery: SurgeryConfig,
    scaler: torch.amp.GradScaler | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> OptimizerSurgery:
    """Project every adapter's harmful reference out of its gradient before each step.

    Positive parts are taken where signs mean something, at the features, hence the "full" rule here: the
    signs of an adapter's A and B are arbitrary.
    """
    return OptimizerSurgery(
        optimizer,
        eps=surgery.eps,
        rule="full",
        granularity="layer",
        scaler=scaler,
        process_group=process_group,
    )


def _values(losses: tuple[Tensor, ...], logits: Tensor, labels: Tensor) -> Tensor:
    accuracy = ((logits > 0) == (labels > 0.5)).float().mean()
    return torch.stack([*losses, accuracy]).detach()
