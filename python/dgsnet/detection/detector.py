"""`Detector`: a trained model that scores images, in Python; scoring.py has the command `dgsnet predict`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgsnet.data.items import Item
from dgsnet.detection.decisions import SETTINGS, THRESHOLD, Calibration, check_setting, decide
from dgsnet.detection.engine import Job, answers, mean
from dgsnet.detection.given import checked, listed
from dgsnet.errors import UserError

# torch, open_clip and the rest are imported where they are used: `from dgsnet import Detector` stays quick.
if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dgsnet.config import Config, Crops
    from dgsnet.data.distortions import Distortion
    from dgsnet.data.loading import Wait
    from dgsnet.data.preprocess import Preprocessor
    from dgsnet.detection.batches import Batches, Line
    from dgsnet.model.description import Description
    from dgsnet.model.dgsnet import DGSNet


class Detector:
    """A trained model that says how likely an image was generated.

    A score is a function of the image alone: the patch shuffle is seeded from the image's content, and all
    images go through the network in batches of one shape, because floating-point sums depend on that shape
    and on nothing else in a batch. Between machines, versions or numbers of threads the last digits may
    differ.

    With `views=k` it is the mean logit of k views: the plain one and k - 1 made as in training (another
    shuffle or crop, maybe mirrored), seeded from the image's content too. With `crops=5` or `crops="tiles"`
    the plain view is several crops, and the mean is over all of them and the k - 1 others.

    Args:
        model: the network.
        config: the configuration it was trained with, preprocessing included.
        calibration: what turns scores into decisions; None decides at 0.5.
        views: views averaged per image; None is what the calibration was made with, else 1.
        batch: images that go through the network at a time; None is what the calibration was made with, else
            1. An image alone costs as much as a whole batch.
        precision: of the network's weights, "fp32", "bf16" or "fp16"; None is what the calibration was made
            with, else "fp32".
        crops: 1, 5 or "tiles", as `PreprocessConfig` has them; None is what the calibration was made with,
            without one what the configuration says.
        description: where there is no calibration, it has the temperature and the threshold.

    Attributes:
        model: the network, in evaluation mode; of an .onnx an `OnnxNetwork`. What scores is a copy, made when
            it is first asked for.
        config, calibration, views, batch, precision, crops, description: as given or found.
        folder: of the model, whose calibration decides; None where `load` has not made it.
        alarmed: whether `dgsnet monitor` found that the calibration does not hold; see `obey`.
        errors: index to message of the images that the last `predict` could not read.
        again: makes the same detector in another process; None where `load` has not made it.

    >>> detector = Detector.load("runs/demo/model")  # doctest: +SKIP
    >>> detector.predict(["photo.jpg", "broken.png"])  # doctest: +SKIP
    array([0.03121, nan], dtype=float32)
    >>> detector.errors  # doctest: +SKIP
    {1: 'broken.png: cannot identify image file'}
    """

    def __init__(
        self,
        model: DGSNet,
        config: Config,
        calibration: Calibration | None = None,
        views: int | None = None,
        *,
        batch: int | None = None,
        precision: str | None = None,
        crops: Crops | None = None,
        description: Description | None = None,
    ):
        from dgsnet.data.preprocess import Preprocessor
        from dgsnet.detection.batches import fp32_only

        self.views: int = _setting(calibration, "views", views)
        self.batch: int = _setting(calibration, "batch", batch)
        self.precision: str = _setting(calibration, "precision", precision)
        if self.precision != "fp32" and fp32_only(model):
            raise UserError(f"an .onnx is computed in fp32: {self.precision} needs the model folder")
        if crops is None and not calibration:
            crops = config.preprocess.crops
        self.crops: Crops = _setting(calibration, "crops", crops)
        try:
            preprocess = replace(config.preprocess, crops=self.crops)
        except ValueError as error:
            # A mosaic has no crops.
            raise UserError(str(error)) from None
        self.model = model.eval()
        self.config = config
        self.calibration = calibration
        self.description = description
        self.folder: Path | None = None
        self.alarmed = False
        self.preprocess = Preprocessor(preprocess)
        self.errors: dict[int, str] = {}
        self.again: Callable[[], Detector] | None = None
        self._wait: Wait | None = None

    @classmethod
    def load(
        cls,
        run: str | Path,
        device: str | None = None,
        *,
        views: int | None = None,
        batch: int | None = None,
        precision: str | None = None,
        crops: Crops | None = None,
        calibrated: bool = True,
        pretrained: str | None = None,
    ) -> Detector:
        """Load a model folder with its calibration, or the best model of a training run's folder.

        Args:
            run: folder written by `dgsnet train`, `dgsnet convert` or `dgsnet demo`, or an .onnx with its
                description beside it, as `dgsnet export` writes them.
            device: torch device, such as "cpu" or "cuda:1"; None takes the GPU where there is one. An .onnx
                is scored on the CPU.
            views, batch, precision, crops: as of the class.
            calibrated: False leaves the folder's calibration aside.
            pretrained: weights file of the backbone, in place of the one that the folder names; TorchScript,
                such as OpenAI's own files, can run code and is loaded only if it is named here.

        Raises:
            UserError: the folder holds no model, its backbone cannot be loaded, it was calibrated for other
                views, crops, batches or another precision, or there is no such device.
        """
        from dgsnet.detection.decisions import load_calibration
        from dgsnet.model.folders import is_onnx, model_folder

        if not is_onnx(run):
            # What is no model is refused before the imports that take seconds.
            model_folder(run)

        from dgsnet.model.network import device_for, load_network

        device = device_for(run, device)
        calibration = load_calibration(run) if calibrated else None
        if calibration and calibration.raw:
            raise UserError(
                f"{run} is calibrated for another program's scores: run dgsnet calibrate --replace"
            )
        model, config, description = load_network(Path(run), device, pretrained)
        how: dict[str, Any] = {"views": views, "batch": batch, "precision": precision, "crops": crops}
        detector = cls(model, config, calibration, **how, description=description)
        if calibrated:
            detector.folder = Path(run)
            detector.obey()
        detector.again = functools.partial(
            cls.load, run, device, calibrated=calibrated, pretrained=pretrained, **how
        )
        return detector

    def fastest(self, batch: int | None = None, precision: str | None = None) -> Detector:
        """The same, at the precision and in the batches that are fast on this machine, unless they are given.

        `dgsnet.detection.batches` says how they are chosen.
        """
        from dgsnet.detection.batches import best_size, device_of, fast_precision, fp32_only, ready

        fast = "fp32" if fp32_only(self.model) else fast_precision(device_of(self.model))
        precision = precision or fast
        batch = batch or best_size(ready(self.model, precision))[0]
        how: dict[str, Any] = {"batch": batch, "precision": precision}
        kept: dict[str, Any] = {"crops": self.crops, "description": self.description}
        faster = Detector(self.model, self.config, self.calibration, self.views, **kept, **how)
        faster.again = self.again and functools.partial(self.again, **how)
        return faster

    def settings(self) -> dict[str, Any]:
        """What logits depend on besides the image, as JSON values: a hash of the model, preprocessing, ..."""
        from dgsnet.model.network import identity

        return {
            "model": identity(self.model, self.config),
            "preprocessing": self.config.preprocess.of_one(),
            "views": self.views,
            "batch": self.batches.size,
            "precision": self.precision,
            "crops": self.crops,
        }

    def predict(self, images: Any, *, workers: int | None = None, consistency: bool = False) -> np.ndarray:
        """Probability that each image was generated, float32 [N]; calibrated where the model is.

        Args:
            images: one image or N of them. An image is a path, a PIL image, an encoded image as bytes or a
                uint8 array [H, W], [H, W, 3] or [H, W, 4]; several are a sequence or one uint8 array
                [N, H, W, 3] or [N, H, W, 4].
            workers: processes that read and prepare images; None chooses, 0 works in this process.
            consistency: score copies too, `dgsnet.data.distortions.COPIES`: [N, 1 + copies], the images
                themselves first. `decide` then says "unsure" where the decision on a copy is another.

        An image that cannot be read gives NaN, and `errors` tells why under its index. With `consistency` so
        does one of which a copy cannot be made.

        Raises:
            TypeError: something that is no image; raised before any is scored.
            ValueError: an array of another shape or type.
        """
        from dgsnet.data.distortions import COPIES

        images = listed(images)
        stream: Any = self.stream_copies if consistency else self.stream
        shape = (len(images), 1 + len(COPIES)) if consistency else len(images)
        probabilities = np.full(shape, np.nan, dtype=np.float32)
        self.errors = {}
        for index, (probability, error) in enumerate(stream(images, workers=workers)):
            probabilities[index] = probability
            if error:
                self.errors[index] = error
        return probabilities

    def stream(
        self, images: Iterable[str | Path | Image | np.ndarray | Item], *, workers: int | None = None
    ) -> Iterator[tuple[float, str]]:
        """`predict` one (probability, error message) at a time, in order; the message is "" for a score.

        `images` may be any iterable, of any length: it is read some batches ahead of the scores.
        """
        for logits, error in self._stream(images, workers):
            yield self.probabilities(logits).item(), error

    def stream_copies(
        self, images: Iterable[str | Path | Image | np.ndarray | Item], *, workers: int | None = None
    ) -> Iterator[tuple[list[float], str]]:
        """As `stream`, with a list of probabilities: of the image, then of each of COPIES."""
        for logits, error in self._stream(images, workers, consistency=True):
            yield self.probabilities(logits).tolist(), error

    def stream_logits(
        self, images: Iterable[str | Path | Image | np.ndarray | Item], *, workers: int | None = None
    ) -> Iterator[tuple[float, str]]:
        """As `stream`, with the mean logit of crops and views, before any temperature; NaN with an error."""
        for (logit,), error in self._stream(images, workers):
            yield logit, error

    def _stream(
        self, images: Iterable[Any], workers: int | None, consistency: bool = False
    ) -> Iterator[tuple[list[float], str]]:
        """Logits [1 + copies] of one image after another, NaN with an error."""
        images = images if isinstance(images, list) else map(checked, images)
        job = self.job(consistency)
        versions = 1 + len(job.prepare.copies)
        for answer in answers(job, images, workers=workers):
            logits, error = answer.logits[""]
            yield logits or [math.nan] * versions, error

    def job(self, consistency: bool = False) -> Job:
        """How images become logits, [1] of each or with consistency [1 + copies]."""
        from dgsnet.data.distortions import COPIES

        return Job(Prepared(self.preprocess, self.views, COPIES if consistency else ()), {"": self})

    def filled(
        self,
        prepare: Any,
        images: Iterable[Any],
        workers: int | None = None,
        *,
        idle: Callable[[], bool] | None = None,
    ) -> Iterator[list[Any]]:
        """What `prepare`, a map-style dataset, makes of images, in lists of what about fills a batch.

        The next ones are made while the model works. `waiting` tells where it has to wait for them.

        Args:
            workers: as of `predict`.
            idle: whether the model has nothing left to do; where not given, a GPU is asked.
        """
        from dgsnet.data.loading import Wait
        from dgsnet.data.preprocess import MAX_TILES
        from dgsnet.detection.supply import in_order

        most = MAX_TILES if self.crops == "tiles" else self.crops
        batch, device = -(-self.batch // (most + self.views - 1)), self.batches.device
        ahead = batch * max(1, self.batches.behind)
        prepared = in_order(prepare, images, workers, batch=ahead, device=device)
        lists = iter(lambda: list(itertools.islice(prepared, batch)), [])
        with contextlib.closing(prepared), contextlib.suppress(StopIteration):
            self._wait = wait = Wait(device, idle)
            filled = next(lists)
            # Before the first batch, processes start.
            wait.begin()
            while True:
                yield filled
                wait.step(len(filled))
                filled = wait.next(lists)

    def waiting(self) -> str:
        """How fast images come, and how fast they could be scored, where the model waits for them much."""
        from dgsnet.data.loading import WAITING

        wait = self._wait
        if wait is None or wait.share <= WAITING:
            return ""
        return f"waits for images: {wait.rate:.3g}/s come, {wait.could:.3g}/s could be scored"

    @property
    def fills(self) -> int:
        """The fewest images whose crops and views fill batches, however many versions of them there are."""
        return 1 if self.crops == "tiles" else self.batch // math.gcd(self.batch, self.crops + self.views - 1)

    def mean_logits(self, versions: Sequence[Tensor]) -> list[float]:
        """The mean logits of versions of images, each given as its prepared crops and views.

        Args:
            versions: uint8 [n, 3, S, S] each, n at least 1.
        """
        return [mean(logits) for logits in self.single_logits(versions)]

    def single_logits(self, versions: Sequence[Tensor]) -> list[list[float]]:
        """The logits [n] of each version's crops and views, which `mean_logits` has the mean of."""
        line = self.line()
        for pixels in versions:
            line.add(pixels)
        line.finish()
        return [line.take(len(pixels)) for pixels in versions]

    def line(self) -> Line:
        """Takes prepared crops and views, and scores them in batches."""
        from dgsnet.detection.batches import Line

        def score(pixels: Tensor) -> Tensor:
            return self.logits(self.preprocess.normalise(pixels))

        return Line(score, self.batches)

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits, float32 [N] on the model's device; generated is positive.

        Args:
            pixels: prepared and normalised images [N, 3, S, S], float, on any device; N may be 0.

        Raises:
            ValueError: another shape than the model's input.
        """
        size = self.model.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be [N, 3, {size}, {size}], got {list(pixels.shape)}")
        return self.batches(pixels)

    @functools.cached_property
    def batches(self) -> Batches:
        """What scores: a copy of the model with its adapters merged, made when it is first asked for."""
        from dgsnet.detection.batches import Batches, ready

        batches = Batches(ready(self.model, self.precision), self.batch)
        if batches.size < self.batch:
            warnings.warn(
                f"in batches of {self.batch} the bits of an image's score depend on what is beside it on "
                f"{batches.device}: images are scored one by one",
                stacklevel=2,
            )
        return batches

    def probabilities(self, logits: Tensor | Sequence[float]) -> Tensor:
        """sigmoid(logit / temperature), float64 of the shape of `logits`; temperature 1 if uncalibrated."""
        import torch

        return (torch.as_tensor(logits, dtype=torch.float64) / self.temperature).sigmoid()

    @property
    def temperature(self) -> float:
        """What logits are divided by: the calibration's, else the description's, else 1."""
        rule = self.calibration or self.description
        return rule.temperature if rule else 1.0

    @property
    def threshold(self) -> float:
        """The probability above which an image is called generated, found as `temperature` is, else 0.5."""
        rule = self.calibration or self.description
        return rule.threshold if rule else THRESHOLD

    def obey(self) -> None:
        """Look whether `dgsnet monitor` has raised an alarm; UserError where its file is damaged."""
        from dgsnet.detection.monitor import alarmed

        self.alarmed = self.folder is not None and alarmed(self.folder)

    def decide(self, probabilities: Any) -> list[str]:
        """Names "generated", "real" or "unsure" for N probabilities as `predict` gives them; "" for NaN.

        Without a calibration, "generated" above `threshold` and else "real". Of copies, [N, 1 + copies], the
        names must agree, else it is "unsure". After an alarm of `dgsnet monitor` nothing is called generated.
        """
        names = decide(probabilities, self.calibration, self.threshold)
        return ["unsure" if name == "generated" and self.alarmed else name for name in names]


def _setting(calibration: Calibration | None, name: str, given: Any) -> Any:
    """One of SETTINGS: what is given, else the calibration's, else the default."""
    made = getattr(calibration, name) if calibration else SETTINGS[name]
    if given is None:
        return made
    check_setting(name, given)
    if calibration and given != made:
        raise UserError(
            f"the model is calibrated for {name}={made}, and its threshold does not hold for {name}={given}: "
            f"leave {name} out, or run dgsnet calibrate --{name} {given}"
        )
    return given


