"""The expert on files: learns the label from what a file gives away, so that the student need not.

It is trained beside the student, and its logit, as a constant, is added to the student's in the image loss
(a product of experts, docs/method.md). It is no part of the detector.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from dgsnet.data.items import Item
from dgsnet.data.nuisances import NUISANCES

# Adam's rate for numbers of unit variance, whatever suits the backbone: the expert has to learn faster than
# the student, or the student learns from the files first.
LEARNING_RATE = 1e-2
# Enough for a mean and a deviation; a training set may have millions.
MOST_FILES = 2**14
# A rare yes, divided by its deviation, must not become a huge number.
LEAST_DEVIATION = 0.05


class FileExpert(nn.Module):
    """A linear layer on standardised `file_nuisances`, starting at 0.

    Example:
        >>> import torch
        >>> FileExpert()(torch.zeros(2, len(NUISANCES)))
        tensor([0., 0.], grad_fn=<SqueezeBackward1>)
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(NUISANCES)))
        self.register_buffer("deviation", torch.ones(len(NUISANCES)))
        self.linear = nn.Linear(len(NUISANCES), 1)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def standardise(self, samples: list[Item], *, progress: bool = False) -> None:
        """Take mean and deviation from the files, of many from MOST_FILES evenly spaced ones.

        Files that cannot be read are left out; training reports them when it reads them.
        """
        from dgsnet.audit.shortcuts import read_nuisances

        chosen = samples[:: math.ceil(len(samples) / MOST_FILES)]
        rows, _ = read_nuisances(chosen, progress=progress)
        values = rows[~np.isnan(rows).any(axis=1)].astype(np.float64)
        if len(values):
            self.mean.copy_(torch.from_numpy(values.mean(axis=0)))
            self.deviation.copy_(torch.from_numpy(values.std(axis=0).clip(LEAST_DEVIATION)))

    def forward(self, nuisances: Tensor) -> Tensor:
        """Logits [N] of nuisances [N, len(NUISANCES)]."""
        return self.linear((nuisances - self.mean) / self.deviation).squeeze(-1)
