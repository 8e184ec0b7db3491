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
    """What is found of an item.

    Attributes:
        note: as the job's `prepare` has it.
    """

    item: Any
    note: Any
    # By part: the logits of every version's crops and views and "", or none and an error.
    single: dict[str, tuple[list[list[float]], str]]

    @property
    def logits(self) -> dict[str, tuple[list[float], str]]:
        """By part: the mean logits of its versions and "", or none and an error."""
        return {name: ([mean(rows) for rows in found], error) for name, (found, error) in self.single.items()}


@dataclass(frozen=True)
class Job:
    """How items become logits.

    Args:
        prepare: map-style dataset from an item to what is noted of it and, by name, its parts: of every
            version of the image its crops and views, uint8 [n, 3, S, S], and "", or None and an error
            message. `prepare.failed(item, why)` is the same for an item that cannot be prepared.
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
    from dgsnet.detection.batches import device_of

    again = {name: scorer.again for name, scorer in job.scorers.items()}
    if None in again.values():
        raise UserError("engine ray needs a detector that Detector.load made")
    detector = job.scorers[""]
    for item, answer in on_ray(
        partial(_loaded, again),
        job.prepare,
        items,
        workers,
        fills=detector.fills,
        on_gpu=device_of(detector.model).type == "cuda",
    ):
        yield Answer(item, *answer)


def _loaded(again: Mapping[str, Callable[[], Any]]) -> Callable[[Sequence[Any]], list[Any]]:
    """What scores prepared items, made where it scores."""
    scorers = {name: load() for name, load in again.items()}
    return partial(_scored, scorers)


def mean(logits: Sequence[float]) -> float:
    """Of one image's logits, in float32."""
    import torch

    return logits[0] if len(logits) == 1 else torch.tensor(logits).mean().item()


def _scored(scorers: Mapping[str, Any], prepared: Sequence[Any]) -> list[Any]:
    """The notes and logits of prepared items, as `Answer` has them."""
    scoring = _Scoring(scorers)
    scoring.add(prepared)
    return [*scoring.rest()]


class _Scoring:
    """Prepared items on their way through the batches of their scorers, in their order."""

    def __init__(self, scorers: Mapping[str, Any]) -> None:
        self._lines = {name: scorer.line() for name, scorer in scorers.items()}
        # What is known of each, how many rows its versions have, and where in every line its last one stands.
        self._waiting: deque[tuple[Any, dict[str, tuple[list[int], str]], dict[str, int]]] = deque()

    def add(self, prepared: Sequence[Any]) -> None:
        """Have what fills batches scored."""
        for note, parts in prepared:
            for name, (versions, _) in parts.items():
                for rows in versions or ():
                    self._lines[self._of(name)].add(rows)
            counts = {name: ([*map(len, versions or ())], error) for name, (versions, error) in parts.items()}
            self._waiting.append((note, counts, {name: line.added for name, line in self._lines.items()}))

    def ready(self, behind: int) -> Iterator[Any]:
        """Notes and logits of the items that do not wait for the last so many batches."""
        known = {name: line.known(behind) for name, line in self._lines.items()}
        while self._waiting and all(known[name] >= end for name, end in self._waiting[0][2].items()):
            note, counts, _ = self._waiting.popleft()
            yield (
                note,
                {
                    name: ([self._lines[self._of(name)].take(count) for count in versions], error)
                    for name, (versions, error) in counts.items()
                },
            )

    def rest(self) -> Iterator[Any]:
        """The others'."""
        for line in self._lines.values():
            line.finish()
        yield from self.ready(0)

    def idle(self) -> bool:
        """Whether no batch is under way."""
        return all(line.idle() for line in self._lines.values())

    def close(self) -> None:
        """Leave out what is not begun."""
        for line in self._lines.values():
            line.close()

    def _of(self, name: str) -> str:
        return name if name in self._lines else ""


def _here(job: Job, items: Iterable[Any], workers: int | None) -> Iterator[Any]:
    detector, scoring = job.scorers[""], _Scoring(job.scorers)
    # A GPU is asked itself.
    idle = scoring.idle if detector.batches.pool else None
    with contextlib.closing(scoring):
        for prepared in detector.filled(job.prepare, items, workers, idle=idle):
            scoring.add(prepared)
            yield from scoring.ready(detector.batches.behind)
        yield from scoring.rest()


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
        (answer,) = _scored(job.scorers, [job.prepare.failed(item, "the process that read it died")])
    return answer


def _is_death(error: Exception) -> bool:
    """Whether a DataLoader's process is gone: torch says so, or what it has prepared cannot be fetched."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
