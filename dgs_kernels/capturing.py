"""Gradients of further losses, captured beside `.grad`: what every surgery on parameters shares.

Capturing, the names of layers, and the loops in which captured gradients cannot be right.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dgs_kernels.ops.arguments import check_choice, check_class

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

GRANULARITIES = ("tensor", "layer", "model")


class _Unscaled:
    """What was captured, in the shape of an optimiser that a GradScaler unscales and steps."""

    param_groups: list[dict]

    def step(self) -> bool:
        return True


class GradientCapture:
    """Gradients of `optimizer`'s parameters, captured under names.

    `caller` is the public class, for messages; the other arguments: see `OptimizerSurgery`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        caller: str,
        granularity: str = "tensor",
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        process_group: dist.ProcessGroup | None = None,
        check_ranks: bool = True,
    ) -> None:
        check_choice(caller, "granularity", granularity, GRANULARITIES)
        check_class(caller, "model", model, nn.Module)
        check_class(caller, "scaler", scaler, torch.amp.GradScaler)
        check_class(caller, "process_group", process_group, getattr(dist, "ProcessGroup", ()))
        self.optimizer, self.model, self.scaler, self.process_group = optimizer, model, scaler, process_group
        self.granularity = granularity
        self._captured: dict[Hashable, dict[Tensor, Tensor]] = {}
        self._open: str | None = None
        self._layers: dict[Tensor, str] = {}
        self._ranks_checked = not check_ranks
        self._loss_scale: float | None = None
        self._unscaled: Any = _Unscaled()  # all of an optimiser that GradScaler asks for
        for param in self.parameters():
            self._layer(param)

    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def clear(self) -> None:
        """Forget what was captured since the last step."""
        self._captured.clear()

    # Capturing -------------------------------------------------------------------------------------------

    @contextmanager
    def _capture(self, name: Hashable, context: str) -> Iterator[None]:
        """What `backward()` inside computes is added to what was captured under `name`; `.grad` stays."""
        if self._open:
            raise RuntimeError(f"{context} inside {self._open}: capture one after the other")
        self._forget_skipped_step()
        self._check_unreduced()
        captured, params = self._captured.get(name, {}), [p for p in self.parameters() if p.requires_grad]
        # DDP with gradient_as_bucket_view points .grad into buckets that the next backward overwrites.
        shared = dist.is_available() and dist.is_initialized() and not any(map(_is_sharded, params))
        task = [p.grad.clone() if shared and p.grad is not None else p.grad for p in params]
        before = {p: stamp(g) for p, g in captured.items()}
        self._open = context
        try:
            for p in params:
                p.grad = captured.get(p)
            yield
            arrived = {p: p.grad for p in params if p.grad is not None}
        except BaseException:
            self._captured.pop(name, None)  # half a gradient is none
            raise
        finally:
            for p, grad in zip(params, task):
                p.grad = grad
            self._open = None
        for p, grad in arrived.items():
            if grad.layout != torch.strided:
                self._captured.pop(name, None)
                raise TypeError(
                    f"{context}: the gradient of {self._layer(p)} is sparse; surgery needs dense gradients "
                    "(nn.Embedding(sparse=False))"
                )
            captured[p] = grad.clone() if shared and captured.get(p) is not grad else grad
        self._check_unreduced()
        if all(before.get(p) == stamp(g) for p, g in arrived.items()):
            raise RuntimeError(
                f"{context}: no gradient of this optimizer's parameters arrived; call backward() inside, on "
                "a loss that depends on them"
            )
        self._captured[name] = captured

    def _forget_skipped_step(self) -> None:
        """GradScaler skips a step without a word to hooks: what was captured for it must not join the next.

        It lowers its scale then, and only then while gradients wait for a step.
        """
        if self.scaler is None or not self.scaler.is_enabled():
            return
        scale = self.scaler.get_scale()
        if scale != self._loss_scale:
            self.clear()
        self._loss_scale = scale

    def _check_unreduced(self) -> None:
        """FSDP2 without gradient synchronisation keeps gradients where they would join another loss's."""
        if not any(_is_sharded(p) for p in self.parameters()):
            return
        if self.model is None:
            raise ValueError(
                "parameters sharded by FSDP2 need model=, to check that no gradient waits unreduced"
            )
        for module in self.model.modules():
            find_state = getattr(module, "_get_fsdp_state", None)
            state = None if find_state is None else find_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            for param in (p for group in groups if group for p in group.fsdp_params):
                waiting = getattr(getattr(param, "_unsharded_param", None), "grad", None)
                if waiting is not None or getattr(param, "unsharded_accumulated_grad", None) is not None:
                    self.clear()
                    raise RuntimeError(
                        "FSDP2 holds gradients that it has not reduced, so task and reference would mix: "
                        "with surgery, do not call set_requires_gradient_sync(False)"
                    )

    # Layers ----------------------------------------------------------------------------------------------

    def _layer(self, param: Tensor) -> str:
        name = self._layers.get(param)
        if name is None:
            self._layers = self._name_layers()
            name = self._layers.get(param)
        if name is None:
            raise ValueError(
                'granularity="layer" needs to know the modules: pass model=, or give the optimizer '
                "model.named_parameters()"
            )
        return name

    def _name_layers(self) -> dict[Tensor, str]:
        groups = self.optimizer.param_groups
        places = {p: f"{g}.{i}" for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
        names = {p: n for group in groups for p, n in zip(group["params"], group.get("param_names", ()))}
        if self.model is not None:
            names |= {p: name for name, p in self.model.named_parameters()}
        if self.granularity == "tensor":
            return places | names
        if self.granularity == "model":
            return dict.fromkeys(places, "model")
        return {p: name.rpartition(".")[0] for p, name in names.items()}

    # Using what was captured ------------------------------------------------------------------------------

    def _release(self, unscale: bool = True) -> dict[Hashable, dict[Tensor, Tensor]]:
        """What was captured for this step, and forget it; {} if nothing was, or it overflowed."""
        if self._open:
            raise RuntimeError(f"optimizer.step() inside {self._open}: leave the context first")
        if self._captured:
            self._check_scaling()
        self._forget_skipped_step()
        captured = dict(self._captured)
        self.clear()
        if (
            unscale
            and captured
            and not self._unscale([g for grads in captured.values() for g in grads.values()])
        ):
            for p in self.parameters():
                p.grad = None  # so that the optimizer leaves everything as it is: a skipped step
            return {}
        return captured

    # What cannot be right --------------------------------------------------------------------------------

    def _check_scaling(self) -> None:
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "this fused optimizer is handed gradients that GradScaler has not unscaled; call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        if self.scaler is None and _called_by_scaler():
            raise RuntimeError(
                "a GradScaler steps this optimizer: pass it as scaler=, and scale the reference losses too, "
                "scaler.scale(loss).backward()"
            )

    def _unscale(self, captured: list[Tensor]) -> bool:
        """Divide what was captured by the loss scale; False if it overflowed, which skips the step.

        Through GradScaler's public interface, as an optimiser of its own: so an overflow lowers the scale.
        """
        if self.scaler is None or not self.scaler.is_enabled():
            return True
        if any(_is_sharded(t) for t in captured):
            raise RuntimeError(
                "GradScaler does not know of gradients captured under FSDP2: train in bfloat16"
            )
        holders = [t.detach() for t in captured]
        for holder, t in zip(holders, captured):
            holder.grad = t
        self._unscaled.param_groups = [{"params": holders}]
        self.scaler.unscale_(self._unscaled)
        return self.scaler.step(self._unscaled) is not None

    def _check_ranks(self, norms: dict[str, Tensor]) -> None:
        """Once, at the first step: ranks that train together must hold the same gradients.

        `norms` are the squared norms of each kind of gradient [G], the same number of kinds on all ranks.
        """
        if self._ranks_checked:
            return
        self._ranks_checked = True
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        everywhere: list = [None] * dist.get_world_size()
        mine = {what: norm.double().cpu() for what, norm in norms.items()}
        dist.all_gather_object(everywhere, mine)
        for what, norm in mine.items():
            same = (
                len(theirs[what]) == len(norm)
                and torch.allclose(theirs[what], norm, rtol=1e-3, atol=0, equal_nan=True)
                for theirs in everywhere
            )
            if not all(same):
                raise RuntimeError(
                    f"the {what} gradients differ between ranks. DDP reduces only the first backward after a "
                    "forward: make that the task's, and pass process_group= to average captured gradients at "
                    "each step (ranks that do not train together: check_ranks=False)"
                )


def _called_by_scaler() -> bool:
    frame: FrameType | None = sys._getframe()
    code = torch.amp.GradScaler.step.__code__
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals["self"].is_enabled()
        frame = frame.f_back
    return False


def _is_sharded(x: Tensor) -> TypeGuard[DTensor]:
    return hasattr(x, "device_mesh")


def stamp(x: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written or replaced."""
    return id(x), local(x)._version


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor."""
    if not _is_sharded(x):
        return x
    with torch.no_grad():
        return x.to_local()


def place(x: Tensor, name: str) -> tuple[Tensor, tuple]:
    """This process's part of a tensor, and the mesh dimensions that the other parts are spread over."""
    if not _is_sharded(x):
        return x, ()
    if any(placement.is_partial() for placement in x.placements):
        raise RuntimeError(f"the gradient of {name} is a DTensor of partial sums: reduce it before the step")
    dims = (dim for dim, placement in enumerate(x.placements) if not placement.is_replicate())
    return local(x), tuple((x.device_mesh, dim) for dim in dims)


def average(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    if tensors:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        torch._foreach_copy_(
            tensors, [f.view_as(t) for f, t in zip(flat.split([t.numel() for t in tensors]), tensors)]
        )
