"""Gradient surgery as fused kernels behind autograd-aware hooks."""

from dgs_kernels import reference
from dgs_kernels.backends import BackendError, explain
from dgs_kernels.hooks.adamw import SurgeryAdamW
from dgs_kernels.hooks.features import gradient_surgery
from dgs_kernels.hooks.objectives import ObjectiveSurgery
from dgs_kernels.hooks.parameters import OptimizerSurgery
from dgs_kernels.hooks.subspace import ReferenceSubspace
from dgs_kernels.module import SurgeryHead
from dgs_kernels.ops.combine_ import combine_
from dgs_kernels.ops.gramian import MAX_OBJECTIVES, gramian
from dgs_kernels.ops.project_align import project_align
from dgs_kernels.ops.project_align_ import project_align_
from dgs_kernels.ops.spectral_entropy import spectral_entropy
from dgs_kernels.ops.surgery_head import SurgeryHeadOutput, surgery_head

__all__ = [
    "MAX_OBJECTIVES",
    "BackendError",
    "ObjectiveSurgery",
    "OptimizerSurgery",
    "ReferenceSubspace",
    "SurgeryAdamW",
    "SurgeryHead",
    "SurgeryHeadOutput",
    "combine_",
    "explain",
    "gradient_surgery",
    "gramian",
    "project_align",
    "project_align_",
    "reference",
    "spectral_entropy",
    "surgery_head",
]
