"""A small training problem, with each of the hooks and by plain formulas in one process.

Shared by the tests of loops in this process and in several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from dgs_kernels import ObjectiveSurgery, OptimizerSurgery, SurgeryAdamW, gradient_surgery, reference

HOOKS = ("features", "parameters", "SurgeryAdamW", "objectives")
SURGERY = {"parameters": OptimizerSurgery, "objectives": ObjectiveSurgery}
STEPS, ROWS = 3, 8
# What transformers' Trainer is told, so that it adds nothing to the loop's formulas.
TRAINER: dict[str, Any] = {
    "use_cpu": True,
    "max_steps": STEPS,
    "per_device_train_batch_size": 1,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
ALIGNMENT = 0.3
# Gradients are clipped to this norm.
MAX_NORM = 0.05
# A large eps: steps are then in proportion to gradients, so that an error in one cannot hide, nor grow.
ADAMW = {"lr": 0.5, "eps": 0.5, "weight_decay": 0.1}


hooks = pytest.mark.parametrize("kind", HOOKS)
on_parameters = pytest.mark.parametrize("kind", HOOKS[1:])


class Net(nn.Module):
    """Returns predictions [n, 1], and the alignment loss where feature surgery is asked for.

    Seven parameters in four layers: three gradients, of task and references, cannot be taken for either.
    """

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.LayerNorm(5)
        )
        self.head = nn.Linear(5, 1)
        self.to(dtype)

    def forward(self, x, harmful=None, beneficial=None):
        features = self.backbone(x)
        if harmful is None:
            return self.head(features), features.new_zeros(())
        features, alignment_loss = gradient_surgery(features, harmful, beneficial)
        return self.head(features), alignment_loss


@dataclass
class Batch:
    """n rows: inputs and targets of the task, inputs of the reference losses, directions for features."""

    x: torch.Tensor
    y: torch.Tensor
    x_harmful: torch.Tensor
    x_beneficial: torch.Tensor
    harmful: torch.Tensor
    beneficial: torch.Tensor

    def part(self, i: int, parts: int) -> Batch:
        return Batch(*(t.chunk(parts)[i] for t in vars(self).values()))

    def to(self, dtype) -> Batch:
        return Batch(*(t.to(dtype) for t in vars(self).values()))


def batch(step: int, dtype=torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    sizes = (9, 1, 9, 9, 5, 5)
    drawn = Batch(*(torch.randn(ROWS, n, generator=generator, dtype=torch.float64) for n in sizes))
    return drawn.to(dtype)


def task_loss(prediction, b: Batch):
    return (prediction.float() if prediction.dtype.itemsize < 4 else prediction).sub(b.y).square().mean()


def reference_loss(prediction):
    return prediction.sin().mean()


def every_product(gramian):
    """Weights that depend on all inner products, on their scale, and smoothly: rounding stays small."""
    return 1 / (1 + gramian.diagonal()) + 0.3 * gramian.sum(1).tanh()


def adamw(params, **options):
    return torch.optim.AdamW(params, **ADAMW, **options)


class Hook:
    """One of the ways to operate, behind what a loop calls: the backward of a batch, the optimiser."""

    def __init__(self, kind: str, model: nn.Module, /, make=adamw, **options):
        self.kind = kind
        if kind == "SurgeryAdamW":
            self.optimizer = SurgeryAdamW(model.parameters(), **ADAMW, alignment=ALIGNMENT, **options)
            self.surgery = self.optimizer
        else:
            self.optimizer = make(model.parameters())
            if kind == "parameters":
                self.surgery = OptimizerSurgery(self.optimizer, alignment=ALIGNMENT, **options)
            elif kind == "objectives":
                options = {"weighting": every_product, "granularity": "tensor", **options}
                self.surgery = ObjectiveSurgery(self.optimizer, **options)

    def contexts(self) -> list:
        """Where the backward of each reference loss runs."""
        if self.kind == "objectives":
            return [partial(self.surgery.objective, name) for name in ("harmful", "beneficial")]
        return [self.surgery.harmful, self.surgery.beneficial]

    def references(self, model, b: Batch, backward=torch.Tensor.backward, weight=1.0) -> None:
        if self.kind != "features":
            for context, x in zip(self.contexts(), (b.x_harmful, b.x_beneficial)):
                with context():
                    backward(reference_loss(model(x)[0]) * weight)

    def loss(self, model, b: Batch):
        directions = (b.harmful, b.beneficial) if self.kind == "features" else ()
        prediction, alignment_loss = model(b.x, *directions)
        return task_loss(prediction, b) + ALIGNMENT * alignment_loss

    def capture(self, model, b: Batch, backward=torch.Tensor.backward, weight=1.0) -> None:
        """Every loss as an objective, the task's too."""
        with self.surgery.objective("task"):
            backward(self.loss(model, b) * weight)
        self.references(model, b, backward, weight)

    def backward(self, model, b: Batch, backward=torch.Tensor.backward, weight=1.0) -> None:
        self.references(model, b, backward, weight)
        backward(self.loss(model, b) * weight)


