"""A server in this process, on a real socket, and a client that asks it."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from arena import Judge
from arena.serving.limits import Limits
from arena.serving.server import Server, bind

ROW = {"prompt": "What is 2 + 2?", "response_a": "It is 4.", "response_b": "I believe that it is five."}
JSON = {"content-type": "application/json"}


@dataclass
class Client:
    """Asks the server on a port."""

    port: int
    server: Server | None = None

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: Mapping[str, str] = JSON
    ) -> tuple[int, Any, Mapping[str, str]]:
        """The status, the content and the headers of an answer; bytes are sent as they are."""
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method or ("GET" if body is None else "POST"), path, sent, dict(headers))
        reply = connection.getresponse()
        content, kind = reply.read(), reply.headers.get("content-type", "")
        connection.close()
        return reply.status, json.loads(content) if content and kind == "application/json" else content, reply.headers

    def judge(self, body: Any) -> tuple[int, Any]:
        return self.ask("/v1/judge", body)[:2]

    def opened(self, body: bytes = b"", announced: int | None = None, path: str = "/v1/judge") -> socket.socket:
        """A connection on which a request was sent, perhaps with less of its body than announced."""
        sender = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        length = len(body) if announced is None else announced
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}"
        sender.sendall(f"{head}\r\n\r\n".encode() + body)
        return sender


@contextmanager
def served(
    judges: Mapping[str, Judge], limits: Limits | None = None, *, token: str | None = None,
    reports: Mapping[str, Sequence[Path]] | None = None,
) -> Iterator[Client]:  # fmt: skip
    bound, server = bind("127.0.0.1", 0), Server(judges, limits=limits, token=token, reports=reports or {})
    port = bound.getsockname()[1]
    thread = Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        until(lambda: server.started)
        yield Client(port, server)
    finally:
        server.service.draining = True
        thread.join(30)
        assert not thread.is_alive()


def until(holds: Callable[[], Any], seconds: float = 20) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
