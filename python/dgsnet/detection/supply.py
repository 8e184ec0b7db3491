"""Images on their way to the model: prepared ahead of it, in other processes or a thread, in order."""

from __future__ import annotations

import io
import pickle
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dgsnet.errors import UserError
from dgsnet.processes import default_workers, start_worker

# More processes than this wait for a model on the processor, not for the images.
MAX_WORKERS = 8
# Starting processes takes about as long as preparing this many images.
MIN_IMAGES_FOR_WORKERS = 64
# Images that come from a process at a time. Each message takes half a millisecond, whatever is in it.
TOGETHER = 8


def in_order(
    prepare: Any,
    images: Iterable[Any],
    workers: int | None = None,
    *,
    batch: int = 1,
    device: torch.device | None = None,
) -> Generator[Any, None, None]:
    """What `prepare`, a map-style dataset, makes of one image after another.

    Args:
        images: of any length; taken by the caller's thread, not much further than they are asked for.
        workers: processes that prepare; None chooses, 0 is a thread of this process.
        batch: so many are ready when the model has done as many.
        device: the model's; for a GPU uint8 tensors come in pinned memory.

    Raises:
        UserError: workers is negative.
    """
    from torch.utils.data import DataLoader

    on_gpu = device is not None and device.type == "cuda"
    if workers is None:
        workers = default_workers() if on_gpu else min(MAX_WORKERS, default_workers())
    elif workers < 0:
        raise UserError(f"workers is {workers}; it must be 0 or more")
    if not workers:
        yield from _from_a_thread(prepare, images, batch)
        return
    together = min(batch, TOGETHER)
    # The images themselves are the indices sent to the processes.
    sampler: Any = images
    for packed in DataLoader(
        prepare,
        batch_size=together,
        sampler=sampler,
        num_workers=workers,
        # While the model is at one batch, the next is made, and no process is ever without work.
        prefetch_factor=1 + -(-batch // (together * workers)),
        collate_fn=_packed,
        pin_memory=on_gpu,
        worker_init_fn=start_worker,
    ):
        yield from _unpacked(*packed)


def _from_a_thread(prepare: Any, images: Iterable[Any], ahead: int) -> Iterator[Any]:
    """The same from one thread, which leaves the interpreter to the model where it reads and decodes."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(1, "images") as pool:
        try:
            for image in images:
                waiting.append(pool.submit(prepare.__getitem__, image))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Packer(pickle.Pickler):
    """Leaves uint8 tensors out, for they would be sent one by one."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.length = 0

    def persistent_id(self, value: Any) -> tuple[int, torch.Size] | None:
        if not (isinstance(value, Tensor) and value.dtype == torch.uint8):
            return None
        self.tensors.append(value.flatten())
        self.length += value.numel()
        return self.length - value.numel(), value.shape


class _Unpacker(pickle.Unpickler):
    def __init__(self, words: bytes, pixels: Tensor) -> None:
        super().__init__(io.BytesIO(words))
        self.pixels = pixels

    def persistent_load(self, place: tuple[int, torch.Size]) -> Tensor:
        start, shape = place
        return self.pixels[start : start + shape.numel()].view(shape)


def _packed(answers: list[Any]) -> tuple[bytes, Tensor]:
    """Some answers as they travel: the pixels of all as one tensor, in memory that processes share."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(answers)
    return file.getvalue(), torch.cat([torch.empty(0, dtype=torch.uint8), *packer.tensors])


def _unpacked(words: bytes, pixels: Tensor) -> list[Any]:
    return _Unpacker(words, pixels).load()
