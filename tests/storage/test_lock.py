"""One process at a time, and no lock outlives its process."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from arena.storage.lock import locked

HOLD = "import sys, time, pathlib, arena.storage.lock as lock\nwith lock.locked(pathlib.Path(sys.argv[1])):\n"
HOLD += "    print('held', flush=True)\n    time.sleep(60)"


@contextmanager
def holder(target: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_process_that_holds_it_is_named_and_one_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "fold0"
    with holder(target) as process:
        with pytest.raises(ValueError, match=rf"process {process.pid} is using .*fold0"), locked(target):
            pass
        with locked(tmp_path / "deep" / "fold1"):  # control: another target is free
            pass
        process.kill()
        process.wait()
        assert (target.parent / ".fold0.lock").is_file()  # what the killed one left behind
        with locked(target):
            pass
    assert list(target.parent.iterdir()) == []


def test_waiting_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path / "x") as process:
        threading.Timer(0.5, process.kill).start()
        with pytest.raises(ValueError, match="is using"), locked(tmp_path / "x"):  # control: it is held
            pass
        with locked(tmp_path / "x", wait=True):
            assert process.wait() != 0


def test_folders_made_for_it_go_with_it_unless_something_was_put_there(tmp_path: Path) -> None:
    with locked(tmp_path / "runs" / "demo" / "fold0"):
        assert (tmp_path / "runs" / "demo").is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "runs" / "demo" / "fold0"), locked(tmp_path / "empty" / "x"):
        (tmp_path / "runs" / "precious").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "precious", "runs"]


def test_the_lock_is_released_if_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "x"):
        raise RuntimeError
    with locked(tmp_path / "x"), pytest.raises(ValueError, match=f"process {os.getpid()} "), locked(tmp_path / "x"):
        pass


def test_the_target_may_be_moved_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "fold0").mkdir()
    with locked(tmp_path / "fold0"):
        (tmp_path / "fold0").rename(tmp_path / "earlier")
        (tmp_path / "fold0").mkdir()
        with pytest.raises(ValueError, match="is using"), locked(tmp_path / "fold0"):
            pass


def most_at_once(target: Path, way: object) -> int:
    """How many of eight threads were ever inside at the same time."""
    inside, most, end = [], [0], time.monotonic() + 1.0

    def work() -> None:
        while time.monotonic() < end:
            try:
                with way(target):  # type: ignore[operator]
                    inside.append(1)
                    most[0] = max(most[0], len(inside))
                    time.sleep(0.0005)
                    inside.pop()
            except ValueError:
                continue

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most[0]


def test_never_two_at_once_though_its_file_comes_and_goes(tmp_path: Path) -> None:
    assert most_at_once(tmp_path / "x", locked) == 1
    assert most_at_once(tmp_path / "comes" / "and" / "goes", locked) == 1
    assert most_at_once(tmp_path / "x", lambda target: nullcontext()) > 1  # control


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_its_file_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with locked(tmp_path / "x"):
            assert (tmp_path / ".x.lock").stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        os.umask(before)


def test_an_unwritable_place_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written to"), locked(tmp_path / "file" / "x"):
        pass

    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match=r"cannot be written to \(Permission denied\)"), locked(tmp_path / "x"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_reported_and_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "x"):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
