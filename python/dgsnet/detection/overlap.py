"""Images that are there twice, by their files' content: what is measured on them looks better than it is.

A copy of a file is found under any name; the same picture saved anew is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from dgsnet.data.images import ImageError, file_hash
from dgsnet.data.items import CLASSES, Item, find_images, find_labelled
from dgsnet.errors import UserError

# Of items that were read already, their files' hashes, None of what cannot be read; None: they are read.
Hashes = Sequence[int | None] | None


def images_of_class(paths: Sequence[str], label: int) -> list[Item]:
    """The images of this label that paths stand for, each content once, with a word of what is left out.

    Args:
        paths: as of find_items, of which labelled datasets give their images of this label.
        label: 0 real, 1 generated.

    Raises:
        UserError: a path stands for nothing, or labels cannot be read.
    """
    plain, items = [], []
    for path in paths:
        if not (samples := find_labelled(path)):
            plain.append(path)
            continue
        taken = [sample for sample in samples if sample.label == label]
        print(
            f"{path} is a labelled dataset: its {len(taken)} {CLASSES[label]} images are taken, its "
            f"{len(samples) - len(taken)} {CLASSES[1 - label]} ones are not"
        )
        items += taken
    found, missing = find_images(plain) if plain else ([], {})
    for path, why in missing.items():
        raise UserError(f"{path}: {why}; give image files, folders or quoted glob patterns")
    items += [dataclasses.replace(item, label=label) for item in found]
    once = distinct(items)
    if copies := len(items) - len(once):
        print(f"{copies} of {len(items)} {CLASSES[label]} images are copies of others' files: left out")
    return once


def distinct(items: Sequence[Item]) -> list[Item]:
    """The items without those whose file has the content of an earlier one's; what cannot be read stays."""
    sizes = Counter(map(_size, items))
    # What is alone with its size need not be read.
    twice = {size for size, count in sizes.items() if count > 1 or size is None or None in sizes}
    copies, known = set(), set[int]()
    for place, content in _hashes(items, twice):
        if content in known:
            copies.add(place)
        known.add(content)
    return [item for place, item in enumerate(items) if place not in copies]


def shared(first: Sequence[Item], second: Sequence[Item], *, seconds: float = math.inf) -> list[Item]:
    """Those of the second with the same content as one of the first; each is read for so long at most."""
    sizes = [{_size(item) for item in items} for items in (first, second)]
    common = set.union(*sizes) if None in set.union(*sizes) else set.intersection(*sizes)
    known = {content for _, content in _hashes(first, common, seconds)}
    return [second[place] for place, content in _hashes(second, common, seconds) if content in known]


def in_training(model: str | Path, items: Sequence[Item], hashes: Hashes = None) -> list[Item]:
    """Those of the items whose files the model was trained on; none where the model does not say."""
    from dgsnet.model.checkpoint import trained_on

    known = set(trained_on(model).tolist())
    found = _hashes(items) if hashes is None and known else enumerate(hashes or ())
    return [items[place] for place, content in found if content in known]


def warn_of_training_images(model: str | Path, items: Sequence[Item], hashes: Hashes = None) -> None:
    """One line on stderr where some of the items were in the model's training."""
    if found := in_training(model, items, hashes):
        were = "image was" if len(found) == 1 else "images were"
        why = "the figures are better than on new images"
        _warn(f"{len(found)} of {len(items)} {were} in this model's training", found, why)


def warn_of_shared_images(training: Sequence[Item], validation: Sequence[Item], *, seconds: float) -> None:
    """One line on stderr where images that a model is to be chosen by are among those it is trained on."""
    if found := shared(training, validation, seconds=seconds):
        are = "image is" if len(found) == 1 else "images are"
        why = "the validation's figures are better than on new images, and choose the best model wrongly"
        _warn(f"{len(found)} of {len(validation)} validation {are} in the training too", found, why)


def warn_of_both_labels(items: Sequence[Item], *, seconds: float = math.inf, hashes: Hashes = None) -> None:
    """One line on stderr where a file is labelled real in one place and generated in another."""
    reals, generated = ([item for item in items if item.label == label] for label in (0, 1))
    if hashes is None:
        found = shared(reals, generated, seconds=seconds)
    else:
        known = {content for item, content in zip(items, hashes) if item.label == 0} - {None}
        found = [item for item, content in zip(items, hashes) if item.label == 1 and content in known]
    if found:
        are = "image has a file that is" if len(found) == 1 else "images have files that are"
        why = "one of the two labels is wrong"
        _warn(f"{len(found)} of {len(generated)} generated {are} labelled real too", found, why)


def _warn(fact: str, found: Sequence[Item], why: str) -> None:
    print(f"dgsnet: warning: {fact}, such as {found[0].path}: {why}", file=sys.stderr)


def _size(item: Item) -> int | None:
    """Bytes of an image's file; None where only reading it tells."""
    if item.data is not None:
        return len(item.data)
    if item.container:
        return item.size if item.group is None else None
    try:
        return os.stat(item.file).st_size
    except (OSError, ValueError):
        # ValueError comes of a zero byte in the name.
        return None


def _hashes(
    items: Sequence[Item], sizes: Container[int | None] | None = None, seconds: float = math.inf
) -> Iterator[tuple[int, int]]:
    """Place and hash of the items that can be read, of these sizes if given, for so long at most."""
    end = time.monotonic() + seconds
    for place, item in enumerate(items):
        if time.monotonic() > end:
            return
        if sizes is None or _size(item) in sizes:
            # Whoever scores it says why.
            with contextlib.suppress(ImageError):
                yield place, file_hash(item.read_bytes())
