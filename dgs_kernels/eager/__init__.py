"""The formulas of `reference.py` behind the arguments of kernels, one file per operation."""
