"""`dgsnet convert`: checkpoints that others published as model folders of this package, known by content."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from dgsnet.config import Config, ModelConfig, SurgeryConfig
from dgsnet.errors import UserError
from dgsnet.exchange.hub import PREFIX, Download, download
from dgsnet.exchange.layouts import LAYOUTS, OTHERS, Layout, layout_of, shapes_of
from dgsnet.exchange.official import PUBLISHED, STUDENT, TEACHER, Official, read, write
from dgsnet.exchange.weights import State, holds, load, save
from dgsnet.files import check_new, file_sha256
from dgsnet.model.checkpoint import build_model, load_trained_state, save_model, trained_state
from dgsnet.model.description import Description, Origin
from dgsnet.model.folders import BACKBONE_FILES

OFFICIAL = "DGS-Net"


def convert_command(
    checkpoint: str,
    out: str,
    name: str | None = None,
    alpha: float = ModelConfig.lora_alpha,
    pretrained: str | None = None,
    accept_licence: bool = False,
) -> None:
    """Import a published checkpoint as a model folder for predict, calibrate, evaluate, serve and export.

    Args:
        checkpoint: a .pth or .safetensors file of DGS-Net, UniversalFakeDetect, Community Forensics, Sieve,
            DDA, Effort, C2P-CLIP or B-Free, by any name; or hf:OWNER/NAME, hf:OWNER/NAME@REVISION or
            hf:OWNER/NAME/FILE, which is downloaded from the Hugging Face Hub.
        out: folder for the model; must be new or empty.
        name: its backbone, where it is another than the published one.
        alpha: numerator of the scaling of DGS-Net's adapters; the file does not hold it.
        pretrained: weights file of the backbone, for a checkpoint that holds a head alone.
        accept_licence: download weights whose licence forbids commercial use, is unknown here or is missing.
    """
    found = convert(
        checkpoint, out, name=name, alpha=alpha, pretrained=pretrained, accept_licence=accept_licence
    )
    if isinstance(found, Official):
        print(f"SHA-256 {found.sha256}: {PUBLISHED.get(found.sha256, 'not a published file known here')}")
        what = (
            f"LoRA of rank {found.rank}, {'merged' if found.merged else 'not merged'}"
            if found.rank
            else "no LoRA"
        )
        return print(f"{out}: stage {found.stage} of {name or ModelConfig.name}, {what} in {checkpoint}")
    origin, licence = found.origin, found.licence or "none named by its authors: ask them before you use it"
    revision = f" at revision {origin.revision}" if origin.revision else ""
    print(f"SHA-256 {origin.sha256}: {origin.file}{revision}")
    print(f"{out}: {origin.layout}, {found.model.name}; licence {licence}")


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    alpha: float = ModelConfig.lora_alpha,
    pretrained: str | None = None,
    accept_licence: bool = False,
) -> Official | Description:
    """Write a model folder that `Detector.load` reads, of a checkpoint that others published.

    The arguments are `convert_command`'s. The file is read with weights_only=True, no shape in it is trusted,
    and all of its tensors must be known.

    Returns:
        What the file held: of DGS-Net's an `Official`, of others' the folder's description.

    Raises:
        UserError: `out` is in use; the file is missing, damaged, of no layout known here or of another
            backbone; its backbone is missing; or a download that is not possible or whose licence was not
            accepted.

    Example:
        >>> convert("fc_weights.pth", "runs/ufd")  # doctest: +SKIP
    """
    out = Path(out)
    check_new(out)
    source = Download(Path(checkpoint), Path(checkpoint).name)
    if str(checkpoint).startswith(PREFIX):
        source = download(str(checkpoint), accept_licence)
    state, wrapper = load(source.path)
    layout = None if holds(state, STUDENT) or holds(state, TEACHER) else _known(source.path, state, wrapper)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".convert-") as folder:
        if layout:
            return _write(out, Path(folder), source, state, layout, name or layout.name, pretrained)
        name = name or ModelConfig.name
        official = read(source.path, name=name, alpha=alpha, state=state)
        write(out, Path(folder), source.name, official, name=name, alpha=alpha)
        return official


def _known(path: Path, state: State, wrapper: str) -> Layout:
    """The layout of a file that is none of DGS-Net's."""
    if layout := layout_of(state, wrapper):
        return layout
    for beginning, what in OTHERS.items():
        if holds(state, beginning):
            raise UserError(f"{path} is {what}: no backbone with a linear head says that")
    known = ", ".join([OFFICIAL, *(layout.title for layout in LAYOUTS)])
    raise UserError(
        f"{path} is no checkpoint that is known here ({len(state)} tensors, {min(state)[:80]!r} the first by "
        f"name); known are {known}"
    )


def _write(
    out: Path,
    folder: Path,
    source: Download,
    state: State,
    layout: Layout,
    name: str,
    pretrained: str | None,
) -> Description:
    """Make the model folder `out` of a state, by way of a temporary folder on the same disk."""
    if pretrained and not layout.pretrained:
        raise UserError(f"{source.path} is {layout.title} and holds its backbone: leave --pretrained out")
    backbone = folder / BACKBONE_FILES[1]
    model, preprocess = layout.settings(name, pretrained or layout.pretrained or str(backbone))
    try:
        tower, head = layout.take(state, shapes_of(model, preprocess.image_size), preprocess.image_size)
        if state:
            raise ValueError(f"{min(state)} is unknown to this layout")
    except ValueError as error:
        raise UserError(f"{source.path} is {layout.title}, but not on {name}: {error}") from None
    if tower:
        save(tower, backbone)
    description = Description(
        model,
        preprocess,
        bias=layout.bias,
        threshold=layout.threshold,
        licence=source.licence or layout.licence,
        origin=Origin(layout.title, source.name, source.revision, file_sha256(source.path)),
    )
    # No run has been: there was no surgery, and the teacher, a tower without adapters, has the same head.
    config = Config(model=model, preprocess=preprocess, surgery=SurgeryConfig(mode="none"))
    try:
        network = build_model(config, with_text=False)
    except UserError as error:
        if tower:
            raise
        raise UserError(
            f"{source.path} is {layout.title}, {layout.what}, and that backbone is missing: {error}; or give "
            "its file with --pretrained"
        ) from None
    head["bias"] = head["bias"] + layout.bias
    own = {f"head.image_head.{kind}": tensor for kind, tensor in head.items()}
    same = {f"head.teacher_head.{kind}": tensor for kind, tensor in head.items()}
    rest = {key: torch.zeros_like(tensor) for key, tensor in trained_state(network).items()}
    load_trained_state(network, rest | own | same)
    save_model(out, network, config, backbone=backbone if tower else None, description=description)
    return description
