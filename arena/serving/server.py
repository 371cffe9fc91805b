"""Runs the server, and stops it so that every accepted request is answered."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from arena.command_line import command
from arena.inference.judge import Judge
from arena.progress import console
from arena.serving.app import make_app
from arena.serving.gate import Gate
from arena.serving.limits import Limits
from arena.serving.service import Service
from arena.stopping import Stopped

CONNECTIONS = 1024
LAST_SECONDS = 5  # for answers that are still being sent at the end; requests that are still arriving get 503 then
BACKLOG = 1024


class Protocol(H11Protocol):
    """Closes connections whose next request does not come in time.

    What counts is a whole header: neither a part of one nor the rest of a body that is answered already holds a
    connection.

    Attributes:
        seconds: from the beginning of a connection, or an answer, to the header of the next request.
    """

    seconds = Limits.body_seconds
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def on_response_complete(self) -> None:
        self._await_request()  # first, as the next request may be there already
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _await_request(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.seconds, self._give_up, self.cycle)

    def _give_up(self, last: RequestResponseCycle | None) -> None:
        if self.cycle is last:
            self.transport.abort()  # `close` would wait for a client that does not read its answer


class Server(uvicorn.Server):
    """Serves judges on a bound socket.

    SIGTERM and SIGINT make it refuse further requests, answer those that it has accepted, and end. A second signal ends
    it at once.
    """

    def __init__(
        self, judges: Mapping[str, Judge], *, limits: Limits | None = None, token: str | None = None,
        reports: Mapping[str, Sequence[Path]] = {},
    ) -> None:  # fmt: skip
        self.service = Service(judges, limits)
        self._ended_by: signal.Signals | None = None
        app = make_app(self.service, reports)
        paths = {"/", *(path for route in app.routes if (path := getattr(route, "path", None)))}
        gate = Gate(app, self.service.metrics, paths, token)
        super().__init__(
            uvicorn.Config(
                gate, http=Protocol, ws="none", lifespan="off", log_level="error", access_log=False,
                server_header=False, limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=LAST_SECONDS,
                backlog=BACKLOG,
            )
        )  # fmt: skip

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to stop, or ends at once."""
        if self.service.draining:
            self.should_exit = self.force_exit = True
            self._ended_by = signal.Signals(sig)
            return
        self.service.draining = True
        console.print(f"{signal.Signals(sig).name}: answering what was accepted; another one ends at once")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in sockets or []:
            host, port = bound.getsockname()[:2]
            place = f"[{host}]" if ":" in host else host
            console.print(f"serving {', '.join(self.service.judges)} at http://{place}:{port}/")

    async def on_tick(self, counter: int) -> bool:
        """Ends the loop once everything is answered."""
        if self.service.draining and self.service.is_idle:
            self.should_exit = True
        return await super().on_tick(counter)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until a signal. Raises `Stopped` if a second one ended it, perhaps with requests unanswered."""
        super().run(sockets)
        if self._ended_by is not None:
            raise Stopped(f"ended by {self._ended_by.name}", 128 + self._ended_by)
        self.service.close()
        console.print("stopped: every accepted request was answered")


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which takes no connections yet. Raises `ValueError` if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once (TCP_NODELAY) only for sockets of this protocol; without it, the second packet of an answer
    # waits for the client's acknowledgement of the first, for 40 ms
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ValueError(
            f"{host}:{port} cannot be listened to ({error}): name another --port or --host, as in "
            f"`{command('arena', 'serve', 'demo', '--port', '8001')}`"
        ) from None
    return bound
