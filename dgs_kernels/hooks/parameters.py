"""Surgery on the gradients of all parameters with captured reference gradients, layer by layer."""

from __future__ import annotations

import functools
import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dgs_kernels.hooks.capture import BeforeStep, Capture, check_margin
from dgs_kernels.hooks.lasting import check_steps
from dgs_kernels.hooks.metrics import SLACK, SurgeryMetrics, cosine, length
from dgs_kernels.hooks.places import Part
from dgs_kernels.hooks.ranks import average
from dgs_kernels.hooks.updates import Promise
from dgs_kernels.ops.project_align_ import SUMS, run
from dgs_kernels.options import Surgery


@dataclass(kw_only=True, eq=False, repr=False)
class ReferenceSurgery(Capture):
    """Surgery with captured reference gradients, as far as `OptimizerSurgery` and `SurgeryAdamW` share it."""

    alignment: float | Tensor = 1.0
    eps: float = 1e-6
    order: str = "align_first"
    rule: str = "positive"
    margin: float = 0.0
    caller: ClassVar[str] = "SurgeryAdamW"

    def __post_init__(self) -> None:
        self.options.check(self.caller)
        check_margin(self.caller, self.margin)
        if self.margin and self.rule != "conflict":
            raise ValueError(f'{self.caller}: a margin needs rule="conflict", got {self.rule!r}')
        super().__post_init__()
        self._last: tuple[list[str], Tensor, Surgery, float] | None = None
        self._names: list[str] = []

    def harmful(self, steps: int = 1) -> AbstractContextManager[None]:
        """A context: what `backward()` inside computes becomes the direction to remove; `.grad` stays.

        It serves `steps` steps, 1 or more, or until there is a new one.
        """
        check_steps("harmful()", steps)
        return self.capture("harmful", "harmful()", steps)

    def beneficial(self, steps: int = 1) -> AbstractContextManager[None]:
        """A context: what `backward()` inside computes becomes the direction to align with; as `harmful`."""
        check_steps("beneficial()", steps)
        return self.capture("beneficial", "beneficial()", steps)

    @property
    def options(self) -> Surgery:
        return Surgery.of(self.alignment, self.eps, self.order, self.rule)

    def take(self) -> list[Part]:
        """The surgery that is due: task, harmful and beneficial gradients, the last list maybe empty.

        A parameter takes part that has a gradient and a captured one. What was captured is forgotten.
        """
        self._last = None
        captured = self.release()
        harmful, beneficial = (captured.get(kind, {}) for kind in ("harmful", "beneficial"))
        # Through `process_group` another rank's loss may have reached what none of this one's has.
        everyone = bool(captured) and self.process_group is not None
        task = {p: g for p, g in self.task().items() if everyone or p in harmful or p in beneficial}
        if everyone:
            self.meet_ranks()
        places = {"harmful": 1, "beneficial": 2} if beneficial else {"harmful": 1}
        parts, self._names = self.parts([task, harmful, beneficial][: 1 + len(places)])
        for part in parts:
            for kind, tensors in zip(places, part.lists[1:]):
                if self.process_group is not None and kind in self.fresh:
                    average(tensors, self.process_group)
        self.lasting.keep(self.fresh, parts, len(self._names), places, self.process_group is not None)
        self.fresh = {}
        for part in parts:
            part.lists += [[]] * (3 - len(part.lists))
        return parts

    def sums(self, parts: list[Part], at_once: bool = True) -> tuple[Tensor, str]:
        """The layers' inner products [G, 6], over devices and processes, and the pass that is now due.

        That is "apply", or "all" where one pass can do everything (`at_once`: as far as the caller knows) and
        writes them. Metrics are computed from them.
        """
        at_once &= len(parts) == 1 and not parts[0].meshes and self._ranks_checked and not self.margin
        dtype = functools.reduce(torch.promote_types, (part.sums_dtype for part in parts))
        total = torch.zeros(len(self._names), SUMS, dtype=dtype, device=parts[0].device)
        surgery = self.options
        if surgery.scale is not None:
            surgery = surgery._replace(scale=surgery.scale.detach().clone())
        self._last = self._names, total, surgery, self.margin
        if self.updates:
            promise = Promise(last=1, unchanged=surgery.rule != "conflict")
            self.updates.expect(self._names, parts, [promise], functools.partial(self._measure, parts, total))
        if at_once:
            return total, "all"
        self._add_inner_products(total, parts, [part.lists[0] for part in parts])
        self.compare_ranks({"task": total[:, 2], "captured": total[:, 1]})
        if not self.margin:
            return total, "apply"
        # The kernels' rule, min(<x, h>, 0), of what <x, h> lacks.
        asked = total.clone()
        asked[:, 0] -= self.margin * (_projected(total, surgery)[1].clamp(min=0) * total[:, 1]).sqrt()
        return asked, "apply"

    def _add_inner_products(self, total: Tensor, parts: list[Part], first: list[list[Tensor]]) -> None:
        """Add [G, 6] of `first` in place of the task's gradients, over devices and processes."""
        for part, tensors in zip(parts, first):
            sums = torch.zeros_like(total, device=part.device, dtype=part.sums_dtype)
            run(tensors, *part.lists[1:], part.groups, sums, *self.options, "sums")
            total += part.add_up(sums).to(total)

    def _measure(self, parts: list[Part], like: Tensor, changes: list[list[Tensor]]) -> tuple[Tensor, ...]:
        total = torch.zeros_like(like)
        self._add_inner_products(total, parts, changes)
        along_h, h, square, _, b, along_b = total.unbind(1)
        return square, torch.stack([along_h, along_b], 1), torch.stack([h, b], 1)

    def metrics(self) -> SurgeryMetrics | None:
        """What the last step's surgery did to each layer; None if it had nothing to do. Waits for nothing."""
        if self._last is None:
            return None
        layers, sums, surgery, margin = self._last
        pull = surgery.weight
        gh, hh, gg, _, bb, _ = sums.unbind(1)
        inner, energy = _projected(sums, surgery)
        along = cosine(inner, energy, hh)
        gap = (along - margin).clamp(max=0) if surgery.rule == "conflict" else along
        # Of the gap, what eps lets be closed.
        share = (hh.sqrt() / (hh.sqrt() + surgery.eps)).square()
        return SurgeryMetrics(
            layers,
            cosine=cosine(gh, gg, hh),
            removed=share * gap * (2 * along - share * gap),
            conflict=gh < 0,
            alignment=torch.where(bb == 0, 0.0, abs(pull) * length(bb) / length(gg)),
            margin_met=(along - share * gap >= margin - SLACK) | (hh == 0) | (margin == 0),
            refresh_cosine=dict(self.lasting.cosines),
            **(self.updates.found() if self.updates else {}),
        )


