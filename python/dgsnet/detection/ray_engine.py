"""Scoring on Ray Data: one task lists the images, many prepare them, actors with the model score them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dgsnet.detection.detector import Detector, Prepared
from dgsnet.detection.rows import Row, Todo
from dgsnet.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# Images that go from one task to the next together.
BATCH = 32


def score_on_ray(
    detector: Detector,
    load: Callable[[], Detector],
    todo: Todo,
    *,
    workers: int | None = None,
    consistency: bool = False,
) -> Iterator[Row]:
    """`scoring.score` on a Ray cluster: the same rows in the same order.

    Uses the cluster that `ray.init` was called for or that RAY_ADDRESS names; without either, Ray is started
    on this machine and stopped at the end.

    Args:
        load: makes the same detector where it scores.
        todo: what to score. Its paths and its table are looked up on the machine of this process; the files
            must be on all machines under the same path.
        workers: processes that score, at most; None takes one per GPU, on CPUs as many as threads fill.

    Raises:
        UserError: Ray is not installed, there is no such cluster, a list comes from standard input, or
            processes keep dying.
    """
    if "-" in todo.paths:
        raise UserError("engine ray cannot read a list from standard input: write it to a .txt file")
    try:
        import ray
    except ImportError:
        raise UserError("engine ray needs Ray: pip install 'dgs-kernels[scale]'") from None
    with _cluster(ray):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what later versions of Ray will do
                rows = _dataset(ray, detector, load, todo, workers, consistency)
            for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from (pickle.loads(row.as_py()) for row in table["row"])
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"Ray gave up: {reason}; go on with --resume, and --engine local") from None


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    nobody = UserError(f"no Ray cluster at RAY_ADDRESS={address}")
    if address and not _answers(address):
        raise nobody
    local = {} if address else {"include_dashboard": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **local)
        except ConnectionError:
            raise nobody from None
    try:
        yield
    finally:
        ray.shutdown()


def _answers(address: str) -> bool:
    """Whether anybody listens at host:port; Ray itself would try for minutes. True for other addresses."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return True
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            return True
    except OSError:
        return False


def _dataset(
    ray: Any,
    detector: Detector,
    load: Callable[[], Detector],
    todo: Todo,
    workers: int | None,
    consistency: bool,
) -> Any:
    import torch

    from dgsnet.data.distortions import COPIES

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    on_gpu = next(detector.model.parameters()).is_cuda
    threads, folder = torch.get_num_threads(), os.getcwd()
    prepare = Prepared(detector.preprocess, detector.views, COPIES if consistency else ())
    if workers is None:
        resources = ray.cluster_resources()
        workers = int(resources.get("GPU", 0) if on_gpu else resources.get("CPU", 0) // threads) or 1

    # No restarts of actors: what they were made from may be gone, as Ray would say on the terminal for each.
    old = tuple(map(int, ray.__version__.split(".")[:2])) < (2, 64)  # later ones take no such argument
    restarts = {"max_restarts": 0, "max_task_retries": 0} if old else {}
    # Steps that ask for different resources do not become one task. Scoring asks for no CPU, because it would
    # keep it for good, and preparing might have none left.
    return (
        ray.data.read_datasource(_listing(ray, todo), override_num_blocks=1, num_cpus=0)
        .map_batches(_prepare, fn_args=(prepare, threads, folder), batch_size=BATCH, batch_format="pyarrow")
        .map_batches(
            _Scorer,
            fn_constructor_args=(load, threads, folder),
            batch_size=None,
            batch_format="pyarrow",
            concurrency=(1, workers),
            num_cpus=0,
            num_gpus=1 if on_gpu else 0,
            **restarts,
        )
    )


def _listing(ray: Any, todo: Todo) -> Any:
    """A Ray datasource of one task that goes through the images as fast as they are taken from it."""
    from ray.data.block import BlockMetadata

    class Listing(ray.data.Datasource):
        supports_distributed_reads = False  # lists and the partial table are files of this machine

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            def read(folder: str = os.getcwd()) -> Iterator[pa.Table]:
                os.chdir(folder)
                items = iter(todo)
                while batch := list(itertools.islice(items, BATCH)):
                    yield _table(item=[pickle.dumps(item) for item in batch])

            return [ray.data.ReadTask(read, BlockMetadata(None, None, None, None))]

    return Listing()


def _prepare(table: pa.Table, prepare: Prepared, threads: int, folder: str) -> pa.Table:
    _settle(threads, folder)
    items, answers = [], []
    for packed in table["item"]:
        item = pickle.loads(packed.as_py())
        pixels, error = prepare[item]
        items.append(pickle.dumps((replace(item, data=None), error)))
        answers.append(None if pixels is None else pixels.numpy().tobytes())
    return _table(item=items, pixels=answers)


class _Scorer:
    def __init__(self, load: Callable[[], Detector], threads: int, folder: str):
        _settle(threads, folder)
        self.detector = load()

    def __call__(self, table: pa.Table) -> pa.Table:
        import torch

        size = self.detector.model.image_size
        items = [pickle.loads(packed.as_py()) for packed in table["item"]]
        views = [
            torch.from_numpy(np.frombuffer(pixels.as_py(), np.uint8).reshape(-1, 3, size, size).copy())
            for (_, error), pixels in zip(items, table["pixels"])
            if not error
        ]
        # All of a table go through the network together.
        logits = iter(self.detector.mean_logits(views))
        rows = []
        for item, error in items:
            answer: Any = math.nan if error else self.detector.probabilities(next(logits)).tolist()
            rows.append(pickle.dumps(Row.of(self.detector, item, answer, error)))
        return _table(row=rows)


def _settle(threads: int, folder: str) -> None:
    """Make a Ray process like the one it works for: paths may be relative, and sums depend on the threads."""
    import torch

    os.chdir(folder)
    torch.set_num_threads(threads)


def _table(**columns: Sequence[bytes | None]) -> pa.Table:
    import pyarrow as pa

    return pa.table({name: pa.array(values, pa.large_binary()) for name, values in columns.items()})
