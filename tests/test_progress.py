"""What is printed never ends a run, whatever becomes of the terminal, the pipe or the file behind it.

Items made ahead are the same, in order, and nothing is left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arena.progress import Output, ahead, console, optional

# an interpreter of its own that prints and shows a bar, and in the midst of it gets the signal that is its argument
TALKS = """
import os, signal, sys, time
from arena.progress import console, guard_output, progress
from arena.stopping import stopping
guard_output()
with stopping() as stop, progress("working", 3) as advance:
    for turn in range(200):
        console.print("Köln " + "x" * 100)
        advance(0)
        print("plain", file=sys.stderr)
        if turn == 100:
            signal.raise_signal(int(sys.argv[1]))
        if stop():
            break
open("saved", "w").close()
sys.exit(stop.stopped().status)
"""
HELP = "import sys; sys.argv = ['arena', '--help']; from arena.cli import main; main()"


def reader_gone() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def vanished_terminal() -> int:
    """Writing to it fails with EIO."""
    master, slave = os.openpty()
    os.close(master)
    return slave


ENDS: dict[str, Callable[[], int]] = {"pipe": reader_gone, "disk": full_disk, "terminal": vanished_terminal}


def ended(code: str, end: int, folder: Path, *words: str, **environment: str) -> int:
    """Exit status of an interpreter that writes to a file descriptor alone."""
    command = [sys.executable, "-c", code, *words]
    path = os.pathsep.join(sys.path)
    process = subprocess.run(
        command, stdout=end, stderr=end, cwd=folder, check=False, env={**os.environ, "PYTHONPATH": path, **environment}
    )
    os.close(end)
    return process.returncode


@pytest.mark.parametrize("bar", ["0", "1"])
@pytest.mark.parametrize("name", ENDS)
def test_a_run_whose_output_cannot_be_written_ends_as_it_would_have(tmp_path: Path, name: str, bar: str) -> None:
    assert ended(TALKS, ENDS[name](), tmp_path, str(int(signal.SIGINT)), TTY_COMPATIBLE=bar) == 130
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ENDS)
def test_a_script_that_only_uses_the_package_ends_well_too(tmp_path: Path, name: str) -> None:
    """Standard output is Python's own there, and what it still holds is flushed at exit."""
    code = "from arena.progress import console\nfor _ in range(9): console.print('x' * 5000)\nprint('more')"
    assert ended(code, ENDS[name](), tmp_path) == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_terminal_that_hangs_up_ends_a_run_well(tmp_path: Path) -> None:
    assert ended(TALKS, vanished_terminal(), tmp_path, str(int(signal.SIGHUP)), TTY_COMPATIBLE="1") == 129
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ENDS)
def test_help_needs_no_reader(tmp_path: Path, name: str) -> None:
    assert ended(HELP, ENDS[name](), tmp_path) == 0


def test_a_process_may_be_started_without_any_stream(tmp_path: Path) -> None:
    script = tmp_path / "talks.py"
    script.write_text(TALKS, encoding="utf-8")
    line = f'exec "{sys.executable}" "{script}" {int(signal.SIGINT)} <&- >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(["sh", "-c", line], cwd=tmp_path, check=False, env=environment).returncode == 130
    assert (tmp_path / "saved").exists()


def test_what_a_stream_cannot_encode_is_escaped(tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    end = os.open(shown, os.O_WRONLY | os.O_CREAT)
    assert ended(TALKS, end, tmp_path, str(int(signal.SIGINT)), PYTHONIOENCODING="ascii") == 130
    assert rb"K\xf6ln" in shown.read_bytes()


def test_a_closed_stream_and_none_swallow_what_is_written(tmp_path: Path) -> None:
    stream = (tmp_path / "x").open("w")
    stream.close()
    for output in (Output(lambda: stream), Output(lambda: None)):
        assert output.write("text") == 4 and not output.isatty()
        output.flush()
        assert output.encoding.lower().startswith("utf")


def test_a_write_that_was_interrupted_by_another_does_not_silence_the_stream(tmp_path: Path) -> None:
    class Busy:
        encoding, turn = "utf-8", 0

        def write(self, text: str) -> None:
            self.turn += 1
            if self.turn == 1:
                raise RuntimeError("reentrant call")
            file.write(text)

        def fileno(self) -> int:
            return file.fileno()

    with (tmp_path / "x").open("w") as file:
        busy = Busy()
        output = Output(lambda: busy)  # type: ignore[arg-type, return-value]
        output.write("lost ")
        output.write("shown")
    assert (tmp_path / "x").read_text() == "shown"


def test_a_screen_of_no_columns_shows_what_is_printed(tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    for columns in ("0", "\u00b2", "-1"):
        end = os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        assert ended("from arena.progress import console; console.print('said')", end, tmp_path, COLUMNS=columns) == 0
        assert shown.read_text() == "said\n"


def test_optional_work_fails_with_a_one_line_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with optional("drawing", "the same command draws it"):
        raise OSError("no\nroom")
    assert capsys.readouterr().out == "warning: drawing failed (OSError: no room); the same command draws it\n"
    with pytest.raises(SystemExit), optional("drawing"):
        raise SystemExit(3)
    assert console.encoding


def test_items_are_made_ahead_in_order_and_no_further_than_the_depth() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for at in range(20):
            made.append(at)
            yield at

    items = ahead(source(), depth=2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.1)
    assert len(made) <= 5
    assert list(items) == list(range(3, 20))


def test_an_error_in_the_background_comes_where_the_item_would() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("a bad batch")

    items = ahead(source())
    assert next(items) == 1
    with pytest.raises(ValueError, match="a bad batch"):
        next(items)


def test_no_thread_is_left_behind_when_the_consumer_stops() -> None:
    items = ahead(iter(range(100)))
    next(items)
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
