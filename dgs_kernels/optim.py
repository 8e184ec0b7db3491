"""AdamW with gradient surgery inside its step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from dgs_kernels.captured import CapturedGradients, SurgeryMetrics, Work, local
from dgs_kernels.ops import surgery_adamw_


class SurgeryAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose step operates on the gradients as it reads them, and never writes them.

    The update of `OptimizerSurgery` on AdamW, in fewer passes over memory; `.grad` is left as it was.
    Arguments, state and `state_dict` are those of `torch.optim.AdamW`, and each loads the other's. Copies and
    pickles keep the surgery.

    Args:
        params, lr, betas, eps, weight_decay, maximize, foreach: see `torch.optim.AdamW`.
        amsgrad, capturable, differentiable, fused: not supported; use `OptimizerSurgery` on AdamW.
        surgery_eps: the `eps` of the surgery, added to the norm of a layer's harmful direction.
        alignment, order, rule, granularity, model, scaler, process_group, check_ranks: see
            `OptimizerSurgery`.

    Raises:
        ValueError, TypeError, RuntimeError: as `OptimizerSurgery`.

    Example:
        >>> import torch
        >>> from dgs_kernels import SurgeryAdamW
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = SurgeryAdamW([w], lr=1.0, rule="full", weight_decay=0)
        >>> with optimizer.harmful():
        ...     w[0].backward()
        >>> w.sum().backward()
        >>> optimizer.step()
        >>> optimizer.metrics().removed.round(decimals=4)
        tensor([0.5000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        alignment: float | Tensor = 1.0,
        surgery_eps: float = 1e-6,
        order: str = "align_first",
        rule: str = "positive",
        granularity: str = "tensor",
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        process_group: dist.ProcessGroup | None = None,
        check_ranks: bool = True,
    ) -> None:
        refused = {
            "amsgrad": amsgrad,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        for name in (name for name, value in refused.items() if value):
            raise ValueError(
                f"SurgeryAdamW has no {name}: use OptimizerSurgery on torch.optim.AdamW({name}=True)"
            )
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, foreach=foreach)
        self.surgery = CapturedGradients(
            self,
            caller="SurgeryAdamW",
            alignment=alignment,
            eps=surgery_eps,
            order=order,
            rule=rule,
            granularity=granularity,
            model=model,
            scaler=scaler,
            process_group=process_group,
            check_ranks=check_ranks,
        )

    def harmful(self) -> AbstractContextManager[None]:
        """See `OptimizerSurgery.harmful`."""
        return self.surgery.harmful()

    def beneficial(self) -> AbstractContextManager[None]:
        """See `OptimizerSurgery.beneficial`."""
        return self.surgery.beneficial()

    def metrics(self) -> SurgeryMetrics | None:
        """See `OptimizerSurgery.metrics`."""
        return self.surgery.metrics()

    def register_step_pre_hook(self, hook: Any) -> NoReturn:
        """Refused: it would see gradients before the surgery, which is inside the step and never written."""
        raise RuntimeError(
            "SurgeryAdamW operates inside its step, where no hook sees gradients: clip before step(), or, "
            "to hook what the surgery leaves, use OptimizerSurgery on torch.optim.AdamW"
        )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"surgery": self.surgery}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, if given, computes loss and gradients first, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self.surgery.take()
        self.surgery.remember(work, None if work is None else self._operate(work))
        operated = set() if work is None else set(work.params())
        for group in self.param_groups:
            self._step_plainly(
                group, [p for p in group["params"] if p.grad is not None and p not in operated]
            )
        return loss

    def _operate(self, work: Work) -> Tensor:
        """Step the parameters of `work`; returns the sums of its layers."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        # A layer that lies in one shard and one parameter group is operated on in a single pass.
        whole = self.surgery.is_whole(work) and len({id(groups[p]) for p in work.params()}) == 1
        sums = work.empty_sums() if whole else self.surgery.sums(work)
        for (device, _), shard in work.shards.items():
            for group in self.param_groups:
                at = [i for i, p in enumerate(shard.params) if groups[p] is group]
                if not at:
                    continue
                params = [shard.params[i] for i in at]
                averages, squares, steps = self._state(params)
                surgery_adamw_.run(
                    [local(p) for p in params],
                    [shard.grads[i] for i in at],
                    [local(t) for t in averages],
                    [local(t) for t in squares],
                    steps,
                    [shard.harmful[i] for i in at],
                    [shard.beneficial[i] for i in at] if shard.beneficial else [],
                    [shard.groups[i] for i in at],
                    sums.to(device),
                    *self.surgery.options,
                    "all" if whole else "apply",
                    float(group["lr"]),
                    *map(float, group["betas"]),
                    group["weight_decay"],
                    group["eps"],
                    group["maximize"],
                )
                increment_version(params)  # of distributed ones, too, whose local parts were written
        return sums

    def _step_plainly(self, group: dict, params: list[Tensor]) -> None:
        """What AdamW does: parameters without surgery."""
        averages, squares, steps = self._state(params)
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            averages,
            squares,
            [],
            steps,
            foreach=group["foreach"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _state(self, params: list[Tensor]) -> tuple[list[Tensor], ...]:
        """AdamW's state of parameters: exp_avg, exp_avg_sq and step, made where there is none yet."""
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            elif state["step"].device.type != "cpu":  # loaded from a fused AdamW
                state["step"] = state["step"].cpu()
        names = ("exp_avg", "exp_avg_sq", "step")
        return tuple([self.state[p][name] for p in params] for name in names)
