"""What the benchmark reads: examples with the lengths of real ones and random tokens.

All begin with the same instruction and end with the same suffix, as a judge's prompts do; between them stand a heading
and the prompt, a heading and answer A, a heading and answer B. Order 1 is order 0 with the answers exchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from arena.data.tokens import TokenStore, open_tokens
from arena.data.truncation import even_cap

# tokens of the template `judge` under Gemma-2's tokenizer, the separator counted with the headings
INSTRUCTION, HEADINGS, SUFFIX = 220, (5, 6, 6), 22
AROUND = INSTRUCTION + sum(HEADINGS) + SUFFIX
FIRST_ID = 10  # ids below are control tokens: padding among them

LENGTHS = Path(__file__).parent / "lengths_autoj.csv"  # lengths only, no text
MEDIAN, COMPETITION_MEAN = 897.0, 1250.0  # of the competition's prompts, those cut at LONGEST included
LONGEST = 4096


@dataclass(frozen=True)
class Workload:
    """Examples to measure with.

    Attributes:
        store: both orders of each conversation.
        labels: float32 (2 * rows, 3), random probabilities for each example.
    """

    name: str
    store: TokenStore
    labels: np.ndarray

    def examples(self, order: int) -> np.ndarray:
        """int64 (rows,), the examples of one order."""
        return np.arange(order, len(self.store), 2)


def make_workload(name: str, fields: np.ndarray, folder: Path, *, vocabulary: int, longest: int, seed: int) -> Workload:
    """Writes random examples of these lengths to a file in `folder` and opens it.

    Args:
        fields: int64 (rows, 3), tokens of prompt, answer A and answer B; cut evenly where an example is too long.

    Raises:
        ValueError: `longest` cannot hold the instruction and a token of each field.
    """
    if longest < AROUND + 3:
        raise ValueError(f"examples take {AROUND + 3} tokens at least, not {longest}")
    rng = np.random.default_rng([seed, len(fields)])

    def ids(count: int) -> np.ndarray:
        return rng.integers(FIRST_ID, vocabulary, count).astype(np.int32)

    instruction, suffix = ids(INSTRUCTION), ids(SUFFIX)
    headings = [ids(count) for count in HEADINGS]
    examples = []
    for lengths in fields.tolist():
        cap = even_cap(lengths, longest - AROUND)
        prompt, a, b = (ids(min(length, cap)) for length in lengths)
        for first, second in ((a, b), (b, a)):
            parts = zip(headings, (prompt, first, second), strict=True)
            examples.append(np.concatenate([instruction, *(part for pair in parts for part in pair), suffix]))
    return workload_of(name, examples, folder, rng)


def workload_of(name: str, examples: list[np.ndarray], folder: Path, seed: int | np.random.Generator) -> Workload:
    """Writes examples, both orders of each row in turn, to a file in `folder` and opens it; labels are random."""
    labels = np.random.default_rng(seed).dirichlet([1.0, 1.0, 1.0], len(examples)).astype(np.float32)
    return Workload(name, _store(examples, folder / f"{name}.arrow"), labels)


def field_lengths(name: str, rows: int, seed: int) -> np.ndarray:
    """int64 (rows, 3), tokens of prompt, answer A and answer B.

    Raises:
        ValueError: no such workload, or more rows than there are lengths.
    """
    rng = np.random.default_rng(seed)
    if name == "competition":
        inner = competition_lengths(rows, seed) - AROUND - 3
        shares = rng.dirichlet([1.0, 2.0, 2.0], rows)
        return np.asarray(1 + shares * inner[:, None], dtype=np.int64)
    if name != "autoj":
        raise ValueError(f"there is no workload {name!r}: name autoj or competition")
    known: np.ndarray = np.loadtxt(LENGTHS, delimiter=",", skiprows=2, dtype=np.int64)
    if rows > len(known):
        raise ValueError(f"{LENGTHS.name} has the lengths of {len(known)} rows, not of {rows}")
    return np.asarray(known[rng.permutation(len(known))[:rows]])


def competition_lengths(count: int, seed: int) -> np.ndarray:
    """int64 (count,), lognormal lengths of examples with the competition's median and mean, cut at `LONGEST`."""
    drawn = np.random.default_rng(seed).lognormal(math.log(MEDIAN), _sigma(), count)
    return np.asarray(np.clip(np.rint(drawn), AROUND + 3, LONGEST), dtype=np.int64)


def _sigma() -> float:
    """The spread with which a lognormal of this median, cut at `LONGEST`, has this mean; found by bisection."""
    low, high = 0.1, 2.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _cut_mean(middle) < COMPETITION_MEAN else (low, middle)
    return low


def _cut_mean(sigma: float) -> float:
    mu, edge = math.log(MEDIAN), math.log(LONGEST)
    below = math.exp(mu + sigma**2 / 2) * _normal((edge - mu - sigma**2) / sigma)
    return below + LONGEST * _normal((mu - edge) / sigma)


def _normal(z: float) -> float:
    """The share of a normal distribution below z."""
    return (1 + math.erf(z / math.sqrt(2))) / 2


def _store(examples: list[np.ndarray], path: Path) -> TokenStore:
    """A token file of these examples, both orders in turn, as `arena.data.tokens` lays them out."""
    none = pa.array([0] * len(examples), pa.int32())
    columns = {"input_ids": pa.array(examples, pa.list_(pa.int32())), "turns_dropped": none, "tokens_cut": none}
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return open_tokens(path, orders=2)
