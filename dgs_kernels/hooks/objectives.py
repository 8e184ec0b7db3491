"""Gradient surgery between any number of losses, before every step of any optimiser."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from dgs_kernels.arguments import WHOLE, check_choice
from dgs_kernels.hooks.capture import BeforeStep, Capture, check_keywords, check_margin
from dgs_kernels.hooks.lasting import check_steps
from dgs_kernels.hooks.metrics import ObjectiveMetrics
from dgs_kernels.hooks.per_sample import Recorder
from dgs_kernels.hooks.places import Gradient, Part, inner_products, local, stamp
from dgs_kernels.hooks.ranks import all_reduce, average
from dgs_kernels.hooks.updates import Promise, Updates
from dgs_kernels.hooks.weightings import NAMES, Weighting, weigh
from dgs_kernels.ops.combine_ import combine_
from dgs_kernels.ops.gramian import MAX_OBJECTIVES
from dgs_kernels.tensors import sums_dtype

MODES = ("exact", "running")
TASK, RUNNING_SUM = ".grad", "sum so far"
# How many numbers a gradient's sketch has.
BUCKETS = 32
# Share of the gradients' energy: a difference of 1% in norm, as bfloat16 rounds.
REPEATED = 1e-4


@dataclass
class _Running:
    """What mode="running" keeps of a step's objectives beside the sum of their gradients."""

    sketches: dict[str, Tensor | None] = field(default_factory=dict)
    folds: list[ObjectiveMetrics] = field(default_factory=list)


