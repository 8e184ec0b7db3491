"""Where gradients lie: the parts of tensors that this process has, by device and mesh."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dgs_kernels.hooks.ranks import is_sharded
from dgs_kernels.ops.gramian import gramian
from dgs_kernels.tensors import sums_dtype

# A gradient, by parameter.
if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Gradient = dict[Tensor, Tensor]


@dataclass
class Part:
    """K gradients of T parameters that live on one device and are split over the same processes.

    `meshes` are the mesh dimensions that the rest of each tensor is spread over, `lists` K lists of T
    tensors, and `groups` the layers of the parameters, 0..G-1.
    """

    device: torch.device
    meshes: tuple
    lists: list[list[Any]]
    params: list[Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def fill(self, shared: bool) -> None:
        """Zeros where a loss does not reach a parameter: views of a common tensor, or own ones."""
        missing = [(tensors, i) for tensors in self.lists for i, t in enumerate(tensors) if t is None]
        most = max((self.lists[0][i].numel() for _, i in missing), default=0)
        zeros: dict[torch.dtype, Tensor] = {}
        for tensors, i in missing:
            like = self.lists[0][i]
            if shared:
                if like.dtype not in zeros:
                    zeros[like.dtype] = like.new_zeros(most)
                tensors[i] = zeros[like.dtype][: like.numel()].view(like.shape)
            else:
                tensors[i] = torch.zeros_like(like)

    @functools.cached_property
    def sums_dtype(self) -> torch.dtype:
        return sums_dtype(*self.lists)

    def with_lists(self, lists: list[list[Any]]) -> Part:
        """Other tensors of the same parameters."""
        return Part(self.device, self.meshes, lists, self.params, self.groups)

    def of(self, sums: Tensor) -> Tensor:
        """Sums of all layers, on the device and of the type that kernels ask for here."""
        return sums.to(self.device, self.sums_dtype)

    def add_up(self, numbers: Tensor) -> Tensor:
        """Sums over the processes, in place."""
        for mesh, dim in self.meshes:
            dist.all_reduce(numbers, group=mesh.get_group(dim))
        return numbers


def inner_products(parts: list[Part], layers: int) -> Tensor:
    """[G, K, K], added up over devices and processes."""
    found = [part.add_up(gramian(part.lists, groups=part.groups)) for part in parts]
    if len(parts) == 1:
        return found[0]
    total = found[0].new_zeros(layers, *found[0].shape[1:], dtype=torch.float64)
    for part, products in zip(parts, found):
        total[list(dict.fromkeys(part.groups))] += products.to(total)
    return total


def stamp(x: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written or replaced."""
    return id(x), local(x)._version


def local(x: Any) -> Any:
    """This process's part of a tensor; None of None."""
    if not is_sharded(x):
        return x
    with torch.no_grad():
        return x.to_local()


def place(x: Tensor, name: str) -> tuple[Tensor, tuple]:
    """This process's part of a tensor, and the mesh dimensions that the other parts are spread over."""
    if not is_sharded(x):
        return x, ()
    if any(placement.is_partial() for placement in x.placements):
        raise RuntimeError(f"the gradient of {name} is a DTensor of partial sums: reduce it before the step")
    dims = (dim for dim, placement in enumerate(x.placements) if not placement.is_replicate())
    return local(x), tuple((x.device_mesh, dim) for dim in dims)


def distributed(mine: Tensor, p: Tensor) -> Tensor:
    """n tensors like this process's part of `p`, [n, *...], as [n, *p.shape]: sharded as `p` is."""
    if not is_sharded(p):
        return mine
    from torch.distributed.tensor import DTensor

    like = _several(p, len(mine))
    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride
    )


def undistributed(whole: Tensor, p: Tensor) -> Tensor:
    """This process's part of n tensors like `p`, [n, *p.shape], sharded in any way or not at all."""
    if not is_sharded(p):
        return whole.full_tensor() if is_sharded(whole) else whole
    from torch.distributed.tensor import distribute_tensor

    like = _several(p, len(whole))
    if not is_sharded(whole):
        # Each process has all of it.
        whole = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return local(whole.redistribute(like.device_mesh, like.placements))


def _several(p: DTensor, count: int) -> DTensor:
    """[count, *p.shape], whose placements are those of as many tensors like `p`."""
    several: Any = p.detach().expand(count, *p.shape)
    return several
