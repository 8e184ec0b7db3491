"""One road from images to logits for all that scores: on this machine's device, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from dgsnet.detection.ray_engine import on_ray
from dgsnet.errors import UserError

Engine = Literal["local", "ray"]


class Answer(NamedTuple):
    """What is found of an item."""

    item: Any
    note: Any  # as the job's `prepare` has it
    logits: dict[str, tuple[list[float], str]]  # by part: of its versions and "", or none and an error


@dataclass(frozen=True)
class Job:
    """How items become logits.

    Args:
        prepare: map-style dataset from an item to what is noted of it and, by name, its parts: views uint8
            [versions * views, 3, S, S] and "", or None and an error message. `prepare.failed(item, why)` is
            the same for an item that cannot be prepared.
        scorers: detectors by the name of the part that they score; that of "" scores all others too.
    """

    prepare: Any
    scorers: Mapping[str, Any]


def answers(
    job: Job, items: Iterable[Any], *, engine: Engine = "local", workers: int | None = None
) -> Iterator[Answer]:
    """Score items of any length, in their order, whatever becomes of the processes that read them.

    Args:
        job: how.
        items: not read much further than they are scored. On Ray they are gone through in another process.
        engine: local works on this machine. ray works on the cluster that `ray.init` was called for or that
            RAY_ADDRESS names; without either, Ray is started on this machine and stopped at the end.
        workers: processes that read and prepare images, 0 for none; on Ray processes that score, at most.
            None chooses.

    Yields:
        One answer for each item. An image at which a reading process dies (a decoder that crashes, the
        system's memory killer) is tried once more by itself, and then has that as its error.

    Raises:
        UserError: Ray is not installed, there is no such cluster or its processes keep dying, or a detector
            is none that `Detector.load` made.
    """
    if engine == "local":
        yield from _surviving(job, items, workers)
        return
    again = {name: scorer.again for name, scorer in job.scorers.items()}
    if None in again.values():
        raise UserError("engine ray needs a detector that Detector.load made")
    detector = job.scorers[""]
    for item, (note, logits) in on_ray(
        partial(_loaded, again),
        job.prepare,
        items,
        workers,
        fills=detector.fills,
        on_gpu=next(detector.model.parameters()).is_cuda,
    ):
        yield Answer(item, note, logits)


def _loaded(again: Mapping[str, Callable[[], Any]]) -> Callable[[Sequence[Any]], list[Any]]:
    """What scores prepared items, made where it scores."""
    scorers = {name: load() for name, load in again.items()}
    return lambda prepared: begin(scorers, prepared)()


def begin(scorers: Mapping[str, Any], prepared: Sequence[Any]) -> Callable[[], list[Any]]:
    """Have a device score prepared items; what is returned waits for their notes and logits."""
    views: dict[str, list[Any]] = {name: [] for name in scorers}
    for _, parts in prepared:
        for name, (part, _) in parts.items():
            if part is not None:
                views[name if name in scorers else ""].append(part)
    begun = {name: scorers[name].mean_logits(several) for name, several in views.items()}

    def finish() -> list[Any]:
        logits = {name: iter(several.tolist()) for name, several in begun.items()}

        def of(name: str, part: Any, error: str) -> tuple[list[float], str]:
            scorer = name if name in scorers else ""
            count = 0 if part is None else len(part) // scorers[scorer].views
            return [next(logits[scorer]) for _ in range(count)], error

        return [(note, {name: of(name, *part) for name, part in parts.items()}) for note, parts in prepared]

    return finish


def _here(job: Job, items: Iterable[Any], workers: int | None) -> Iterator[Any]:
    detector = job.scorers[""]
    begun: deque[Callable[[], list[Any]]] = deque()
    for filled in detector.filled(job.prepare, items, workers):
        begun.append(begin(job.scorers, filled))
        # A GPU works on a batch while the answers to the one before it are taken.
        if len(begun) > (detector.batches.device.type == "cuda"):
            yield from begun.popleft()()
    while begun:
        yield from begun.popleft()()


def _surviving(job: Job, items: Iterable[Any], workers: int | None) -> Iterator[Answer]:
    from dgsnet.detection.supply import MIN_IMAGES_FOR_WORKERS

    items = iter(items)
    if workers is None:
        first = list(itertools.islice(items, MIN_IMAGES_FOR_WORKERS))
        workers = 0 if len(first) < MIN_IMAGES_FOR_WORKERS else None
        items = itertools.chain(first, items)
    waiting: deque[Any] = deque()
    with _signal_kept():
        while True:
            try:
                for answer in _here(job, _noted(items, waiting), workers):
                    yield Answer(waiting.popleft(), *answer)
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not _is_death(error):
                    raise
            while waiting:
                yield Answer(waiting[0], *_alone(job, waiting[0]))
                waiting.popleft()


def _noted(items: Iterable[Any], waiting: deque[Any]) -> Iterator[Any]:
    # torch's handler of this signal raises wherever the program is when a process dies; without it the death
    # is found when the next answer is due. It was set just before the first item is asked for.
    if _handles_signals():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for item in items:
        waiting.append(item)
        yield item


@contextlib.contextmanager
def _signal_kept() -> Iterator[None]:
    before = signal.getsignal(signal.SIGCHLD) if _handles_signals() else None
    try:
        yield
    finally:
        if before is not None and _handles_signals():
            signal.signal(signal.SIGCHLD, before)


def _handles_signals() -> bool:
    return hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()


def _alone(job: Job, item: Any) -> Any:
    try:
        (answer,) = _here(job, [item], 1)
    except (RuntimeError, OSError, EOFError) as error:
        if not _is_death(error):
            raise
        (answer,) = begin(job.scorers, [job.prepare.failed(item, "the process that read it died")])()
    return answer


def _is_death(error: Exception) -> bool:
    """Whether a DataLoader's process is gone: torch says so, or what it has prepared cannot be fetched."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
