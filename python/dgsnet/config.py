"""The one typed configuration of a run: read from YAML, overridden on the command line, saved with the run.

Every default is the official DGS-Net setting unless a comment says otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dgsnet.errors import UserError
from dgsnet.files import one_line

T = TypeVar("T")

CONFIG_FILE = "config.json"
# Crops of an image that a score is the mean of: the centre, the four corners too, or tiles of the whole.
Crops = Literal[1, 5, "tiles"]
# Settings of one crop at native resolution: what a mosaic has, and what there was before there were others.
NATIVE: dict[str, Any] = {
    **{"crops": 1, "small": "upscale", "resize": "none", "side": 0, "antialias": True, "grid": 1}
}
# A YAML file for each recipe of `dgsnet train --recipe`, which says what it is.
RECIPES = Path(__file__).parent / "recipes"
# Most letters of a model's name.
MAX_NAME = 200
# Channel mean and standard deviation of pixels in 0..1, by the name that PreprocessConfig has for them.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass
class ModelConfig:
    """The CLIP backbone and its adapters.

    Args:
        name: open_clip model name, "timm/" and the name of an image tower of timm, or "dgsnet-tiny" for the
            small CLIP that ships with the package.
        pretrained: pretrained tag of open_clip or timm, local weights file, "builtin" for the weights that
            ship with the package ("dgsnet-tiny" only), or "" for random weights.
        lora_rank: rank r of the adapters of every vision block; 0 trains the head alone.
        lora_alpha: adapter scaling numerator; the scaling is alpha / sqrt(r).
        lora_dropout: dropout probability on the adapters' input.
        lora_targets: linears of a vision block that have an adapter: "qkv" of the attention (official),
            "qkvo" with the one after it, "mlp" or "all".
        feature: what the heads see. "own" is what the model gives: a CLIP's projected embedding, a timm
            tower's pooled feature. "class" is the class token after the last norm, before any projection.
        l2: divide features by their length before the heads see them.
    """

    name: str = "ViT-L-14-quickgelu"
    pretrained: str = "openai"
    lora_rank: int = 6
    lora_alpha: float = 6.0
    lora_dropout: float = 0.8
    lora_targets: Literal["qkv", "qkvo", "mlp", "all"] = "qkv"
    feature: Literal["own", "class"] = "own"
    l2: bool = False

    def __post_init__(self) -> None:
        if (letters := len(str(self.name))) > MAX_NAME:
            raise ValueError(f"name has {letters} letters, at most {MAX_NAME} are taken")
        _between(0, 2**12, lora_rank=self.lora_rank)
        _fraction(lora_dropout=self.lora_dropout)


@dataclass
class PreprocessConfig:
    """How an image becomes the model's input.

    Args:
        mode: "patches" is the mosaic of least and most complex patches; "crop" a centre crop at native
            resolution (random when training), after scaling up images that are smaller.
        image_size: side of the model's square input in pixels; for "patches" it must be
            patch_size * sqrt(num_patches).
        patch_size: side of a patch in pixels.
        num_patches: patches kept, a square number.
        normalization: channel mean and standard deviation, "imagenet" (official), "clip" or "inception".
        flip: mirror half of the training images.
        crops: in mode "crop", what the mean logit is taken over when images are scored: 1 is the centre; 5
            the centre and the four corners; "tiles" as many as cover the image, 64 at most. Training, its
            validation included, sees one.
        small: in mode "crop", what is done to sides that are shorter than the crop: "upscale" enlarges the
            image, both sides alike, as it is enlarged for a mosaic; "pad" puts black around it; "tile"
            repeats it from its left and upper edges.
        resize: in mode "crop", what comes before the crop: "none" leaves native pixels; "shorter" scales the
            image, bilinearly, until its shorter side is `side`; "squash" until both are.
        side: of a resized image, in pixels; 0 where none is resized.
        antialias: whether a resized image's pixels are means of all that they cover, as Pillow makes them,
            or of the four nearest, as OpenCV does.
        grid: in mode "crop", crops lie on multiples of so many pixels, and what is beyond the last multiple
            is left out before small images are tiled: the tokens of a crop are then tokens of the image.
    """

    mode: Literal["patches", "crop"] = "patches"
    image_size: int = 224
    patch_size: int = 32
    num_patches: int = 49
    normalization: Literal["imagenet", "clip", "inception"] = "imagenet"
    flip: bool = True
    crops: Crops = 1
    small: Literal["upscale", "pad", "tile"] = "upscale"
    resize: Literal["none", "shorter", "squash"] = "none"
    side: int = 0
    antialias: bool = True
    grid: int = 1

    def __post_init__(self) -> None:
        _between(1, 2**14, image_size=self.image_size, patch_size=self.patch_size)
        _between(1, 2**20, num_patches=self.num_patches)
        side = round(self.num_patches**0.5)
        if self.mode == "patches" and (
            side * side != self.num_patches or side * self.patch_size != self.image_size
        ):
            raise ValueError(
                f"num_patches={self.num_patches} patches of {self.patch_size} pixels do not tile an image of "
                f"{self.image_size} pixels: num_patches must be a square and "
                "patch_size * sqrt(num_patches) == image_size"
            )
        _between(0, 2**14, side=self.side)
        _between(1, self.image_size, grid=self.grid)
        if (self.resize == "none") != (self.side == 0):
            raise ValueError(f"preprocess.side={self.side} does not go with preprocess.resize={self.resize}")
        for name, published in NATIVE.items():
            if self.mode == "patches" and getattr(self, name) != published:
                raise ValueError(
                    f"preprocess.{name}={getattr(self, name)} goes with preprocess.mode=crop only: a mosaic "
                    "is made of the whole image"
                )

    def of_one(self) -> dict[str, Any]:
        """What decides the pixels of one crop, in words of before there were other values than NATIVE's."""
        values = dataclasses.asdict(self)
        left_out = {"crops"} | {name for name, value in NATIVE.items() if values[name] == value}
        return {name: value for name, value in values.items() if name not in left_out}