def _projected(sums: Tensor, surgery: Surgery) -> tuple[Tensor, Tensor]:
    """<x, h> and <x, x> [G], x being what the projection is applied to."""
    gh, _, gg, bh, bb, gb = sums.unbind(1)
    if surgery.order == "project_first":
        return gh, gg
    pull = surgery.weight
    return gh + pull * bh, gg + 2 * pull * gb + pull * pull * bb


@dataclass(kw_only=True, eq=False, repr=False)
class OptimizerSurgery(ReferenceSurgery):
    """Edit the gradients of all parameters before every step of an optimiser, layer by layer.

    Reference gradients are captured beside `.grad`, accumulate over micro-batches and are used up by the
    step. There a step-pre-hook operates on all gradients at once (`project_align_`), as they are then: after
    clipping. Parameters without a gradient, or that no reference loss reached, are left alone.

    Args:
        optimizer: any `torch.optim.Optimizer`; of a wrapper (accelerate, Lightning) the `.optimizer` inside.
        alignment: weight of the negative part of the beneficial gradient, a number or a 0-dim tensor; may be
            reassigned at any time.
        eps, order, rule: see `project_align`; inner products and norms run over a layer.
        margin: of rule "conflict", 0 or more: the projection leaves <d, h> >= margin |x| |h| of x, the
            nearest such d. With a margin a layer is always read twice.
        granularity: what a layer is: "tensor"; "layer", the tensors of one module, whose names come from
            `model` or an optimiser made from `model.named_parameters()`; or "model", all of them.
        model: the module that holds the parameters. Needed with FSDP2.
        scaler: the GradScaler of the loop, if there is one. Scale the reference losses with it too. A
            captured gradient that overflows skips the step and lowers the scale, as the task's does.
        process_group: average captured gradients over these ranks at each step, for backwards that DDP does
            not reduce. None: they come reduced, as through DDP's wrapper.
        check_ranks: compare the gradients' norms between ranks once, at the first step.
        track_update: measure what each step makes of the edited gradient: `update_cosine` and `promise_held`
            of the metrics. Costs a copy of the parameters and, with one captured gradient, 7 streams.

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

    caller: ClassVar[str] = "OptimizerSurgery"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hook = weakref.ref(BeforeStep(self, self._edit))

    def _edit(self) -> None:
        if not (parts := self.take()):
            return
        sums, due = self.sums(parts)
        for part in parts:
            task, harmful, beneficial = part.lists
            run(task, harmful, beneficial, part.groups, part.of(sums), *self.options, due)
