"""An operation, declared: torch's operator with its fake kernel and gradient, and the way past torch to a
kernel.

What an implementation is, in every backend: a function of the operation's name in a file of that name
(`dgs_kernels/eager`, `dgs_kernels/triton`, `csrc/torch/module.cpp`). It takes the arguments of the operator,
then the results, which it fills, and returns None. A native function looks at its arguments by itself, in a
fraction of the time that Python takes: where tensors are not the usual ones (dense, of one dtype and device,
of shapes that fit, of no subclass), it touches nothing and returns the reason. So the usual call reaches it
through little of Python and past torch's dispatcher, and only an unusual one is checked and laid out here.

So each rule has one home. What a kernel can read is the native functions' affair (csrc/calls.h). What a user
may pass, which is more, and the words where it does not fit, are said here and in `dgs_kernels/ops`, as
backends without the native library are in need of them too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dgs_kernels import backends, private_torch
from dgs_kernels.arguments import refuse_forward_mode
from dgs_kernels.tensors import NO_MEMORY, in_a_row, refuse_freed, refuse_zero_tensors

_library = torch.library.Library("dgs", "FRAGMENT")

# The arguments of an operator, under the names of its schema.
Named = Any
# Of such arguments, and of lists of such tensors or of integers, torch's dispatcher would make nothing else.
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = _TENSORS | {type(None), float, int, bool, str, torch.dtype}


class Operation:
    """One operator `dgs::NAME`; calling it with its arguments takes the shortest way that is open.

    Every function is given the operator's arguments by name.

    Args:
        schema: of the operator, as torch writes it. The first argument says which device serves a call.
        check: raises what the public function documents; what `kinds` looks at is right by then.
        lay_out: checked arguments of any type and layout as kernels read them, lists in any dense layout;
            None where there is nothing to do.
        results: memory for what a kernel returns; None where no kernel could take these arguments.
        fake: the results as they come of arguments that were not laid out, if those are others.
        kinds: what has to be looked at before torch's dispatcher, and can be read by torch.compile.
        finish: the result, of the one that the kernel has filled.
        written: the tensors that are edited in place.
        case: why eager PyTorch alone serves a call, None where kernels do.
        gradient: `setup_context` and `backward` of `torch.library.register_autograd`.
        differentiable: names of the arguments that a gradient flows back to.
    """

    def __init__(
        self,
        schema: str,
        *,
        lay_out: Callable[[Named], Named | None],
        check: Callable[[Named], object] = lambda a: None,
        results: Callable[[Named], tuple[Tensor, ...] | None] = lambda a: (),
        fake: Callable[[Named], tuple[Tensor, ...] | None] | None = None,
        kinds: Callable[[Named], None] = lambda a: None,
        finish: Callable[[Named, Tensor], Tensor] | None = None,
        written: Callable[[Named], Iterable[Tensor]] | None = None,
        case: Callable[[Named], str | None] | None = None,
        gradient: tuple[Callable, Callable] | None = None,
        differentiable: Sequence[str] = (),
    ) -> None:
        self.name = schema.partition("(")[0]
        self._check, self._kinds, self._lay_out, self._results = check, kinds, lay_out, results
        self._fake, self._finish, self._written, self._case = fake or results, finish, written, case
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.operator = getattr(torch.ops.dgs, self.name).default
        names = [argument.name for argument in self.operator._schema.arguments]
        self.arguments: Any = namedtuple(self.name, names)  # type: ignore[misc]
        self._has_lists = "[]" in schema
        self._has_one_result = len(self.operator._schema.returns) == 1
        self._differentiable = [names.index(name) for name in differentiable]
        _library.impl(self.name, self.kernel, "CompositeExplicitAutograd")
        # The kernel itself sees to negated views.
        if written is not None:
            _library.impl(self.name, torch.library.fallthrough_kernel, "Negative")
        if self._has_lists:
            _library.impl(self.name, self._refuse_mapping, "FuncTorchBatched")
        torch.library.register_fake(f"dgs::{self.name}", self._faked, lib=_library)
        self.past_torch, self._as_given = self._ways_past_torch()
        if gradient is not None:
            self._function = self._with_gradient(*gradient)

    def _with_gradient(self, setup: Callable, backward: Callable) -> Any:
        """Give the operator its gradient; returns what torch makes of both, in a fraction of the time."""

        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            setup(ctx, self.arguments(*inputs), output)

        torch.library.register_autograd(
            f"dgs::{self.name}", backward, setup_context=setup_context, lib=_library
        )

        def forward(*arguments: Any) -> Any:
            return self.kernel(*arguments)

        # Torch asks for it at every call, and making it takes a third of a small one.
        vars(forward)["__signature__"] = inspect.signature(forward)

        def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
            """One call after the other, as torch does with operators."""
            each = zip(
                *(itertools.repeat(x) if dim is None else x.unbind(dim) for x, dim in zip(arguments, in_dims))
            )
            results = [self(*one) for one in each]
            if self._has_one_result:
                return torch.stack(results), 0
            return tuple(map(torch.stack, zip(*results))), (0,) * len(results[0])

        functions = (forward, setup_context, backward, vmap)
        names = ("forward", "setup_context", "backward", "vmap")
        return type(self.name, (torch.autograd.Function,), dict(zip(names, map(staticmethod, functions))))

    def gradients(self, **of: Tensor | None) -> tuple[Tensor | None, ...]:
        """What a backward returns: the gradients of the arguments that have one, by name."""
        return tuple(of.get(name) for name in self.arguments._fields)

    def _ways_past_torch(self) -> tuple[Callable[[tuple], Any], Callable[[tuple], Any]]:
        """Two functions of all arguments, `past_torch` and `as_given`.

        They give the results of a native function, or None if none takes the arguments as they are; the first
        also where torch wants to see the call. Functions that know everything by themselves, since looking
        things up in an object, and stepping from one of its methods into the next, take a small call long.
        """
        make, written, case, differentiable = self._results, self._written, self._case, self._differentiable
        name, wants_gradient, has_one_result = self.name, self._wants_gradient, self._has_one_result
        named = functools.partial(tuple.__new__, self.arguments)
        implementation, looks_by_itself = backends.implementation, backends.looks_by_itself
        is_grad_enabled, strided = torch.is_grad_enabled, torch.strided

        def past_torch(arguments: tuple) -> Any:
            if private_torch.watched():
                return None
            if differentiable and is_grad_enabled() and wants_gradient(arguments):
                return None
            return as_given(arguments)

        def as_given(arguments: tuple) -> Any:
            first = arguments[0]
            if type(first) is list:
                first = first[0] if first else None
            if not isinstance(first, Tensor) or first.layout is not strided:
                return None
            a = named(arguments)
            if case is not None and case(a):
                return None
            serve = implementation(name, "cpu" if first.is_cpu else first.device.type)
            if not looks_by_itself(serve):
                return None
            results = make(a)
            if results is None:
                return None
            reason = serve(*arguments, *results)
            if reason is not None:
                if reason.endswith(NO_MEMORY):
                    refuse_freed(name, arguments)
                return None
            if written is not None:
                increment_version(written(a))
            return results[0] if has_one_result else results

        return past_torch, as_given

    def __call__(self, *arguments: Any) -> Any:
        """The operator, past torch's dispatcher where a native function takes the arguments as they are."""
        results = self.past_torch(arguments)
        return self.through_torch(arguments) if results is None else results

    def through_torch(self, arguments: tuple) -> Any:
        """The operator, its arguments looked at before torch does; where torch does not care, its kernel."""
        refuse_forward_mode(self.name, *arguments)
        if self._written is not None and torch.jit.is_tracing():
            raise NotImplementedError(
                f"{self.name}: torch.jit.trace leaves out operators that write into lists: use torch.compile"
            )
        is_watched = private_torch.watched()
        is_seen = is_watched or private_torch.transformed()
        wants_gradient = torch.is_grad_enabled() and self._wants_gradient(arguments)
        # This way under torch.func.grad too, which knows no operator's own formula.
        if not is_watched and (wants_gradient or not is_seen) and all(map(_is_plain, arguments)):
            if wants_gradient:
                return self._function.apply(*arguments)
            with torch.no_grad():
                return self._laid_out(arguments)
        self._kinds(self.arguments(*arguments))
        with contextlib.nullcontext() if is_seen or wants_gradient else torch.no_grad():
            return self.operator(*arguments)

    def _refuse_mapping(self, *arguments: Any) -> None:
        raise NotImplementedError(
            f"{self.name} takes lists of tensors, which torch.func.vmap cannot map: call it in a loop, once "
            "for each of tensor.unbind()"
        )

    def _wants_gradient(self, arguments: tuple) -> bool:
        for at in self._differentiable:  # noqa: SIM110 (any() of a generator takes twice as long)
            if getattr(arguments[at], "requires_grad", False):
                return True
        return False

    def kernel(self, *arguments: Any) -> Any:
        """What torch's dispatcher calls."""
        results = self._as_given(arguments)
        if results is None:
            results = self._laid_out(arguments)
        return results if self._written is None else None

    def _laid_out(self, arguments: tuple) -> Any:
        """The results, of arguments that are to be checked and laid out first."""
        a = self.arguments._make(arguments)
        self._kinds(a)
        self._check(a)
        first = next(iter(a[0]), None) if isinstance(a[0], list) else a[0]
        if first is not None:
            case = None if self._case is None else self._case(a)
            serve = backends.implementation(self.name, first.device.type, case)
            if not backends.looks_by_itself(serve):
                refuse_freed(self.name, arguments)
        if self._written is not None:
            refuse_zero_tensors(self.name, self._written(a))
        ready = self._lay_out(a)
        if ready is None:
            return ()
        results = self._results(ready)
        assert results is not None, f"{self.name}: what was laid out has no results"
        given = (in_a_row(x) if _are_tensors(x) else x for x in ready) if self._has_lists else ready
        reason = serve(*given, *results)
        # Laying out does not mend everything: sums may be of a subclass.
        if reason is not None:
            raise ValueError(f"{self.name}: {reason}")
        if self._written is not None:
            increment_version(self._written(a))
            for tensor, result in zip(self._written(a), self._written(ready)):
                if result is not tensor:
                    tensor.copy_(result)
        if not self._has_one_result:
            return results
        return results[0] if self._finish is None else self._finish(a, results[0])

    def _faked(self, *arguments: Any) -> Any:
        a = self.arguments._make(arguments)
        self._kinds(a)
        self._check(a)
        if self._written is not None:
            return None
        results = self._fake(a)
        return results[0] if results and self._has_one_result else results


def _is_plain(x: Any) -> bool:
    if type(x) is not list:
        return type(x) in _PLAIN
    kinds = set(map(type, x))
    return kinds <= _TENSORS or kinds == {int}


def _are_tensors(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and isinstance(x[0], Tensor)
