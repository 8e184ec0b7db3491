"""`dgsnet serve`: a page to drop images on, and the JSON API behind it. docs/page.md describes both."""

from __future__ import annotations

import contextlib
import io
import math
import os
import secrets
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dgsnet.data.images import ImageError, read_image
from dgsnet.data.items import Item
from dgsnet.detection.decisions import THRESHOLD, Precision
from dgsnet.detection.detector import Detector
from dgsnet.detection.heatmaps import draw, heatmap
from dgsnet.detection.provenance import ProvenanceReader
from dgsnet.detection.rows import Row
from dgsnet.errors import UserError
from dgsnet.pages import page

try:
    import anyio
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.responses import HTMLResponse, JSONResponse
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import File, FormParser, parse_options_header
except ImportError:
    raise UserError("the page needs more packages: pip install 'dgs-kernels[serve]'") from None

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Requests that may wait for the model at a time; a page sends one after the other.
MAX_WAITING = 32
# Clients whose rate is remembered; the one not heard of for longest is forgotten first.
MAX_CLIENTS = 10_000


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


def create_app(
    detector: Detector,
    *,
    hosts: tuple[str, ...] = LOOPBACK,
    max_bytes: int = 2**25,
    per_minute: int = 120,
    consistency: bool = False,
    provenance: ProvenanceReader | None = None,
) -> FastAPI:
    """The page and its API as an ASGI application, for any server.

    The model works for one request at a time, in a thread of its own. Nothing that is sent is stored.

    Args:
        detector: the model.
        hosts: names under which the page may be asked for, against DNS rebinding; ("*",) allows all.
        max_bytes: of one image file.
        per_minute: requests that one client may make, a score and a heatmap being one each.
        consistency: score re-encoded and resized copies too, and be unsure where they are decided otherwise.
        provenance: reads each file's Content Credentials.

    Example:
        >>> app = create_app(Detector.load("runs/demo/model"))  # doctest: +SKIP
        >>> uvicorn.run(app)  # doctest: +SKIP
    """
    # The interactive documentation would load scripts from elsewhere; /openapi.json stays.
    app = FastAPI(title="dgsnet", docs_url=None, redoc_url=None)
    limit = RateLimit(per_minute)
    model = anyio.CapacityLimiter(1)
    facts = _facts(detector) | {"max_bytes": max_bytes, "consistency": consistency}
    facts["provenance"] = provenance is not None

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable) -> Response:
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        if "*" not in hosts and urlsplit(f"//{host}").hostname not in hosts:
            response: Response = JSONResponse({"detail": f"this page is not served as {host!r}"}, 400)
        elif request.method != "GET" and origin and urlsplit(origin).netloc != host:
            response = JSONResponse({"detail": "requests from other sites are refused"}, 403)
        else:
            response = await call_next(request)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
        return response

    async def body(request: Request) -> bytes:
        """The image sent, never more of it in memory than is allowed."""
        if wait := limit(request.client.host if request.client else ""):
            raise _too_many(429, f"more than {per_minute} requests per minute", wait)
        if model.statistics().tasks_waiting >= MAX_WAITING:
            raise _too_many(503, "too many images are waiting", 5)
        data = bytearray()
        too_large = HTTPException(413, f"larger than {max_bytes:,} bytes")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > max_bytes:
            raise too_large
        async for chunk in request.stream():
            data += chunk
            if len(data) > max_bytes:
                raise too_large
        return bytes(data)

    async def answer(function: Callable[[bytes, str], Any], request: Request, name: str) -> Any:
        data = await body(request)
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            name, data = _uploaded(request.headers["content-type"], data, name)

        try:
            return await anyio.to_thread.run_sync(function, data, name or "image", limiter=model)
        except ImageError as error:
            raise HTTPException(422, str(error)) from None

    def score_image(data: bytes, name: str) -> dict[str, Any]:
        image = read_image(data, name=name)
        stream: Any = detector.stream_copies if consistency else detector.stream
        ((answer, error),) = stream([image], workers=0)
        if error:
            raise ImageError(f"{name}: {error}")
        score = Row.of(detector, Item(name), answer, "")
        row = {"name": name, "probability": score.probability, "decision": score.decision}
        if consistency:
            row["spread"] = score.spread
        if provenance:
            row |= provenance(Item(name, data=data))._asdict()
        return row | {"width": image.shape[1], "height": image.shape[0]}

    def heatmap_image(data: bytes, name: str) -> bytes:
        image, file = read_image(data, name=name), io.BytesIO()
        draw(heatmap(detector, image), image).savefig(file, format="png")
        return file.getvalue()

    # The image is the body (`curl --data-binary @x.jpg`), or the file of a form (`curl -F file=@x.jpg`).
    form = {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
    content = {"application/octet-stream": {}, "multipart/form-data": {"schema": form}}
    binary = {"requestBody": {"required": True, "content": content}}

    @app.post("/api/score", openapi_extra=binary)
    async def score(request: Request, name: str = "") -> dict[str, Any]:
        """Score the image that is the request's body: its probability and the decision."""
        return await answer(score_image, request, name)

    @app.post("/api/heatmap", openapi_extra=binary, response_class=Response)
    async def heatmap_png(request: Request, name: str = "") -> Response:
        """The heatmap, as PNG, of the image that is the request's body."""
        return Response(await answer(heatmap_image, request, name), media_type="image/png")

    @app.get("/api/model")
    async def model_facts() -> dict[str, Any]:
        """What decides: the calibration, or that there is none, and the limits."""
        return facts

    @app.get("/api/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        html = page.render(Path(__file__).with_name("serve.html"), nonce=nonce, facts=facts)
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    return app


def _uploaded(content_type: str, data: bytes, name: str) -> tuple[str, bytes]:
    """Name and content of the one file in a form; `name` stands where it is given."""
    files: list[tuple[str, bytes]] = []

    def take(file: File) -> None:
        file.file_object.seek(0)
        files.append((os.fsdecode(file.file_name or b""), file.file_object.read()))

    options = {"MAX_MEMORY_FILE_SIZE": len(data) + 1, "UPLOAD_ERROR_ON_BAD_CTE": True}  # nothing on disk
    try:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        parser = FormParser(
            "multipart/form-data", lambda field: None, take, boundary=boundary, config=options
        )
        parser.write(data)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise HTTPException(400, f"not a form that can be read: {error}") from None
    if len(files) != 1:
        raise HTTPException(400, f"expected one file in the form, got {len(files)}")
    return name or files[0][0], files[0][1]


def _facts(detector: Detector) -> dict[str, Any]:
    calibration = detector.calibration
    facts: dict[str, Any] = {"calibrated": calibration is not None, "views": detector.views}
    if calibration:
        names = ("threshold", "low", "fpr", "fpr_upper", "confidence", "n_reals", "n_generated")
        return facts | {name: getattr(calibration, name) for name in names}
    return facts | {"threshold": THRESHOLD, "low": THRESHOLD}


def _too_many(status: int, message: str, wait: float) -> HTTPException:
    seconds = math.ceil(wait)
    return HTTPException(status, f"{message}; try again in {seconds} s", {"Retry-After": str(seconds)})


def serve_command(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str | None = None,
    views: int | None = None,
    batch: int | None = None,
    precision: Precision | None = None,
    max_megabytes: int = 32,
    per_minute: int = 120,
    consistency: bool = False,
    provenance: bool = False,
    trust: str | None = None,
    pretrained: str | None = None,
) -> None:
    """Show a page that scores the images dropped on it, with the JSON API behind it.

    Args:
        model: a model folder, or the folder of a training run.
        host: address to listen on. Anything but this machine's own opens the page to the network, without
            a password.
        port: to listen on; 0 takes a free one.
        device: torch device; the GPU where there is one if not given.
        views: mosaics averaged per image; if not given, what the model was calibrated with, else 1.
        batch: images that go through the network at a time; if not given, what the model was calibrated with,
            else 1. A lone image costs as much as a whole batch.
        precision: of the network's weights; if not given, what the model was calibrated with, else fp32.
        max_megabytes: largest image file.
        per_minute: requests that one client may make.
        consistency: score re-encoded and resized copies too, and decide "unsure" where they are decided
            otherwise; 5 times the work and more.
        provenance: show the file's Content Credentials: verified, unverified, invalid, absent.
        trust: PEM file of the certificates that signers are trusted by; none are if not given.
        pretrained: weights file of the model's backbone, in place of what the folder names; TorchScript, such
            as OpenAI's own file, has to be named here.
    """
    if trust and not provenance:
        raise UserError("--trust goes with --provenance")
    for name, value in {"max-megabytes": max_megabytes, "per-minute": per_minute}.items():
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be 1 or more")
    if host not in LOOPBACK:
        print(f"dgsnet: warning: anybody who can reach {host} can use the page", file=sys.stderr)
    with ProvenanceReader(trust) if provenance else contextlib.nullcontext() as reader:
        detector = Detector.load(
            model, device, views=views, batch=batch, precision=precision, pretrained=pretrained
        )
        try:
            listening = socket.create_server(
                (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
            )
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host} port {port}: {error}; give another --port") from None
        app = create_app(
            detector,
            hosts=LOOPBACK if host in LOOPBACK else ("*",),
            max_bytes=max_megabytes * 2**20,
            per_minute=per_minute,
            consistency=consistency,
            provenance=reader,
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{listening.getsockname()[1]} (Ctrl-C stops it)", flush=True)
        config = uvicorn.Config(app, log_level="warning", server_header=False, access_log=False)
        with listening:
            uvicorn.Server(config).run(sockets=[listening])
