"""A blend of several predictions of the same rows, and its file.

A logarithmic pool (Genest and Zidek, 1986) is the weighted product of the members' probabilities. Its weights need not
sum to 1: their sum is the inverse temperature. A linear pool is their weighted mean, raised to the power `sharpness`.
The probability of each class is then multiplied by e to the power of its bias, and of that of a special row's kind, and
each row is normalised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import softmax

from arena.metrics import SMALLEST
from arena.storage.files import write_json

FORMAT = 1

Pool = Literal["log", "linear"]


@dataclass(frozen=True)
class Blend:
    """How several predictions become one.

    Attributes:
        weights: of the members, at least 0; of a linear pool with sum 1.
        sharpness: the inverse temperature of a linear pool; 1 for a logarithmic one, whose weights hold it.
        bias: of each class, with mean 0.
        kinds: by the name of a kind of special rows, the further bias of each class.
    """

    pool: Pool
    weights: tuple[float, ...]
    sharpness: float
    bias: tuple[float, ...]
    kinds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __call__(self, members: np.ndarray, kinds: np.ndarray | None = None) -> np.ndarray:
        """The blend, float64 (n, C), of probabilities (k, n, C).

        Args:
            kinds: str (n,), `names_of_kinds`; a blend without biases of kinds needs none.
        """
        assert kinds is not None or not self.kinds
        logs = self.sharpness * pooled_logs(self.pool, self.weights, logarithms(members)) + np.array(self.bias)
        for name, bias in self.kinds.items():
            logs[kinds == name] += bias
        return np.asarray(softmax(logs, axis=1))


@dataclass(frozen=True)
class Member:
    """What a blend is made of.

    Attributes:
        kind: `run`, a run's finished folds; `file`, predictions that somebody brings; `baseline`, the task's simple
            model, fitted on all labelled rows.
        path: of the run or the file; of the labelled rows for a baseline.
    """

    name: str
    kind: Literal["run", "file", "baseline"]
    path: str


@dataclass(frozen=True)
class SavedBlend:
    """A blend on disk.

    Attributes:
        task: the task whose classes are predicted.
        scores: what was measured when it was fitted, for people to read.
    """

    task: str
    members: tuple[Member, ...]
    blend: Blend
    scores: dict[str, Any]


def logarithms(members: np.ndarray) -> np.ndarray:
    """The logarithms of probabilities, float64; those of 0 are finite."""
    return np.asarray(np.log(np.clip(members, SMALLEST, 1.0)))


def pooled_logs(pool: Pool, weights: Sequence[float] | np.ndarray, logs: np.ndarray) -> np.ndarray:
    """The logarithms, up to a constant for each row, of pooled probabilities: float64 (n, C), of (k, n, C)."""
    if pool == "log":
        return np.asarray(np.tensordot(weights, logs, axes=1))
    return np.asarray(np.log(np.tensordot(weights, np.exp(logs), axes=1)))


def save_blend(path: Path, saved: SavedBlend) -> None:
    """Writes a blend as JSON."""
    members = [vars(member) for member in saved.members]
    write_json(
        path, {"format": FORMAT, "task": saved.task, "members": members, **vars(saved.blend), "scores": saved.scores}
    )


def is_blend(name: str) -> bool:
    """Whether a name is that of a blend's file, and not of a judge or a run."""
    return name.endswith(".json")


def read_blend(path: Path) -> SavedBlend:
    """A blend from its file. Raises `ValueError` if that is missing, damaged, or no blend."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.get("format") != FORMAT:
            raise ValueError(f"its format is {facts.get('format')}, and this version of arena reads {FORMAT}")
        members = tuple(Member(**member) for member in facts["members"])
        blend = Blend(
            facts["pool"], tuple(facts["weights"]), float(facts["sharpness"]), tuple(facts["bias"]),
            {str(name): tuple(map(float, bias)) for name, bias in facts.get("kinds", {}).items()},  # earlier: none
        )  # fmt: skip
        if blend.pool not in ("log", "linear") or len(blend.weights) != len(members):
            raise ValueError("its members and weights do not fit together")
        return SavedBlend(str(facts["task"]), members, blend, dict(facts["scores"]))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}: fit a blend with `arena blend`") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a blend ({type(error).__name__}: {error}): fit it with `arena blend`"
        ) from None
