"""Gradient surgery as fused kernels behind autograd-aware hooks."""
