"""Imported by the process that tests fork others from: those have one thread, as tests in tests/dgsnet do."""

import torch

torch.set_num_threads(1)
