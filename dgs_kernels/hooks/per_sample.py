"""Inner products of the gradients of every sample's loss, without those gradients.

A linear layer's gradient for sample b is G_b^T A_b, from what the layer was given, A_b [T, I], and the
gradient of the loss with respect to what it gave, G_b [T, O]. With one row for a sample (T = 1) the inner
product of two samples' gradients is (A_b . A_c) (G_b . G_c) (Goodfellow 2015, arXiv 1510.01799); with
several, whichever costs less of the same sum over pairs of rows and of the gradients themselves, a slice of
the layer at a time. So one backward to the layers' outputs is all that the graph is asked for, and the
memory is that of activations and of their gradients, whatever the number of samples and of parameters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dgs_kernels.tensors import sums_dtype

# Numbers of one layer that are held at a time beside activations: 4 MiB of float32, which caches hold.
BLOCK = 2**20


class Rows(NamedTuple):
    """The gradients themselves, [B, n], where they are no more than activations are."""

    gradients: Tensor

    @classmethod
    def joined(cls, calls: list[Rows]) -> Rows:
        return cls(torch.stack([call.gradients for call in calls]).sum(0)) if len(calls) > 1 else calls[0]

    def gramian(self) -> Tensor:
        return self.gradients @ self.gradients.T

    def weighted(self, weights: Tensor) -> Tensor:
        return weights @ self.gradients


class Product(NamedTuple):
    """Gradients G_b^T A_b [S, O, I] of S slices of a weight: given [B, S, T, I], asked [B, S, T, O]."""

    given: Tensor
    asked: Tensor

    @classmethod
    def joined(cls, calls: list[Product]) -> Product:
        """What a layer that is called several times adds up over its calls."""
        return cls(*(torch.cat(parts, 2) if len(calls) > 1 else parts[0] for parts in zip(*calls)))

    def gramian(self) -> Tensor:
        samples, slices, rows, width = self.given.shape
        outputs = self.asked.shape[3]
        of_pairs = samples**2 * rows**2 * (width + outputs)
        of_gradients = samples * width * outputs * (rows + samples)
        if slices == 1 and of_pairs < of_gradients:
            return _by_pairs(self.asked[:, 0], lambda few: _products(self.given[few, 0], self.given[:, 0]))
        narrow, wide = sorted(self, key=lambda x: x.shape[3])
        total, width = wide.new_zeros(samples, samples), wide.shape[3]
        step = max(1, BLOCK // (samples * slices * width))
        held = wide.new_empty(samples * slices * min(step, narrow.shape[3]) * width)
        for some in narrow.split(step, 3):
            shape = (samples * slices, some.shape[3], width)
            gradients = held[: math.prod(shape)].view(shape)
            torch.bmm(some.mT.flatten(0, 1), wide.flatten(0, 1), out=gradients)
            gradients = gradients.view(samples, -1)
            total.addmm_(gradients, gradients.T)
        return total

    def weighted(self, weights: Tensor) -> Tensor:
        given, asked = self
        samples, slices, rows, width = given.shape
        of = weights.view(-1, 1, 1, 1)
        # The narrower one, whose copy is smaller.
        given, asked = (given * of, asked) if width < asked.shape[3] else (given, asked * of)
        given, asked = (x.transpose(0, 1).reshape(slices, samples * rows, -1) for x in (given, asked))
        return asked.mT @ given


class Lookup(NamedTuple):
    """Gradients of a table's rows: places [B, T], asked [B, T, D]; [N, D] is the table's shape."""

    places: Tensor
    asked: Tensor
    shape: torch.Size

    @classmethod
    def joined(cls, calls: list[Lookup]) -> Lookup:
        places, asked, shapes = zip(*calls)
        return cls(torch.cat(places, 1), torch.cat(asked, 1), shapes[0])

    def gramian(self) -> Tensor:
        return _by_pairs(
            self.asked,
            lambda few: (self.places[few].flatten()[:, None] == self.places.flatten()).to(self.asked.dtype),
        )

    def weighted(self, weights: Tensor) -> Tensor:
        asked = (self.asked * weights.view(-1, 1, 1)).flatten(0, 1)
        return asked.new_zeros(self.shape).index_add_(0, self.places.flatten(), asked)


Factor = Rows | Product | Lookup


def _products(few: Tensor, rows: Tensor) -> Tensor:
    return few.flatten(0, 1) @ rows.flatten(0, 1).T


def _by_pairs(asked: Tensor, given: Callable[[slice], Tensor]) -> Tensor:
    """[B, B], sums over all pairs of rows of a product of two inner products, some samples at a time.

    `asked` is [B, T, O]; `given` has the other factor, [samples * T, B * T], for some of the samples.
    """
    samples, rows, _ = asked.shape
    step = max(1, BLOCK // (samples * rows * rows))
    parts = []
    for first in range(0, samples, step):
        few = slice(first, min(first + step, samples))
        pairs = _products(asked[few], asked).mul_(given(few))
        parts.append(pairs.view(-1, rows, samples, rows).sum((1, 3)))
    return torch.cat(parts)


# Layers -------------------------------------------------------------------------------------------------


def _linear(layer: nn.Linear, given: Tensor, asked: Tensor) -> Iterator[tuple[str, Factor]]:
    given, asked = (x.reshape(len(x), 1, -1, x.shape[-1]) for x in (given, asked))
    yield "weight", Product(given, asked)
    yield "bias", Rows(asked.sum((1, 2)))


def _convolution(layer: nn.Conv1d | nn.Conv2d, given: Tensor, asked: Tensor) -> Iterator[tuple[str, Factor]]:
    # A sequence is an image of one row.
    if given.dim() == 3:
        given, asked = given[:, :, None], asked[:, :, None]
    kernel, stride, dilation = (
        (1,) * (2 - len(x)) + tuple(x) for x in (layer.kernel_size, layer.stride, layer.dilation)
    )
    if isinstance(layer.padding, str):
        extents = [d * (k - 1) if layer.padding == "same" else 0 for d, k in zip(dilation, kernel)]
        around = [(extent // 2, extent - extent // 2) for extent in extents]
    else:
        around = [(0, 0)] * (2 - len(layer.padding)) + [(width, width) for width in layer.padding]
    given = F.pad(given, [*around[1], *around[0]])
    # Windows are [B, C * k * k, T].
    windows = F.unfold(given, kernel, dilation, stride=stride)
    given = windows.unflatten(1, (layer.groups, -1)).mT
    asked = asked.flatten(2).unflatten(1, (layer.groups, -1)).mT
    yield "weight", Product(given, asked)
    yield "bias", Rows(asked.sum(2).flatten(1))


def _embedding(layer: nn.Embedding, given: Tensor, asked: Tensor) -> Iterator[tuple[str, Factor]]:
    places, asked = given.reshape(len(given), -1), asked.reshape(len(given), -1, asked.shape[-1])
    if layer.padding_idx is not None:
        asked = asked * (places != layer.padding_idx)[..., None]
    yield "weight", Lookup(places, asked, layer.weight.shape)


def _norm_of_last(
    layer: nn.LayerNorm | nn.RMSNorm, given: Tensor, asked: Tensor
) -> Iterator[tuple[str, Factor]]:
    if isinstance(layer, nn.LayerNorm):
        normal = F.layer_norm(given, layer.normalized_shape, eps=layer.eps)
    else:
        normal = F.rms_norm(given, layer.normalized_shape, eps=layer.eps)
    shape = (len(given), -1, math.prod(layer.normalized_shape))
    yield "weight", Rows((normal * asked).reshape(shape).sum(1))
    yield "bias", Rows(asked.reshape(shape).sum(1))


def _norm_of_groups(layer: nn.GroupNorm, given: Tensor, asked: Tensor) -> Iterator[tuple[str, Factor]]:
    normal = F.group_norm(given, layer.num_groups, eps=layer.eps)
    shape = (*given.shape[:2], -1)
    yield "weight", Rows((normal * asked).reshape(shape).sum(2))
    yield "bias", Rows(asked.reshape(shape).sum(2))


LAYERS: dict[type[nn.Module], Callable[..., Iterator[tuple[str, Factor]]]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _norm_of_last,
    nn.RMSNorm: _norm_of_last,
    nn.GroupNorm: _norm_of_groups,
}
NAMES = ", ".join(kind.__name__ for kind in LAYERS)


def _kind(module: nn.Module) -> Callable[..., Iterator[tuple[str, Factor]]] | None:
    """What makes factors of a layer; None of one that computes something else than its class says."""
    for kind, make in LAYERS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            zeros = getattr(module, "padding_mode", "zeros") == "zeros"
            plain = not any(
                getattr(module, key, None) for key in ("sparse", "max_norm", "scale_grad_by_freq")
            )
            return make if zeros and plain else None
    return None


# Recording ----------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """A layer's call: what it was given, and where the graph goes on from what it gave."""

    layer: nn.Module
    given: Tensor
    version: int
    edge: GradientEdge
    shape: torch.Size


