"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass

RUN_FILES = ("log.jsonl", "recipe.yaml", "run.json")  # that go to a mirror with each checkpoint


@dataclass
class Done:
    """How far a run is; kept in every checkpoint."""

    step: int = 0
    tokens: int = 0
    unique_tokens: int = 0
    micro_batches: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of these seconds, for data
