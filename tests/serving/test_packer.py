"""Requests that wait together are judged together; those that are given up, refused or damned do not cost others."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from arena import Judge
from arena.inference.verdicts import Explanation
from arena.serving import packer, server
from arena.serving.limits import Limits
from arena.serving.metrics import Metrics
from arena.serving.packer import Job
from arena.serving.server import Protocol
from arena.stopping import Stopped
from tests.serving.client import ROW, Client, served, until

BODY = json.dumps(ROW).encode()


@dataclass
class Watched:
    """What `Judge.explain_all` is asked, which waits until it may go on.

    Attributes:
        batches: the prompts of the rows of each call.
    """

    go: Event = field(default_factory=Event)
    batches: list[list[str]] = field(default_factory=list)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    seen, real = Watched(), Judge.explain_all

    def watch(self: Judge, rows: Any, **options: Any) -> list[Explanation]:
        seen.batches.append([str(prompt[0]) for prompt in rows.table["prompt"]])
        assert seen.go.wait(30)
        return real(self, rows, **options)

    monkeypatch.setattr(Judge, "explain_all", watch)
    yield seen
    seen.go.set()


def numbered(at: int, **more: Any) -> dict[str, Any]:
    return {**ROW, "prompt": str(at), **more}


def waiting_rows(client: Client) -> int:
    assert client.server is not None
    return sum(packer.waiting_rows for packer in client.server.service.packers)


def test_what_waits_together_is_judged_together(judges: dict[str, Judge], watched: Watched) -> None:
    """One call for all that came while the first was judged, in their order, and another for another judge."""
    with served(judges) as client, ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(client.judge, numbered(0))]
        until(lambda: watched.batches)
        for at in range(1, 9):
            body = {"rows": [numbered(at), numbered(at)], "judge": "second" if at == 4 else None}
            answers.append(pool.submit(client.judge, body))
            until(lambda at=at: waiting_rows(client) == 2 * at)
        answers.append(pool.submit(client.ask, "/v1/rank", {"prompt": "9", "answers": ["a", "b", "c"]}))
        until(lambda: waiting_rows(client) == 19)
        watched.go.set()
        found = [answer.result()[:2] for answer in answers]
    others = [str(at) for at in (1, 2, 3, 5, 6, 7, 8) for _ in range(2)]
    assert watched.batches == [["0"], [*others, "9", "9", "9"], ["4", "4"]]
    assert [status for status, _ in found] == [200] * 10
    assert [answer["batch"]["requests"] for _, answer in found] == [1, *[8] * 3, 1, *[8] * 5]
    for at, (_, answer) in enumerate(found[:9]):  # each has its own rows' numbers
        alone = judges["second" if at == 4 else "first"].predict_proba(
            [{name: [text] for name, text in numbered(at).items()}]
        )
        assert [*answer["rows"][-1]["probabilities"].values()] == pytest.approx(alone[0].tolist(), abs=1e-5)


@pytest.mark.parametrize(("limits", "sizes"), [({"batch_rows": 3}, [1, 3, 2]), ({"batch_tokens": 1}, [1] * 6)])
def test_a_batch_has_its_limits(
    limits: dict[str, int], sizes: list[int], judges: dict[str, Judge], watched: Watched
) -> None:
    with served(judges, Limits(**limits)) as client, ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(client.judge, ROW)]
        until(lambda: watched.batches)
        answers += [pool.submit(client.judge, ROW) for _ in range(5)]
        until(lambda: waiting_rows(client) == 5)
        watched.go.set()
        assert [answer.result()[0] for answer in answers] == [200] * 6
    assert [len(batch) for batch in watched.batches] == sizes


def test_the_size_of_a_batch_is_learnt_from_the_last_ones(judges: dict[str, Judge], watched: Watched) -> None:
    """Prompts have more tokens than short texts suggest, so fewer rows fit than their texts' sizes say."""
    estimate = Job("first", judges["first"], [{name: [text] for name, text in ROW.items()}]).tokens
    with served(judges, Limits(batch_tokens=20 * estimate)) as client, ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(client.judge, ROW)]
        until(lambda: watched.batches)
        answers += [pool.submit(client.judge, ROW) for _ in range(19)]
        until(lambda: waiting_rows(client) == 19)
        watched.go.set()
        tokens = answers[0].result()[1]["batch"]["tokens"]
        assert [answer.result()[0] for answer in answers] == [200] * 20
    assert tokens > packer.MOST_OFF * estimate
    off = 1 + packer.OF_LATE * min(1, tokens / (20 * estimate)) * (packer.MOST_OFF - 1)
    assert [len(batch) for batch in watched.batches][:2] == [1, int(20 * packer.FILLED / off)]


