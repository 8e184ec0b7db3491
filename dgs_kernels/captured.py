"""Reference gradients of an optimiser's parameters: captured beside `.grad`, put into layers, operated with.

What `OptimizerSurgery` and `SurgeryAdamW` share.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dgs_kernels.ops.arguments import check_choice, check_options
from dgs_kernels.ops.eager import projection
from dgs_kernels.ops.project_align_ import SUMS, run, sums_dtype
from dgs_kernels.reference import ORDERS, RULES

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

GRANULARITIES = ("tensor", "layer", "model")


@dataclass(frozen=True)
class SurgeryMetrics:
    """What a step's surgery did to each of G layers; tensors on the layers' device, computed without a sync.

    Attributes:
        layers: G names.
        cosine: [G], between the task gradient and the direction h that `rule` makes of the harmful one.
        removed: [G], share of the energy ||x||^2 that the projection took, x being what it was applied to.
        conflict: [G] bool, whether that cosine is negative.
        alignment: [G], ||alignment * min(beneficial, 0)|| / ||task gradient||.
    """

    layers: list[str]
    cosine: Tensor
    removed: Tensor
    conflict: Tensor
    alignment: Tensor

    @property
    def conflict_rate(self) -> Tensor:
        """Share of the layers whose task and harmful gradient conflict, 0-dim."""
        return self.conflict.float().mean()

    def scalars(self, prefix: str = "surgery") -> dict[str, float]:
        """Every number under the name of its plot, as TensorBoard takes them; waits for the device once."""
        names = ("cosine", "removed", "conflict", "alignment")
        values = torch.stack([getattr(self, name).float() for name in names]).tolist()
        numbers = {f"{prefix}/conflict_rate": sum(values[2]) / max(1, len(self.layers))}
        for name, row in zip(names, values):
            numbers |= {f"{prefix}/{name}/{layer}": value for layer, value in zip(self.layers, row)}
        return numbers


@dataclass
class Shard:
    """The tensors of a step that live on one device and are split over the same processes."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    harmful: list[Tensor] = field(default_factory=list)
    beneficial: list[Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)


@dataclass
class Work:
    """One step's surgery: its tensors, by device and mesh dimensions, and the names of its G layers."""

    shards: dict[tuple, Shard]
    layers: list[str]

    def params(self) -> list[Tensor]:
        return [p for shard in self.shards.values() for p in shard.params]

    def empty_sums(self) -> Tensor:
        dtype = sums_dtype(*(ts for s in self.shards.values() for ts in (s.grads, s.harmful, s.beneficial)))
        return torch.zeros(len(self.layers), SUMS, dtype=dtype, device=next(iter(self.shards))[0])


class _Unscaled:
    """What was captured, in the shape of an optimiser that a GradScaler unscales and steps."""

    param_groups: list[dict]

    def step(self) -> bool:
        return True


