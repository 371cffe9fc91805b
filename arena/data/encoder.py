"""What turns rows into examples: one sequence of token ids for each order of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        input_ids: int32, shape (n_tokens,), at most `max_length`.
        turns_dropped: turns of a conversation that were omitted.
        tokens_cut: tokens of its texts that were omitted, including those of dropped turns.
    """

    input_ids: np.ndarray
    turns_dropped: int
    tokens_cut: int


@dataclass(frozen=True)
class TokenTargets:
    """Which tokens of n examples are to be predicted, for a `TokenTask`.

    Attributes:
        places: int32 (m,), the positions in each example from which its next token is predicted, in ascending order.
        offsets: int32 (n + 1,), where the places of each example begin, and the end.
        cut: int32 (n,), tokens that were to be predicted but did not fit into the example.
    """

    places: np.ndarray
    offsets: np.ndarray
    cut: np.ndarray

    @classmethod
    def of(cls, places: Sequence[np.ndarray], cut: Sequence[int]) -> TokenTargets:
        """Lays out the int32 places of each example."""
        offsets = np.cumsum([0, *map(len, places)], dtype=np.int32)
        flat = np.concatenate([np.zeros(0, dtype=np.int32), *places])
        return cls(flat, offsets, np.array(cut, dtype=np.int32))


@dataclass(frozen=True)
class Encoded:
    """Examples laid end to end.

    Attributes:
        input_ids: int32 (tokens of all examples,).
        offsets: int32 (n + 1,), the beginning of each example, and the end.
        turns_dropped: int32 (n,), as in `Example`.
        tokens_cut: int32 (n,), as in `Example`.
        targets: of a `TokenTask`; None for a task with classes.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    turns_dropped: np.ndarray
    tokens_cut: np.ndarray
    targets: TokenTargets | None = None

    @classmethod
    def of(
        cls, examples: Sequence[Sequence[np.ndarray]], dropped: Sequence[int], cut: Sequence[int],
        targets: TokenTargets | None = None,
    ) -> Encoded:  # fmt: skip
        """Lays out examples that are given as pieces, int32 arrays of token ids."""
        offsets = np.cumsum([0, *(sum(map(len, pieces)) for pieces in examples)], dtype=np.int32)
        flat = np.concatenate([np.zeros(0, dtype=np.int32), *(piece for pieces in examples for piece in pieces)])
        return cls(flat, offsets, np.array(dropped, dtype=np.int32), np.array(cut, dtype=np.int32), targets)

    def examples(self) -> Iterator[Example]:
        """The examples in order; their `input_ids` are views."""
        counts = zip(self.turns_dropped.tolist(), self.tokens_cut.tolist(), strict=True)
        for (start, end), (dropped, cut) in zip(pairwise(self.offsets.tolist()), counts, strict=True):
            yield Example(self.input_ids[start:end], dropped, cut)


class Encoder(ABC):
    """Turns rows into examples, for one tokenizer and the settings of a recipe's prompt.

    Attributes:
        constant_ids: token ids of the texts around a row's own, by which cached tokens are told apart.
    """

    constant_ids: list[list[int]]

    @abstractmethod
    def tokenise(self, rows: Mapping[str, Sequence[Any]]) -> list[Any]:
        """The token ids of each row's texts, given the columns `Task.texts`, in any form that `lay_out` takes."""

    @abstractmethod
    def lay_out(self, rows: Sequence[Any], *, orders: int) -> Encoded:
        """The examples of tokenised rows, each in the first `orders` of its orders, one after another."""

    def parts(self) -> dict[str, Any] | None:
        """What a prompt consists of besides texts, for `arena/inference/exported.py`; None if that does not fit."""
        return None

    def encode(self, rows: Mapping[str, Sequence[Any]], *, orders: int = 1) -> Iterator[Example]:
        """The examples of a batch of rows; those of one row are adjacent."""
        yield from self.lay_out(self.tokenise(rows), orders=orders).examples()


class TokenEncoder(Encoder):
    """An encoder of a `TokenTask`.

    Attributes:
        end_ids: tokens that end what is predicted.
    """

    end_ids: tuple[int, ...]

    @abstractmethod
    def prompts(self, rows: Sequence[Any]) -> list[np.ndarray]:
        """The int32 token ids that a model continues with its answer, for each tokenised row."""
