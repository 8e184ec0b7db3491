"""Where `dgs_kernels.hooks.weightings` used to be."""

from dgs_kernels.hooks.weightings import *  # noqa: F403