class CapturedGradients:
    """The reference gradients of `optimizer`'s parameters.

    `caller` is the public class, for messages; the other arguments are those of `OptimizerSurgery`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        caller: str,
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
        check_options(caller, None, alignment, eps, order, rule)
        check_choice(caller, "granularity", granularity, GRANULARITIES)
        self.optimizer, self.model, self.scaler, self.process_group = optimizer, model, scaler, process_group
        self.alignment, self.eps, self.order, self.rule = alignment, eps, order, rule
        self.granularity = granularity
        self._captured: dict[str, dict[Tensor, Tensor]] = {"harmful": {}, "beneficial": {}}
        self._open: str | None = None
        self._layers: dict[Tensor, str] = {}
        self._ranks_checked = not check_ranks
        self._loss_scale: float | None = None
        self._last: tuple[list[str], Tensor, float | Tensor] | None = None
        self._unscaled: Any = _Unscaled()  # all of an optimiser that GradScaler asks for
        for param in self.parameters():
            self._layer(param)

    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def clear(self) -> None:
        """Forget what was captured since the last step."""
        for captured in self._captured.values():
            captured.clear()

    # Capturing -------------------------------------------------------------------------------------------

    def harmful(self) -> AbstractContextManager[None]:
        """A context: what `backward()` inside computes becomes the direction to remove; `.grad` stays."""
        return self._capture("harmful")

    def beneficial(self) -> AbstractContextManager[None]:
        """A context: what `backward()` inside computes becomes the direction to align with."""
        return self._capture("beneficial")

    @contextmanager
    def _capture(self, kind: str) -> Iterator[None]:
        if self._open:
            raise RuntimeError(f"{kind}() inside {self._open}(): capture one after the other")
        self._forget_skipped_step()
        self._check_unreduced()
        captured, params = self._captured[kind], [p for p in self.parameters() if p.requires_grad]
        # DDP with gradient_as_bucket_view points .grad into buckets that the next backward overwrites.
        shared = dist.is_available() and dist.is_initialized() and not any(map(_is_sharded, params))
        task = [p.grad.clone() if shared and p.grad is not None else p.grad for p in params]
        before = {p: _stamp(g) for p, g in captured.items()}
        self._open = kind
        try:
            for p in params:
                p.grad = captured.get(p)
            yield
            arrived = {p: p.grad for p in params if p.grad is not None}
        except BaseException:
            captured.clear()  # half a gradient is none
            raise
        finally:
            for p, grad in zip(params, task):
                p.grad = grad
            self._open = None
        for p, grad in arrived.items():
            if grad.layout != torch.strided:
                captured.clear()
                raise TypeError(
                    f"{kind}(): the gradient of {self._layer(p)} is sparse; surgery needs dense gradients "
                    "(nn.Embedding(sparse=False))"
                )
            captured[p] = grad.clone() if shared and captured.get(p) is not grad else grad
        self._check_unreduced()
        if all(before.get(p) == _stamp(g) for p, g in arrived.items()):
            raise RuntimeError(
                f"{kind}(): no gradient of this optimizer's parameters arrived; call backward() inside, on a "
                "loss that depends on them"
            )

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

    # Operating -------------------------------------------------------------------------------------------

    @property
    def options(self) -> tuple[Tensor | None, float, float, str, str]:
        """The operators' arguments (scale, alignment, eps, order, rule)."""
        if isinstance(self.alignment, Tensor):
            return self.alignment, 1.0, self.eps, self.order, self.rule
        return None, self.alignment, self.eps, self.order, self.rule

    @torch.no_grad()
    def take(self) -> Work | None:
        """The surgery that is due, and forget what was captured; None if there is nothing to do.

        A parameter takes part that has a gradient and a captured one.
        """
        if self._open:
            raise RuntimeError(f"optimizer.step() inside {self._open}(): leave the context first")
        self._check_scaling()
        self._forget_skipped_step()
        harmful, beneficial = (dict(self._captured[kind]) for kind in ("harmful", "beneficial"))
        self.clear()
        if not harmful and not beneficial:
            return None
        if not self._unscale([*harmful.values(), *beneficial.values()]):
            for p in self.parameters():
                p.grad = None  # so that the optimizer leaves everything as it is: a skipped step
            return None

        numbers: dict[str, int] = {}
        shards: dict[tuple, Shard] = {}
        for p in self.parameters():
            grad = p.grad
            h, b = (captured.get(p) if captured else None for captured in (harmful, beneficial))
            if grad is None or (h is None and b is None and self.process_group is None):
                continue
            layer = self._layer(p)
            if grad.layout != torch.strided:
                raise TypeError(f"the gradient of {layer} is sparse; surgery needs dense gradients")
            grad, meshes = _place(grad, layer)
            shard = shards.setdefault((grad.device, meshes), Shard())
            shard.params.append(p)
            shard.grads.append(grad)
            shard.groups.append(numbers.setdefault(layer, len(numbers)))
            shard.harmful.append(torch.zeros_like(grad) if h is None else local(h))
            if beneficial:
                shard.beneficial.append(torch.zeros_like(grad) if b is None else local(b))
        if not shards:
            return None
        if self.process_group is not None:
            for shard in shards.values():
                _average(shard.harmful, self.process_group)
                _average(shard.beneficial, self.process_group)
        return Work(shards, list(numbers))

    def is_whole(self, work: Work) -> bool:
        """Whether surgery is done in one go: every layer on one device of one process, nothing to check."""
        return len(work.shards) == 1 and not next(iter(work.shards))[1] and self._ranks_checked

    def sums(self, work: Work) -> Tensor:
        """The layers' inner products [G, 6], added up over devices and processes."""
        total = work.empty_sums()
        for (device, meshes), shard in work.shards.items():
            part = torch.zeros_like(total, device=device)
            run(shard.grads, shard.harmful, shard.beneficial, shard.groups, part, *self.options, "sums")
            for mesh, dim in meshes:
                dist.all_reduce(part, group=mesh.get_group(dim))
            total += part.to(total.device)
        self._check_ranks(total)
        return total

    def operate(self, work: Work) -> Tensor:
        """Edit the gradients of `work` in place; returns the sums of its layers."""
        whole = self.is_whole(work)
        sums = work.empty_sums() if whole else self.sums(work)
        for (device, _), shard in work.shards.items():
            part = "all" if whole else "apply"
            here = sums.to(device)
            run(shard.grads, shard.harmful, shard.beneficial, shard.groups, here, *self.options, part)
        return sums

    def remember(self, work: Work | None, sums: Tensor | None) -> None:
        """Keep what metrics are computed from."""
        pull = self.alignment.detach().clone() if isinstance(self.alignment, Tensor) else self.alignment
        self._last = None if work is None or sums is None else (work.layers, sums, pull)

    def metrics(self) -> SurgeryMetrics | None:
        """What the last step's surgery did to each layer; None if it had nothing to do. Waits for nothing."""
        if self._last is None:
            return None
        layers, sums, pull = self._last
        gh, hh, gg, bh, bb, gb = sums.unbind(1)
        inner, energy = gh, gg
        if self.order == "align_first":
            inner, energy = gh + pull * bh, gg + 2 * pull * gb + pull * pull * bb
        k = projection(sums, pull, self.eps, ORDERS.index(self.order), RULES.index(self.rule))
        tiny = torch.finfo(sums.dtype).tiny
        return SurgeryMetrics(
            layers,
            cosine=gh / (gg.sqrt() * hh.sqrt()).clamp(min=tiny),
            removed=(2 * k * inner - k * k * hh) / energy.clamp(min=tiny),
            conflict=gh < 0,
            alignment=(pull * bb.sqrt()).abs() / gg.sqrt().clamp(min=tiny),
        )

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

    def _check_ranks(self, sums: Tensor) -> None:
        """Once, at the first step: ranks that train together must hold the same gradients."""
        if self._ranks_checked:
            return
        self._ranks_checked = True
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        everywhere: list = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, sums[:, :3].double().cpu())
        for column, what in ((2, "task"), (1, "captured")):
            mine = sums[:, column].double().cpu()
            same = (
                len(theirs) == len(mine)
                and torch.allclose(theirs[:, column], mine, rtol=1e-3, atol=0, equal_nan=True)
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


def _stamp(x: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written or replaced."""
    return id(x), local(x)._version


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor."""
    if not _is_sharded(x):
        return x
    with torch.no_grad():
        return x.to_local()


def _place(x: Tensor, name: str) -> tuple[Tensor, tuple]:
    """This process's part of a tensor, and the mesh dimensions that the other parts are spread over."""
    if not _is_sharded(x):
        return x, ()
    if any(placement.is_partial() for placement in x.placements):
        raise RuntimeError(f"the gradient of {name} is a DTensor of partial sums: reduce it before the step")
    dims = (dim for dim, placement in enumerate(x.placements) if not placement.is_replicate())
    return local(x), tuple((x.device_mesh, dim) for dim in dims)


def _average(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    if tensors:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        torch._foreach_copy_(
            tensors, [f.view_as(t) for f, t in zip(flat.split([t.numel() for t in tensors]), tensors)]
        )
