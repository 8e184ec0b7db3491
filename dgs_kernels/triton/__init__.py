"""The portable GPU kernels, one file per operation."""
