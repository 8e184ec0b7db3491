"""`dgsnet caption`: one BLIP caption per training image, in the JSON that training looks for."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dgsnet.data.captions import CAPTIONS_FILE
from dgsnet.data.items import Item, find_samples, paths_hash
from dgsnet.data.tables import Table, partial
from dgsnet.errors import UserError
from dgsnet.files import one_line, replacing
from dgsnet.processes import default_workers, start_worker

if TYPE_CHECKING:
    from torch import Tensor

BLIP = "Salesforce/blip-image-captioning-large"
# As BLIP's authors caption: their prompt, which is not part of the caption, and their beam search.
PROMPT = "a picture of "
GENERATION = dict(num_beams=3, max_length=20, min_length=5, do_sample=False, repetition_penalty=1.0)
COLUMNS = ("path", "caption", "error")


class Captioner:
    """BLIP from `transformers`, with its own preprocessing; model and device as in `caption_command`.

    Raises:
        UserError: it cannot be loaded, is no BLIP, or there is no such device.

    Example:
        >>> captioner = Captioner()  # doctest: +SKIP
        >>> captioner(captioner.prepare(read_image("cat.jpg"))[None])  # doctest: +SKIP
        ['a cat sitting on a chair']
    """

    def __init__(self, model: str = BLIP, device: str | None = None):
        import torch
        from transformers import AutoConfig, BlipForConditionalGeneration, BlipProcessor

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # Else transformers asks on the terminal whether to run code that the folder brings.
        options: Any = {"trust_remote_code": False}
        try:
            if (kind := AutoConfig.from_pretrained(model, **options).model_type) != "blip":
                raise UserError(f"{model} is a model of type {kind}, not blip")
            found: Any = BlipForConditionalGeneration.from_pretrained(
                model, output_loading_info=True, **options
            )
            self.processor: Any = BlipProcessor.from_pretrained(model, **options)
        except UserError:
            raise
        # What a missing, damaged, foreign or hostile folder raises has no class in common.
        except Exception as error:
            reason = one_line(error, 200)
            raise UserError(
                f"{model}: cannot be loaded as BLIP ({reason}); give a folder that holds one, or a network"
            ) from None
        self.model, loaded = found
        # The output layer is tied to the embeddings: files may leave it out.
        missing = sorted(key for key in loaded["missing_keys"] if ".cls.predictions." not in key)
        if missing:
            raise UserError(f"{model}: {len(missing)} tensors are missing, such as {missing[0]}")
        try:
            self.model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device} cannot be used here ({error}); try cpu") from None
        self.prompt = self.processor.tokenizer(PROMPT, return_tensors="pt").input_ids

    def prepare(self, image: Any) -> Tensor:
        """An image uint8 [H, W, 3] as the model's input, float32 [3, S, S]."""
        options = {"return_tensors": "pt", "input_data_format": "channels_last"}
        return self.processor.image_processor(images=[image], **options).pixel_values[0]

    def __call__(self, pixels: Tensor) -> list[str]:
        """Captions of prepared images [N, 3, S, S]: a function of the batch, beam search without sampling."""
        device = self.model.device
        words = self.model.generate(
            pixel_values=pixels.to(device),
            input_ids=self.prompt.repeat(len(pixels), 1).to(device),
            **GENERATION,
        )
        # All of the prompt but its end token stands before what was generated.
        captions = self.processor.batch_decode(words[:, self.prompt.shape[1] - 1 :], skip_special_tokens=True)
        return [" ".join(caption.split()) for caption in captions]


