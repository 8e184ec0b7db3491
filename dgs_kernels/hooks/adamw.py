"""AdamW with gradient surgery inside its step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from dgs_kernels.hooks.capture import check_keywords
from dgs_kernels.hooks.metrics import SurgeryMetrics
from dgs_kernels.hooks.parameters import ReferenceSurgery
from dgs_kernels.hooks.places import Part, local
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
        alignment, order, rule, margin, granularity: see `OptimizerSurgery`.
        model, scaler, process_group, check_ranks, track_update: see `OptimizerSurgery`.

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
        surgery_eps: float = 1e-6,
        **surgery: Any,
    ) -> None:
        given = {"amsgrad": amsgrad, "capturable": capturable, "differentiable": differentiable}
        _refuse_unsupported(given | {"fused": fused})
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, foreach=foreach)
        check_keywords("SurgeryAdamW", ReferenceSurgery, surgery)
        self.surgery = ReferenceSurgery(self, eps=surgery_eps, **surgery)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer`; a group has the options of the constructor, and no others."""
        _refuse_unsupported(param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer`; nothing is loaded of a state with options that are not supported."""
        for group in state_dict["param_groups"]:
            _refuse_unsupported(group, 'in the state first, group["{name}"] = False')
        super().load_state_dict(state_dict)

    def harmful(self, steps: int = 1) -> AbstractContextManager[None]:
        """See `OptimizerSurgery.harmful`."""
        return self.surgery.harmful(steps)

    def beneficial(self, steps: int = 1) -> AbstractContextManager[None]:
        """See `OptimizerSurgery.beneficial`."""
        return self.surgery.beneficial(steps)

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
        groups = {p: group for group in self.param_groups for p in group["params"]}
        parts = self.surgery.take()
        operated = [p for part in parts for p in part.params]
        if parts:
            # A layer that lies in one part and one parameter group is operated on in a single pass.
            sums, due = self.surgery.sums(parts, len({id(groups[p]) for p in operated}) == 1)
            if self.surgery.updates:
                self.surgery.updates.begin()
            for part, group in itertools.product(parts, self.param_groups):
                at = [i for i, p in enumerate(part.params) if groups[p] is group]
                if at:
                    self._step_with_surgery(part, at, group, part.of(sums), due)
        done = set(operated)
        for group in self.param_groups:
            if plain := [p for p in group["params"] if p.grad is not None and p not in done]:
                self._step_plainly(group, plain)
        if self.surgery.updates:
            self.surgery.updates.end()
        return loss

    def _step_with_surgery(self, part: Part, at: list[int], group: dict, sums: Tensor, due: str) -> None:
        """Step the parameters of a part that stand at these places, of one group."""
        params, layers = [part.params[i] for i in at], [part.groups[i] for i in at]
        *averages, steps = self._state(params)
        written = [[local(t) for t in tensors] for tensors in (params, *averages)]
        grads, *directions = ([tensors[i] for i in at] if tensors else [] for tensors in part.lists)
        hyper = (*map(float, (group["lr"], *group["betas"])), group["weight_decay"], group["eps"])
        surgery_adamw_.run(
            *(written[0], grads, *written[1:], steps, *directions, layers, sums),
            *(*self.surgery.options, due, *hyper, group["maximize"]),
        )
        # Also of distributed parameters, whose local parts were written.
        increment_version(params)

    def _step_plainly(self, group: dict, params: list[Tensor]) -> None:
        """What AdamW does: parameters without surgery."""
        beta1, beta2 = group["betas"]
        options = {name: group[name] for name in ("foreach", "lr", "weight_decay", "eps", "maximize")}
        averages, squares, steps = self._state(params)
        grads = [p.grad for p in params if p.grad is not None]
        adamw(params, grads, averages, squares, [], steps, amsgrad=False, beta1=beta1, beta2=beta2, **options)

    def _state(self, params: list[Tensor]) -> tuple[list[Tensor], ...]:
        """AdamW's state of parameters: exp_avg, exp_avg_sq and step, made where there is none yet."""
        states = [self.state[p] for p in params]
        for p, state in zip(params, states):
            if not state:
                state["step"] = torch.tensor(0.0, device="cpu")
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            elif not state["step"].is_cpu:
                # Fused AdamW leaves it on the device.
                state["step"] = state["step"].cpu()
        return tuple([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))


def _refuse_unsupported(options: dict[str, Any], remedy: str = "leave it out") -> None:
    """Raise where an option asks for steps that are none of these, or are made in another way."""
    # Those steps have the same results; of `amsgrad` there is nothing to go on with.
    for name in ("capturable", "differentiable", "fused"):
        if options.get(name):
            raise ValueError(
                f"SurgeryAdamW has no {name}: {remedy.format(name=name)}, or use OptimizerSurgery on "
                f"torch.optim.AdamW({name}=True)"
            )
    if options.get("amsgrad"):
        raise ValueError(
            "SurgeryAdamW has no amsgrad: use OptimizerSurgery on torch.optim.AdamW(amsgrad=True)"
        )
    if not options.get("decoupled_weight_decay", True):
        raise ValueError(
            "SurgeryAdamW decays weights apart from gradients: use OptimizerSurgery on torch.optim.Adam"
        )
