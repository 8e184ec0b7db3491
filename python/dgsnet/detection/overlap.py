"""Images that a model was trained on: measured on them it looks better than it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dgsnet.data.images import ImageError, file_hash
from dgsnet.data.items import Item


def in_training(model: str | Path, items: Sequence[Item]) -> list[Item]:
    """Those of the items whose files the model was trained on; none where the model does not say.

    A copy of a file is found under any name; the same picture saved anew is not.
    """
    from dgsnet.model.checkpoint import trained_on

    known = trained_on(model)
    if not len(known):
        return []
    hashes = np.array([_hash(item) for item in items], np.int64)
    return [item for item, found in zip(items, np.isin(hashes, known)) if found]


def warn_of_training_images(model: str | Path, items: Sequence[Item]) -> None:
    """One line on stderr where some of the items were in the model's training."""
    if found := in_training(model, items):
        was = "image was" if len(found) == 1 else "images were"
        print(
            f"dgsnet: warning: {len(found)} of {len(items)} {was} in this model's training, such as "
            f"{found[0].path}: the figures are better than on new images",
            file=sys.stderr,
        )


def _hash(item: Item) -> int:
    try:
        return file_hash(item.read_bytes())
    except ImageError:  # whoever scores it says why
        return 0
