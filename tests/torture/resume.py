"""Resume against uninterrupted: cut in a step, between steps, in an evaluation, and while the fold is judged."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import arena.training.run
from arena.stopping import Stop
from arena.training.trainer import Trainer
from tests.torture.ground import Found, Ground, checkpoints_of, command, fold_of, log
from tests.torture.processes import Child

WHERE = {"accumulate": "in a step", "_after_step": "after a step", "_compute": "in an evaluation"}


class Asked(Stop):
    """Asks for the end at the nth time it is called, and notes in a file who called."""

    def __init__(self, at: int | None, notes: Path) -> None:
        super().__init__()
        self.at, self.calls, self.notes = at, 0, notes

    def __call__(self) -> bool:
        self.calls += 1
        with self.notes.open("a") as file:
            file.write(sys._getframe(1).f_code.co_name + "\n")
        if self.calls == self.at:
            self.signal = signal.SIGTERM
        return self.signal is not None


def cut(ground: Ground, place: Path, at: int | None) -> int:
    """Trains in `place` until the `at`-th question whether to end; the exit status. Notes the order of examples."""

    def work(announce: object) -> None:
        @contextmanager
        def stopping(seconds: float | None = None) -> Iterator[Stop]:
            yield Asked(at, place / "calls.txt")

        take = Trainer._step

        def noted(self: Any, batch: Any, start: float) -> Any:
            facts = take(self, batch, start)
            with (place / "order.jsonl").open("a") as file:
                file.write(json.dumps([facts["step"], [each.index.tolist() for each in batch]]) + "\n")
            return facts

        arena.training.run.stopping = stopping
        Trainer._step = noted  # type: ignore[method-assign]
        command(ground.train(place / "runs"))

    return Child(work, place / "shown.txt").wait()


def points(calls: list[str]) -> dict[int, str]:
    """Five moments of a run, by the number of the question, from all parts of it."""
    steps = [at for at, name in enumerate(calls, 1) if name == "accumulate"]
    after = [at for at, name in enumerate(calls, 1) if name == "_after_step"]
    judged = [at for at, name in enumerate(calls, 1) if name == "_compute"]
    first = [at for at in judged if at < after[-1] and at < steps[-1]]
    chosen = (steps[len(steps) // 4], after[1], first[len(first) // 2], steps[-1], judged[-2])
    return {at: WHERE[calls[at - 1]] for at in chosen}


def distance(a: Path, b: Path) -> float:
    """Largest difference of the last checkpoints' weights and optimizer states."""
    largest = 0.0
    for name in ("weights.safetensors", "optimizer.safetensors"):
        one, other = (load_file(checkpoints_of(runs).step(checkpoints_of(runs).steps()[-1]) / name) for runs in (a, b))
        assert one.keys() == other.keys()
        largest = max(
            largest, *(float(np.abs(one[key].astype(float) - other[key]).max()) for key in one if one[key].size)
        )
    return largest


def same_resume(ground: Ground) -> Found:
    found = Found("resume against uninterrupted, cut at 5 points", "largest weight difference 0, same order, same log")
    straight = ground.place("resume/straight")
    assert cut(ground, straight, None) == 0, (straight / "shown.txt").read_text()
    order = (straight / "order.jsonl").read_text()
    largest, where = 0.0, []
    for at, name in points((straight / "calls.txt").read_text().split()).items():
        place = ground.place(f"resume/at{at}")
        status = cut(ground, place, at)
        again = cut(ground, place, None)
        if (status, again) != (143, 0):
            found.count(f"{name}, question {at}: exit status {status}, then {again}")
            continue
        apart = distance(place / "runs", straight / "runs")
        largest, where = max(largest, apart), [*where, name]
        same = {
            "weights": apart == 0.0,
            "order": (place / "order.jsonl").read_text() == order,
            "log": log(place / "runs") == log(straight / "runs"),
            "oof.csv": _oof(place) == _oof(straight),
        }
        odd = [what for what, equal in same.items() if not equal]
        found.count(f"{name}, question {at}: another {', '.join(odd)}" if odd else None)
    counts = ", ".join(f"{where.count(name)} {name}" for name in WHERE.values())
    found.note = f"largest difference {largest:g}; oof.csv equal to the byte; cut {counts}"
    return found


def _oof(place: Path) -> bytes:
    return (fold_of(place / "runs") / "oof.csv").read_bytes()
