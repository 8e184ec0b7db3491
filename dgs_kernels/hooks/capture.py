"""Gradients of further losses, captured beside `.grad`: what every surgery on parameters shares.

Capturing, the hook before a step, layers, and the loops in which captured gradients cannot be right.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dgs_kernels.arguments import check_choice, check_class
from dgs_kernels.hooks.lasting import Lasting
from dgs_kernels.hooks.places import Gradient, Part, local, place, stamp
from dgs_kernels.hooks.ranks import compare, is_sharded, meet
from dgs_kernels.hooks.updates import Updates
from dgs_kernels.private_torch import is_zero_tensor

GRANULARITIES = ("tensor", "layer", "model")
INSTEAD_OF_DEEPSPEED = "use FSDP2, or DDP with torch's ZeroRedundancyOptimizer"


@dataclass(kw_only=True, eq=False, repr=False)
class Capture:
    """Gradients of `optimizer`'s parameters, captured under names. The arguments: see `OptimizerSurgery`."""

    optimizer: torch.optim.Optimizer = field(kw_only=False)
    granularity: str = "tensor"
    model: nn.Module | None = None
    scaler: torch.amp.GradScaler | None = None
    process_group: dist.ProcessGroup | None = None
    check_ranks: bool = True
    track_update: bool = False
    # For messages: the public class, and what else to do where the optimiser is wrapped.
    caller: ClassVar[str]
    wrapped: ClassVar[str] = ""

    def __post_init__(self) -> None:
        inner = getattr(self.optimizer, "optimizer", None)
        kind = type(self.optimizer).__name__
        if any("deepspeed" in type(x).__module__ for x in (self.optimizer, inner)):
            raise TypeError(
                f"{self.caller}: DeepSpeed reduces gradients into partitions of its own, which no "
                f"captured one can join: {INSTEAD_OF_DEEPSPEED}"
            )
        if isinstance(inner, torch.optim.Optimizer):
            raise TypeError(
                f"{self.caller}: {kind} only wraps an optimizer and runs no hooks: pass its .optimizer"
                f"{self.wrapped}"
            )
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(f"{self.caller}: optimizer must be a torch.optim.Optimizer, got {kind}")
        check_choice(self.caller, "granularity", self.granularity, GRANULARITIES)
        check_class(self.caller, "model", self.model, nn.Module)
        check_class(self.caller, "scaler", self.scaler, torch.amp.GradScaler)
        check_class(self.caller, "process_group", self.process_group, getattr(dist, "ProcessGroup", ()))
        self._hook: Callable[[], BeforeStep | None] = lambda: None
        self._captured: dict[str, Gradient] = {}
        self._open: str | None = None
        self.fresh: dict[str, Gradient] = {}
        self.lasting = Lasting()
        self.updates = Updates() if self.track_update else None
        self._layers: dict[Tensor, str] = {}
        self._ranks_met = self._ranks_checked = not self.check_ranks
        self._loss_scale: float | None = None
        self._unscaled: Any = _Unscaled()
        for param in self.parameters():
            self.layer(param)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"optimizer": self.optimizer, "_hook": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._hook = lambda: None

    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def task(self) -> Gradient:
        """What stands in `.grad`, in memory, so that it can be edited there."""
        found = {}
        for p in self.parameters():
            grad = p.grad
            if grad is not None:
                if is_zero_tensor(grad):
                    p.grad = grad = grad.clone()
                found[p] = grad
        return found

    @property
    def captured(self) -> bool:
        """Whether the coming step has captured gradients, new or kept."""
        return bool(self._captured or self.lasting.serving)

    def remove(self) -> None:
        """Undo it: the optimiser steps with plain gradients again."""
        if hook := self._hook():
            hook.remove()
        self.clear()

    def clear(self) -> None:
        """Forget what was captured."""
        self.forget()
        self.lasting = Lasting()

    def forget(self) -> None:
        """Forget what was captured for the coming step."""
        self._captured.clear()
        self.lasting.forget()
        if self.updates:
            self.updates.drop()

    # Capturing -------------------------------------------------------------------------------------------

    @contextmanager
    def capture(self, name: str, context: str, steps: int = 1) -> Iterator[None]:
        """What `backward()` inside computes is added to what was captured under `name`; `.grad` stays."""
        if self._open:
            raise RuntimeError(f"{context} inside {self._open}: capture one after the other")
        self.forget_skipped_step()
        captured, params = self._captured.get(name, {}), [p for p in self.parameters() if p.requires_grad]
        is_split = any(map(is_sharded, params))
        if is_split:
            self._check_unreduced()
        # DDP with gradient_as_bucket_view points .grad into buckets that the next backward overwrites.
        shared = not is_split and dist.is_available() and dist.is_initialized()
        task = [p.grad.clone() if shared and p.grad is not None else p.grad for p in params]
        before = {p: stamp(g) for p, g in captured.items()}
        self._open = context
        try:
            for p in params:
                p.grad = captured.get(p)
            yield
            arrived = {p: p.grad for p in params if p.grad is not None}
        except BaseException:
            # Half a gradient must not stay.
            self._captured.pop(name, None)
            raise
        finally:
            for p, grad in zip(params, task):
                p.grad = grad
            self._open = None
        for p, grad in arrived.items():
            if grad.layout != torch.strided:
                self._captured.pop(name, None)
                raise TypeError(
                    f"{context}: the gradient of {self.layer(p)} is sparse; surgery needs dense gradients "
                    "(nn.Embedding(sparse=False))"
                )
            is_new = shared and captured.get(p) is not grad
            captured[p] = grad.clone() if is_new or is_zero_tensor(grad) else grad
        if is_split:
            self._check_unreduced()
        if all(before.get(p) == stamp(g) for p, g in arrived.items()):
            raise RuntimeError(
                f"{context}: no gradient of this optimizer's parameters arrived; call backward() inside, on "
                "a loss that depends on them; where DeepSpeed has put partitions of its own in their place, "
                f"{INSTEAD_OF_DEEPSPEED}"
            )
        self._captured[name] = captured
        self.lasting.ask(name, steps)

    def release(self, unscale: bool = True) -> dict[str, Gradient]:
        """What was captured for this step or is kept for it; {} if nothing is, or it overflowed.

        What is new is `fresh`. A surgery says to `lasting` when it has used it.
        """
        if self._open:
            raise RuntimeError(f"optimizer.step() inside {self._open}: leave the context first")
        if self._captured:
            self._check_scaling()
        self.forget_skipped_step()
        captured, asked = dict(self._captured), dict(self.lasting.asked)
        self.forget()
        self.fresh = {}
        tensors = [g for grads in captured.values() for g in grads.values()]
        if unscale and captured and not self._unscale(tensors):
            for p in self.parameters():
                # The optimizer then leaves everything as it is: a skipped step.
                p.grad = None
            return {}
        self.fresh, self.lasting.asked = captured, asked
        return self.lasting.joined(captured)

    def forget_skipped_step(self) -> None:
        """GradScaler skips a step without a word to hooks: what was captured for it must not join the next.

        It lowers its scale then, and only then while gradients wait for a step.
        """
        if self.scaler is None or not self.scaler.is_enabled():
            return
        scale = self.scaler.get_scale()
        if scale != self._loss_scale:
            self.forget()
        self._loss_scale = scale

    def _unscale(self, captured: list[Tensor]) -> bool:
        """Divide what was captured by the loss scale; False if it overflowed, which skips the step.

        Through GradScaler's public interface, as an optimiser of its own: so an overflow lowers the scale.
        """
        if self.scaler is None or not self.scaler.is_enabled():
            return True
        if any(is_sharded(t) for t in captured):
            raise RuntimeError(
                "GradScaler does not know of gradients captured under FSDP2: train in bfloat16"
            )
        holders = [t.detach() for t in captured]
        for holder, t in zip(holders, captured):
            holder.grad = t
        self._unscaled.param_groups = [{"params": holders}]
        self.scaler.unscale_(self._unscaled)
        return self.scaler.step(self._unscaled) is not None

    # Layers ----------------------------------------------------------------------------------------------

    def layer(self, param: Tensor) -> str:
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

    def parts(self, gradients: Sequence[Gradient]) -> tuple[list[Part], list[str]]:
        """K gradients of the parameters of the first, by the place where they lie; and the names of G layers.

        They are zero where there is none.
        """
        numbers: dict[str, int] = {}
        parts: dict[tuple, Part] = {}
        for p, first in gradients[0].items():
            layer = self.layer(p)
            if first.layout != torch.strided:
                raise TypeError(f"the gradient of {layer} is sparse; surgery needs dense gradients")
            mine, meshes = place(first, layer)
            at = (mine.device, meshes)
            part = parts.get(at)
            if part is None:
                part = parts[at] = Part(*at, [[]])
            part.params.append(p)
            part.groups.append(numbers.setdefault(layer, len(numbers)))
            part.lists[0].append(mine)
        for part in parts.values():
            part.lists += [[*map(local, map(grads.get, part.params))] for grads in gradients[1:]]
            part.fill(shared=self.process_group is None)
        return list(parts.values()), list(numbers)

    # What cannot be right --------------------------------------------------------------------------------

    def _check_unreduced(self) -> None:
        """FSDP2 without gradient synchronisation keeps gradients where they would join another loss's."""
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
                        "with surgery, do not call set_requires_gradient_sync(False), as accelerate and HF "
                        "Trainer do between micro-batches without their option sync_each_batch=True"
                    )

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

    def meet_ranks(self) -> None:
        """Once, before the first collective of `process_group`: tell of ranks that do not come to it."""
        if self.process_group is not None and not self._ranks_met:
            self._ranks_met = True
            meet(self.process_group)

    def compare_ranks(self, norms: dict[str, Tensor]) -> None:
        """Once, at the first step: ranks that train together must hold the same gradients.

        `norms` are the squared norms of each kind of gradient [G], the same number of kinds on all ranks.
        """
        if not self._ranks_checked:
            self._ranks_checked = True
            compare(norms, self.parameters(), self.process_group)


