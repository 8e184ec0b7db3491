"""Arguments that several commands have: the type of each and, said once, what their --help says of it.

What a command's own docstring says of an argument comes before that.
"""

from __future__ import annotations

from typing import Annotated

from dgsnet import config
from dgsnet.detection import decisions, engine

A_MODEL = "a model folder, or the folder of a training run, or an .onnx that dgsnet export wrote."
Model = Annotated[str, A_MODEL]
Pretrained = Annotated[
    str | None,
    "weights file of the model's backbone, in place of what the folder names; TorchScript, such as OpenAI's "
    "own file, has to be named here.",
]
Device = Annotated[str | None, "torch device; the GPU where there is one if not given."]
Views = Annotated[
    int | None, "mosaics averaged per image; if not given, what the model was calibrated with, else 1."
]
Batch = Annotated[
    int | None,
    "images that go through the network at a time; if not given, what the model was calibrated with, else 1. "
    "A lone image costs as much as a whole batch.",
]
Precision = Annotated[
    decisions.Precision | None,
    "of the network's weights; if not given, what the model was calibrated with, else fp32.",
]
Crops = Annotated[
    config.Crops | None,
    "what a score is the mean over: 1 is the centre crop, 5 it and the four corners, tiles as many as cover "
    "the image, 64 at most; if not given, what the model was calibrated with, else what its configuration "
    "says.",
]
Workers = Annotated[
    int | None,
    "processes that read and prepare images, or with ray that score them; chosen if not given.",
]
Engine = Annotated[engine.Engine, "local scores on this machine's device, ray on all of a Ray cluster's."]
Trust = Annotated[
    str | None, "PEM file of the certificates that signers are trusted by; none are if not given."
]
