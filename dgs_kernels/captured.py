"""Reference gradients of an optimiser's parameters: captured beside `.grad`, put into layers, operated with.

What `OptimizerSurgery` and `SurgeryAdamW` share.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dgs_kernels.capturing import GradientCapture, average, local, place
from dgs_kernels.ops.arguments import check_options
from dgs_kernels.ops.eager import projection
from dgs_kernels.ops.project_align_ import SUMS, run, sums_dtype
from dgs_kernels.reference import ORDERS, RULES


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


class CapturedGradients(GradientCapture):
    """The reference gradients of `optimizer`'s parameters. Arguments as those of `OptimizerSurgery`."""

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
        super().__init__(
            optimizer,
            caller=caller,
            granularity=granularity,
            model=model,
            scaler=scaler,
            process_group=process_group,
            check_ranks=check_ranks,
        )
        self.alignment, self.eps, self.order, self.rule = alignment, eps, order, rule
        self._last: tuple[list[str], Tensor, float | Tensor] | None = None

    def harmful(self) -> AbstractContextManager[None]:
        """A context: what `backward()` inside computes becomes the direction to remove; `.grad` stays."""
        return self._capture("harmful", "harmful()")

    def beneficial(self) -> AbstractContextManager[None]:
        """A context: what `backward()` inside computes becomes the direction to align with."""
        return self._capture("beneficial", "beneficial()")

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
        captured = self._release()
        if not captured:
            return None
        harmful, beneficial = (captured.get(kind, {}) for kind in ("harmful", "beneficial"))
        numbers: dict[str, int] = {}
        shards: dict[tuple, Shard] = {}
        for p in self.parameters():
            grad = p.grad
            h, b = harmful.get(p), beneficial.get(p)
            if grad is None or (h is None and b is None and self.process_group is None):
                continue
            layer = self._layer(p)
            if grad.layout != torch.strided:
                raise TypeError(f"the gradient of {layer} is sparse; surgery needs dense gradients")
            grad, meshes = place(grad, layer)
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
                average(shard.harmful, self.process_group)
                average(shard.beneficial, self.process_group)
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
        self._check_ranks({"task": total[:, 2], "captured": total[:, 1]})
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
