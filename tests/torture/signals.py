"""SIGTERM, SIGINT and SIGHUP to real processes while they train, save, evaluate and infer; and a second signal."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arena.inference.evaluate
import arena.training.run
import arena.training.saving
import arena.training.trainer
from arena.storage.manifest import damage
from tests.torture.ground import (
    Found,
    Ground,
    checkpoints_of,
    command,
    differs,
    done,
    start,
    steps_logged,
    steps_saved,
)
from tests.torture.processes import Announce, Child

PAUSE = 0.03  # seconds more for every forward, so that a signal meets it
LIMIT = 30.0  # seconds from the signal to the end
SOON = 5.0  # the same for a second one
# what is called when each of these begins, and how often in a whole run
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "training": (arena.training.trainer, "accumulate", 5),
    "saving": (arena.training.saving, "save_checkpoint", 5),
    "evaluating": (arena.inference.evaluate.Evaluation, "probabilities", 2),
    "inferring": (arena.inference.evaluate.Evaluation, "probabilities", 1),
    "finishing": (arena.training.run, "save_judge", 1),
}
WORKS = ("training", "saving", "evaluating", "inferring")


def begun(ground: Ground, place: Path, doing: str, nth: int, held: Path | None = None) -> Child:
    """A real `arena train` or `arena infer` that tells when it begins its nth such work.

    Args:
        held: it then waits until this file is there.
    """

    def work(announce: Announce) -> None:
        owner, name, _ = MOMENTS[doing]
        plain, calls = getattr(owner, name), 0

        def told(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                announce("now")
                if held is not None:
                    until(held.exists)
            if doing == "saving":
                time.sleep(PAUSE)
            return plain(*args, **kwargs)

        setattr(owner, name, told)
        command(_arguments(ground, place, doing), pause=PAUSE)

    return Child(work, place / "shown.txt")


def _arguments(ground: Ground, place: Path, doing: str) -> list[str]:
    return ground.infer(place / "submission.csv") if doing == "inferring" else ground.train(place / "runs")


def ends_well(ground: Ground) -> Found:
    found = Found(
        "SIGTERM, SIGINT, SIGHUP while training, saving, evaluating, inferring", "saved and gone within 30 s, 20 of 20"
    )
    draws, slowest, places = random.Random(0), 0.0, []
    for turn in range(ground.times(20, 4)):
        doing = WORKS[turn % len(WORKS)]
        number = signal.SIGINT if turn // len(WORKS) == 2 else signal.SIGTERM
        place = ground.place(f"signals/{turn}")
        child = begun(ground, place, doing, draws.randint(1, MOMENTS[doing][2]))
        seconds = _signalled(child, draws, number)
        slowest = max(slowest, seconds)
        why = _ended(ground, place, child, doing, 128 + number, seconds)
        places.append(doing)
        found.count(why and f"{doing}, {number.name}: {why}")
    fresh = ((signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGHUP, True), (signal.SIGINT, False))
    fresh = fresh[: ground.times(len(fresh), 0)]
    for number, is_read in fresh:
        why, seconds = _started_anew(ground, number, is_read)
        slowest = max(slowest, seconds)
        found.count(why and f"started anew, {number.name}, {'' if is_read else 'no '}reader: {why}")
    found.note = f"slowest {slowest:.1f} s; " + ", ".join(f"{places.count(each)} {each}" for each in WORKS)
    found.note += f", {len(fresh)} in an interpreter of its own, the last into a pipe that nobody reads"
    found.note += "; the same command then ended as the undisturbed one"
    return found


def _started_anew(ground: Ground, number: signal.Signals, is_read: bool) -> tuple[str | None, float]:
    """As the others, but in an interpreter that was started for it; and the seconds from the signal to the end.

    Args:
        is_read: whether anybody reads what it prints; otherwise it writes into a pipe whose reader is gone.
    """
    place = ground.place(f"signals/{number.name}-{is_read}")
    command = [sys.executable, "-W", "ignore", "-m", "arena.cli", *ground.train(place / "runs")]

    def work(announce: Announce) -> None:
        if not is_read:
            read, write = os.pipe()
            os.dup2(write, 1)
            os.dup2(write, 2)
            os.close(read)
        os.execv(sys.executable, command)

    child = Child(work, place / "shown.txt")
    until(lambda: steps_logged(place / "runs") > 0, 120)
    begin = time.monotonic()
    child.send(number)
    child.wait()
    seconds = time.monotonic() - begin
    if "Traceback" in child.text():
        return f"a traceback: {child.text()[-1500:]}", seconds
    return _ended(ground, place, child, "training", 128 + number, seconds), seconds


def _signalled(child: Child, draws: random.Random, number: signal.Signals) -> float:
    """Signals a process once it is at the work; seconds till it has ended."""
    assert child.hear() == "now", child.text()
    time.sleep(draws.uniform(0, PAUSE))
    begin = time.monotonic()
    child.send(number)
    child.wait()
    return time.monotonic() - begin


def _ended(ground: Ground, place: Path, child: Child, doing: str, status: int, seconds: float) -> str | None:
    """What is wrong with how it ended, what it left, and what the same command then makes of that."""
    if child.status != status:
        return f"exit status {child.status}, not {status}: {child.text()[-1500:]}"
    if seconds > LIMIT:
        return f"gone after {seconds:.1f} s"
    if doing == "inferring":
        if not list(place.rglob("*.part")):
            return "nothing was kept"
    elif steps_logged(place / "runs") != steps_saved(place / "runs"):
        return f"step {steps_saved(place / 'runs')} of {steps_logged(place / 'runs')} is saved"
    return same_in_the_end(ground, place, doing)


def same_in_the_end(ground: Ground, place: Path, doing: str) -> str | None:
    """Why the same command does not end with what the undisturbed one gave."""
    try:
        done(_arguments(ground, place, doing), place / "again.txt")
    except RuntimeError as error:
        return str(error)
    if doing != "inferring":
        return differs(ground, place / "runs")
    if (place / "submission.csv").read_bytes() != ground.submission:
        return "another submission"
    return None


def ends_at_once(ground: Ground) -> Found:
    found = Found("a second SIGTERM or SIGINT", "gone at once, nothing corrupt")
    draws, slowest, shown = random.Random(1), 0.0, 0
    for turn in range(ground.times(8, 2)):
        doing = WORKS[turn % len(WORKS)]
        first, second = draws.choice(((signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)))
        place = ground.place(f"second/{turn}")
        child = begun(ground, place, doing, draws.randint(1, MOMENTS[doing][2]))
        assert child.hear() == "now", child.text()
        child.send(first)
        until(lambda child=child: "stops at once" in child.text())
        begin = time.monotonic()
        child.send(second)
        child.wait()
        seconds = time.monotonic() - begin
        slowest, shown = max(slowest, seconds), shown + ("Traceback" in child.text())
        found.count(_after_two(ground, place, child, doing, seconds))
    found.note = (
        f"slowest {slowest:.1f} s; {shown} showed a traceback; the same command then ended as the undisturbed one"
    )
    return found


def _after_two(ground: Ground, place: Path, child: Child, doing: str, seconds: float) -> str | None:
    if child.status not in (-signal.SIGTERM, 130, 143):
        return f"{doing}: exit status {child.status}: {child.text()[-1500:]}"
    if seconds > SOON:
        return f"{doing}: gone after {seconds:.1f} s"
    torn = [str(path) for path in checkpoints_of(place / "runs").folder.glob("[!.]*") if damage(path)]
    if torn:
        return f"{doing}: damaged: {', '.join(torn)}"
    why = same_in_the_end(ground, place, doing)
    return why and f"{doing}: {why}"


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for something; not for ever, for a process may have ended before it."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.001)


def one_at_a_time(ground: Ground) -> Found:
    found = Found("two processes in one place", "the second is told so, the first is unharmed")
    for turn in range(ground.times(6, 2)):
        doing = ("training", "evaluating", "inferring")[turn % 3]
        place = ground.place(f"two/{turn}")
        first = begun(ground, place, doing, 1)
        assert first.hear() == "now", first.text()
        second = start(_arguments(ground, place, doing), place / "second.txt")
        second.wait()
        first.wait()
        why = None
        told = f"process {first.pid} is using" in second.text() and "Traceback" not in second.text()
        if second.status != 2 or not told:
            why = f"the second ended with {second.status}: {second.text()[-500:]}"
        elif first.status != 0:
            why = f"the first ended with {first.status}: {first.text()[-1500:]}"
        why = why or same_in_the_end(ground, place, doing)
        found.count(why and f"{doing}: {why}")
    found.note = "exit status 2, the first's process id named; the first ended as the undisturbed one"
    return found
