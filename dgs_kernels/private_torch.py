"""What torch keeps to itself, and the way past its dispatcher or the hooks have to know: its private
functions, all of them here.

`tests/dgs_kernels/test_private_torch.py` shows what breaks without each.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

# How many modes want to see every operator: fake tensors, counters of operations, tracers.
dispatch_modes = torch._C._len_torch_dispatch_stack
# Whether a profiler writes down every operator.
profiled = torch.autograd._profiler_enabled
# Whether one of `torch.func`'s transforms is at work, whose tensors have no memory of their own.
transformed = torch._C._are_functorch_transforms_active

# Whether a tensor is one of zeros that lie nowhere.
is_zero_tensor = torch._C.TensorBase._is_zerotensor


def store() -> torch.distributed.Store:
    """Through which the ranks have found each other."""
    return torch.distributed.distributed_c10d._get_default_store()


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on, whose tangents kernels do not carry along."""
    return forward_ad._current_level >= 0


def watched() -> bool:
    """Whether torch wants to see each operator: tracing, a dispatch mode, the profiler, forward mode."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return bool(traced or dispatch_modes() or profiled() or forward_ad._current_level >= 0)
