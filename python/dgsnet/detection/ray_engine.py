"""Work on Ray Data: one task lists items, many prepare them, and actors with the model score them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dgsnet.data.items import Item
from dgsnet.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# Items that go from one task to the next together, and a few more where they fill batches.
TOGETHER = 32


def on_ray(
    load: Callable[[], Callable[[Sequence[Any]], list[Any]]],
    prepare: Any,
    items: Iterable[Any],
    workers: int | None,
    *,
    fills: int,
    on_gpu: bool,
) -> Iterator[tuple[Any, Any]]:
    """Every item, in its order, with what is found of it; of `Item`s without their data.

    Args:
        load: makes what finds it of a list of prepared items, in each process that scores.
        prepare: map-style dataset that prepares an item, as `engine.Job` has it.
        items: gone through in another process of this machine. Files must be on all machines under the same
            path.
        workers: processes that score, at most; None takes one per GPU, on CPUs as many as threads fill.
        fills: items that fill batches.
        on_gpu: whether each of these processes has a GPU.

    Raises:
        UserError: Ray is not installed, there is no such cluster, or processes keep dying.
    """
    try:
        import ray
    except ImportError:
        raise UserError("engine ray needs Ray: pip install 'dgs-kernels[scale]'") from None
    with _cluster(ray):
        try:
            with warnings.catch_warnings():
                # Ray warns of what later versions will do.
                warnings.simplefilter("ignore")
                found = _dataset(ray, load, prepare, items, workers, fills, on_gpu)
            for table in found.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from _unpacked(table)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"Ray gave up: {reason}; go on with --engine local, and of predict with --resume"
            ) from None


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
    load: Callable[[], Any],
    prepare: Any,
    items: Iterable[Any],
    workers: int | None,
    fills: int,
    on_gpu: bool,
) -> Any:
    import torch

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    threads, folder = torch.get_num_threads(), os.getcwd()
    together = -(-TOGETHER // fills) * fills
    if workers is None:
        resources = ray.cluster_resources()
        workers = int(resources.get("GPU", 0) if on_gpu else resources.get("CPU", 0) // threads) or 1

    # No restarts of actors: what they were made from may be gone, as Ray would say on the terminal for each.
    # Later ones take no such argument.
    old = tuple(map(int, ray.__version__.split(".")[:2])) < (2, 64)
    restarts = {"max_restarts": 0, "max_task_retries": 0} if old else {}
    # Steps that ask for different resources do not become one task. Scoring asks for no CPU, because it would
    # keep it for good, and preparing might have none left.
    listing = _listing(ray, items, together)
    return (
        ray.data.read_datasource(listing, override_num_blocks=1, num_cpus=0)
        .map_batches(
            _prepare, fn_args=(prepare, threads, folder), batch_size=together, batch_format="pyarrow"
        )
        .map_batches(
            _Scorer,
            fn_constructor_args=(pickle.dumps(load), threads, folder),
            batch_size=None,
            batch_format="pyarrow",
            concurrency=(1, workers),
            num_cpus=0,
            num_gpus=1 if on_gpu else 0,
            **restarts,
        )
    )


def _listing(ray: Any, items: Iterable[Any], together: int) -> Any:
    """A Ray datasource of one task that goes through the items as fast as they are taken from it."""
    from ray.data.block import BlockMetadata

    class Listing(ray.data.Datasource):
        # Lists and a partial table are files of this machine.
        supports_distributed_reads = False

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            def read(folder: str = os.getcwd()) -> Iterator[pa.Table]:
                os.chdir(folder)
                rest = iter(items)
                while batch := list(itertools.islice(rest, together)):
                    yield _packed(batch)

            return [ray.data.ReadTask(read, BlockMetadata(None, None, None, None))]

    return Listing()


def _prepare(table: pa.Table, prepare: Any, threads: int, folder: str) -> Iterator[pa.Table]:
    _settle(threads, folder)
    # Images come one by one, as a large one has many tiles.
    for item in _unpacked(table):
        yield _packed([_prepared(prepare, item)])


def _prepared(prepare: Any, item: Any) -> tuple[Any, Any, dict[str, Any]]:
    note, parts = prepare[item]
    # Arrays, since a tensor brings along all of the memory that it is a part of.
    arrays = {
        name: (versions and [rows.numpy() for rows in versions], why)
        for name, (versions, why) in parts.items()
    }
    return replace(item, data=None) if isinstance(item, Item) else item, note, arrays


class _Scorer:
    def __init__(self, load: bytes, threads: int, folder: str):
        _settle(threads, folder)
        self.score = pickle.loads(load)()

    def __call__(self, table: pa.Table) -> pa.Table:
        import torch

        items, prepared = [], []
        for item, note, arrays in _unpacked(table):
            items.append(item)
            parts = {
                n: (a if a is None else [*map(torch.from_numpy, a)], why) for n, (a, why) in arrays.items()
            }
            prepared.append((note, parts))
        # All of a table go through the network together.
        return _packed(list(zip(items, self.score(prepared))))


def _settle(threads: int, folder: str) -> None:
    """Make a Ray process like the one it works for: paths may be relative, and sums depend on the threads."""
    import torch

    os.chdir(folder)
    torch.set_num_threads(threads)


def _packed(values: Iterable[Any]) -> pa.Table:
    import pyarrow as pa

    return pa.table({"value": pa.array([pickle.dumps(value) for value in values], pa.large_binary())})


def _unpacked(table: pa.Table) -> Iterator[Any]:
    return (pickle.loads(value.as_py()) for value in table["value"])
