"""The two hooks: surgery on the gradient of features, as a layer, and of parameters, before each step."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dgs_kernels import reference
from dgs_kernels.captured import CapturedGradients
from dgs_kernels.capturing import GradientCapture
from dgs_kernels.ops.arguments import refuse_forward_mode
from dgs_kernels.ops.project_align import check, project_align


def gradient_surgery(
    features: Tensor,
    harmful: Tensor,
    beneficial: Tensor | None = None,
    *,
    eps: float = 1e-6,
    order: str = "align_first",
    rule: str = "positive",
) -> tuple[Tensor, Tensor]:
    """Edit the gradient that flows back into `features`: align it, and project the harmful direction out.

    The identity on `features`. The alignment loss is a real loss value to add, weighted, to your own: the
    gradient that arrives at it carries the weight, a loss scale and any accumulation factor, so the surgery
    composes with GradScaler, schedules, accumulation, DDP and FSDP2 without being told. Nothing is aligned
    where that loss is not part of what is differentiated.

    Args:
        features: [..., D]; the leading axes are rows.
        harmful: reference gradient whose direction is removed, broadcastable to features' shape. A constant.
        beneficial: reference gradient whose negative part b attracts, likewise; None: no alignment.
        eps, order, rule: see `project_align`.

    Returns:
        (features, alignment_loss): the same values, to be used from here on, and the 0-dim mean over the rows
        of <features, b> in float32 (float64 for float64 inputs); 0 without rows or without `beneficial`.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit, saying what was expected.

    Example:
        >>> import torch, dgs_kernels
        >>> f = torch.ones(1, 2, requires_grad=True)
        >>> seen, alignment_loss = dgs_kernels.gradient_surgery(f, torch.tensor([1.0, 0.0]))
        >>> (seen.sum() + 0.2 * alignment_loss).backward()
        >>> f.grad.round(decimals=4)
        tensor([[0., 1.]])
    """
    options = (1.0, eps, order, rule)
    check(features, harmful, beneficial, *options, caller="gradient_surgery", name="features")
    refuse_forward_mode("gradient_surgery", features)
    return _GradientSurgery.apply(features, harmful, beneficial, eps, order, rule)


class _GradientSurgery(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Tensor, harmful: Tensor, beneficial: Tensor | None, eps: float, order: str, rule: str
    ) -> tuple[Tensor, Tensor]:
        # A copy, because torch lets no in-place layer change a view that an edited gradient flows through.
        return features.clone(), reference.alignment_loss(features, beneficial)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        features, harmful, beneficial, ctx.eps, ctx.order, ctx.rule = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(harmful, beneficial)
        ctx.shape, ctx.dtype, ctx.device = features.shape, features.dtype, features.device

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, loss_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        harmful, beneficial = ctx.saved_tensors
        nothing = (None,) * 5
        if grad is None and (loss_grad is None or beneficial is None):
            return None, *nothing
        if grad is None:
            grad = torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device)
        alignment: float | Tensor = 0.0
        if loss_grad is None:
            beneficial = None
        elif beneficial is not None:
            alignment = loss_grad / max(1, ctx.shape[:-1].numel())
        edited = project_align(
            grad, harmful, beneficial, alignment=alignment, eps=ctx.eps, order=ctx.order, rule=ctx.rule
        )
        return edited, *nothing


class BeforeStep(GradientCapture):
    """Surgery that `_edit` does before every step of an optimiser, which the optimiser carries as a hook."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, caller: str, **options: Any) -> None:
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer):
            raise TypeError(
                f"{caller}: {type(optimizer).__name__} only wraps an optimizer and runs no hooks: pass its "
                ".optimizer"
            )
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{caller}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        super().__init__(optimizer, caller=caller, **options)
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        vars(optimizer)["__reduce_ex__"] = _refuse_copy

    def remove(self) -> None:
        """Undo it: the optimiser steps with plain gradients again."""
        self._handle.remove()
        vars(self.optimizer).pop("__reduce_ex__", None)
        self.clear()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._edit()
            return None
        # The closure makes the gradients, so it runs now and the optimiser is told its result.
        with torch.enable_grad():
            loss = closure()
        self._edit()
        return (optimizer, _Once(loss)), {k: v for k, v in kwargs.items() if k != "closure"}

    def _edit(self) -> None:
        raise NotImplementedError


class OptimizerSurgery(BeforeStep, CapturedGradients):
    """Edit the gradients of all parameters before every step of an optimiser, layer by layer.

    Reference gradients are captured beside `.grad`, accumulate over micro-batches and are used up by the
    step. There a step-pre-hook operates on all gradients at once (`project_align_`), as they are then: after
    clipping. Parameters without a gradient, or that no reference loss reached, are left alone.

    Args:
        optimizer: any `torch.optim.Optimizer`; of a wrapper (accelerate, Lightning) the `.optimizer` inside.
        alignment: weight of the negative part of the beneficial gradient, a number or a 0-dim tensor; may be
            reassigned at any time.
        eps, order, rule: see `project_align`; inner products and norms run over a layer.
        granularity: what a layer is: "tensor"; "layer", the tensors of one module, whose names come from
            `model` or an optimiser made from `model.named_parameters()`; or "model", all of them.
        model: the module that holds the parameters. Needed with FSDP2.
        scaler: the GradScaler of the loop, if there is one. Scale the reference losses with it too. A
            captured gradient that overflows skips the step and lowers the scale, as the task's does.
        process_group: average captured gradients over these ranks at each step, for backwards that DDP does
            not reduce. None: they come reduced, as through DDP's wrapper.
        check_ranks: compare the gradients' norms between ranks once, at the first step.

    Raises:
        ValueError, TypeError, RuntimeError: an option that does not exist or a combination that would be
            wrong, with the remedy.

    Example:
        >>> import torch
        >>> from dgs_kernels import OptimizerSurgery
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> surgery = OptimizerSurgery(optimizer, rule="full")
        >>> with surgery.harmful():
        ...     w[0].backward()
        >>> w.sum().backward()
        >>> optimizer.step()
        >>> w.detach().round(decimals=4).abs()
        tensor([0., 1.])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        alignment: float | Tensor = 1.0,
        eps: float = 1e-6,
        order: str = "align_first",
        rule: str = "positive",
        granularity: str = "tensor",
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        process_group: dist.ProcessGroup | None = None,
        check_ranks: bool = True,
    ) -> None:
        super().__init__(
            optimizer,
            caller="OptimizerSurgery",
            alignment=alignment,
            eps=eps,
            order=order,
            rule=rule,
            granularity=granularity,
            model=model,
            scaler=scaler,
            process_group=process_group,
            check_ranks=check_ranks,
        )

    def _edit(self) -> None:
        work = self.take()
        self.remember(work, None if work is None else self.operate(work))


class _Once:
    """A closure that has run; optimisers that evaluate it again would step on gradients without surgery."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.called = loss, False

    def __call__(self) -> Any:
        if self.called:
            raise RuntimeError(
                "this optimizer evaluates its closure several times in a step, as LBFGS does: surgery needs "
                "one that does so once"
            )
        self.called = True
        return self.loss


def _refuse_copy(protocol: Any) -> NoReturn:
    raise TypeError(
        "this optimizer carries surgery as a hook, which a copy or pickle would lose: call surgery.remove() "
        "first, or save optimizer.state_dict()"
    )
