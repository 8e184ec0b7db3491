"""Who may ask the page, and how long and how many may keep it waiting."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

# Connections at a time, each of which may need a file as well.
MAX_CONNECTIONS = 384
# Seconds for a request's headers, and after an answer for all that is left to send and to receive.
WAIT_SECONDS = 10.0

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
POLICY = "default-src 'none'; frame-ancestors 'none'"


class Guard:
    """Refuses requests under other names and from other sites' pages; tells browsers what answers are for.

    Args:
        app: the application behind it.
        hosts: names under which it may be asked; with "*" among them all.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Content-Security-Policy", POLICY)
            await send(message)

        refused = self._refusal(scope["method"], Headers(scope=scope))
        app = JSONResponse({"detail": refused[1]}, refused[0]) if refused else self.app
        await app(scope, receive, send_guarded)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        host, origin = headers.get("host", ""), headers.get("origin", "")
        try:
            name, site = urlsplit(f"//{host}").hostname, urlsplit(origin).netloc
        except ValueError:
            # The brackets do not match.
            return 400, f"no names of a host and a site: {host!r}, {origin!r}"
        if "*" not in self.hosts and name not in self.hosts:
            return 400, f"this page is not served as {host!r}"
        if method != "GET" and origin and site != host:
            return 403, "requests from other sites are refused"
        return None


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 that waits for no client for long; where there are too many, for the latest ones."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection; where there are too many, the one that has been waited for longest is dropped."""
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._wait()
        if len(self.connections) > MAX_CONNECTIONS:
            others: Any = (other for other in self.connections if not other.transport.is_closing())
            waited = (other for other in others if other.idle or other.cycle.more_body)
            min(waited, key=lambda other: other.since).transport.abort()

    @property
    def idle(self) -> bool:
        """Whether nothing is being asked."""
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self._stop_waiting()
        self.since = self.loop.time()
        self._timer = self.loop.call_later(WAIT_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """What the client sends."""
        super().data_received(data)
        if not self.idle:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """An answer is given."""
        super().on_response_complete()
        if self.idle:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_waiting()
        super().connection_lost(exc)
