"""A server under load: `python -m benchmarks serve`.

Clients on one machine ask without pause, each with the next conversation of a file: first one client, then many, in
several rounds, because a machine's speed changes from minute to minute, and what is compared should be measured side by
side. Before them the same judge is called from Python, one conversation at a time. Every answer is compared with what
the judge says of all conversations at once. What is reported is how many conversations are judged in a second, how long
one takes, how many are judged together, and the memory of the process, in which the clients are too.
"""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import numpy as np
import psutil
from tyro.conf import Positional, arg

from arena.distributed import device_name, fix_threads, in_a_thread
from arena.inference.judge import Judge
from arena.progress import console
from arena.storage.files import local_path, write_json, write_text
from benchmarks.machine import made_by, provenance
from benchmarks.tables import table

TOLERANCE = 1e-5  # of a probability, in float32, where conversations are judged in batches of another shape
SHORT = 5  # one client, and calls from Python, take a fifth of the time of many clients
ROUNDS = 5
COLUMNS = {
    "asked by": "{asked_by}", "conversations": "{rows}", "a second": "{rows_a_second:.1f}", "median, ms": "{p50:.0f}",
    "95%, ms": "{p95:.0f}", "99%, ms": "{p99:.0f}", "judged together": "{together:.1f}",
    "tokens a second": "{tokens_a_second:,.0f}", "memory, MB": "{memory:,.0f}",
    "after a round": "{memory_early:,.0f}",
}  # fmt: skip


@dataclass
class Serve:
    """Ask a server of a judge from one client and from many, and report throughput and latency."""

    run_name: Positional[Annotated[str, arg(metavar="RUN", help="The judge.", help_behavior_hint="")]] = "demo"
    data: Annotated[str, arg(metavar="PATH", help="The conversations.")] = "data/demo/test.csv"
    clients: Annotated[int, arg(help="How many ask at once.")] = 64
    seconds: Annotated[float, arg(help="How long the clients ask, all rounds together; one asks a fifth of it.")] = 60.0
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")
    out: Annotated[Path, arg(help="The folder for bench-serve.json and .md.")] = Path("docs")

    def run(self) -> list[Path]:
        """Measures, writes the two files and gives their paths."""
        from arena.serving.server import Server, bind

        local_path(self.out, "--out")
        fix_threads()
        judge = in_a_thread(lambda: Judge.from_pretrained(self.run_name, runs=self.runs))  # as `arena serve` does
        rows = [{name: row[name] for name in judge.task.texts} for row in judge.read(self.data).table]
        expected = in_a_thread(lambda: judge.predict_proba(rows))
        bodies = [json.dumps(row) for row in rows]
        bound, server = bind("127.0.0.1", 0), Server({"judge": judge})

        def serve() -> None:
            with console.quiet_here():  # without a line for each request
                server.run([bound])

        thread = Thread(target=serve)
        thread.start()
        port = bound.getsockname()[1]
        while not server.started:
            time.sleep(0.01)
        many, seconds = f"{self.clients} clients", self.seconds / ROUNDS
        try:
            # before the server has computed, whose threads then share the cores with any others
            parts = {"a call from Python": [in_a_thread(lambda: called(judge, rows, self.seconds / SHORT))]}
            parts |= {"1 client": [], many: []}
            for _ in range(ROUNDS):
                parts["1 client"].append(asked(port, bodies, expected, 1, seconds / SHORT))
                parts[many].append(asked(port, bodies, expected, self.clients, seconds))
        finally:
            server.service.draining = True
            thread.join()
        found = [facts(asked_by, of_all) for asked_by, of_all in parts.items()]
        result = {**provenance(), "device": device_name(judge.models[0].device), "found": found}
        paths = [self.out / f"bench-serve.{ending}" for ending in ("json", "md")]
        write_json(paths[0], result)
        write_text(paths[1], as_page(result))
        console.print(f"written: {', '.join(map(str, paths))}")
        return paths


@dataclass
class Part:
    """What was measured in one stretch.

    Attributes:
        seconds: how long it took.
        latencies: in seconds, of each conversation.
        batches: what the server says each conversation was judged together with.
        memory: in megabytes, at the end.
    """

    seconds: float
    latencies: list[float]
    batches: list[dict[str, Any]]
    memory: float


