"""Tensors of every kind that torch wraps: an operation gives what it gives of the same numbers in memory, or
raises, and the process lives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import functionalize

import dgs_kernels
from dgs_kernels import backends
from tests.dgs_kernels.ops.lists import Marked
from tests.dgs_kernels.test_arguments import call, valid

REFUSED = (ValueError, TypeError, RuntimeError, NotImplementedError)


def zeros(x):
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


def later_zeros(x):
    """A part of zeros that begins far behind where they would begin, were they somewhere."""
    return torch._efficientzerotensor((10**6 + x.numel(),), dtype=x.dtype)[10**6 :].view(x.shape)


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def freed_part(x):
    whole = x.new_zeros(10**6 + x.numel())
    part = whole[10**6 :].view(x.shape)
    whole.untyped_storage().resize_(0)
    return part


def negated(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def negated_in_a_row(x):
    """Without gaps, as the imaginary part of a conjugate is not: a view of all that lies behind that."""
    pairs = torch.cat([-x.flatten(), x.new_zeros(2 - x.numel() % 2)]).view(-1, 2)
    return torch.view_as_complex(pairs).conj().imag.as_strided(x.shape, x.stride(), 0)


def quantised(x):
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


# Made of the numbers of a tensor; `SAME` hold them, others are refused.
SAME = {
    "subclass": lambda x: x.clone().as_subclass(Marked),
    "negated": negated,
    "negated in a row": negated_in_a_row,
}
ZEROS = {"zeros": zeros, "part of zeros": later_zeros}
NOWHERE = {
    "freed": freed,
    "part of freed": freed_part,
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x]),
    "jagged": lambda x: torch.nested.nested_tensor([x], layout=torch.jagged),
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.reshape(len(x) if x.dim() else 1, -1).to_sparse_csr(),
    "bsr": lambda x: x.reshape(len(x) if x.dim() else 1, -1).to_sparse_bsr((1, 1)),
    "quantised": quantised,
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
}
WRITTEN = {"project_align_": ("grads",), "combine_": ("grads",)}
WRITTEN["surgery_adamw_"] = ("params", "exp_avgs", "exp_avg_sqs", "steps", "sums")


def first(value):
    """A tensor in an argument: itself, or the last of the lists."""
    while isinstance(value, list) and value:
        value = value[-1]
    return value


def replaced(value, tensor):
    if not isinstance(value, list):
        return tensor
    return [*value[:-1], replaced(value[-1], tensor)]


def places(operation):
    """The names of the arguments that hold tensors."""
    return [name for name, value in valid(operation).items() if isinstance(first(value), torch.Tensor)]


def outcome(operation, arguments):
    """What is returned and what is written, in memory."""
    result = call(operation, arguments)
    tensors = result if isinstance(result, (tuple, torch.Tensor)) else ()
    tensors = list(tensors) if isinstance(tensors, tuple) else [tensors]
    for name in WRITTEN.get(operation, ()):
        tensors.append(first(arguments[name]))
    return [torch.zeros_like(t) + t for t in tensors if isinstance(t, torch.Tensor)]


def alike(operation, name, make, numbers=lambda x: x):
    """The wrapper gives what its numbers give."""
    given = valid(operation)
    plain = replaced(given[name], numbers(first(given[name])).clone())
    wrapped = replaced(given[name], make(numbers(first(given[name]))))
    others = [copy.deepcopy({k: v for k, v in given.items() if k != name}) for _ in range(2)]
    wanted = outcome(operation, {k: others[0].get(k, plain) for k in given})
    got = outcome(operation, {k: others[1].get(k, wrapped) for k in given})
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x.as_subclass(torch.Tensor), y, rtol=1e-5, atol=1e-6, equal_nan=True)


CASES = [(operation, name) for operation in backends.OPERATIONS for name in places(operation)]
# torch itself refuses a fake tensor among real ones with this error.
SEEN_BY_MODES = (AssertionError,)


@pytest.fixture(params=["fast", "eager"], autouse=True)
def served(request, monkeypatch):
    if request.param == "fast":
        if reason := backends.obstacle("cpu", "project_align", "cpu"):
            pytest.skip(reason)
        monkeypatch.delenv(backends.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(backends.VARIABLE, "eager")


@pytest.mark.parametrize("operation, name", CASES)
def test_numbers_that_are_there_count(operation, name):
    for make in SAME.values():
        # The hooks make `sums` themselves.
        if name != "sums":
            alike(operation, name, make)


@pytest.mark.parametrize("operation, name", CASES)
def test_zeros_that_lie_nowhere_are_zeros(operation, name):
    for make in ZEROS.values():
        if name in WRITTEN.get(operation, ()):
            with pytest.raises(REFUSED):
                alike(operation, name, make, torch.zeros_like)
        else:
            alike(operation, name, make, torch.zeros_like)


@pytest.mark.parametrize("operation, name", CASES)
# torch warns that a kind is new or old.
@pytest.mark.filterwarnings("ignore")
def test_others_are_refused(operation, name):
    for kind, make in NOWHERE.items():
        arguments = valid(operation)
        numbers = first(arguments[name])
        # torch has no single numbers of these kinds.
        if numbers.dim() == 0 and kind in ("jagged", "mkldnn"):
            continue
        wrapped = make(numbers)
        arguments[name] = replaced(arguments[name], wrapped)
        if operation == "spectral_entropy" and kind in ("meta", "fake"):
            # This operation has one tensor, so nothing is of another kind.
            assert call(operation, arguments).device == wrapped.device
        else:
            with pytest.raises((*REFUSED, *SEEN_BY_MODES)):
                call(operation, arguments)
                pytest.fail(f"{kind} was served")


def of_one(operation, name):
    """The operation as a function of the first tensor of one argument."""

    def function(x):
        given = valid(operation)
        return outcome(operation, given | {name: replaced(given[name], x)})[0]

    return function


@pytest.mark.parametrize("operation, name", CASES)
def test_functionalized(operation, name):
    """What only reads is served, what writes is refused: torch functionalizes no such operator of others."""
    function = of_one(operation, name)

    x = first(valid(operation)[name])
    if operation in WRITTEN:
        with pytest.raises(RuntimeError):
            functionalize(function)(x)
    else:
        torch.testing.assert_close(functionalize(function)(x), function(x))


@pytest.mark.parametrize("operation, name", CASES)
def test_mapped(operation, name):
    """vmap has rules for tensors and none for lists of them, where the error says what to do."""
    function = of_one(operation, name)

    x = first(valid(operation)[name])
    if isinstance(valid(operation)[name], list) or operation in WRITTEN:
        with pytest.raises(NotImplementedError, match=f"{operation} takes lists .* call it in a loop"):
            torch.func.vmap(function)(torch.stack([x, x]))
        return
    got = torch.func.vmap(function, randomness="same")(torch.stack([x, x]))
    torch.testing.assert_close(got, torch.stack([function(x)] * 2), rtol=1e-5, atol=1e-6)


def test_single_columns_of_a_conjugate_are_read_as_torch_reads_them():
    """Rows of one number, two apart in memory: a kernel that takes strides would read them as they lie."""
    x = torch.tensor([[1.0], [-2.0], [3.0]])
    got = dgs_kernels.project_align(negated(x), torch.ones(3, 1), rule="full", eps=0.5)
    torch.testing.assert_close(got, dgs_kernels.project_align(x, torch.ones(3, 1), rule="full", eps=0.5))
