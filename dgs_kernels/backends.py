"""Which implementation serves a call, and why.

Four backends, each with the same function per operation: `cuda` and `cpu` are the native library's compiled
kernels, `triton` the portable GPU kernels, `eager` the formulas of `reference.py`. The best one that exists
for a device serves it; the environment variable `DGS_KERNELS_BACKEND` makes the choice explicit.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VARIABLE = "DGS_KERNELS_BACKEND"
BACKENDS = ("cuda", "triton", "cpu", "eager")
OPERATIONS = (
    "project_align",
    "project_align_",
    "gramian",
    "combine_",
    "surgery_head",
    "spectral_entropy",
    "surgery_adamw_",
)

# The side of a patch in pixels that DGS-Net uses.
KERNEL_PATCH_SIZE = 32
# What the kernels of an operation take; eager PyTorch serves the rest.
LIMITS = {
    "spectral_entropy": f"patches of {KERNEL_PATCH_SIZE} x {KERNEL_PATCH_SIZE} pixels, not of float64 images"
}

# Best first. Devices not named here are served by eager PyTorch.
PREFERENCE = {"cuda": ("cuda", "triton", "eager"), "cpu": ("cpu", "eager"), "xpu": ("triton", "eager")}


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve the call."""


# `os.environ` encodes a name at every look, a tenth of a small call; what it looks into is read here.
_read = getattr(os.environ, "_data", os.environ).get
_KEY = os.environ.encodekey(VARIABLE) if hasattr(os.environ, "_data") else VARIABLE


def implementation(operation: str, device_type: str, case: str | None = None) -> Callable:
    """The function that serves `operation` on tensors of this device type.

    `case` says why a call is one that eager PyTorch alone serves.

    Raises:
        BackendError: `DGS_KERNELS_BACKEND` names a backend that does not exist or cannot serve the call.
    """
    return _implementation(operation, device_type, _read(_KEY), case)


@functools.cache
def _implementation(operation: str, device_type: str, forced: Any, case: str | None) -> Callable:
    if forced:
        forced = os.fsdecode(forced)
        if forced not in BACKENDS:
            raise BackendError(f"{VARIABLE}={forced}: expected one of {', '.join(BACKENDS)}")
        if reason := obstacle(forced, operation, device_type, case):
            raise BackendError(f"{VARIABLE}={forced} cannot serve {operation} on {device_type}: {reason}")
        return _load(forced, operation)
    reasons: list[str] = []
    for backend in PREFERENCE.get(device_type, ("eager",)):
        reason = obstacle(backend, operation, device_type, case)
        if reason is None:
            if reasons:
                warnings.warn(
                    f"dgs_kernels: {operation} on {device_type} falls back to the {backend} backend "
                    f"({'; '.join(reasons)})",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return _load(backend, operation)
        reasons.append(f"{backend}: {reason}")
    raise AssertionError("eager serves every operation")


def obstacle(backend: str, operation: str, device_type: str, case: str | None = None) -> str | None:
    """Why a backend cannot serve an operation on a device type; None if it can."""
    if backend == "eager":
        return None
    if case:
        return case
    if backend == "triton":
        return _triton_obstacle(operation, device_type)
    if device_type != backend:
        return f"it serves {backend} tensors only"
    if reason := _native_obstacle():
        return reason
    native = importlib.import_module("dgs_kernels._native")
    if backend not in native.devices.split():
        return f"the native library was built without {backend} kernels"
    if not hasattr(native, operation):
        return "the native library was built from older sources; reinstall"
    return None


def looks_by_itself(implementation: Callable) -> bool:
    """Whether it is a native function, which takes any arguments and says why it does not serve."""
    return isinstance(implementation, types.BuiltinFunctionType)


def _load(backend: str, operation: str) -> Callable:
    file = "dgs_kernels._native" if backend in ("cpu", "cuda") else f"dgs_kernels.{backend}.{operation}"
    return getattr(importlib.import_module(file), operation)


@functools.cache
def _native_obstacle() -> str | None:
    """Load the native library; why that was not possible, or None."""
    libraries = sorted(Path(__file__).parent.glob("_native*.so"))
    if not libraries:
        return "the native library was not built; reinstall with a C++ compiler on the PATH"
    try:
        importlib.import_module("dgs_kernels._native")
    except (ImportError, AttributeError) as error:
        # AttributeError: a torch without DLPack's exchange API.
        return f"{libraries[0].name} could not be loaded: {str(error).splitlines()[0]}"
    return None


def _triton_obstacle(operation: str, device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(f"dgs_kernels.triton.{operation}") is None:
        return "it has no such kernel"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton serves CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
    if device_type not in ("cpu", "cuda", "xpu"):
        return f"triton has no {device_type} support here"
    return None


def explain() -> str:
    """Which backend serves each operation on each device, why the others do not, and what kernels take.

    `python -m dgs_kernels` prints it.

    Example:
        >>> import dgs_kernels
        >>> print(dgs_kernels.explain())  # doctest: +ELLIPSIS
        dgs_kernels ...
    """
    forced = os.environ.get(VARIABLE)
    lines = [f"dgs_kernels with torch {torch.__version__}; {VARIABLE}={forced or '(not set)'}"]
    for device in ("cpu", "cuda"):
        present = device == "cpu" or torch.cuda.is_available()
        lines.append(f"{device}:" + ("" if present else " no such device is visible"))
        for operation in OPERATIONS:
            obstacles = {backend: obstacle(backend, operation, device) for backend in BACKENDS}
            if forced:
                chosen = forced if obstacles.get(forced, "unknown") is None else "none: an error"
            else:
                chosen = next(b for b in PREFERENCE[device] if obstacles[b] is None)
            limit = f"; kernels take {LIMITS[operation]}" if operation in LIMITS else ""
            lines.append(f"  {operation}: {chosen}{limit}")
            for backend, reason in obstacles.items():
                lines.append(f"    {backend:7s}{reason or 'available'}")
    return "\n".join(lines)