def called(judge: Judge, rows: list[dict[str, Any]], seconds: float) -> Part:
    """Warm calls from Python, each of which judges one row."""
    latencies, started = list[float](), time.monotonic()
    while time.monotonic() < started + seconds:
        before = time.monotonic()
        judge.predict_proba([rows[len(latencies) % len(rows)]])
        latencies.append(time.monotonic() - before)
    return Part(time.monotonic() - started, latencies, [], memory())


def asked(port: int, bodies: list[str], expected: np.ndarray, clients: int, seconds: float) -> Part:
    """What so many clients got from a server in some time.

    Args:
        expected: float64 (n, C), the probabilities of the conversations in `bodies`.

    Raises:
        ValueError: a conversation was refused, or got other probabilities.
    """
    started, answers = time.monotonic(), list[tuple[float, dict[str, Any]]]()

    def ask_on(first: int) -> None:
        connection, at = http.client.HTTPConnection("127.0.0.1", port, timeout=120), first
        while (before := time.monotonic()) < started + seconds:
            connection.request("POST", "/v1/judge", bodies[at % len(bodies)], {"content-type": "application/json"})
            reply = connection.getresponse()
            content = json.loads(reply.read())
            if reply.status != 200:
                raise ValueError(f"the server refused a conversation: {content['error']['message']}")
            answers.append((time.monotonic() - before, content["batch"]))
            got = list(content["rows"][0]["probabilities"].values())
            if not np.allclose(got, expected[at % len(bodies)], rtol=0, atol=TOLERANCE):
                raise ValueError(f"conversation {at % len(bodies)} got {got} instead of {expected[at % len(bodies)]}")
            at += clients

    with ThreadPoolExecutor(clients) as pool:
        for each in [pool.submit(ask_on, first) for first in range(clients)]:
            each.result()
    latencies, batches = (list(each) for each in zip(*answers, strict=True))
    return Part(time.monotonic() - started, latencies, batches, memory())


def facts(asked_by: str, parts: list[Part]) -> dict[str, Any]:
    """How many rows were judged in all rounds and in a second of each, and how long one took in milliseconds."""
    latencies, seconds = np.concatenate([part.latencies for part in parts]), sum(part.seconds for part in parts)
    batches = [batch for part in parts for batch in part.batches]
    p50, p95, p99 = 1000 * np.percentile(latencies, (50, 95, 99))
    return {
        "asked_by": asked_by, "rows": len(latencies), "rows_a_second": len(latencies) / seconds,
        "by_round": [len(part.latencies) / part.seconds for part in parts], "p50": float(p50), "p95": float(p95),
        "p99": float(p99), "together": float(np.mean([batch["rows"] for batch in batches])) if batches else None,
        "tokens_a_second": sum(b["tokens"] / b["rows"] for b in batches) / seconds if batches else None,
        "memory": parts[-1].memory, "memory_early": parts[0].memory if len(parts) > 1 else None,
    }  # fmt: skip


def memory() -> float:
    """The megabytes of this process."""
    return float(psutil.Process().memory_info().rss / 1e6)


def as_page(result: dict[str, Any]) -> str:
    """The Markdown page."""
    python, one, many = result["found"]
    times = [of_many / of_one for of_many, of_one in zip(many["by_round"], one["by_round"], strict=True)]
    sections = [
        f"# A server under load, {result['date'][:10]}", made_by(result["device"], result),
        f"{ROUNDS} rounds, in each of which one client asks, and then {many['asked_by']}, without pause, each with one "
        "conversation at a time, in both orders. They are in the server's own process; calls from Python come before "
        f"them. Every answer is within {TOLERANCE:g} of the judge's for all conversations at once. `judged together` "
        "is the mean over conversations of how many were in their batch; memory is of the process, at the end and "
        "after the first round.",
        table(COLUMNS, result["found"]),
        f"{many['asked_by']} get {many['rows_a_second'] / one['rows_a_second']:.1f} times as many verdicts in a second "
        f"as one ({min(times):.1f} to {max(times):.1f} in the rounds). An idle server's median latency, that of a "
        f"client alone, is {one['p50']:.0f} ms; calls from Python, which come before, take {python['p50']:.0f}.",
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"