class _NotKept:
    """An optimiser, as an attribute of the surgery that it carries: in a circle both would stay."""

    def __get__(self, surgery: Any, owner: type) -> Any:
        if surgery is None:
            return self
        optimizer = vars(surgery)["optimizer"]()
        if optimizer is None:
            raise RuntimeError("the optimizer of this surgery is gone: keep it as long as the surgery")
        return optimizer

    def __set__(self, surgery: Any, given: Any) -> None:
        # What is no optimiser is refused in a moment, in words.
        is_one = isinstance(given, torch.optim.Optimizer)
        vars(surgery)["optimizer"] = weakref.ref(given) if is_one else lambda: given


# Here, since a dataclass would take it for a default.
Capture.optimizer = _NotKept()  # type: ignore[assignment]


class BeforeStep:
    """`edit` runs before every step of an optimiser, which carries it as a hook and must not be copied.

    With a closure it runs when the optimiser has evaluated that, at the weights that it has then.
    """

    def __init__(self, surgery: Capture, edit: Callable[[], None]) -> None:
        self._surgery, self._edit = surgery, edit
        # Whether a closure was given and not evaluated.
        self._left_out = False
        optimizer = surgery.optimizer
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )
        vars(optimizer).setdefault("__reduce_ex__", _NoCopy()).add(self)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        attributes = vars(self._surgery.optimizer)
        carried = attributes.get("__reduce_ex__", _NoCopy())
        carried.discard(self)
        if not carried:
            attributes.pop("__reduce_ex__", None)

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        self._left_out = closure is not None
        updates = self._surgery.updates
        if closure is None:
            self._edit()
            if updates:
                updates.begin()
            return None
        # This comes before the optimiser moves anything, as it may before it calls the closure.
        if updates:
            updates.begin(self._surgery.parameters())

        def once() -> Any:
            if not self._left_out:
                raise RuntimeError(
                    "this optimizer evaluates its closure several times in a step, as LBFGS does: surgery "
                    "needs one that does so once"
                )
            with torch.enable_grad():
                result = closure()
            self._left_out = False
            self._edit()
            return result

        return (optimizer, once), {k: v for k, v in kwargs.items() if k != "closure"}

    def _after(self, *_: Any) -> None:
        if self._left_out and self._surgery.captured:
            raise RuntimeError(
                "this optimizer stepped without its closure, and without the surgery that was to follow it: "
                "run the backwards yourself, and call step() without a closure"
            )
        if self._surgery.updates:
            self._surgery.updates.end()


class _NoCopy(set):
    """In the place of an optimiser's `__reduce_ex__`: the hooks that it carries."""

    def __call__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "this optimizer carries surgery as a hook, which a copy or pickle would lose: call "
            "surgery.remove() first, or save optimizer.state_dict()"
        )


class _Unscaled:
    """What was captured, in the shape of an optimiser that a GradScaler unscales and steps."""

    param_groups: list[dict]

    def step(self) -> bool:
        return True


def _called_by_scaler() -> bool:
    frame: FrameType | None = sys._getframe()
    code = torch.amp.GradScaler.step.__code__
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals["self"].is_enabled()
        frame = frame.f_back
    return False


def check_margin(caller: str, margin: object) -> None:
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise TypeError(f"{caller}: margin must be a number, got {type(margin).__name__}")
    if not 0 <= margin < float("inf"):
        raise ValueError(f"{caller}: margin must be 0 or more, and finite, got {margin}")


def check_keywords(caller: str, kind: type, given: dict[str, Any]) -> None:
    """Raise where a dataclass has no such field, in the name of the class that was called."""
    for name in given.keys() - {known.name for known in fields(kind)}:
        raise TypeError(f"{caller}.__init__() got an unexpected keyword argument {name!r}")
