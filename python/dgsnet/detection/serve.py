"""`dgsnet serve`: a page to drop images on, and the JSON API behind it. docs/page.md describes both."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import socket
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dgsnet.data.declared import read_declared
from dgsnet.data.distortions import COPIES
from dgsnet.data.images import ImageError, read_image
from dgsnet.data.items import Item
from dgsnet.detection import arguments
from dgsnet.detection.detector import Detector, Prepared
from dgsnet.detection.heatmaps import draw, heatmap
from dgsnet.detection.monitor import append
from dgsnet.detection.provenance import ProvenanceReader
from dgsnet.detection.rows import Row
from dgsnet.errors import UserError
from dgsnet.pages import page

try:
    import anyio
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.responses import HTMLResponse
    from starlette.requests import ClientDisconnect

    from dgsnet.detection.connections import Guard, Protocol
    from dgsnet.detection.together import Together
    from dgsnet.detection.uploads import RateLimit, Uploads, image_of, too_many
except ImportError:
    raise UserError("the page needs more packages: pip install 'dgs-kernels[serve]'") from None

if TYPE_CHECKING:
    from torch import Tensor

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Requests that may be in work or wait for their turn; a page sends one after the other.
MAX_REQUESTS = 33
# Scores that can still be reviewed.
MAX_ANSWERED = 10_000
# The longer side of a thumbnail, in pixels.
THUMBNAIL = 224

log = logging.getLogger(__name__)


def create_app(
    detector: Detector,
    *,
    hosts: tuple[str, ...] = LOOPBACK,
    max_bytes: int = 2**25,
    per_minute: int = 120,
    consistency: bool = False,
    provenance: ProvenanceReader | None = None,
    declared: bool = False,
    reviewed: str | Path | None = None,
) -> FastAPI:
    """The page and its API as an ASGI application, for any server.

    Images that come while the model works are scored together, in its batches. Two at most are decoded at a
    time: one to be scored and one to be drawn. Nothing that is sent is stored.

    Args:
        detector: the model.
        hosts: names under which the page may be asked for, against DNS rebinding; ("*",) allows all.
        max_bytes: of one image file.
        per_minute: requests that one client may make, a score and a heatmap being one each.
        consistency: score re-encoded and resized copies too, and be unsure where they are decided otherwise.
        provenance: reads each file's Content Credentials.
        declared: read what each file declares of its origin.
        reviewed: table that images are appended to of which a visitor says that they were real.

    Example:
        >>> app = create_app(Detector.load("runs/demo/model"))  # doctest: +SKIP
        >>> uvicorn.run(app)  # doctest: +SKIP
    """
    # The interactive documentation would load scripts from elsewhere; /openapi.json stays.
    app = FastAPI(title="dgsnet", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, hosts=hosts)
    limit, uploads = RateLimit(per_minute), Uploads(max_bytes)
    inside = anyio.CapacityLimiter(MAX_REQUESTS)
    preparing, drawing = anyio.CapacityLimiter(1), anyio.CapacityLimiter(1)
    prepared = Prepared(detector.preprocess, detector.views, COPIES if consistency else ())
    logits = Together(detector)
    facts = _facts(detector) | {"max_bytes": max_bytes, "consistency": consistency}
    facts |= {"provenance": provenance is not None, "declared": declared, "reviewed": bool(reviewed)}
    # Names and decisions that can be reviewed.
    answered: OrderedDict[str, tuple[str, str]] = OrderedDict()

    def facts_now() -> dict[str, Any]:
        # While the file is being changed, what was known stays.
        with contextlib.suppress(UserError):
            detector.obey()
        return facts | {"alarm": detector.alarmed}

    @app.exception_handler(ClientDisconnect)
    async def hung_up(request: Request, _: Exception) -> Response:
        log.warning("%s hung up", request.client.host if request.client else "a client")
        # Nobody receives it.
        return Response(status_code=499)

    def check_queue() -> None:
        if inside.available_tokens < 1:
            raise too_many(503, "too many images are waiting", 5)

    async def answer(
        request: Request,
        name: str,
        turn: anyio.CapacityLimiter,
        function: Callable[[bytes, str], Any],
        then: Callable[[Any], Awaitable[Any]] | None = None,
    ) -> Any:
        """What a function makes of the image and its name, in a thread when it is its turn; and then more."""
        if wait := limit(request.client.host if request.client else ""):
            raise too_many(429, f"more than {per_minute} requests per minute", wait)
        check_queue()

        def work() -> Any:
            given, data = image_of(file, request.headers.get("content-type", ""))
            return function(data, name or given or "image")

        async with uploads.received(request) as file:
            check_queue()
            async with inside:
                async with turn:
                    if await request.is_disconnected():
                        raise ClientDisconnect
                    try:
                        found = await anyio.to_thread.run_sync(work)
                    except ImageError as error:
                        raise HTTPException(422, str(error)) from None
                return await then(found) if then else found

    def prepare_image(data: bytes, name: str) -> tuple[str, list[Tensor], dict[str, Any]]:
        image = read_image(data, name=name)
        versions, error = prepared.part(image)
        if error:
            raise ImageError(f"{name}: {error}")
        assert versions is not None
        more: dict[str, Any] = provenance(Item(name, data=data))._asdict() if provenance else {}
        more |= read_declared(data, name=name)._asdict() if declared else {}
        return name, versions, more | {"width": image.shape[1], "height": image.shape[0]}

    async def score_prepared(image: tuple[str, list[Tensor], dict[str, Any]]) -> dict[str, Any]:
        name, versions, more = image
        facts_now()
        score = Row.of(detector, Item(name), detector.probabilities(await logits(versions)).tolist(), "")
        row = {"name": name, "probability": score.probability, "decision": score.decision}
        if reviewed:
            review = secrets.token_urlsafe(16)
            row["review"], answered[review] = review, (name, score.decision)
            if len(answered) > MAX_ANSWERED:
                answered.popitem(last=False)
        return row | ({"spread": score.spread} if consistency else {}) | more

    def heatmap_image(data: bytes, name: str) -> bytes:
        image, file = read_image(data, name=name), io.BytesIO()
        draw(heatmap(detector, image), image).savefig(file, format="png")
        return file.getvalue()

    # The image is the body (`curl --data-binary @x.jpg`), or the file of a form (`curl -F file=@x.jpg`).
    form = {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
    content = {"application/octet-stream": {}, "multipart/form-data": {"schema": form}}
    binary = {"requestBody": {"required": True, "content": content}}

    def thumbnail_image(data: bytes, name: str) -> bytes:
        small, file = Image.fromarray(read_image(data, name=name)), io.BytesIO()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(file, format="png")
        return file.getvalue()

    @app.post("/api/score", openapi_extra=binary)
    async def score(request: Request, name: str = "") -> dict[str, Any]:
        """Score the image that is the request's body: its probability and the decision."""
        return await answer(request, name, preparing, prepare_image, score_prepared)

    @app.post("/api/heatmap", openapi_extra=binary, response_class=Response)
    async def heatmap_png(request: Request, name: str = "") -> Response:
        """The heatmap, as PNG, of the image that is the request's body."""
        return Response(await answer(request, name, drawing, heatmap_image), media_type="image/png")

    @app.post("/api/thumbnail", openapi_extra=binary, response_class=Response)
    async def thumbnail_png(request: Request, name: str = "") -> Response:
        """The image that is the request's body in small, as PNG, for browsers that cannot show it."""
        return Response(await answer(request, name, drawing, thumbnail_image), media_type="image/png")

    @app.post("/api/reviewed")
    async def real(request: Request, review: str = "") -> dict[str, str]:
        """Note that an image was real, which the score that named it `review` was about; once."""
        if wait := limit(request.client.host if request.client else ""):
            raise too_many(429, f"more than {per_minute} requests per minute", wait)
        if not reviewed or (found := answered.pop(review, None)) is None:
            raise HTTPException(404, "no such score, or it was reviewed before")
        try:
            await anyio.to_thread.run_sync(append, reviewed, *found)
        except (OSError, UserError) as error:
            log.warning("cannot append to %s: %s", reviewed, error)
            raise HTTPException(500, "it cannot be noted: the server's log says why") from None
        return {"status": "noted"}

    @app.get("/api/model")
    async def model_facts() -> dict[str, Any]:
        """What decides: the calibration, or that there is none, and the limits."""
        return facts_now()

    @app.get("/api/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: "
            "data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        html = page.render(Path(__file__).with_name("serve.html"), nonce=nonce, facts=facts_now())
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    return app


def _facts(detector: Detector) -> dict[str, Any]:
    calibration = detector.calibration
    facts: dict[str, Any] = {"calibrated": calibration is not None, "views": detector.views}
    facts["crops"] = detector.crops
    if calibration:
        names = ("threshold", "low", "fpr", "fpr_upper", "confidence", "n_reals", "n_generated")
        return facts | {name: getattr(calibration, name) for name in names}
    return facts | {"threshold": detector.threshold, "low": detector.threshold}


def server(app: FastAPI) -> uvicorn.Server:
    """uvicorn for a page, with its limits."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_level="warning",
        server_header=False,
        access_log=False,
        # Anybody can write X-Forwarded-For: it is believed from those only whom uvicorn's variable names.
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)


def serve_command(
    model: arguments.Model,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: arguments.Device = None,
    views: arguments.Views = None,
    batch: arguments.Batch = None,
    precision: arguments.Precision = None,
    crops: arguments.Crops = None,
    max_megabytes: int = 32,
    per_minute: int = 120,
    consistency: bool = False,
    provenance: bool = False,
    trust: arguments.Trust = None,
    declared: bool = False,
    reviewed: str | None = None,
    pretrained: arguments.Pretrained = None,
) -> None:
    """Show a page that scores the images dropped on it, with the JSON API behind it.

    Args:
        host: address to listen on. Anything but this machine's own opens the page to the network, without
            a password.
        port: to listen on; 0 takes a free one.
        max_megabytes: largest image file.
        per_minute: requests that one client may make.
        consistency: score re-encoded and resized copies too, and decide "unsure" where they are decided
            otherwise; 5 times the work and more.
        provenance: show the file's Content Credentials: verified, unverified, invalid, absent.
        declared: show what the file's metadata declare, unsigned: generated, partly, captured, none.
        reviewed: .csv that images are appended to of which a visitor says "this was real", for dgsnet
            monitor; there is no such button if not given.
    """
    if trust and not provenance:
        raise UserError("--trust goes with --provenance")
    for name, value in {"max-megabytes": max_megabytes, "per-minute": per_minute}.items():
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be 1 or more")
    if reviewed and not Path(reviewed).absolute().parent.is_dir():
        raise UserError(f"--reviewed {reviewed}: there is no such folder")
    if host not in LOOPBACK:
        print(f"dgsnet: warning: anybody who can reach {host} can use the page", file=sys.stderr)
    with ProvenanceReader(trust) if provenance else contextlib.nullcontext() as reader:
        how: dict[str, Any] = {"views": views, "batch": batch, "precision": precision, "crops": crops}
        detector = Detector.load(model, device, pretrained=pretrained, **how)
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
            declared=declared,
            reviewed=reviewed,
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{listening.getsockname()[1]} (Ctrl-C stops it)", flush=True)
        with listening:
            server(app).run(sockets=[listening])
