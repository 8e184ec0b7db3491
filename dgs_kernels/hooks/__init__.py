"""Gradient surgery in a training loop: on the gradients of features, of parameters, of several losses."""
