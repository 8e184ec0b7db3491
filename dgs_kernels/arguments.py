"""What arguments have to be before torch's dispatcher sees them, and the words where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dgs_kernels import private_torch

# Those of NumPy too, and those that torch.compile does not know yet.
NUMBER: Any = (int, float, Real, torch.SymInt, torch.SymFloat)
WHOLE: Any = (int, Integral, torch.SymInt)


def check_tensors(caller: str, **tensors: object) -> None:
    """Raise a TypeError unless all are dense tensors."""
    # Sparse tensors are none of those that torch.compile traces, and dynamo does not read the layout.
    reads_layouts = not torch.compiler.is_compiling()
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{caller}: {name} must be a torch.Tensor, got {type_name(x)}")
        if reads_layouts and x.layout != torch.strided:
            raise TypeError(f"{caller}: {name} must be a dense tensor (.to_dense()), got layout {x.layout}")
        if x.is_nested:
            raise TypeError(
                f"{caller}: {name} must be a dense tensor (.to_padded_tensor(0)), got a nested one"
            )


def check_items(caller: str, **lists: Sequence[object]) -> None:
    """Raise a TypeError unless all are lists of dense tensors."""
    for name, items in lists.items():
        check_tensors(caller, **{f"{name}[{i}]": x for i, x in enumerate(items)})


def check_choice(caller: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{caller}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_class(caller: str, name: str, value: object, kind: type | tuple[()]) -> None:
    """Raise a TypeError unless it is None or of this class; `()` stands for one that this torch lacks."""
    if value is not None and not isinstance(value, kind):
        expected = f"a {kind.__module__}.{kind.__qualname__} or None" if kind else "None"
        raise TypeError(f"{caller}: {name} must be {expected}, got {type_name(value)}")


def check_whole(caller: str, name: str, value: Any) -> None:
    """Raise unless it is a whole number of at least 1."""
    if not isinstance(value, WHOLE):
        raise TypeError(f"{caller}: {name} must be an integer, got {type_name(value)}")
    if value < 1:
        raise ValueError(f"{caller}: {name} must be >= 1, got {value}")


def check_number(caller: str, name: str, value: object) -> None:
    if not isinstance(value, NUMBER):
        raise TypeError(f"{caller}: {name} must be a number, got {type_name(value)}")


def refuse_forward_mode(caller: str, *arguments: object) -> None:
    """Raise where a tensor, in a list or not, has a tangent that the operation would lose."""
    if not private_torch.forward_mode():
        return
    for x in (x for argument in arguments for x in (argument if isinstance(argument, list) else [argument])):
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{caller} has no forward-mode derivative (jvp): it edits gradients, which flow backward; "
                "use backward() or torch.autograd.grad"
            )


def type_name(x: object) -> str:
    return "None" if x is None else f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