@dataclass
class DataConfig:
    """Where the images are.

    Args:
        train: dataset roots, or JSON/CSV lists, for training; one may stand without a list.
        val: the same for validation; empty: no validation, the last checkpoint is the best.
        captions: JSON object of image path to caption, "none" to train without captions, or "auto" to read
            captions.json of each root.
        nuisances: "files" trains an expert on what a file gives away without being looked at (format, JPEG
            quality, size, metadata) and adds its logit to the student's in the image loss, so that the
            student need not learn it; "none" does not.
        workers: data-loading processes of each training process; null: as many as the machine has cores
            for, 16 at most.
        prefetch: batches that every worker makes ahead.
        pairs: true puts a real image and its generated twin (docs/data.md) into one micro-batch, with the
            same crop, mirroring and `augment`; "independent": with draws of their own.
        balance: "class" draws as many real as generated images in every epoch; "generator" as many of every
            generator as the smallest has, or `cap`, besides; "none" takes all.
        cap: generated images of one generator in an epoch, at most; 0: any number.
        selection: where patches are selected from decoded images: in the "workers", or on the "device" for
            the whole batch.
        views: draws of crop, shuffle, mirroring and `augment` for each training image, used in turn by the
            epochs; what the frozen tower sees is then finite, and its features are computed once and kept on
            disk (4 bytes per number). 0: a fresh draw in every epoch, as published.
        cache: folder where features of frozen towers are kept, of captions and, with `views`, of images;
            empty: $XDG_CACHE_HOME/dgsnet, or ~/.cache/dgsnet.
    """

    train: list[str] | str = field(default_factory=list)
    val: list[str] | str = field(default_factory=list)
    captions: str = "auto"
    nuisances: Literal["none", "files"] = "none"
    workers: int | None = None
    prefetch: int = 2
    pairs: bool | Literal["independent"] = False
    balance: Literal["none", "class", "generator"] = "none"
    cap: int = 0
    selection: Literal["workers", "device"] = "workers"
    views: int = 0
    cache: str = ""

    def __post_init__(self) -> None:
        self.train = [self.train] if isinstance(self.train, str) else list(self.train)
        self.val = [self.val] if isinstance(self.val, str) else list(self.val)
        _at_least(0, views=self.views, cap=self.cap)
        _between(0, 2**10, workers=self.workers or 0)
        _between(1, 2**10, prefetch=self.prefetch)


@dataclass
class AugmentConfig:
    """What training images go through before they are made the model's input; both classes alike.

    Args:
        preset: "none" (official), or what detectors are trained on: "wang", "web", "dda", "openfake",
            "aligned" (`dgsnet.data.distortions.PRESETS`).
        steps: more of it, after the preset's, such as "jpeg:30..95@0.5" or "blur:0.1..3@0.5": an operation,
            its range of values and its probability; + chains operations, | chooses between chains.
    """

    preset: Literal["none", "wang", "web", "dda", "openfake", "aligned"] = "none"
    steps: list[str] = field(default_factory=list)


