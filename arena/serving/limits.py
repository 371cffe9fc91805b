"""What a server takes in and waits for at most, and how it says no."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

CLOSE = {"connection": "close"}
STOPPING = "the server is stopping: ask another one"


@dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Attributes:
        rows: of a request.
        answers: of a request to rank; each is compared with each other.
        characters: of a row.
        turns: of a prompt or an answer.
        body_bytes: of a request.
        body_seconds: in which a request must arrive, from its first line to the end of its body.
        seconds: in which a request must be answered.
        waiting_rows: of all requests that wait.
        batch_rows: judged together, unless one request has more.
        batch_tokens: judged together, by an estimate, unless one request has more; None: the judge's packing budget.
    """

    rows: int = 256
    answers: int = 12
    characters: int = 200_000
    turns: int = 200
    body_bytes: int = 8 * 2**20
    body_seconds: float = 20.0
    seconds: float = 60.0
    waiting_rows: int = 2048
    batch_rows: int = 256
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: give a number above 0")


class RefusedError(Exception):
    """A request that is not answered as it asks.

    Attributes:
        status: of HTTP.
        problems: for each field that is wrong, its `row` (None: it is of no row), `field` and `what`.
    """

    def __init__(
        self, status: int, message: str, problems: Sequence[Mapping[str, Any]] = (), headers: Mapping[str, str] = {}
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.problems, self.headers = status, message, list(problems), dict(headers)
