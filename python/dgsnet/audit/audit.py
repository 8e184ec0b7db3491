"""`dgsnet audit`: before training, how much of the label the files and the captions give away."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgsnet.data.captions import attach_captions
from dgsnet.data.items import CLASSES, Item, find_samples
from dgsnet.data.lists import read_json
from dgsnet.data.nuisances import NUISANCES
from dgsnet.errors import UserError
from dgsnet.files import locked, write_file

if TYPE_CHECKING:
    from dgsnet.audit.shortcuts import FileModel, Leak, Shortcuts

# Beyond it a figure gains nothing: the interval of an AUC is then two points wide.
MOST_IMAGES = 2**14
# From here on hardly an image speaks against the shortcut, and nothing can be learned from the others.
NEARLY_ALL = 0.98
# What can be done about it, by the beginnings of the nuisances' names.
REMEDIES = {
    ("format", "JPEG", "chroma", "log2 bytes"): "Re-encode both classes alike: one format, one quality, one "
    "chroma subsampling. Pixels still hold the first compression, so a detector may see it all the same; "
    "better are images of both classes that were compressed alike to begin with.",
    ("log2 width", "log2 height", "log2 aspect"): "Cut both classes to the same sizes. Scaling leaves traces "
    "of its own in the pixels.",
    ("mode", "EXIF"): "Write both classes in one colour mode, and without metadata.",
}


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `dgsnet audit` measured of a data set.

    Attributes:
        nuisances: float32 [n, len(NUISANCES)] of the images that could be read.
        labels: [n] of these.
        total: images of the data set, of which some may not have been looked at.
        damaged: of each file that could not be read a line that says why.
    """

    shortcuts: Shortcuts
    nuisances: np.ndarray
    labels: np.ndarray
    total: int
    damaged: list[str]


def audit(
    samples: Sequence[Item],
    *,
    captions: bool = False,
    most: int = MOST_IMAGES,
    seconds: float = math.inf,
    progress: bool = False,
) -> Audit:
    """Look for shortcuts in labelled images, without decoding them.

    Captions are measured of images that have one. Of more than `most` images so many are drawn, always the
    same ones; after so many seconds no further file is read.

    Raises:
        UserError: too few images of a class could be read.
    """
    from dgsnet.audit.shortcuts import FEWEST, find_shortcuts, read_nuisances

    chosen = [samples[i] for i in np.random.default_rng(0).permutation(len(samples))[:most]]
    # What is read together comes together, in the order in which the first of it was drawn.
    groups: dict[str, int] = {}
    chosen.sort(key=lambda item: 0 if item.group is None else groups.setdefault(item.shard, len(groups)))
    rows, damaged = read_nuisances(chosen, seconds=seconds, progress=progress)
    sound = ~np.isnan(rows).any(axis=1)
    read = [sample for sample, whole in zip(chosen, sound) if whole]
    nuisances, labels = rows[sound], np.array([sample.label for sample in read])
    captioned = [sample.label for sample in read if sample.caption is not None]
    for kind, having in {
        "": labels.tolist(),
        " with a caption": captioned if captions else labels.tolist(),
    }.items():
        for label, name in enumerate(CLASSES):
            if (count := having.count(label)) < FEWEST:
                unread = f"; {len(damaged)} files could not be read, such as {damaged[0]}" if damaged else ""
                raise UserError(
                    f"an audit needs at least {FEWEST} {name} images{kind}, here are {count}{unread}"
                )
    shortcuts = find_shortcuts(
        nuisances,
        labels,
        [sample.generator for sample in read],
        [sample.caption for sample in read] if captions else None,
    )
    return Audit(shortcuts, nuisances, labels, len(samples), damaged)


def audit_command(data: list[str], out: str, captions: str | None = None, split: str | None = None) -> None:
    """Tell, before training, how much of the label the files and the captions give away.

    Prints a verdict, and writes audit.html and audit.json. Needs no model.

    Args:
        data: dataset folders, JSON/CSV lists, .tar shards or .parquet files, taken together.
        out: folder for the results.
        captions: JSON file of image path to caption, or auto for captions.json of each folder; captions are
            not measured if not given.
        split: train, val or test, for folders that hold several.
    """
    with locked(Path(out)):
        found = {root: find_samples(root, split) for root in data}
        if captions:
            found = {root: attach_captions(s, captions, root, partly=True) for root, s in found.items()}
        samples = [sample for members in found.values() for sample in members]
        result = audit(samples, captions=bool(captions), progress=True)
        write_file(Path(out) / "audit.json", (json.dumps(document(result), indent=2) + "\n").encode())
        write_page(Path(out) / "audit.html", result, data)
    for line in result.damaged:
        print(f"left out: {line}")
    for sentence in [*verdict(result.shortcuts), *advice(result.shortcuts)]:
        print(sentence)
    print(f"results in {out}")


