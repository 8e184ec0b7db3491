"""The model card that `dgsnet export` writes: scope, training data, decisions, limits, use."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgsnet.detection.decisions import summary
from dgsnet.exchange.huggingface import form_of
from dgsnet.model.catalogue import has_text, timm_arguments
from dgsnet.pages import page

if TYPE_CHECKING:
    from dgsnet.config import Config
    from dgsnet.detection.detector import Detector
    from dgsnet.model.description import Description


def model_card(
    detector: Detector, extra: dict[str, Any], contract: dict[str, Any], out: Path, format: str
) -> str:
    """The card of an exported model, Markdown.

    `extra` is what is stored with the model; the last part of `out`, where the export will lie, is named.
    """
    from dgsnet.model.checkpoint import fingerprint

    config, name = detector.config, detector.config.model.name
    size, resized = detector.model.image_size, detector.model.resized or detector.description is not None
    library = "open_clip"
    tower = f'open_clip.create_model("{name}"{f", force_image_size={size}" if resized else ""}).visual'
    if not has_text(name):
        arguments = ", ".join(f"{key}={value!r}" for key, value in timm_arguments(name).items())
        arguments += f", img_size={size}" if resized else ""
        library, tower = "timm", f"timm.create_model({arguments})".replace("'", '"')
    text = page.render(
        Path(__file__).with_suffix(".md"),
        name=out.stem,
        out=out.name,
        format=format,
        model=config.model,
        library=library,
        tower=tower,
        form=form_of(detector.model),
        fingerprint=fingerprint(detector.model),
        training=_origin(detector.description) or _training(config, extra),
        measured={key: value for key, value in extra.items() if isinstance(value, float)},
        rules=summary(detector.calibration).splitlines() if detector.calibration else (),
        contract=json.dumps(contract, indent=2),
        versions=f"dgs-kernels {version('dgs-kernels')}, torch {version('torch')}",
    )
    return f"{text}\n"


def _origin(description: Description | None) -> str:
    """Where a detector comes from that was trained by other programs; empty for one that was not."""
    if description is None:
        return ""
    origin, licence = description.origin, description.licence
    named = f"their licence is {page.plain(licence)}" if licence else "their authors name no licence"
    return (
        f"Converted from {page.code(origin.file)}, weights of {page.plain(origin.layout)} (SHA-256 "
        f"{page.plain(origin.sha256)}); {named}. What they were trained on is their authors' to say."
    )


def _training(config: Config, extra: dict[str, Any]) -> str:
    if "source" in extra:
        return (
            f"Converted from the authors' checkpoint {page.code(str(extra['source']))} (stage "
            f"{page.plain(str(extra['stage']))}). By their "
            "account it was trained on setting II of AIGIBench: ProGAN (car, cat, chair, horse) and Stable "
            "Diffusion v1.4. That was not checked here."
        )
    # The last parts of a path name the data set; the first ones name somebody's disk.
    sources = (
        ", ".join(page.code("/".join(Path(path).parts[-2:])) for path in config.data.train) or "not recorded"
    )
    surgery = {"none": "plain fine-tuning, no gradient surgery"}.get(
        config.surgery.mode,
        f"gradient surgery ({config.surgery.mode}), alignment {config.surgery.alignment:g}",
    )
    experts = {
        "captions": config.surgery.text != "project",
        "file nuisances": config.data.nuisances != "none",
    }
    if used := [name for name, value in experts.items() if value]:
        surgery += f", experts on {' and '.join(used)}"
    if config.surgery.distillation:
        surgery += f", distillation {config.surgery.distillation:g}"
    if update := extra.get("update"):
        surgery = (
            f"an update, rule {page.plain(str(update['rule']))}, of the detector "
            f"{page.code(Path(str(update['model'])).name)}, whose own training is not recorded here"
        )
    return (
        f"Data: {sources}. Method: {surgery}; epochs: {config.optim.epochs}"
        + (f", at most {config.optim.max_steps} steps" if config.optim.max_steps else "")
        + f", batches of {config.optim.batch_size * config.optim.accumulation}, learning rate "
        f"{config.optim.lr:g}, seed {config.seed}."
    )