@pytest.mark.parametrize(("tokens", "estimate", "most"), [(60, 7, 1.05), (1023, 97_506, 1.3), (4000, 1, 2.0)])
def test_odd_requests_hardly_change_the_batches_of_others(tokens: int, estimate: int, most: float) -> None:
    learning = packer.Packer(Limits(), Metrics())
    for _ in range(10):
        learning._learn(tokens, estimate, 4096)
    assert 1 / most <= learning._estimates_off <= most
    for _ in range(40):
        learning._learn(4000, 4000, 4096)
    assert learning._estimates_off == pytest.approx(1, abs=0.01)
    learning.close()


def test_a_full_queue_and_a_late_answer(judges: dict[str, Judge], watched: Watched) -> None:
    with served(judges, Limits(waiting_rows=4, seconds=1.0)) as client, ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.judge, numbered(0))
        until(lambda: watched.batches)
        second = pool.submit(client.judge, {"rows": [numbered(1)] * 4})
        until(lambda: waiting_rows(client) == 4)
        status, answer, headers = client.ask("/v1/judge", numbered(2))
        assert status == 429 and int(headers["retry-after"]) >= 1 and "4 rows are waiting" in answer["error"]["message"]
        assert first.result()[0] == second.result()[0] == 504
        assert waiting_rows(client) == 0  # what nobody waits for any more makes room
        third = pool.submit(client.judge, numbered(3))
        until(lambda: waiting_rows(client) == 1)
        watched.go.set()
        assert third.result()[0] == 200
    assert watched.batches == [["0"], ["3"]]


def test_a_client_that_leaves_is_never_judged(judges: dict[str, Judge], watched: Watched) -> None:
    with served(judges) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.judge, numbered(0))
        until(lambda: watched.batches)
        leaving = [client.opened(json.dumps(numbered(at)).encode()) for at in (1, 2)]
        half_closed = client.opened(json.dumps(numbered(3)).encode())
        until(lambda: waiting_rows(client) == 3)
        leaving[0].close()
        half_closed.shutdown(socket.SHUT_WR)
        until(lambda: waiting_rows(client) == 1)
        watched.go.set()
        assert first.result()[0] == 200 and leaving[1].recv(12) == b"HTTP/1.1 200"
        assert b"arena_cancelled_total 2.0" in client.ask("/metrics")[1]
    assert watched.batches == [["0"], ["2"]]


def test_slow_and_broken_senders(judges: dict[str, Judge]) -> None:
    with served(judges, Limits(body_seconds=0.3)) as client:
        slow = client.opened(BODY[:10], len(BODY))
        shut = client.opened(BODY[:10], len(BODY))
        shut.shutdown(socket.SHUT_WR)
        gone = client.opened(BODY[:10], len(BODY))
        gone.close()
        liar = client.opened(BODY + b"and more", len(BODY))
        rubbish = socket.create_connection(("127.0.0.1", client.port), timeout=30)
        rubbish.sendall(b"\x16\x03\x01\x00\xff" * 20 + b"\r\n\r\n")
        assert client.judge(ROW)[0] == 200  # nobody waits for them
        assert slow.recv(1000).startswith(b"HTTP/1.1 408") and shut.recv(1000) == b""
        assert liar.recv(12) == b"HTTP/1.1 200" and rubbish.recv(12) == b"HTTP/1.1 400"
        chunked = client.opened(b"", 0, path="/v1/judge")
        assert chunked.recv(12) == b"HTTP/1.1 400"
        until(lambda: client.server is not None and client.server.service.is_idle)