class ObjectiveSurgery(Capture):
    """Train on several losses: before every step their gradients are made one that respects them all.

    Each loss's backward runs in a context that captures its gradient beside `.grad`. Before the optimiser
    steps, one pass finds the inner products of all gradients (`gramian`), a method makes weights of them, and
    one pass adds the gradients up (`combine_`). What a plain backward left in `.grad` is an objective too,
    the first. Of a loss that does not reach a parameter the gradient there is zero.

    Args:
        optimizer: any `torch.optim.Optimizer`; of a wrapper (accelerate, Lightning) the `.optimizer` inside.
        weighting: "mean", "pcgrad", "ogd" (the first objective, made orthogonal to all others), "gem" (the
            first objective, the nearest gradient that conflicts with none of the others), "mgda" or "upgrad",
            see `dgs_kernels.weightings`; or a callable from the Gramian [K, K] to weights [K], as TorchJD's
            weightings are; or a list of them, one for each layer.
        granularity: what a layer is, see `OptimizerSurgery`.
        mode: "exact" holds K gradients. "running" holds two: each objective joins the sum of those before it
            by PCGrad between the two, which for two objectives is PCGrad and for more approximates it.
        margin: of "gem", 0 or more: <g_k, d> >= margin |g_k| |g_0| for the gradient d that steps. Where no d
            within the sum of all lengths meets it, the largest common margin that one does takes its place.
        seed: of the random orders of "pcgrad"; the same on all ranks. `generator` draws them: to resume to
            the same weights, save its `get_state()`.
        model, process_group, check_ranks, track_update: see `OptimizerSurgery`. Tracking K objectives keeps a
            copy of the first one's gradient too, and costs K + 8 streams.
        scaler: the GradScaler of the loop, if there is one. Scale every loss with it.

    Raises:
        ValueError, TypeError, RuntimeError: an option that does not exist or a combination that would be
            wrong, with the remedy.

    Example:
        >>> import torch
        >>> from dgs_kernels import ObjectiveSurgery
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> surgery = ObjectiveSurgery(optimizer, weighting="pcgrad")
        >>> for loss in (w[0], w[1] - w[0]):
        ...     with surgery.objective():
        ...         loss.backward()
        >>> optimizer.step()
        >>> w.detach()
        tensor([-0.5000, -1.5000])
    """

    caller: ClassVar[str] = "ObjectiveSurgery"
    wrapped = "; if it edits .grad before it steps, call surgery.combine() first, or it finds nothing there"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weighting: str | Weighting | list[str | Weighting] = "pcgrad",
        granularity: str = "model",
        *,
        mode: str = "exact",
        margin: float = 0.0,
        seed: int = 0,
        **capture: Any,
    ) -> None:
        check_choice("ObjectiveSurgery", "mode", mode, MODES)
        for one in weighting if isinstance(weighting, list) else [weighting]:
            _check_weighting(one)
        if mode == "running" and weighting != "pcgrad":
            raise ValueError(
                'ObjectiveSurgery: mode="running" is PCGrad against a running sum: it needs '
                f'weighting="pcgrad", got {weighting!r}'
            )
        check_margin(self.caller, margin)
        if margin and any(
            one != "gem" for one in (weighting if isinstance(weighting, list) else [weighting])
        ):
            raise ValueError(f'ObjectiveSurgery: a margin needs weighting="gem", got {weighting!r}')
        if not isinstance(seed, WHOLE):
            raise TypeError(f"ObjectiveSurgery: seed must be an integer, got {type(seed).__name__}")
        check_keywords(self.caller, Capture, capture)
        if mode == "running" and capture.get("track_update"):
            raise ValueError('ObjectiveSurgery: track_update needs every gradient: use mode="exact"')
        self.weighting, self.mode, self.margin = weighting, mode, margin
        super().__init__(optimizer, granularity=granularity, **capture)
        self._check_layers()
        self.generator = torch.Generator().manual_seed(int(seed))
        self._running = _Running()
        self._numbers_checked: set[int] = set()
        self._last: ObjectiveMetrics | None = None
        self._combined: dict[Tensor, tuple] = {}
        self._recorder: Recorder | None = None
        self._hook = weakref.ref(BeforeStep(self, self._edit))

    def forget(self) -> None:
        super().forget()
        self._running = _Running()

    @contextmanager
    def objective(self, name: str | None = None, steps: int = 1) -> Iterator[None]:
        """A context: what `backward()` inside computes is the gradient of one objective; `.grad` stays.

        Without a name it is one more objective. Contexts of one name add up, over micro-batches. With `steps`
        above 1 the gradient serves so many steps, in the place that its name first had.
        """
        check_steps("objective()", steps)
        if steps > 1 and (name is None or self.mode == "running"):
            raise ValueError(
                'objective(steps=): a gradient that serves several steps needs a name, and mode="exact"'
            )
        if any(p.grad is not None and stamp(p.grad) == made for p, made in self._combined.items()):
            raise RuntimeError(
                "objective() after combine(): .grad waits for a step; with micro-batches name the objectives "
                "and call combine() after the last"
            )
        self.forget_skipped_step()
        running = self.mode == "running"
        kept = [kept for kept in self.lasting.serving if kept not in self._captured]
        seen = [*kept, *(self._running.sketches if running else self._captured)]
        name = f"objective {len(seen)}" if name is None else name
        if name in (TASK, RUNNING_SUM):
            raise ValueError(f"objective(): {name!r} is what was captured in no context: take another name")
        if running and name in seen:
            raise RuntimeError(
                f'{name!r} has joined the running sum: with mode="running" run all backwards of an objective '
                "in one context"
            )
        if not running and name not in seen and len(seen) == MAX_OBJECTIVES:
            raise RuntimeError(
                f"more than {MAX_OBJECTIVES} objectives in one step: name them, objective(name), so that "
                'micro-batches of one add up, or use mode="running"'
            )
        with self.capture(name, "objective()", steps):
            yield
        if running:
            self._fold(name)

    def combine(self) -> None:
        """Do now what the step would do: `.grad` then holds one gradient, to clip or unscale as any other."""
        scale = 1.0
        if self.scaler is not None and self.scaler.is_enabled():
            if any(p.grad is not None for p in self.parameters()):
                raise RuntimeError(
                    "combine() with a GradScaler cannot tell whether .grad is unscaled: run every backward "
                    "inside objective()"
                )
            if self.lasting.any:
                raise RuntimeError(
                    "combine() with a GradScaler, whose scale changes, cannot use kept gradients: call "
                    "objective() without steps="
                )
            scale = self.scaler.get_scale()
        self._operate(self._running, self.release(unscale=False), scale)
        self._combined = {p: stamp(p.grad) for p in self.parameters() if p.grad is not None}

    @contextmanager
    def record(self) -> Iterator[None]:
        """A context: the model runs inside, so that `per_sample` can tell its samples apart."""
        if self.model is None:
            raise ValueError("record() needs to know the layers: pass model=")
        if self._recorder is None:
            self._recorder = Recorder(self.model, self.parameters())
        with self._recorder.record():
            yield

    @torch.no_grad()
    def per_sample(self, losses: Tensor) -> None:
        """Every sample's loss is an objective: leave in `.grad` what the weighting makes of their gradients.

        The inner products of the gradients come from what layers were given and asked, not from the
        gradients, so memory does not grow with the number of losses beyond activations. It takes the place
        of `backward()`, uses the graph up, and adds to `.grad`. `metrics().gramian` is [G, B, B].

        Args:
            losses: [B], of B samples that the model was called with inside `record()`; the first dimension
                of what layers are given and give is the samples. Trained parameters must be of Linear,
                Conv1d, Conv2d, Embedding, LayerNorm, RMSNorm or GroupNorm layers.

        Raises:
            ValueError, TypeError: losses that are not [B] or have no graph, layers with another first
                dimension.
            NotImplementedError: a parameter of another kind of layer, or used without calling its layer.
            RuntimeError: nothing was recorded, samples are mixed (BatchNorm), inputs were changed in place,
                several processes train together.

        The first call with a model waits for the device once more, to see that samples are apart.
        """
        if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.requires_grad or not len(losses):
            raise ValueError("per_sample(): losses must be a tensor [B] with a graph, a loss for each sample")
        if self._recorder is None:
            raise RuntimeError("per_sample(): run the model inside record() first")
        if self.mode != "exact" or self._captured:
            raise RuntimeError('per_sample() stands alone: no objective() beside it, and mode="exact"')
        if self.updates:
            raise RuntimeError("per_sample() makes no sample's gradient that track_update could compare with")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError("per_sample() knows the samples of one process alone")
        scaled = self.scaler is not None and self.scaler.is_enabled()
        factors = self._recorder.factors(losses)
        numbers: dict[str, int] = {}
        groups = [numbers.setdefault(self.layer(p), len(numbers)) for p in factors]
        found = [factor.gramian() for factor in factors.values()]
        products = torch.zeros(len(numbers), *found[0].shape, dtype=sums_dtype(found), device=found[0].device)
        for group, its in zip(groups, found):
            products[group] += its.to(products)
        if scaled:
            products /= self.scaler.get_scale() ** 2  # type: ignore[union-attr]
        layers, samples = list(numbers), [f"sample {b}" for b in range(len(losses))]
        weights = self._weights(layers, products) if len(losses) > 1 else torch.ones_like(products[:, 0])
        for p, its, group in zip(list(factors), found, groups):
            gradient = factors.pop(p).weighted(weights[group].to(its)).view(p.shape).to(p.dtype)
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        self._last = ObjectiveMetrics(layers, samples, products, weights, margin=self.margin)

    def metrics(self) -> ObjectiveMetrics | None:
        """What the last surgery found; None if there were not two objectives. Waits for nothing."""
        return replace(self._last, **self.updates.found()) if self._last and self.updates else self._last

    # Operating -------------------------------------------------------------------------------------------

    def _edit(self) -> None:
        self._combined = {}
        if self.captured or self._open:
            self._operate(self._running, self.release())

    @torch.no_grad()
    def _operate(self, running: _Running, captured: dict, scale: float = 1.0) -> None:
        """Make one gradient in `.grad` of what was captured and of what stands there."""
        task = self.task()
        if not self.fresh and not (captured and task):
            return
        if self.mode == "running":
            self._check_sketches(running.sketches, task)
        fresh = [name for name in self.fresh if name != RUNNING_SUM]
        merged, found = self._merge({TASK: task, **captured} if task else captured, fresh, scale)
        for p, grad in merged.items():
            p.grad = grad
        self._last = found
        if self.mode == "running":
            self._last = _end_to_end([*running.folds, *([found] if found else [])])

    @torch.no_grad()
    def _fold(self, name: str) -> None:
        """Let what was captured join the running sum."""
        alone, _ = self._merge({name: self._captured.pop(name)}, [name])
        self._running.sketches[name] = None if self._numbers_checked else _sketch(alone)
        total = self._captured.pop(RUNNING_SUM, None)
        if total is not None:
            alone, found = self._merge({RUNNING_SUM: total, name: alone})
            self._running.folds += [found] if found else []
        self._captured[RUNNING_SUM] = alone

    def _merge(
        self, objectives: dict[str, Gradient], fresh: Sequence[str] = (), scale: float = 1.0
    ) -> tuple[Gradient, ObjectiveMetrics | None]:
        """One gradient of K, written where the first one's tensors are, and what was found on the way.

        `fresh` are those that `process_group` has still to average. `scale` is what all gradients were
        multiplied with; weightings shall not see it.
        """
        names, (first, *others) = list(objectives), objectives.values()
        reached = self._reached([first, *others])
        lasts = self.lasting.lasts(names[0])
        merged = {p: first[p] if p in first else torch.zeros_like(p) for p in reached}
        parts, layers = self.parts([merged, *others])
        if self.process_group is not None:
            for part, name in itertools.product(parts, fresh):
                average(part.lists[names.index(name)], self.process_group)
        places = {name: place for place, name in enumerate(names)}
        self.lasting.keep(self.fresh, parts, len(layers), places, self.process_group is not None)
        self.fresh = {}
        # The combined gradient is written where the first one's tensors are.
        if lasts:
            merged = {p: grad.clone() for p, grad in merged.items()}
            for part in parts:
                part.lists[0] = [local(merged[p]) for p in part.params]
        if not others:
            return merged, None
        products = inner_products(parts, len(layers)) / scale**2
        if self.mode == "exact":
            self._check_repeated(products.sum(0), names)
        self.compare_ranks(dict(zip(names, products.diagonal(dim1=1, dim2=2).T)))
        weights = self._weights(layers, products)
        if self.updates:
            self._expect(self.updates, parts, layers)
        for part in parts:
            mine = weights if len(parts) == 1 else weights[list(dict.fromkeys(part.groups))]
            combine_(part.lists[0], part.lists, mine.to(part.device), groups=part.groups)
        return merged, ObjectiveMetrics(
            layers, names, products, weights, margin=self.margin, refresh_cosine=dict(self.lasting.cosines)
        )

    def _expect(self, updates: Updates, parts: list[Part], layers: list[str]) -> None:
        """Have the step measured against every gradient, of which the first is about to be overwritten."""
        kept = [part.with_lists([[t.clone() for t in part.lists[0]], *part.lists[1:]]) for part in parts]
        of = dict(zip(self._all_layers(), self.weighting)) if isinstance(self.weighting, list) else {}
        promises = [_promise(of.get(layer, self.weighting)) for layer in layers]
        same = promises if of else promises[:1]
        updates.expect(layers, kept, same, functools.partial(_measure, kept, len(layers)))

    def _reached(self, objectives: list[Gradient]) -> list[Tensor]:
        """The parameters that a loss has reached: in `process_group`, on any rank."""
        params = self.parameters()
        reached = [any(p in grads for grads in objectives) for p in params]
        if self.process_group is not None:
            anywhere = torch.tensor(reached, dtype=torch.uint8, device=params[0].device)
            self.meet_ranks()
            all_reduce(anywhere, self.process_group, dist.ReduceOp.MAX)
            reached = anywhere.tolist()
        return [p for p, is_reached in zip(params, reached) if is_reached]

    def _weights(self, layers: list[str], products: Tensor) -> Tensor:
        if not isinstance(self.weighting, list):
            return weigh(self.weighting, products, self.generator, self.margin)
        of = dict(zip(self._all_layers(), self.weighting))
        each = zip((of[layer] for layer in layers), products.split(1))
        return torch.cat([weigh(weighting, its, self.generator, self.margin) for weighting, its in each])

    def _all_layers(self) -> list[str]:
        return list(dict.fromkeys(map(self.layer, self.parameters())))

    # What cannot be right --------------------------------------------------------------------------------

    def _check_sketches(self, sketches: dict[str, Tensor | None], task: Gradient) -> None:
        """What `_check_repeated` does, where the gradients themselves are gone."""
        kept = {name: sketch for name, sketch in sketches.items() if sketch is not None}
        if len(kept) == len(sketches):
            kept = {TASK: _sketch(task), **kept} if task else kept
            rows = torch.stack(list(kept.values()))
            self._check_repeated(rows @ rows.T, list(kept))

    def _check_layers(self) -> None:
        layers = self._all_layers()
        if isinstance(self.weighting, list):
            if len(self.weighting) != len(layers):
                raise ValueError(
                    f"ObjectiveSurgery: a list of weightings needs one for each of the {len(layers)} layers "
                    f"({', '.join(layers)}), got {len(self.weighting)}"
                )
        elif len(layers) > 1 and hasattr(self.weighting, "reset"):
            raise ValueError(
                f"ObjectiveSurgery: {type(self.weighting).__name__} remembers earlier Gramians, and layers "
                f"would mix: pass a list of {len(layers)}, one for each layer"
            )

    def _check_repeated(self, products: Tensor, names: list[str]) -> None:
        """At the first step with so many objectives: none may be the sum of the others; waits for the device.

        ||g_k - sum of the others||^2 is a sum over the Gramian with signs.
        """
        count = len(names)
        if count < 2 or count in self._numbers_checked:
            return
        signs = 2 * torch.eye(count, dtype=products.dtype, device=products.device) - 1
        apart = ((signs @ products) * signs).sum(1)
        energy, apart = torch.stack([products.diagonal(), apart]).tolist()
        if not 0 < sum(energy) < float("inf"):
            return
        self._numbers_checked.add(count)
        if names[0] == TASK and energy[0] == 0:
            raise RuntimeError(
                ".grad holds zeros, which would count as an objective: clear it with "
                "zero_grad(set_to_none=True)"
            )
        for name, distance in zip(names, apart):
            if distance <= REPEATED * sum(energy):
                raise RuntimeError(
                    f"the gradient of {name!r} is the sum of the others ({', '.join(names)}): a loss was "
                    "captured twice, alone and in a total; run each loss's backward once (of a loss that the "
                    "loop itself differentiates, as Lightning and HF Trainer do, return the one not captured)"
                )


