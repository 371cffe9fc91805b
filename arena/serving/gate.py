"""What every request passes first: who may ask, what is counted and logged, and the headers of all answers."""

from __future__ import annotations

import asyncio
import hmac
import time
import traceback
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arena.progress import console, warn
from arena.serving.app import refusal
from arena.serving.limits import CLOSE, STOPPING, RefusedError
from arena.serving.metrics import Metrics

POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
           "cache-control": "no-store", "cross-origin-resource-policy": "same-origin"}  # fmt: skip
GUARDED = ("/v1/", "/metrics", "/report")  # the page, the probes and the description hold nothing to guard
OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Gate:
    """Wraps the application.

    Args:
        paths: that are counted by their names; all others are counted together.
        token: that requests must bring; None: none, and then only those to this machine's own names are let in, so that
            no page of another site can reach the server under a name of its own.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str], token: str | None) -> None:
        self._app, self._metrics, self._paths, self._token = app, metrics, paths, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, is_begun = time.monotonic(), 500, False

        async def sending(message: Message) -> None:
            nonlocal status, is_begun
            if message["type"] == "http.response.start":
                is_begun = True
                status, own = message["status"], {name for name, _ in message["headers"]}
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in own]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            refused = self._refused(scope)
            await (self._app if refused is None else refusal(refused))(scope, receive, sending)
        except asyncio.CancelledError:  # the server ends, and this request is still arriving or not answered yet
            if not is_begun:
                await refusal(RefusedError(503, STOPPING, headers=CLOSE))(scope, receive, sending)
        except Exception as error:  # answered already; its message may quote a request's text
            where = "".join(traceback.format_tb(error.__traceback__))
            warn(f"a request failed ({type(error).__name__}):\n{where}")
        finally:
            self._count(scope, status, time.monotonic() - started)

    def _refused(self, scope: Scope) -> RefusedError | None:
        headers = dict(scope["headers"])
        if self._token is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
            if name not in OWN_NAMES:
                return RefusedError(
                    403, f"the host is not one of {', '.join(OWN_NAMES)}: start the server with --token"
                )
            return None
        if not scope["path"].startswith(GUARDED):
            return None
        given = headers.get(b"authorization", b"")
        if hmac.compare_digest(given, b"Bearer " + self._token.encode()):
            return None
        return RefusedError(401, "the token is missing or wrong", headers={"www-authenticate": "Bearer"})

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.requests.labels(path, status).inc()
        self._metrics.latency.labels(path).observe(seconds)
        console.print(f"{scope['method'][:16]} {path} {status} {seconds * 1000:.0f} ms")
