"""`detector.json`: what turns pixels into a decision, said by a model folder that was trained elsewhere.

A run of ours says the same in `config.json`, which has the sections `model` and `preprocess` too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from dgsnet.config import ModelConfig, PreprocessConfig

DETECTOR_FILE = "detector.json"


@dataclass
class Origin:
    """Where a detector comes from.

    Args:
        layout: whose detector it is, in words.
        file: the file's name, or hf:OWNER/NAME/FILE.
        revision: of the repository, a commit; empty for a file.
        sha256: of the file, as hexadecimal digits.
    """

    layout: str = ""
    file: str = ""
    revision: str = ""
    sha256: str = ""


@dataclass
class Description:
    """A detector: a backbone, a feature of it, a linear head, and what comes before and after them.

    The head is in `adapters.safetensors`, as `head.image_head.weight` [1, D] and `.bias` [1]. An image's
    logit is the mean over its crops and views; the probability is sigmoid(logit / temperature). Where the
    folder has a calibration, that has the temperature and the threshold.

    Args:
        model: the backbone and what the head sees of it.
        preprocess: from image to input.
        positive: what a positive logit means.
        bias: what was added to the published bias of the head, whose own holds it.
        temperature: what logits are divided by.
        threshold: probability above which an image is called generated.
        licence: of the weights, by its SPDX name where it has one; empty: none is known.
        origin: where it comes from.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    positive: Literal["generated"] = "generated"
    bias: float = 0.0
    temperature: float = 1.0
    threshold: float = 0.5
    licence: str = ""
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} must lie between 0 and 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")

    def to_json(self) -> str:
        """The text of detector.json."""
        return json.dumps(asdict(self), indent=2) + "\n"
