"""SIGKILL: runs that save after every step are killed again and again, most often at a touch of a file."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from pathlib import Path

from arena.storage.files import SCRATCH
from tests.torture.ground import Found, Ground, command, differs, steps_logged, steps_saved
from tests.torture.processes import Announce, Child, watch

OWN_CACHE = 3  # every so many runs prepare their rows themselves, and may be killed at that
BY_TIME = 4  # every so many kills comes at any time, the others shortly after a touch of a file
LATER = (0.0, 0.0005, 0.002, 0.005)  # seconds from that touch, at most


def run(ground: Ground, place: Path, at: int | None) -> Child:
    """A real `arena train` in `place` that tells of its `at`-th touch of a file there, and at the end how many."""

    def work(announce: Announce) -> None:
        count = watch(place, at, announce)
        try:
            command(ground.train(place / "runs", *own_cache(place)))
        finally:
            announce(f"{count()} touches")

    return Child(work, place / "shown.txt")


def own_cache(place: Path) -> tuple[str, ...]:
    """Where it prepares its rows; nothing where it finds them prepared."""
    return (f"data.cache={place / 'cache'}",) if int(place.name) % OWN_CACHE == 0 else ()


def survives_kills(ground: Ground) -> Found:
    found = Found("SIGKILL at random moments of a save-heavy run", "100 of 100 resume, at most one save interval lost")
    kills, draws = ground.times(100, 3), random.Random(0)
    touches, seconds = _undisturbed(ground)
    lost, left, chain = Counter[int](), Counter[str](), 0
    while found.tried < kills:
        place = ground.place(f"kills/{chain}")
        chain += 1
        killed, why = 0, None
        while True:
            child = run(ground, place, draws.randint(1, touches * 2 // 3))
            if found.tried + killed < kills:
                _kill(child, draws, seconds, by_time=draws.randrange(BY_TIME) == 0)
            status = child.wait()
            if status != -signal.SIGKILL:
                break
            killed += 1
            lost[steps_logged(place / "runs") - steps_saved(place / "runs")] += 1
            left["in a write"] += bool(list((place / "runs").rglob(f".*{SCRATCH}")))
        why = f"ended with {status}: {child.text()[-1500:]}" if status else differs(ground, place / "runs")
        for _ in range(killed):
            found.count(why and f"run {chain}, killed {killed} times: {why}")
        left["set aside"] += len(list((place / "runs").rglob("earlier/*")))
        for path in place.rglob(".*"):
            left[f"in `{path.relative_to(place).parts[0]}`"] += 1
    steps = ", ".join(f"{count} kills lost {step}" for step, count in sorted(lost.items()))
    if max(lost) > 1:
        found.failures.append(f"more than one step lost: {steps}")
    found.note = (
        f"{chain} runs, each killed until it came to its end; steps written to the log and not saved: {steps}; "
        f"{left.pop('in a write', 0)} kills fell into a write; {left.pop('set aside', 0)} beginnings set aside; "
        f"scratch left at the end: {', '.join(f'{count} {name}' for name, count in left.items()) or 'none'}"
    )
    return found


def infers_on(ground: Ground) -> Found:
    found = Found("SIGKILL while inferring", "goes on; the submission is complete or absent")
    kills, draws, chain, kept = ground.times(20, 2), random.Random(1), 0, 0
    while found.tried < kills:
        place = ground.place(f"infer-kills/{chain}")
        chain, killed, why = chain + 1, 0, None
        while True:
            child = infer(ground, place, draws.randint(1, 60))
            if found.tried + killed < kills and child.hear() == "now":
                time.sleep(draws.uniform(0, draws.choice(LATER)))
                child.send(signal.SIGKILL)
            status = child.wait()
            out = place / "submission.csv"
            if out.exists() and out.read_bytes() != ground.submission:
                why = "another submission"
            if status != -signal.SIGKILL:
                break
            killed += 1
            kept += bool(list(place.rglob("*.part")))
        if status or not out.exists():
            why = f"ended with {status}: {child.text()[-1500:]}"
        for _ in range(killed):
            found.count(why and f"run {chain}, killed {killed} times: {why}")
    found.note = f"{chain} runs, each killed until it came to its end; {kept} kills left logits to go on with"
    return found


def infer(ground: Ground, place: Path, at: int) -> Child:
    """A real `arena infer` that tells of its `at`-th touch of a file in `place`."""

    def work(announce: Announce) -> None:
        watch(place, at, announce)
        command(ground.infer(place / "submission.csv"))

    return Child(work, place / "shown.txt")


def _undisturbed(ground: Ground) -> tuple[int, float]:
    """Touches of files in a whole run, and its seconds."""
    start = time.monotonic()
    child = run(ground, ground.place("kills/0"), None)
    words = list(iter(child.hear, None))
    assert child.wait() == 0 and words, child.text()
    return int(words[-1].split()[0]), time.monotonic() - start


def _kill(child: Child, draws: random.Random, seconds: float, *, by_time: bool) -> None:
    """Kills it at a random time, or shortly after it says that it touches a file; it may have ended by then."""
    if by_time:
        time.sleep(draws.uniform(0, seconds))
    elif child.hear() != "now":
        return
    else:
        time.sleep(draws.uniform(0, draws.choice(LATER)))
    child.send(signal.SIGKILL)
