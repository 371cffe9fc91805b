"""A server under load: `python -m benchmarks serve`.

Clients on one machine ask without pause, each with the next conversation of a file: first one client, then many. What
is reported is how many conversations are judged in a second, how long one takes, how many are judged together, and the
memory of the process, in which the clients are too.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import numpy as np
import psutil
from tyro.conf import Positional, arg

from arena.distributed import device_name, fix_threads
from arena.inference.judge import Judge
from arena.progress import console
from arena.storage.files import local_path, write_json, write_text
from benchmarks.machine import made_by, provenance
from benchmarks.tables import table

COLUMNS = {
    "clients": "{clients}", "conversations": "{rows}", "a second": "{rows_a_second:.1f}", "median, ms": "{p50:.0f}",
    "95%, ms": "{p95:.0f}", "99%, ms": "{p99:.0f}", "judged together": "{together:.1f}",
    "tokens a second": "{tokens_a_second:,.0f}", "memory, MB": "{memory:,.0f}",
}  # fmt: skip


@dataclass
class Serve:
    """Ask a server of a judge from one client and from many, and report throughput and latency."""

    run_name: Positional[Annotated[str, arg(metavar="RUN", help="The judge.", help_behavior_hint="")]] = "demo"
    data: Annotated[str, arg(metavar="PATH", help="The conversations.")] = "data/demo/test.csv"
    clients: Annotated[int, arg(help="How many ask at once.")] = 64
    seconds: Annotated[float, arg(help="How long all of it takes, half of it with one client.")] = 60.0
    runs: Annotated[Path, arg(help="The folder of all runs.")] = Path("runs")
    out: Annotated[Path, arg(help="The folder for bench-serve.json and .md.")] = Path("docs")

    def run(self) -> list[Path]:
        """Measures, writes the two files and gives their paths."""
        from arena.serving.server import Server, bind

        local_path(self.out, "--out")
        fix_threads()
        judge = Judge.from_pretrained(self.run_name, runs=self.runs)
        table = judge.read(self.data).table
        bodies = [json.dumps({name: row[name] for name in judge.task.texts}) for row in table]
        bound, server = bind("127.0.0.1", 0), Server({"judge": judge})

        def serve() -> None:
            with console.quiet_here():  # without a line for each request
                server.run([bound])

        thread = Thread(target=serve)
        thread.start()
        port = bound.getsockname()[1]
        while not server.started:
            time.sleep(0.01)
        try:
            found = [asked(port, bodies, clients, self.seconds / 2) for clients in (1, self.clients)]
        finally:
            server.service.draining = True
            thread.join()
        result = {**provenance(), "device": device_name(judge.models[0].device), "found": found}
        paths = [self.out / f"bench-serve.{ending}" for ending in ("json", "md")]
        write_json(paths[0], result)
        write_text(paths[1], as_page(result))
        console.print(f"written: {', '.join(map(str, paths))}")
        return paths


def asked(port: int, bodies: list[str], clients: int, seconds: float) -> dict[str, Any]:
    """What so many clients got from a server in some time."""
    answers, end = list[tuple[float, dict[str, Any]]](), time.monotonic() + seconds

    def ask_on(first: int) -> None:
        connection, at = http.client.HTTPConnection("127.0.0.1", port, timeout=120), first
        while (started := time.monotonic()) < end:
            connection.request("POST", "/v1/judge", bodies[at % len(bodies)], {"content-type": "application/json"})
            reply = connection.getresponse()
            content = json.loads(reply.read())
            if reply.status != 200:
                raise ValueError(f"the server refused a conversation: {content['error']['message']}")
            answers.append((time.monotonic() - started, content["batch"]))
            at += clients

    threads = [threading.Thread(target=ask_on, args=(first,)) for first in range(clients)]
    started = time.monotonic()
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    took = time.monotonic() - started
    latencies = 1000 * np.array([latency for latency, _ in answers])
    tokens = sum(batch["tokens"] / batch["rows"] for _, batch in answers)
    percentiles = dict(zip(("p50", "p95", "p99"), np.percentile(latencies, (50, 95, 99)).tolist(), strict=True))
    return {
        "clients": clients, "rows": len(answers), "rows_a_second": len(answers) / took, **percentiles,
        "together": float(np.mean([batch["rows"] for _, batch in answers])), "tokens_a_second": tokens / took,
        "memory": psutil.Process().memory_info().rss / 1e6,
    }  # fmt: skip


def as_page(result: dict[str, Any]) -> str:
    """The Markdown page."""
    one, many = result["found"]
    sections = [
        f"# A server under load, {result['date'][:10]}", made_by(result["device"], result),
        "Clients in the server's own process ask without pause, each with one conversation at a time, in both orders. "
        "`judged together` is the mean over conversations of how many were in their batch; memory is of the process.",
        table(COLUMNS, result["found"]),
        f"{many['clients']} clients get {many['rows_a_second'] / one['rows_a_second']:.1f} times as many verdicts as "
        f"one. A client alone is the idle server's latency.",
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"