def plain(
    kind: str,
    *,
    dtype=torch.float64,
    clip: str | None = None,
    layers: Sequence[int] = range(7),
    make=adamw,
) -> list:
    """Weights after STEPS steps, computed without hooks, processes or micro-batches: every gradient by
    `autograd.grad`, every surgery by the reference formulas. Clipping "before" or "after" the surgery;
    `layers` numbers the layer of each of Net's parameters.
    """
    model = Net(dtype)
    params = list(model.parameters())
    optimizer = make(params)
    for step in range(STEPS):
        b = batch(step, dtype)
        if kind == "features":
            features = model.backbone(b.x)
            loss = task_loss(model.head(features), b)
            cotangent, *head = torch.autograd.grad(
                loss, [features, *model.head.parameters()], retain_graph=True
            )
            edited = reference.project_align(cotangent, b.harmful, b.beneficial, alignment=ALIGNMENT / ROWS)
            grads = [*torch.autograd.grad(features, list(model.backbone.parameters()), edited), *head]
        else:
            grads, harmful, beneficial = (
                list(torch.autograd.grad(loss, params))
                for loss in (
                    task_loss(model(b.x)[0], b),
                    reference_loss(model(b.x_harmful)[0]),
                    reference_loss(model(b.x_beneficial)[0]),
                )
            )
            grads = clipped(grads) if clip == "before" else grads
            if kind == "objectives":
                objectives = [grads, harmful, beneficial]
                per_layer = torch.stack([*map(every_product, reference.gramian(objectives, layers))])
                grads = reference.combine_(grads, objectives, per_layer, layers)
            else:
                grads = reference.project_align_(grads, harmful, beneficial, layers, alignment=ALIGNMENT)
        grads = clipped(grads) if clip and (kind == "features" or clip == "after") else grads
        for p, grad in zip(params, grads):
            p.grad = grad
        optimizer.step()
    return weights(model)


def clipped(grads) -> list:
    norm = torch.stack([g.norm() for g in grads]).norm()
    return [g * min(1.0, MAX_NORM / (float(norm) + 1e-6)) for g in grads]


def train(
    hook, model, *, parts=1, backward=torch.Tensor.backward, dtype=torch.float64, before_step=None, step=None
):
    for number in range(STEPS):
        b = batch(number, dtype)
        for i in range(parts):
            hook.backward(model, b.part(i, parts), backward, 1 / parts)
        if before_step:
            before_step()
        (step or hook.optimizer.step)()
        hook.optimizer.zero_grad()


def scaled(kind, growth_interval=2000, **options):
    """(model, scaler, hook, step) of training with a GradScaler that the hook is told of."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth_interval)
    model = Net(torch.float32)
    hook = Hook(kind, model, **({} if kind == "features" else {"scaler": scaler}), **options)

    def step():
        scaler.step(hook.optimizer)
        scaler.update()

    return model, scaler, hook, step


def weights(model) -> list:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(ours: list, theirs: list, tolerance: float = 1e-10) -> None:
    """Equal weights, after training that moved them by far more than the tolerance."""
    start = weights(Net())
    for a, b, s in zip(ours, theirs, start):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
        assert (b.double() - s).norm() > 10 * tolerance * s.norm()
