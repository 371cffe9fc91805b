"""`log.jsonl`: one line for each step and each evaluation, cut back to the checkpoint from which a run resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from arena.storage.files import write_text

EVALUATION = "eval_log_loss"  # the key that distinguishes an evaluation's line from a step's
LINE = ("step", EVALUATION, "eval_rows", "best")  # the keys of an evaluation's line, in this order


class RunLog:
    """The log of a run, which only the first rank writes.

    Attributes:
        evaluations: the held-out log-loss of each evaluation, by step; known after `cut`.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.evaluations: dict[int, float] = {}

    def cut(self, step: int) -> None:
        """Drops the lines after a step, which will be written again, and an incomplete line."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        lines = [line for line in lines if _step_of(line) <= step]
        if self.writes:
            write_text(self.path, "".join(line + "\n" for line in lines))
        self.evaluations = {facts["step"]: facts[EVALUATION] for facts in map(json.loads, lines) if EVALUATION in facts}

    def add(self, facts: dict[str, Any]) -> None:
        if EVALUATION in facts:
            self.evaluations[facts["step"]] = facts[EVALUATION]
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")


def _step_of(line: str) -> float:
    """The step of a line; infinity for an incomplete line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
