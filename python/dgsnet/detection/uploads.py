"""Images on their way to the page: how many requests, how many bytes and for how long, whatever is sent."""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO

import anyio
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

# Clients whose rate is remembered; the one not heard of for longest is forgotten first.
MAX_CLIENTS = 10_000
# Bytes of a body that are kept in memory; more of it are in a file without a name.
SPOOL = 2**16
# Bodies of the largest size that one client, and all of them, may have under way.
CLIENT_BODIES, ALL_BODIES = 2, 8
# A body may take so many seconds, and at least so many bytes have to come in each so many of them.
BODY_SECONDS = 300.0
RATE_SECONDS, RATE_BYTES = 10.0, 10 * 2**14
# Parts of a form, of which one is the image.
MAX_PARTS = 10


class RateLimit:
    """Token buckets: a client may make `per_minute` requests at once, and as many per minute ever after.

    >>> limit = RateLimit(60, clock=iter([0.0, 0.0, 0.0, 1.0]).__next__)
    >>> limit._buckets["a"] = (1.0, 0.0)
    >>> limit("a"), limit("a"), limit("a"), limit("a")
    (0.0, 1.0, 1.0, 0.0)
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self.clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __call__(self, client: str) -> float:
        """Take a token; 0 if there was one, else the seconds until there will be."""
        now = self.clock()
        tokens, then = self._buckets.pop(client, (float(self.per_minute), now))
        tokens = min(self.per_minute, tokens + (now - then) * self.per_minute / 60)
        wait = 0.0 if tokens >= 1 else (1 - tokens) * 60 / self.per_minute
        self._buckets[client] = (tokens - (not wait), now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return wait


@dataclass(eq=False)
class _Body:
    """A body under way: whose it is, its bytes so far, and the scope in which it comes until it is whole."""

    client: str
    bytes: int = 0
    receiving: anyio.CancelScope | None = field(default_factory=anyio.CancelScope)


class Uploads:
    """The bodies under way. Of too many bytes in all or of a client, the body that began first is given up.

    Slow and silent senders so make room for others, behind the same address too.

    Args:
        max_bytes: of one body.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        # In the order in which they began.
        self._bodies: dict[_Body, None] = {}

    @asynccontextmanager
    async def received(self, request: Request) -> AsyncIterator[BinaryIO]:
        """The whole body of a request, as a file at its beginning, which is gone afterwards.

        Raises:
            HTTPException: it is too large or too slow, or there is no room for it.
            starlette.requests.ClientDisconnect: the client has hung up.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            raise self._too_large()
        body = _Body(request.client.host if request.client else "")
        self._bodies[body] = None
        spooled: Any = SpooledTemporaryFile(max_size=SPOOL)  # noqa: SIM115 - closed below
        try:
            await self._receive(request, body, UploadFile(spooled))
            spooled.seek(0)
            yield spooled
        finally:
            del self._bodies[body]
            spooled.close()

    async def _receive(self, request: Request, body: _Body, file: UploadFile) -> None:
        end = anyio.current_time() + BODY_SECONDS
        assert body.receiving
        with body.receiving as scope:
            missing = 0
            scope.deadline = anyio.current_time() + RATE_SECONDS
            async for chunk in request.stream():
                body.bytes += len(chunk)
                if body.bytes > self.max_bytes:
                    raise self._too_large()
                self._make_room(body.client)
                try:
                    await file.write(chunk)
                except OSError as error:
                    # The disk is full.
                    raise too_many(503, f"no room for the image: {error.strerror}", RATE_SECONDS) from None
                missing -= len(chunk)
                if missing <= 0:
                    missing = RATE_BYTES
                    scope.deadline = min(anyio.current_time() + RATE_SECONDS, end)
        given_up, body.receiving = body.receiving is None, None
        if given_up:
            raise too_many(503, "too many images are on their way", RATE_SECONDS)
        if scope.cancelled_caught:
            raise HTTPException(408, "the image comes too slowly")

    def _make_room(self, client: str) -> None:
        own = [body for body in self._bodies if body.client == client]
        for bodies, most in ((own, CLIENT_BODIES), (self._bodies, ALL_BODIES)):
            held = sum(body.bytes for body in bodies)
            for body in bodies:
                if held > most * self.max_bytes and body.receiving:
                    held -= body.bytes
                    body.receiving.cancel()
                    body.receiving, body.bytes = None, 0

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"larger than {self.max_bytes:,} bytes")


def too_many(status: int, message: str, wait: float) -> HTTPException:
    """The error of what may be tried again after so many seconds."""
    seconds = math.ceil(wait)
    return HTTPException(status, f"{message}; try again in {seconds} s", {"Retry-After": str(seconds)})


def image_of(file: BinaryIO, content_type: str) -> tuple[str, bytes]:
    """Name and bytes of an image that is a body, with "" for its name, or the one file of a form.

    Raises:
        HTTPException: it is no form with one file in it.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        return "", file.read()
    files: list[File] = []
    parts = itertools.count(1)

    def take(part: File | Field) -> None:
        if isinstance(part, File):
            files.append(part)
        if next(parts) >= MAX_PARTS:
            raise FormParserError(f"more than {MAX_PARTS} parts")

    try:
        settings = {"MAX_MEMORY_FILE_SIZE": math.inf, "UPLOAD_ERROR_ON_BAD_CTE": True}
        boundary = options.get(b"boundary")
        parser = FormParser("multipart/form-data", take, take, boundary=boundary, config=settings)
        while chunk := file.read(SPOOL):
            parser.write(chunk)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise HTTPException(400, f"not a form that can be read: {error}") from None
    if len(files) != 1:
        raise HTTPException(400, f"expected one file in the form, got {len(files)}")
    files[0].file_object.seek(0)
    return (files[0].file_name or b"").decode(errors="replace"), files[0].file_object.read()