class Recorder:
    """What the layers of `model` that own `parameters` are given while `record` is open."""

    def __init__(self, model: nn.Module, parameters: list[Tensor]) -> None:
        self.model = model
        trained = {p for p in parameters if p.requires_grad}
        self._layers = [
            module
            for module in model.modules()
            if _kind(module) and any(p in trained for p in module.parameters(recurse=False))
        ]
        self._trained = trained
        self._calls: list[_Call] = []
        # The layers of a former batch, in the order of their calls.
        self._checked: tuple | None = None

    def clear(self) -> None:
        self._calls = []

    @contextmanager
    def record(self) -> Iterator[None]:
        def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            given = args[0] if args else kwargs["input"]
            if output.requires_grad:
                edge = get_gradient_edge(output)
                self._calls.append(_Call(layer, given.detach(), given._version, edge, output.shape))

        # The first to see an output: other hooks may replace it.
        hooks = [layer.register_forward_hook(note, prepend=True, with_kwargs=True) for layer in self._layers]
        try:
            yield
        except BaseException:
            self.clear()
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def factors(self, losses: Tensor) -> dict[Tensor, Factor]:
        """What the gradients of the losses [B] are made of, by parameter; the graph is used up."""
        calls, self._calls = self._calls, []
        if not calls and self._layers:
            raise RuntimeError("per_sample(): no layer was recorded: run the model inside record()")
        self._check_shapes(calls, len(losses))
        edges = [call.edge for call in calls]
        order = tuple(id(call.layer) for call in calls)
        if order != self._checked:
            self._check_reached(calls, losses)
            first = torch.zeros_like(losses)
            first[0] = 1
            alone = torch.autograd.grad(losses, edges, first, retain_graph=True, allow_unused=True)
            self._check_independent(calls, alone)
            self._checked = order
        asked = torch.autograd.grad(losses, edges, torch.ones_like(losses), allow_unused=True)
        found: dict[Tensor, list[Factor]] = {}
        for call, gradient in zip(calls, asked):
            if gradient is None:
                continue
            given = call.given
            if given.is_floating_point():
                dtype = sums_dtype([given, gradient])
                given, gradient = given.to(dtype), gradient.to(dtype)
            else:
                gradient = gradient.to(sums_dtype([gradient]))
            make = _kind(call.layer)
            assert make is not None
            with torch.autocast(gradient.device.type, enabled=False):
                for name, factor in make(call.layer, given, gradient):
                    parameter = getattr(call.layer, name, None)
                    if parameter in self._trained:
                        found.setdefault(parameter, []).append(factor)
        return {parameter: self._joined(parameter, its) for parameter, its in found.items()}

    def _joined(self, parameter: Tensor, factors: list[Any]) -> Factor:
        kind = type(factors[0])
        if any(type(factor) is not kind for factor in factors):
            raise NotImplementedError(
                f"per_sample(): {self._name(parameter)} is shared by layers of different kinds"
            )
        return kind.joined(factors)

    # What cannot be right --------------------------------------------------------------------------------

    def _check_shapes(self, calls: list[_Call], samples: int) -> None:
        for call in calls:
            if call.given.shape[:1] != (samples,) or call.shape[:1] != (samples,):
                raise ValueError(
                    f"per_sample(): the first dimension of {self._layer_name(call.layer)} must be the "
                    f"{samples} samples, got {list(call.given.shape)} in and {list(call.shape)} out"
                )
            if call.given._version != call.version:
                raise RuntimeError(
                    f"per_sample(): what {self._layer_name(call.layer)} was given was changed in place "
                    "afterwards (inplace=True?)"
                )

    def _check_reached(self, calls: list[_Call], losses: Tensor) -> None:
        """Every way from the losses to a parameter must be a call that was recorded."""
        ways, seen, waiting = Counter[Tensor](), {losses.grad_fn}, [losses.grad_fn]
        while waiting:
            for node, _ in waiting.pop().next_functions:  # type: ignore[union-attr]
                parameter = getattr(node, "variable", None)
                if parameter is not None:
                    ways[parameter] += 1
                elif node is not None and node not in seen:
                    seen.add(node)
                    waiting.append(node)
        recorded = Counter[Tensor](p for call in calls for p in call.layer.parameters(recurse=False))
        for parameter in self._trained:
            if ways[parameter] > recorded[parameter]:
                raise NotImplementedError(
                    f"per_sample(): {self._name(parameter)} is not used by calling a layer of a kind whose "
                    f"samples can be told apart: {NAMES}; freeze it, or give it an optimiser of its own"
                )

    def _check_independent(self, calls: list[_Call], alone: tuple[Tensor | None, ...]) -> None:
        for call, gradient in zip(calls, alone):
            # A NaN passes: it is another fault.
            if gradient is not None and (gradient[1:].abs() > 0).any():
                raise RuntimeError(
                    "per_sample(): the loss of the first sample depends on others at "
                    f"{self._layer_name(call.layer)}: the first dimension must be the samples everywhere, "
                    "and nothing may mix them, as statistics of a batch do (GroupNorm in place of BatchNorm)"
                )

    def _name(self, parameter: Tensor) -> str:
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        return names.get(parameter, "a parameter that is not the model's")

    def _layer_name(self, layer: nn.Module) -> str:
        names = {module: name for name, module in self.model.named_modules()}
        return f"{names[layer] or 'the model'} ({type(layer).__name__})"
