"""Real processes that cost little: forked from one that has imported everything, watched, signalled, killed."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# what Python reports before it touches a file: moments at which a kill is worth most
TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "tempfile.mkdtemp"}
PATIENCE = 300.0  # seconds until a process counts as hanging

Announce = Callable[[str], None]


class Child:
    """A forked process at some work.

    Args:
        work: called in it with a function that tells the parent a word; how it ends is the exit status.
        shown: the file that takes what it prints.
    """

    def __init__(self, work: Callable[[Announce], object], shown: Path) -> None:
        shown.parent.mkdir(parents=True, exist_ok=True)
        self.shown, self._heard, self.status = shown, b"", None
        self._pipe, write = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            _live(work, shown, lambda word: os.write(write, word.encode() + b"\n"))
        os.close(write)

    def hear(self, seconds: float = PATIENCE) -> str | None:
        """The next word that it tells; None once it has ended."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._heard:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._pipe], [], [], left)[0]:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"process {self.pid} told nothing for {seconds:g} s:\n{self.text()[-2000:]}")
            data = os.read(self._pipe, 4096)
            if not data:
                return None
            self._heard += data
        word, _, self._heard = self._heard.partition(b"\n")
        return word.decode()

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal; nothing happens where it has ended but was not waited for."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status once it has ended, less than zero for the signal that ended it."""
        while self.hear() is not None:
            pass
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pipe)
        return self.status

    def text(self) -> str:
        """What it has printed."""
        return self.shown.read_text(encoding="utf-8", errors="replace")


def ask(work: Callable[[], Any], scratch: Path) -> Any:
    """What some work gives, as JSON, done in a process of its own: torch is never at work in the one that forks."""
    answer = scratch / "answer.json"
    child = Child(lambda announce: answer.write_text(json.dumps(work())), scratch / "asked.txt")
    if child.wait() != 0:
        raise RuntimeError(f"a process failed:\n{child.text()[-4000:]}")
    return json.loads(answer.read_text())


def watch(folder: Path, at: int | None, announce: Announce) -> Callable[[], int]:
    """Tells `now` before the `at`-th time that this process touches a file under a folder; gives the count so far."""
    count, root = 0, str(folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in TOUCHES and args and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(root):
            count += 1
            if count == at:
                announce("now")

    sys.addaudithook(hook)
    return lambda: count


def _live(work: Callable[[Announce], object], shown: Path, announce: Announce) -> None:
    """The life of a forked process, as that of one that was started by a shell."""
    status = 70
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        handle = os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        work(announce)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # as the interpreter
        traceback.print_exc()
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