class Prepared:
    """Map-style dataset from an image to no note and one part, as `Job` has it: itself and its copies.

    Pixels are uint8, a quarter of what normalised ones take on their way to the model.
    """

    def __init__(self, preprocess: Preprocessor, views: int, copies: Sequence[Distortion] = ()):
        self.preprocess, self.views, self.copies = preprocess, views, copies

    def __getitem__(self, image: Any) -> tuple[None, dict[str, tuple[list[Tensor] | None, str]]]:
        return None, {"": self.part(image)}

    def failed(self, image: Any, why: str) -> tuple[None, dict[str, tuple[list[Tensor] | None, str]]]:
        """The answer where it cannot be prepared."""
        return None, {"": (None, _named(image, why))}

    def part(self, image: Any) -> tuple[list[Tensor] | None, str]:
        """Crops and views, uint8 [n, 3, S, S], of the image, then of each of its copies, or an error."""
        from dgsnet.data.images import ImageError, read_image

        try:
            pixels = image.read() if isinstance(image, Item) else read_image(image)
            own = prepare_views(self.preprocess, pixels, self.views, normalised=False)
            return [own, *(self._copy(pixels, copy) for copy in self.copies)], ""
        except ImageError as error:
            return None, _named(image, str(error))

    def _copy(self, image: np.ndarray, copy: Distortion) -> Tensor:
        from dgsnet.data.images import ImageError

        try:
            return prepare_views(self.preprocess, copy(image), self.views, normalised=False)
        except ImageError as error:
            raise ImageError(f"its copy {copy.name} cannot be scored: {error}") from None


def _named(image: Any, why: str) -> str:
    """The reason with the image's name: what the preprocessing refuses does not know its file."""
    name = str(image) if isinstance(image, (str, os.PathLike, Item)) else ""
    return why if name in why else f"{name}: {why}"


def prepare_views(
    preprocess: Preprocessor, image: np.ndarray, views: int, *, normalised: bool = True
) -> Tensor:
    """Prepared crops and views [n, 3, S, S] of one image, uint8 [H, W, 3]: a function of the image alone.

    First the plain view, with crops all of them; the views - 1 others are drawn as in training, from the
    image's content.
    """
    import torch

    generators = (view_generator(image, view) for view in range(1, views))
    others = [preprocess(image, rng=rng, normalised=normalised)[None] for rng in generators]
    return torch.cat([preprocess.crops(image, normalised=normalised), *others])


def view_generator(image: np.ndarray, view: int) -> np.random.Generator | None:
    """What the view of this number is drawn from: nothing for the first, for others the image's content."""
    from dgsnet.data.preprocess import content_seed

    return np.random.default_rng([content_seed(image), view]) if view else None
