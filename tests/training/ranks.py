"""Ranks of a run, forked from one process that has imported everything, and without an agent that watches them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.training.test_trainer import free_port

SERVER = """
import json, os, select, signal, sys, time, traceback
from datetime import timedelta
import torch
from accelerate import Accelerator
from torch import distributed
from arena import cli, distributed as processes, ranks
from arena.stopping import Stopped
from arena.training import checkpoint, held_out, run, trainer
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:  # the exit status of each process, None for those that are still there after so many seconds
        ends, until = [None] * len(asked["wait"]), time.monotonic() + asked["seconds"]
        while None in ends and time.monotonic() < until:
            for at, pid in enumerate(asked["wait"]):
                if ends[at] is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    ends[at] = os.waitstatus_to_exitcode(found[1])
            time.sleep(0.02)
        for pid, end in zip(asked["wait"], ends):
            if end is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        print(json.dumps(ends), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        opened = os.open(asked["shown"], os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        os.environ.update(asked["environment"])
        sys.argv = ["arena", *asked["words"]]
        status = 0
        try:
            exec(asked["code"])
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(pid, flush=True)
"""
TRAIN = "cli.main()"


@dataclass
class Ranks:
    """Starts ranks; their outputs are in `folder`, in a file `shown-R` for each."""

    server: subprocess.Popen[str]
    folder: Path

    def start(self, count: int, *words: str | Path, code: str = TRAIN) -> list[int]:
        """The ids of `count` new processes, each of which runs `code`, with `rank` in it."""
        port = str(free_port())
        asked = []
        for rank in range(count):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            environment = {name: str(value) for name, value in own.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            asked.append({"environment": environment if count > 1 else {}, "words": [*map(str, words)]})
            asked[-1] |= {"shown": str(self.folder / f"shown-{rank}"), "code": f"rank = {rank}\n{code}"}
        return [self._ask(each) for each in asked]

    def ends(self, pids: list[int], seconds: float = 120) -> list[int | None]:
        """The exit status of each, minus the signal of those that were killed; None: it did not end in time."""
        return list(self._ask({"wait": pids, "seconds": seconds}))

    def shown(self, rank: int) -> str:
        """What the rank of the last start has printed."""
        return (self.folder / f"shown-{rank}").read_text(encoding="utf-8")

    def _ask(self, asked: dict[str, Any]) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        assert self.server.poll() is None, f"the server of ranks has ended: {self.server.returncode}"
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


@contextmanager
def forking(folder: Path) -> Iterator[Ranks]:
    """A server of ranks; it ends with the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    try:
        yield Ranks(server, folder)
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait(60)
