"""One forward pass of a stage, from images to losses, and what its optimiser is told."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dgs_kernels import OptimizerSurgery
from dgsnet.config import OptimConfig, SurgeryConfig
from dgsnet.model.dgsnet import DGSNet
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
    """

    def __init__(
        self, model: DGSNet, stage: int, surgery: SurgeryConfig | None, captioned: bool = True
    ) -> None:
        super().__init__()
        self.model, self.surgery, self.captioned = model, surgery, captioned
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

    def forward(
        self, pixels: Tensor, labels: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[Tensor | None, ...] | Tensor:
        """The loss to differentiate, TRAIN_COLUMNS as one detached tensor [5], and for layer-wise surgery the
        harmful reference loss; means over the batch. Without labels, the logits of the head in training.

        An empty batch (all its images damaged, or none for this process in an epoch's last step) counts as a
        black image of no weight, so that this process takes part in what the processes exchange.
        """
        empty = not len(pixels)
        if empty:
            pixels = pixels.new_zeros(1, 3, self.model.image_size, self.model.image_size)
        if labels is None:
            return (self.model.teacher_logits if self.stage == HEAD else self.model.logits)(pixels)
        if not empty:
            return self._losses(pixels, labels, text)
        text = pixels.new_zeros(1, self.model.dim) if self.captioned else None
        found = self._losses(pixels, labels.new_zeros(1), text)
        return tuple(None if value is None else value * 0 for value in found)

    def _losses(
        self, pixels: Tensor, labels: Tensor, text: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.stage == HEAD or self.surgery is None:
            return self._one_branch(pixels, labels)
        teacher = self.model.teacher_features(pixels)  # first, while no activations are kept for backward
        student = self.model.student_features(pixels)
        options = {k: getattr(self.surgery, k) for k in ("order", "eps", "reference_batch_size")}
        harmful = None
        with torch.autocast(pixels.device.type, enabled=False):  # heads and losses stay in fp32
            student, teacher = _wide(student), _wide(teacher)
            if self.surgery.mode == "layer":
                # Without text features nothing is projected here; the alignment stays.
                out = self.model.head(student, teacher, None, labels, **options)
                if text is not None:
                    text_loss, harmful = self._harmful(student, text, labels)
                    out = out._replace(text_loss=text_loss)
            else:
                out = self.model.head(student, teacher, text, labels, **options)
            loss = out.image_loss + out.text_loss + self.surgery.alignment * out.alignment_loss
        losses = (loss, out.image_loss, out.text_loss, out.alignment_loss)
        return loss, _values(losses, out.image_logits, labels), harmful

    def _harmful(self, student: Tensor, text: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The text loss, and <student, h> with the constant harmful directions h = relu(dL_text/dt).

        The gradient of the latter is every layer's harmful reference: the vector-Jacobian product of the
        features with h. The beneficial one is that of the alignment loss, and needs no pass of its own.
        """
        head = self.model.head.text_head
        logits = head(text).squeeze(-1)
        with torch.no_grad():
            residuals = (torch.sigmoid(logits) - labels) / len(labels)
            directions = torch.relu(residuals[:, None] * head.weight)
        return F.binary_cross_entropy_with_logits(logits, labels), (student * directions).sum()

    def _one_branch(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, None]:
        teaching = self.stage == HEAD
        features = (self.model.teacher_features if teaching else self.model.student_features)(pixels)
        head = self.model.head.teacher_head if teaching else self.model.head.image_head
        with torch.autocast(pixels.device.type, enabled=False):
            logits = head(_wide(features)).squeeze(-1)
            loss = F.binary_cross_entropy_with_logits(logits, labels)
        return loss, _values((loss, *loss.new_zeros(3)), logits, labels), None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def named_parameters(model: DGSNet) -> list[tuple[str, nn.Parameter]]:
    """What is trained, with A and B of an adapter named as tensors of the module they adapt: one layer."""
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return [(re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name), p) for name, p in named]


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
