"""Files of labelled rows of any number, with drawn text: the same rows for the same number and seed.

Texts are stretches of one long text of words that become rarer by rank, as in natural language. A tenth of the rows
have the prompt of another row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arena.demo import synthetic_text
from arena.storage.files import atomic_write
from arena.tasks.preference import COLUMNS
from benchmarks.workload import field_lengths

WORKLOADS = {"competition": "gemma-2-9b", "short": "gemma-1.1-2b-sst2"}  # and the recipe of each
SHORT_TOKENS = (4, 28)  # the fewest and the most of a short text; with the template's they are 40 at most
POOL_WORDS = 2_000_000
REPEATED = 0.1  # of the prompts
ROWS_AT_ONCE = 10_000  # in a row group
SAMPLE = 200_000  # characters from which the tokens of a text are estimated


def write_rows(path: Path, workload: str, rows: int, tokenizer: Any, seed: int = 0) -> None:
    """Writes a parquet file with as many rows of a workload, unless it is there."""
    if path.is_file():
        return
    pool = _pool(seed)
    sample = tokenizer(pool[:SAMPLE], add_special_tokens=False)["input_ids"]
    stretches = _Stretches(pool, SAMPLE / len(sample), np.random.default_rng(seed))
    groups = _preferences(rows, stretches, seed) if workload == "competition" else _sentences(rows, stretches)
    with atomic_write(path) as draft:
        first = next(groups)
        with pq.ParquetWriter(draft, first.schema, compression="zstd") as writer:
            writer.write_table(first)
            for group in groups:
                writer.write_table(group)


class _Stretches:
    """Stretches of a long text, given their tokens."""

    def __init__(self, pool: str, per_token: float, rng: np.random.Generator) -> None:
        self.pool, self.per_token, self.rng = pool, per_token, rng

    def places(self, tokens: np.ndarray) -> np.ndarray:
        """int64 (n, 2), the beginning and end of a stretch for each number of tokens."""
        sizes = np.maximum(1, np.rint(tokens * self.per_token)).astype(np.int64)
        starts = self.rng.integers(0, len(self.pool) - sizes.max(), len(sizes))
        return np.stack([starts, starts + sizes], axis=1)

    def texts(self, places: np.ndarray) -> list[str]:
        return [self.pool[start:end] for start, end in places.tolist()]


def _preferences(rows: int, stretches: _Stretches, seed: int) -> Iterator[pa.Table]:
    """The competition's columns, with its lengths."""
    fields = field_lengths("competition", rows, seed)
    rng = stretches.rng
    prompts = stretches.places(fields[:, 0])
    again = np.flatnonzero(rng.random(rows) < REPEATED)
    prompts[again] = prompts[rng.integers(0, rows, len(again))]
    winners = rng.integers(0, len(COLUMNS), rows)
    for start in range(0, rows, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        cells = [stretches.texts(prompts[part])]
        cells += [stretches.texts(stretches.places(fields[part, column])) for column in (1, 2)]
        turns = [[json.dumps([text]) for text in column] for column in cells]
        labels = np.eye(len(COLUMNS), dtype=np.int64)[winners[part]]
        yield pa.table(
            {"id": [str(number) for number in range(start, start + len(labels))]}
            | dict(zip(("prompt", "response_a", "response_b"), turns, strict=True))
            | {name: labels[:, at] for at, name in enumerate(COLUMNS)}
        )


def _sentences(rows: int, stretches: _Stretches) -> Iterator[pa.Table]:
    """SST-2's columns: a short text and a number, without ids."""
    for start in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - start)
        places = stretches.places(stretches.rng.integers(*SHORT_TOKENS, count, endpoint=True))
        yield pa.table({"sentence": stretches.texts(places), "label": stretches.rng.integers(0, 2, count)})


def _pool(seed: int) -> str:
    """A long text of the demo's words."""
    known = [synthetic_text.GOOD, synthetic_text.BAD, synthetic_text.TOPICS, synthetic_text.PROMPTS]
    words = sorted(set(re.findall("[A-Za-z]+", json.dumps(known))))
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, len(words) + 1)
    drawn = rng.choice(len(words), POOL_WORDS, p=weights / weights.sum())
    return " ".join(np.array(rng.permutation(words), dtype=object)[drawn].tolist())
