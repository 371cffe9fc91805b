"""A step that could not be taken: which, and what was in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arena.files import write_json

SHOWN = 10


def note_failure(folder: Path, step: int, loss: float, norm: float, ids: Sequence[str]) -> None:
    """Writes `failure.json` into a run's folder: the step, its loss and gradient norm, and the ids of its examples."""
    write_json(
        folder / "failure.json", {"step": step, "loss": str(loss), "grad_norm": str(norm), "ids": list(ids)}
    )  # fmt: skip


def describe_failure(folder: Path, step: int, loss: float, norm: float, ids: Sequence[str]) -> str:
    """What to tell of it."""
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return (
        f"step {step}: loss {loss}, gradient norm {norm}; the step was not taken, the run is saved as it was before "
        f"it. Rows of the step: {', '.join(ids[:SHOWN])}{more} ({folder / 'failure.json'}); look at these, or train "
        "anew with a lower learning rate (--fresh)"
    )