def test_no_connection_is_held(judges: dict[str, Judge], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that send a part of a header, or trickle a body that is answered already, are closed; others are not."""
    monkeypatch.setattr(Protocol, "seconds", 1.0)
    whole = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with served(judges) as client:
        silent, half, second = (socket.create_connection(("127.0.0.1", client.port), timeout=30) for _ in range(3))
        early = client.opened(b"", 10**6, path="/v1/nothing")
        second.sendall(whole)
        until_sent(second, b"alive")
        until_sent(early, b"HTTP/1.1 404")
        asking = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
        asking.connect()
        asking.auto_open = 0  # only this connection
        for at in range(20):
            for each in (half, second, early):
                with suppress(OSError):  # it is closed
                    each.sendall(b" " if each is early else whole[at : at + 1])
            if at % 5 == 0:  # more often than the limit, and for longer
                asking.request("GET", "/health")
                assert asking.getresponse().read() == b'{"status":"alive"}'
            time.sleep(0.1)
        for each in (silent, half, second, early):
            each.settimeout(0.2)
            with suppress(ConnectionResetError):
                while each.recv(1000):  # it times out if the connection is open
                    pass


def until_sent(connection: socket.socket, text: bytes) -> None:
    """Receives up to a text."""
    received = b""
    while text not in received:
        more = connection.recv(1000)
        assert more, f"closed after {received!r}"
        received += more


def test_a_stopping_server_answers_what_it_took(judges: dict[str, Judge], watched: Watched) -> None:
    with served(judges) as client, ThreadPoolExecutor(4) as pool:
        assert client.server is not None
        taken = [pool.submit(client.judge, numbered(0))]
        until(lambda: watched.batches)
        taken += [pool.submit(client.judge, numbered(at)) for at in (1, 2)]
        until(lambda: waiting_rows(client) == 2)
        client.server.handle_exit(signal.SIGTERM, None)
        assert client.judge(numbered(3))[0] == 503 and client.ask("/ready")[0] == 503
        assert client.ask("/health")[0] == 200
        watched.go.set()
        assert [answer.result()[0] for answer in taken] == [200] * 3


def test_a_request_that_still_arrives_at_the_end_is_refused(
    judges: dict[str, Judge], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "LAST_SECONDS", 0.3)
    with served(judges) as client:
        slow = client.opened(BODY[:10], len(BODY))
        assert client.server is not None and client.ask("/health")[0] == 200
        until(lambda: len(client.server.server_state.tasks) == 1)  # type: ignore[union-attr]
        client.server.handle_exit(signal.SIGTERM, None)
        answer = slow.recv(10_000) + slow.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 503") and b"the server is stopping" in answer
    out = capsys.readouterr()
    assert "POST /v1/judge 503" in out.out and "Traceback" not in out.out + out.err


def test_a_second_signal_ends_the_server_at_once(judges: dict[str, Judge], watched: Watched) -> None:
    bound, serving = server.bind("127.0.0.1", 0), server.Server(judges)
    client = Client(bound.getsockname()[1])
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(serving.run, [bound])
        until(lambda: serving.started)
        asked = pool.submit(client.judge, ROW)
        until(lambda: watched.batches)
        serving.handle_exit(signal.SIGTERM, None)
        assert not running.done()
        serving.handle_exit(signal.SIGINT, None)
        with pytest.raises(Stopped) as ended:
            running.result(20)
        assert ended.value.status == 128 + signal.SIGINT and asked.result()[0] == 503


PROCESS = "import torch; torch.set_num_threads(1); from arena import cli; cli.main()"


def test_sigterm_to_a_process_under_load(run: Path, tmp_path: Path) -> None:
    """Clients ask without pause: each gets a whole answer, a refusal, or no connection, but never half of one."""
    words = ["serve", f"first={run / 'fold0'}", f"second={run / 'fold1'}", "--port", "0"]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, *words], stdout=output, stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        until(lambda: "at http" in log.read_text() or process.poll() is not None, 120)
        client = Client(int(log.read_text().rstrip().rstrip("/").rpartition(":")[2]))  # of the last line
        answers = list[int]()
        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(ask_on, client, at, answers) for at in range(8)]
            until(lambda: len(answers) > 30 or any(each.done() for each in clients), 60)
            process.send_signal(signal.SIGTERM)
            ends = [each.result(60) for each in clients]
        assert process.wait(60) == 0 and "every accepted request was answered" in log.read_text()
    finally:
        process.kill()
    assert all(end in ("refused", "503", "reset") for end in ends) and len(answers) > 30
    assert log.read_text().count("POST /v1/judge 200") == len(answers)


def ask_on(client: Client, at: int, answers: list[int]) -> str:
    """Asks until there is no answer; why there is none."""
    while True:
        try:
            status, answer = client.judge({"rows": [numbered(at)] * 3, "judge": ("first", "second")[at % 2]})
        except ConnectionRefusedError:
            return "refused"
        except ConnectionResetError:
            return "reset"  # a connection that was never accepted
        if status != 200:
            return str(status)
        answers.append(len(answer["rows"]))
