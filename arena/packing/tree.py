"""What examples have in common at their beginnings: found from their token ids, laid out as segments of a prefix tree.

Sorted by their tokens, examples that begin alike stand side by side, and what two of them share is the least that any
neighbours between them share. So an order and one number a neighbour describe every common beginning of a data set.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from arena.config import PackingSettings
from arena.data.tokens import TokenStore
from arena.files import atomic_write
from arena.progress import progress

# Tokens that two examples must share beyond what they already do for a segment of its own to pay: a segment less is a
# partly filled block of queries less in the attention kernels, which work in blocks of 64 or 128.
LEAST_SHARED = 32

FORMAT = 1  # part of the stored file's name
BLOCK, MOST_AT_ONCE = 64, 256  # tokens compared at once when sorting, at first and at most


@dataclass(frozen=True)
class Prefixes:
    """The common beginnings of n examples.

    Attributes:
        rank: int64 (n,), the place of each example in an order by tokens: any that keeps equal beginnings together.
        shared: int32 (levels, n); `shared[0, r]` tokens are common to the examples of ranks r - 1 and r, and
            `shared[j, r]` is the least of the 2^j numbers from r on (a sparse table for minima of ranges).
    """

    rank: np.ndarray
    shared: np.ndarray

    def between(self, ranks: np.ndarray) -> np.ndarray:
        """int64 like `ranks`, which do not fall: the tokens that each example shares with the one before; 0 first.

        The same rank twice is the same example twice, which shares all: the number is then larger than any length.
        """
        common = np.zeros(len(ranks), dtype=np.int64)
        first, last = ranks[:-1] + 1, ranks[1:] + 1  # the least of [first, last)
        level = np.frexp(np.maximum(last - first, 1))[1] - 1
        within = np.minimum(
            self.shared[level, np.minimum(first, len(self.rank) - 1)], self.shared[level, last - 2**level]
        )
        common[1:] = np.where(last > first, within, np.iinfo(np.int32).max)
        return common


@dataclass(frozen=True)
class Tree:
    """Segments of m examples that stand in the order of their tokens; a segment's ancestors come before it.

    Attributes:
        example: (s,) the example, 0 to m - 1, whose tokens a segment shows.
        start, end: (s,) the tokens of that example which the segment shows: [start, end).
        parent: (s,) the segment that ends where this one starts; -1 where it starts at 0.
        ends_in: (m,) the segment that each example ends in.
    """

    example: list[int]
    start: list[int]
    end: list[int]
    parent: list[int]
    ends_in: list[int]

    @property
    def tokens(self) -> int:
        """Tokens of all segments: what a model has to compute."""
        return sum(self.end) - sum(self.start)


def grow_tree(lengths: Sequence[int], shared: Sequence[int], least: int = LEAST_SHARED) -> Tree:
    """The prefix tree of examples that stand in the order of their tokens.

    Args:
        lengths: tokens of each example.
        shared: tokens that each has in common with the one before; the first number is not looked at.
        least: a segment is shared when it has at least this many tokens.
    """
    tree = Tree([], [], [], [], [-1] * len(lengths))
    waiting: list[Branch] = [(range(len(lengths)), 0, -1)] if len(lengths) else []
    while waiting:
        waiting += reversed(_branch(tree, lengths, shared, least, *waiting.pop()))
    return tree


Branch = tuple[range, int, int]  # examples that have their first tokens in common, how many, and the segment they end


def _branch(
    tree: Tree, lengths: Sequence[int], shared: Sequence[int], least: int, members: range, depth: int, parent: int
) -> list[Branch]:
    """Adds the segments of `members` that begin at `depth`, below `parent`; gives the branches that go on."""
    further: list[Branch] = []
    cuts = [at for at in members[1:] if shared[at] < depth + least]
    for first, last in pairwise([members.start, *cuts, members.stop]):
        alone = last - first == 1
        end = lengths[first] if alone else min(min(shared[first + 1 : last]), lengths[first])
        node = parent
        if end > depth:
            node = len(tree.parent)
            tree.example.append(first)
            tree.start.append(depth)
            tree.end.append(end)
            tree.parent.append(parent)
        if alone:
            tree.ends_in[first] = node
        elif end > depth:
            further.append((range(first, last), end, node))
        else:  # equal to the last token, all of them: they end where they are
            tree.ends_in[first:last] = [node] * (last - first)
    return further


def find_prefixes(
    examples: Sequence[np.ndarray] | TokenStore, advance: Callable[[int], None] | None = None
) -> Prefixes:
    """Sorts examples by their tokens and compares neighbours.

    Groups that are equal so far are sorted by a block of tokens at a time, so that memory stays linear in the number
    of examples, whatever their length.

    Args:
        examples: int32 arrays of token ids.
        advance: is told of each number of examples that have found their place.
    """
    n = len(examples)
    order, shared = np.arange(n), np.zeros(n, dtype=np.int32)
    groups = [(0, n, 0, BLOCK)]
    while groups:
        first, last, depth, block = groups.pop()
        keys = [examples[at][depth : depth + block].tobytes() for at in order[first:last].tolist()]
        by_key = sorted(range(last - first), key=keys.__getitem__)
        order[first:last] = order[first:last][by_key]
        keys = [keys[at] for at in by_key]
        shared[first + 1 : last] = [depth + _common(*pair) for pair in pairwise(keys)]
        same = _runs(keys, block)
        groups += [(first + a, first + b, depth + block, min(2 * block, MOST_AT_ONCE)) for a, b in same]
        if advance is not None:
            advance((last - first) - sum(b - a for a, b in same))
    rank = np.empty(n, dtype=np.int64)
    rank[order] = np.arange(n)
    return Prefixes(rank, _minima(shared))


def prefixes_for(store: TokenStore, settings: PackingSettings, cache: Path) -> Prefixes | None:
    """The common beginnings of a store's examples, kept in `cache` under its fingerprint; None if not to be shared."""
    if not settings.share:
        return None
    path = cache / f"prefixes-{store.fingerprint}-{FORMAT}.npz"
    if not path.is_file():
        with progress("finding common beginnings", len(store), "examples") as advance:
            found = find_prefixes(store, advance)
        with atomic_write(path) as draft, draft.open("wb") as file:
            np.savez(file, rank=found.rank, shared=found.shared[0])
    try:
        with np.load(path) as kept:
            rank, shared = kept["rank"], kept["shared"]
        if len(rank) != len(store) or len(shared) != len(store):
            raise ValueError(f"it is of {len(rank):,} examples, not {len(store):,}")
    except (ValueError, KeyError, EOFError, OSError, BadZipFile, zlib.error, NotImplementedError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to have it made again") from error
    return Prefixes(rank, _minima(shared))


def _common(a: bytes, b: bytes) -> int:
    """Tokens (int32) at the beginning that both have."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // 4
    return int((np.frombuffer(a, np.int32, size // 4) != np.frombuffer(b, np.int32, size // 4)).argmax())


def _runs(keys: list[bytes], block: int) -> list[tuple[int, int]]:
    """Ranges of two or more equal keys that fill the block: they may differ later on."""
    ends = [0, *(at for at in range(1, len(keys)) if keys[at] != keys[at - 1]), len(keys)]
    return [(a, b) for a, b in pairwise(ends) if b - a > 1 and len(keys[a]) == 4 * block]


def _minima(shared: np.ndarray) -> np.ndarray:
    """The sparse table of `Prefixes.shared`."""
    n = len(shared)
    table = np.zeros((max(1, n.bit_length()), n), dtype=np.int32)
    table[0] = shared
    for level in range(1, len(table)):
        half = 2 ** (level - 1)
        table[level] = table[level - 1]
        table[level, : n - half] = np.minimum(table[level - 1, : n - half], table[level - 1, half:])
    return table