def document(result: Audit) -> dict[str, Any]:
    """What audit.json holds: AUC as fractions, with intervals that hold together."""
    from dgsnet.audit.shortcuts import CONFIDENCE, FileModel

    def plain(leak: Leak | None) -> dict[str, float] | None:
        return leak and leak._asdict()

    found = result.shortcuts
    generated = int(result.labels.sum())
    return {
        "verdict": found.verdict,
        "files": plain(found.files),
        "captions": plain(found.captions),
        "nuisances": {name: plain(leak) for name, leak in found.nuisances.items()},
        "generators": {
            name: {kind: plain(leak) for kind, leak in leaks.items()}
            for name, leaks in found.generators.items()
        },
        "words": found.words,
        "confidence": CONFIDENCE,
        "n_real": len(result.labels) - generated,
        "n_generated": generated,
        "n_images": result.total,
        "damaged": result.damaged,
        "model": dataclasses.asdict(FileModel.fit(result.nuisances, result.labels)) | {"of": NUISANCES},
    }


def load_model(path: str | Path) -> FileModel:
    """What the files of an audited data set say, from its audit.json.

    Raises:
        UserError: there is no such file, or it is of another version or none of an audit.
    """
    from dgsnet.audit.shortcuts import FileModel

    saved = read_json(Path(path))
    try:
        model = dict(saved["model"])
        if tuple(model.pop("of")) != NUISANCES:
            raise ValueError
        return FileModel(**model)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no audit.json of this version: make one with dgsnet audit") from None


def verdict(found: Shortcuts) -> list[str]:
    """What the figures say, as sentences."""
    sentences = []
    if found.files.found:
        sentences.append(
            f"What the files alone say tells real from generated images with an AUC of {shown(found.files)}."
        )
    if found.strongest:
        names = ", ".join(f"{name} {shown(found.nuisances[name])}" for name in found.strongest[:4])
        sentences.append(f"Strongest by itself: {names}.")
    if found.captions and found.captions.found:
        sentences.append(f"The words of the captions tell them with an AUC of {shown(found.captions)}.")
    within = {
        name: [f"{kind} {shown(leak)}" for kind, leak in leaks.items() if leak and leak.found]
        for name, leaks in found.generators.items()
    }
    if any(within.values()):
        names = "; ".join(f"{name}: {', '.join(kinds)}" for name, kinds in within.items() if kinds)
        sentences.append(f"Within the images of a single generator, {names}.")
    if sentences:
        return ["A shortcut: the label can be told without looking at a single pixel.", *sentences]
    captions = f", that of the captions {shown(found.captions)}" if found.captions else ""
    return [
        f"No shortcut was found. The AUC of the files is {shown(found.files)}{captions}; what is weaker than "
        "the upper ends would not have been noticed, nor what only pixels show."
    ]


def advice(found: Shortcuts) -> list[str]:
    """What to do about the shortcuts that were found, as sentences."""
    if found.verdict == "none found":
        return []
    names = found.strongest
    sentences = [text for starts, text in REMEDIES.items() if any(name.startswith(starts) for name in names)]
    if found.captions and found.captions.found:
        sentences.append("Caption both classes with one captioner, and the same prompt: dgsnet caption.")
    sentences.append(
        "Or balance: choose real and generated images such that the nuisances above are as frequent in one "
        "class as in the other."
    )
    sentences.append(
        "Or train with an expert that takes the shortcut upon itself: dgsnet train --surgery.text expert "
        "--data.nuisances files. Without captions add --data.captions none."
    )
    if max(leak.auc for leak in (found.files, found.captions) if leak) > NEARLY_ALL:
        sentences.append(
            "Here hardly an image speaks against the shortcut, and an expert then leaves nothing to learn "
            "from: change the data first."
        )
    return sentences


def shown(leak: Leak) -> str:
    """An AUC in percent, with its interval."""
    return f"{100 * leak.auc:.1f} ({100 * leak.low:.1f}\N{EN DASH}{100 * leak.high:.1f})"


def write_page(path: Path, result: Audit, data: Sequence[str]) -> None:
    """Write the HTML page."""
    from markupsafe import Markup

    from dgsnet.audit.shortcuts import CONFIDENCE, FEWEST, FOLDS
    from dgsnet.pages import page, plots

    found = result.shortcuts
    varying = {name: leak for name, leak in found.nuisances.items() if leak.low < leak.high}
    together = {"files": found.files} | ({"captions": found.captions} if found.captions else {})
    alone = dict(sorted(varying.items(), key=lambda item: -item[1].auc))
    of_generators = {
        f"{name}, {kind}": leak
        for name, leaks in found.generators.items()
        for kind, leak in leaks.items()
        if leak
    }
    panels = {name: result.nuisances[:, NUISANCES.index(name)] for name in found.strongest[:4]}

    def figure(leaks: dict[str, Leak], description: str) -> Markup:
        return plots.svg(plots.intervals(leaks, "AUC", chance=0.5), description)

    text = page.render(
        Path(__file__).with_name("audit.html"),
        data=", ".join(data),
        result=result,
        found=found,
        verdict=verdict(found),
        advice=advice(found),
        shown=shown,
        together=figure(together | alone, "AUC of files, captions and each nuisance alone"),
        panels=panels and plots.svg(plots.by_class(panels, result.labels), "strongest nuisances by class"),
        generators=of_generators and figure(of_generators, "AUC by generator"),
        constant=[name for name in found.nuisances if name not in varying],
        confidence=f"{CONFIDENCE:.0%}",
        folds=FOLDS,
        fewest=FEWEST,
        machine=f"Python {platform.python_version()}, {platform.system()}",
    )
    write_file(path, text.encode(errors="surrogateescape"))