@dataclass
class OptimConfig:
    """Optimisation.

    Args:
        lr: Adam's learning rate.
        betas: Adam's decay rates.
        weight_decay: decoupled weight decay (0 is Adam, as officially).
        batch_size: images per optimiser step and process, before accumulation; "auto" finds the largest
            that the GPU's memory holds.
        accumulation: micro-batches accumulated into one optimiser step.
        head_epochs: stage 1, the teacher's linear head on the frozen encoder (only with gradient surgery).
        epochs: stage 2, the three branches.
        max_steps: end stage 2 after this many optimiser steps; 0: no limit.
        schedule: the learning rate of each stage after its warm-up: "constant" (official), or "cosine" to 0.
        warmup: share of each stage's steps in which the learning rate rises from 0.
        clip: largest norm of a step's gradient, after surgery; 0: any.
        average: average/ is the mean of so many last checkpoints of stage 2 (`checkpoint_every`, and epochs'
            ends); 0: there is none.
        label_smoothing: s moves the labels that losses see from 0 and 1 to s/2 and 1 - s/2.
        best: what best/ has most of, on the validation images: "ap", "auc", "accuracy", or "worst_auc", the
            lowest AUC of one generator's images against all real ones.
        precision: "fp32"; "bf16" keeps the frozen backbone in it; "fp16" is autocast with a loss scale.
            Adapters, heads, losses and surgery are in fp32 always.
        compile: let torch.compile fuse each vision block, in its "default" mode or, with CUDA graphs, in
            "reduce-overhead".
        checkpointing: keep one activation per vision block and recompute the rest: less memory, more time.
        parallel: on several processes, "ddp": each holds all weights; "fsdp": each holds a share of them and
            gathers a vision block when it is needed.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    batch_size: int | Literal["auto"] = 32
    accumulation: int = 1
    head_epochs: int = 3
    epochs: int = 1
    max_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = 0.0
    clip: float = 0.0
    label_smoothing: float = 0.0
    average: int = 0
    best: Literal["ap", "auc", "accuracy", "worst_auc"] = "ap"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: Literal["no", "default", "reduce-overhead"] = "no"
    checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        if self.batch_size != "auto":
            _at_least(1, batch_size=self.batch_size)
        _at_least(1, accumulation=self.accumulation, epochs=self.epochs)
        _at_least(0, lr=self.lr, weight_decay=self.weight_decay, max_steps=self.max_steps)
        _at_least(0, head_epochs=self.head_epochs, clip=self.clip, average=self.average)
        _fraction(warmup=self.warmup, label_smoothing=self.label_smoothing)
        if len(self.betas) != 2:
            raise ValueError(f"betas={self.betas} must be two numbers")
        _fraction(beta1=self.betas[0], beta2=self.betas[1])
        for name, value in (("precision", "fp16"), ("compile", "reduce-overhead")):
            # A loss scale, and CUDA graphs, know of no weights that come and go.
            if self.parallel == "fsdp" and getattr(self, name) == value:
                raise ValueError(f"optim.{name}={value} goes with optim.parallel=ddp only")


@dataclass
class SurgeryConfig:
    """Gradient surgery.

    Args:
        mode: "feature" is the paper's method; "layer" edits the gradient of every adapter instead of the
            features' one; "none" is plain LoRA fine-tuning.
        alignment: weight lambda of the alignment loss.
        order: "align_first" (official code) or "project_first" (the paper's formula, "feature" only).
        eps: added to the harmful direction's norm.
        reference_batch_size: batch the two reference gradients are scaled for, which makes the strength of
            surgery independent of batch, ranks and accumulation; null is the official formula.
        text: what captions do to the image branch: "project" is the paper's method; "expert" adds the text
            branch's logit to the student's in the image loss and projects nothing; "both" does both.
        distillation: weight of a pull of the student's features to the teacher's ("feature" only).
    """

    mode: Literal["feature", "layer", "none"] = "feature"
    alignment: float = 0.2
    order: Literal["align_first", "project_first"] = "align_first"
    eps: float = 1e-6
    reference_batch_size: int | None = None
    text: Literal["project", "expert", "both"] = "project"
    distillation: float = 0.0

    def __post_init__(self) -> None:
        _at_least(0, alignment=self.alignment, eps=self.eps, distillation=self.distillation)
        if self.distillation == float("inf"):
            raise ValueError(f"distillation={self.distillation} must be finite")
        if self.reference_batch_size is not None:
            _at_least(1, reference_batch_size=self.reference_batch_size)
        if self.mode == "layer" and self.order != "align_first":
            raise ValueError(f"surgery.order={self.order} goes with surgery.mode=feature only")
        if self.mode == "layer" and self.distillation:
            # Which is not to be projected, while a layer's gradient is edited as a whole.
            raise ValueError(f"surgery.distillation={self.distillation} goes with surgery.mode=feature only")
        if self.mode == "layer" and self.text == "expert":
            raise ValueError(
                "surgery.text=expert leaves nothing for surgery.mode=layer to project: use mode=feature, or "
                "text=both"
            )


@dataclass
class Config:
    """One training run.

    Args:
        model: the backbone and its adapters.
        preprocess: from image to input.
        data: where the images are.
        augment: what training images go through.
        optim: optimisation.
        surgery: gradient surgery.
        seed: decides initialisation, order of data, augmentation and dropout.
        checkpoint_every: optimiser steps between checkpoints that a killed run resumes from.
        log_every: optimiser steps between logged values.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    surgery: SurgeryConfig = field(default_factory=SurgeryConfig)
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        _at_least(0, seed=self.seed)
        _at_least(1, checkpoint_every=self.checkpoint_every, log_every=self.log_every)
        if self.data.pairs and self.optim.batch_size == 1:
            raise ValueError("data.pairs needs an optim.batch_size of at least 2")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, as written to config.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def flat(self) -> dict[str, Any]:
        """Every setting under its name on the command line, such as "optim.lr"."""
        return _flatten(self.to_dict(), "")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of to_dict; raises ValueError naming an unknown or missing section or field."""
        return _build(cls, values, "")

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read a run's config.json."""
        return cls.from_dict(json.loads(Path(path).read_text()))


def recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, by their names on the command line."""
    import yaml

    return _flatten(yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8")), "")


def read_config(path: Path) -> Config:
    """Read a config.json; UserError when it is missing, damaged or unknown."""
    return read_settings(path, Config)


def read_settings(path: Path, kind: type[T]) -> T:
    """Read JSON as a dataclass that has a `model`; UserError when it is missing, damaged or unknown."""
    try:
        values = json.loads(path.read_text())
        config = _build(kind, values, "")
        if "model" not in values:
            raise ValueError("it names no model")
        check_types(config)
        return config
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a run or a model has one") from None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged or of another version of dgsnet: {one_line(error, 200)}"
        ) from None


def check_types(values: Any, where: str = "") -> None:
    """ValueError names a field of a dataclass whose value is not of its type, or no finite number."""
    for name, hint in _hints(values.__class__).items():
        value = getattr(values, name)
        if dataclasses.is_dataclass(value):
            check_types(value, f"{where}{name}.")
        elif not _is(value, hint):
            shown = one_line(ValueError(repr(value)[:80]))
            kind = {float: "number", int: "whole number", str: "text"}.get(hint, hint)
            raise ValueError(f"{where}{name}={shown} is no {kind}")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a type; no number is a truth value, no whole one is beyond 64 bits."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is(item, arguments[0]) for item in value)
    if origin is tuple:
        inner = (arguments[0],) * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(inner) and all(map(_is, value, inner))
    if hint in (int, float):
        number = isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
        return number and (isinstance(value, float) or abs(value) < 2**63) and math.isfinite(value)
    return isinstance(value, hint or type(None))


def _flatten(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _at_least(minimum: int, **values: float) -> None:
    for name, value in values.items():
        if not value >= minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")


def _between(minimum: int, maximum: int, **values: float) -> None:
    for name, value in values.items():
        if not minimum <= value <= maximum:
            raise ValueError(f"{name}={value} must be in {minimum}..{maximum}")


def _fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be at least 0 and below 1")


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or 'it'} is no object")
    unknown = sorted(set(values) - known.keys())
    if unknown:
        raise ValueError(f"unknown setting {where}{unknown[0]}; known: {', '.join(sorted(known))}")
    arguments = {}
    for name, value in values.items():
        section = known[name].default_factory
        if dataclasses.is_dataclass(section):
            value = _build(section, value, f"{name}.")
        arguments[name] = tuple(value) if name == "betas" else value
    return cls(**arguments)