def caption_command(
    data: str,
    out: str | None = None,
    model: str = BLIP,
    split: Literal["train", "val", "test"] = "train",
    batch_size: int = 16,
    device: str | None = None,
    workers: int | None = None,
    resume: bool = False,
) -> None:
    """Write the captions that training with gradient surgery needs, with BLIP.

    Args:
        data: the training images, as `dgsnet train --data.train` takes them.
        out: the JSON to write; captions.json in the data's folder, where training finds it, if not given.
        model: a BLIP on the Hugging Face Hub, or a folder that holds one.
        split: of a folder with several, the one to caption; training needs captions of train only.
        batch_size: images captioned at a time.
        device: torch device; the GPU where there is one if not given.
        workers: processes that read and prepare images; chosen if not given.
        resume: go on where a run with the same words was stopped or killed.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    folder = Path(data) if os.path.isdir(data) else Path(data).parent
    target = Path(out) if out else folder / CAPTIONS_FILE
    if target.exists():
        raise UserError(f"{target} is there already: give another --out, or delete it")
    samples = [sample for sample in find_samples(data, split) if sample.caption is None]
    if not samples:
        raise UserError(f"{data}: every image has a caption already")
    with quiet_transformers():
        captioner = Captioner(model, device)

    from dgsnet.model.checkpoint import sampled_hash

    settings = {
        "model": model,
        "weights": sampled_hash(captioner.model.state_dict().values()),
        "generation": [PROMPT, GENERATION],
        "batch_size": batch_size,
        "images": paths_hash(samples),
    }
    with Table(partial(target), settings, COLUMNS, resume=resume) as table:
        done = {row["path"] for row in table.rows()}
        _fill(table, captioner, samples, done, batch_size, workers)
        rows = list(table.rows())
        # Relative to the JSON, so that both can be moved; an image that cannot be read has no words, and
        # training, which asks for captions of all images, will leave it out for itself.
        captions = {os.path.relpath(row["path"], target.parent): row["caption"] for row in rows}
        with replacing(target, "w", encoding="ascii") as file:
            json.dump(captions, file, indent=0)
        table.remove()
    _report(target, rows)


def _fill(
    table: Table,
    captioner: Captioner,
    samples: Sequence[Item],
    done: set[str],
    batch_size: int,
    workers: int | None,
) -> None:
    """Caption the batches that lack a row: the same batches, and so the same captions, after any kill."""
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    batches = [batch for batch in batches if any(sample.path not in done for sample in batch)]
    if workers is None:
        workers = 0 if len(batches) < 4 else min(4, default_workers())
    elif workers < 0:
        raise UserError(f"workers is {workers}; it must be 0 or more")
    # torch takes any map-style object.
    prepared: Any = _Batches(captioner.prepare)
    loader: Any = DataLoader(
        prepared, sampler=batches, batch_size=None, num_workers=workers, worker_init_fn=start_worker
    )
    with tqdm(total=len(samples), initial=table.done, unit="image", disable=None) as progress:
        for batch, (pixels, errors) in zip(batches, loader):
            words: Iterator[str] = iter(captioner(pixels) if len(pixels) else [])
            for sample, error in zip(batch, errors):
                row = {"path": sample.path, "caption": "" if error else next(words), "error": error}
                if sample.path not in done:
                    table.add(row)
                    progress.update()


class _Batches:
    """Map-style dataset from samples to (pixels [n, 3, S, S] of the readable, an error or "" of each)."""

    def __init__(self, prepare: Any):
        self.prepare = prepare

    def __getitem__(self, samples: Sequence[Item]) -> tuple[Tensor, list[str]]:
        import torch

        from dgsnet.data.images import ImageError

        pixels, errors = [], []
        for sample in samples:
            try:
                pixels.append(self.prepare(sample.read()))
                errors.append("")
            except ImageError as error:
                errors.append(str(error))
        return torch.stack(pixels) if pixels else torch.empty(0), errors


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers shows no progress bars and gives no advice."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _report(target: Path, rows: Sequence[dict[str, str]]) -> None:
    bad = [row for row in rows if row["error"]]
    print(f"{target}: {len(rows) - len(bad)} captions, {len(bad)} images could not be read")
    for row in bad[:10]:
        print(f"no caption: {row['error']}", file=sys.stderr)
    if len(bad) > 10:
        print(f"and {len(bad) - 10} more", file=sys.stderr)
    if len(bad) == len(rows):
        raise UserError(f"none of the images could be read; {target} holds no words")
