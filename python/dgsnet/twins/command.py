"""`dgsnet twins`: pairs to train on, a real image and what a decoder makes of it, alike in all else."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dgsnet.data.captions import CAPTIONS_FILE, attach_captions
from dgsnet.data.cells import row_writer
from dgsnet.data.images import ImageError, read_image
from dgsnet.data.items import FOLDERS, Item, paths_hash
from dgsnet.data.pairs import TWINS_FILE
from dgsnet.data.tables import Table, partial
from dgsnet.detection.overlap import images_of_class
from dgsnet.errors import UserError
from dgsnet.files import check_new, replacing, write_file
from dgsnet.processes import default_workers
from dgsnet.twins.writing import Style, style_of, write

if TYPE_CHECKING:
    from dgsnet.twins.makers import Maker

COLUMNS = ("path", "twin", "by", "source", "error")
# What --batch_size counts, in pixels; and how many batches' images are sorted by size at a time.
ONE = 512 * 512
WINDOW = 4


def twins_command(
    data: list[str],
    out: str,
    by: list[str],
    captions: str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
    workers: int | None = None,
    resume: bool = False,
) -> None:
    """Make twins of real images: what generators make of them, alike in all else.

    Args:
        data: real images: files, folders (searched recursively), quoted glob patterns, lists, tar shards and
            Parquet files. Of a labelled dataset its real images are taken.
        out: folder for the dataset, new or empty unless --resume is given.
        by: what makes twins, one or several, of which one is drawn for every image: vae:NAME_OR_FOLDER, an
            AutoencoderKL or AutoencoderTiny of the Hugging Face Hub or in a folder; builtin:DECODER; resize,
            which halves and doubles the size.
        captions: JSON file of image path to caption, or auto for captions.json of each folder; both twins get
            the caption.
        seed: decides which image goes to which decoder, and what an autoencoder draws.
        batch_size: images of 512 x 512 pixels that go through a decoder at a time, fewer of larger ones.
        device: torch device of autoencoders; the GPU where there is one if not given.
        workers: processes that read images; chosen if not given.
        resume: go on where a call with the same words was stopped or killed.
    """
    _check_words(by)
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name} is {value}; it must be {least} or more")
    target = Path(out) / TWINS_FILE
    if not partial(target).exists():
        check_new(Path(out))
    items = images_of_class(data, 0)
    for root in data if captions else ():
        items = attach_captions(items, str(captions), root, partly=True)

    from dgsnet.twins.makers import load_makers

    makers = load_makers(by, device)
    for maker in makers:
        if maker.origin:
            print(maker.origin)
    settings = {
        "by": [[maker.name, *maker.identity] for maker in makers],
        "seed": seed,
        "batch_size": batch_size,
        "images": paths_hash(items),
    }
    with Table(partial(target), settings, ("number", *COLUMNS), resume=resume) as table:
        rate = PairWriter(Path(out), items, makers, seed, batch_size, table).run(workers)
        rows = sorted(table.rows(), key=lambda row: row["number"])
        _finish(target, items, rows)
        table.remove()
    _report(target, rows, rate)


def _check_words(words: Sequence[str]) -> None:
    """UserError for a word of --by that names no kind of maker."""
    for word in words:
        kind, _, name = word.partition(":")
        if not (word == "resize" or (kind in ("vae", "builtin") and name)):
            raise UserError(f"--by {word} is unknown; give vae:NAME_OR_FOLDER, builtin:DECODER or resize")
    if len(set(words)) < len(words):
        raise UserError("--by names one twice")


class _Prepared(NamedTuple):
    """An image on its way, or why there is none.

    Attributes:
        pixels: uint8 Tensor [H, W, 3].
    """

    number: int
    error: str
    pixels: Any = None
    style: Style | None = None
    written: bytes = b""
    maker: int = 0
    seed: int = 0


class _Prepare:
    """Map-style dataset from an item and its number to what is needed of it."""

    def __init__(self, seed: int, makers: int):
        self.seed, self.makers = seed, makers

    def __getitem__(self, numbered: tuple[int, Item]) -> _Prepared:
        import torch

        from dgsnet.data.preprocess import content_seed

        number, item = numbered
        try:
            data = item.read_bytes()
            pixels = read_image(data, name=item.path)
            style = style_of(data, pixels, name=item.path)
            written = write(pixels, style, name=item.path)
        except ImageError as error:
            return _Prepared(number, str(error))
        rng = np.random.default_rng((self.seed, content_seed(pixels)))
        maker, seed = int(rng.integers(self.makers)), int(rng.integers(2**63))
        return _Prepared(number, "", torch.from_numpy(pixels), style, written, maker, seed)


class PairWriter:
    """Makes the pairs that a table lacks.

    Images are taken in windows, always the same ones, and those of a window that one maker takes at one size
    go through it together, whether or not their pairs are there already: what else is in a batch can change
    the last bit of a number.
    """

    def __init__(
        self, out: Path, items: Sequence[Item], makers: Sequence[Maker], seed: int, batch: int, table: Table
    ):
        self.out, self.items, self.makers, self.table = out, items, makers, table
        self.prepare = _Prepare(seed, len(makers))
        self.most = batch * ONE
        self.window = batch * WINDOW
        self.done = {row["number"] for row in table.rows()}
        self.digits = max(6, len(str(len(items))))
        self.writing: deque[Future[dict[str, Any]]] = deque()

    def run(self, workers: int | None) -> str:
        """Do all that is left; returns how fast, in words."""
        from tqdm import tqdm

        from dgsnet.detection.supply import MIN_IMAGES_FOR_WORKERS, in_order

        windows = [
            range(start, min(start + self.window, len(self.items)))
            for start in range(0, len(self.items), self.window)
        ]
        numbers = [number for window in windows if not self.done.issuperset(window) for number in window]
        if workers is None and len(numbers) < MIN_IMAGES_FOR_WORKERS:
            workers = 0
        images = in_order(self.prepare, [(number, self.items[number]) for number in numbers], workers)
        before, begin = self.table.done, time.monotonic()
        with (
            ThreadPoolExecutor(default_workers(), "files") as self.pool,
            tqdm(total=len(self.items), initial=before, unit="image", disable=None) as self.progress,
        ):
            waiting: dict[tuple[int, int, int], list[_Prepared]] = {}
            try:
                for image in images:
                    self._sort(image, waiting)
                    if image.number + 1 == len(self.items) or (image.number + 1) % self.window == 0:
                        for together in waiting.values():
                            self._make(together)
                        waiting.clear()
            except KeyboardInterrupt:
                self._take(0)
                raise
            self._take(0)
        new, seconds = self.table.done - before, time.monotonic() - begin
        return f"; {new / seconds:.1f} images per second" if new else ""

    def _sort(self, image: _Prepared, waiting: dict[tuple[int, int, int], list[_Prepared]]) -> None:
        """Put an image to those that it goes with, and make the twins of these when they are enough."""
        if image.error:
            self._add(self._row(image.number, error=image.error))
            return
        height, width = self.makers[image.maker].size(*image.pixels.shape[:2])
        together = waiting.setdefault((image.maker, height, width), [])
        together.append(image)
        if (len(together) + 1) * height * width > self.most:
            self._make(waiting.pop((image.maker, height, width)))

    def _make(self, together: Sequence[_Prepared]) -> None:
        if self.done.issuperset(image.number for image in together):
            return
        maker = self.makers[together[0].maker]
        twins = maker([image.pixels.numpy() for image in together], [image.seed for image in together])
        for image, twin in zip(together, twins):
            if image.number not in self.done:
                self.writing.append(self.pool.submit(self._write, image, twin))
        self._take(2 * len(together))

    def _take(self, left: int) -> None:
        """Add rows of pairs that are on the disk, until so many are still being written."""
        while len(self.writing) > left:
            self._add(self.writing.popleft().result())

    def _write(self, image: _Prepared, twin: np.ndarray | None) -> dict[str, Any]:
        maker, source = self.makers[image.maker].name, self.items[image.number].path
        if twin is None:
            return self._row(image.number, error=f"{source}: {maker} makes no finite numbers of it")
        assert image.style
        try:
            written = write(twin, image.style, name=source)
        except ImageError as error:
            return self._row(image.number, error=str(error))
        name = f"{image.number:0{self.digits}d}{image.style.ending}"
        files = [f"{maker}/{folder}/{name}" for folder in FOLDERS]
        for file, content in zip(files, (image.written, written)):
            (self.out / file).parent.mkdir(parents=True, exist_ok=True)
            write_file(self.out / file, content)
        return self._row(image.number, path=files[0], twin=files[1], by=maker)

    def _row(self, number: int, **values: str) -> dict[str, Any]:
        named = dict.fromkeys(COLUMNS, "") | {"source": self.items[number].path} | values
        return {"number": number, **named}

    def _add(self, row: dict[str, Any]) -> None:
        if row["number"] not in self.done:
            self.done.add(row["number"])
            self.table.add(row)
            self.progress.update()


def _finish(target: Path, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> None:
    """Write the captions and the table."""
    pairs = [row for row in rows if not row["error"]]
    texts = {
        row[column]: caption
        for row in pairs
        for column in ("path", "twin")
        if (caption := items[row["number"]].caption)
    }
    if texts:
        write_file(target.with_name(CAPTIONS_FILE), json.dumps(texts, indent=0).encode())
    with replacing(target, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        write = row_writer(file)
        write(COLUMNS)
        for row in rows:
            write(row[column] for column in COLUMNS)


def _report(target: Path, rows: Sequence[dict[str, Any]], rate: str) -> None:
    made = Counter(row["by"] for row in rows if not row["error"])
    by = ", ".join(f"{count} by {name}" for name, count in sorted(made.items()))
    print(
        f"{target}: {made.total()} pairs{by and f' ({by})'}, {len(rows) - made.total()} without a twin{rate}"
    )
    if not made:
        raise UserError(f"no image has a twin; {target} says why for each")
    if made.total() < len(rows):
        print(f"the column error of {target} says why", file=sys.stderr)
