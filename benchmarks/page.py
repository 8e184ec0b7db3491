"""What slow clients cost the others of the page: 200 of them beside 16, and the memory that they fill."""

from __future__ import annotations

import argparse
import contextlib
import selectors
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import psutil
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.detection.detector import Detector
from dgsnet.detection.serve import create_app, server
from dgsnet.model.checkpoint import build_model
from PIL import Image

ORDINARY = 16
LARGE, TRICKLING, HEADLESS = 115, 55, 30
LIMIT = 2**25
ROUNDS = 4


@contextlib.contextmanager
def serving(app: Any) -> Iterator[int]:
    """A server on a free port of this process; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        running = server(app)
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        try:
            while not running.started:
                time.sleep(0.01)
            yield listening.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join()


def head(length: int) -> bytes:
    """What a request to score so many bytes begins with."""
    return f"POST /api/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


class Slow(threading.Thread):
    """Clients that send nearly a whole body, or some bytes now and then, or half a header, and then wait.

    Args:
        port: of the page.
        limit: of its bodies, in bytes.
        large, trickling, headless: how many there are of each kind.

    Attributes:
        ended: seconds after which each of them was answered or cut off.
    """

    def __init__(self, port: int, limit: int, large: int, trickling: int, headless: int) -> None:
        super().__init__()
        self.stop = threading.Event()
        self.ended: list[float] = []
        self.rest: dict[socket.socket, memoryview] = {}
        whole = memoryview(head(limit) + bytes(limit - 1000))
        for sent in [len(whole)] * large + [1000] * trickling + [20] * headless:
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setblocking(False)
            self.rest[connection] = whole[:sent]
        self.trickling = list(self.rest)[large : large + trickling]

    def run(self) -> None:
        """Send, and see whose connection ends."""
        begin, beat = time.monotonic(), 0.0
        with selectors.DefaultSelector() as selector:
            for connection in self.rest:
                selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
            while self.rest and not self.stop.is_set():
                for key, events in selector.select(0.1):
                    connection: Any = key.fileobj
                    if events & selectors.EVENT_READ:
                        self.ended.append(time.monotonic() - begin)
                        selector.unregister(connection)
                        del self.rest[connection]
                        connection.close()
                        continue
                    with contextlib.suppress(OSError):
                        sent = connection.send(self.rest[connection][: 2**18])
                        self.rest[connection] = self.rest[connection][sent:]
                    if not self.rest[connection]:
                        selector.modify(connection, selectors.EVENT_READ)
                if time.monotonic() - beat > 0.5:
                    beat = time.monotonic()
                    for connection in self.trickling:
                        with contextlib.suppress(OSError):
                            connection.send(b"x")
        for connection in self.rest:
            connection.close()


def ordinary(port: int, image: bytes, each: int = 5, clients: int = ORDINARY) -> list[float]:
    """Seconds that each answer to ordinary clients took, who all ask at the same time."""

    def ask(_: int) -> list[float]:
        took = []
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(each):
                begin = time.monotonic()
                client.post("/api/score", content=image).raise_for_status()
                took.append(time.monotonic() - begin)
        return took

    with ThreadPoolExecutor(clients) as pool:
        return [seconds for took in pool.map(ask, range(clients)) for seconds in took]


def measure(
    detector: Detector,
    image: bytes,
    limit: int = LIMIT,
    counts: tuple[int, int, int] = (LARGE, TRICKLING, HEADLESS),
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Medians of ordinary answers alone and beside slow clients, the memory that these cost, and their ends.

    Args:
        detector: the page's.
        image: an encoded image that ordinary clients send.
        limit: bytes of a body.
        counts: slow clients of each kind.
        rounds: how often all ordinary clients ask, alone and beside the slow ones.
    """
    process = psutil.Process()
    with serving(create_app(detector, max_bytes=limit, per_minute=1_000_000)) as port:
        ordinary(port, image)
        alone = [seconds for _ in range(rounds) for seconds in ordinary(port, image)]
        slow = Slow(port, limit, *counts)
        before = most = process.memory_info().rss
        slow.start()
        try:
            beside: list[float] = []
            for _ in range(rounds):
                beside += ordinary(port, image)
                most = max(most, process.memory_info().rss)
            slow.join(60)
        finally:
            slow.stop.set()
            slow.join()
    return {
        "benchmark": "page",
        "slow": sum(counts),
        "alone_ms": 1000 * statistics.median(alone),
        "beside_ms": 1000 * statistics.median(beside),
        "ratio": statistics.median(beside) / statistics.median(alone),
        "more_mib": (most - before) / 2**20,
        "ended": len(slow.ended),
        "longest_s": max(slow.ended, default=0.0),
    }


def results(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row, of the built-in model and a photograph's size."""
    import io

    config = Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="builtin", lora_rank=0),
        preprocess=PreprocessConfig(mode="crop", image_size=32),
    )
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    row = measure(Detector(build_model(config, with_text=False).eval(), config), file.getvalue())
    print(", ".join(f"{name} {value:.4g}" for name, value in row.items() if not isinstance(value, str)))
    yield row