def _check_weighting(weighting: object) -> None:
    if isinstance(weighting, type):
        raise TypeError(
            f"ObjectiveSurgery: weighting is the class {weighting.__name__}: pass an instance of it"
        )
    if not callable(weighting) and not (isinstance(weighting, str) and weighting in NAMES):
        raise ValueError(
            f"ObjectiveSurgery: weighting must be one of {', '.join(NAMES)}, a callable from [K, K] to [K], "
            f"or a list of these, got {weighting!r}"
        )


def _promise(weighting: object) -> Promise:
    first = 1 if weighting in ("gem", "ogd") else 0
    return Promise(first, unchanged=weighting == "ogd")


def _measure(parts: list[Part], layers: int, changes: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Inner products of the change with itself [G], with the objectives, and of each with itself [G, K]."""
    found = []
    for start in range(0, len(parts[0].lists), MAX_OBJECTIVES - 1):
        some = slice(start, start + MAX_OBJECTIVES - 1)
        each = [part.with_lists([change, *part.lists[some]]) for change, part in zip(changes, parts)]
        found.append(inner_products(each, layers))
    inner = torch.cat([products[:, 0, 1:] for products in found], 1)
    squares = torch.cat([products.diagonal(dim1=1, dim2=2)[:, 1:] for products in found], 1)
    return found[0][:, 0, 0], inner, squares


def _sketch(grads: Gradient) -> Tensor:
    """Sums of a gradient's numbers in a few buckets: linear, and equal only of equal gradients."""
    flat = [local(grad).reshape(-1) for grad in grads.values()]
    total = torch.zeros(BUCKETS, dtype=torch.float64, device=flat[0].device)
    # They are added in their own type, as a sum in another would copy them.
    for numbers in flat:
        whole = len(numbers) // BUCKETS * BUCKETS
        total += numbers[:whole].view(-1, BUCKETS).sum(0).to(total)
        total[: len(numbers) - whole] += numbers[whole:].to(total)
    return total


def _end_to_end(folds: list[ObjectiveMetrics]) -> ObjectiveMetrics | None:
    """The metrics of a running sum: an entry for each objective that joined it, and layer."""
    if not folds:
        return None
    last = folds[-1]
    # The task came last, but stands first, so that its tensors stay in .grad.
    if last.objectives[0] == TASK:
        flipped = last.gramian.flip(1, 2), last.weights.flip(1)
        folds = [*folds[:-1], ObjectiveMetrics(last.layers, [RUNNING_SUM, TASK], *flipped)]
    return ObjectiveMetrics(
        [f"{fold.objectives[1]}/{layer}" for fold in folds for layer in fold.layers],
        [RUNNING_SUM, "objective"],
        torch.cat([fold.gramian for fold in folds]),
        torch.cat([fold.weights for fold in folds]),
    )
