"""The common beginnings of examples, found from their token ids, as segments of a prefix tree.

Examples sorted by their tokens are next to those with the same beginning, and two of them share as many tokens as the
minimum over the neighbours between them. So an order and one number for each pair of neighbours describe all common
beginnings of a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path

import numpy as np

from arena.data.dataset import reading_cached
from arena.data.tokens import Lists, TokenStore
from arena.progress import progress
from arena.settings import PackingSettings
from arena.storage.files import atomic_write

# The least number of additional shared tokens that is worth a segment: every segment adds a partly filled block of
# queries in the attention kernels, which work in blocks of 64 or 128.
LEAST_SHARED = 32

FORMAT = 1  # part of the cached file's name
BLOCK, MOST_AT_ONCE = 64, 256  # tokens compared at once when sorting, initially and at most
FEW = 2**16  # examples whose tokens are held as keys at once; more are divided first
NARROW = 32  # a range of less than twice as many neighbours is looked up directly, a wider one in whole blocks of it


@dataclass(frozen=True)
class Prefixes:
    """The common beginnings of n examples.

    Attributes:
        rank: int64 (n,), the position of each example in an order by tokens that keeps equal beginnings together.
        shared: int32 (6, n); `shared[0, r]` tokens are common to the examples of ranks r - 1 and r, and `shared[j, r]`
            is the minimum of the 2^j numbers from r on (a sparse table for range minima).
        blocks: int32 (levels, n // 32), the same for the minima of whole blocks of 32 neighbours.
    """

    rank: np.ndarray
    shared: np.ndarray
    blocks: np.ndarray

    @classmethod
    def of(cls, rank: np.ndarray, shared: np.ndarray) -> Prefixes:
        """Given the tokens that each rank shares with the one before it, int32 (n,)."""
        near = _minima(shared, NARROW.bit_length())
        whole = near[-1, : len(shared) // NARROW * NARROW : NARROW]
        return cls(rank, near, _minima(whole, max(1, len(whole).bit_length())))

    def between(self, ranks: np.ndarray) -> np.ndarray:
        """int64: the tokens that each example shares with the one before it, given ascending `ranks`; 0 first.

        A repeated rank is the same example, which shares all tokens: the number is then larger than any length.
        """
        common = np.zeros(len(ranks), dtype=np.int64)
        first, last = ranks[:-1] + 1, ranks[1:] + 1  # the minimum over [first, last)
        within = _range_minimum(self.shared, first, np.minimum(last, first + 2 * NARROW - 1))
        if len(wide := np.flatnonzero(last - first >= 2 * NARROW)):  # the ends overlap the whole blocks between them
            inner = _range_minimum(self.blocks, -(-first[wide] // NARROW), last[wide] // NARROW)
            within[wide] = np.minimum(np.minimum(within[wide], self.shared[-1, last[wide] - NARROW]), inner)
        common[1:] = np.where(last > first, within, np.iinfo(np.int32).max)
        return common


@dataclass(frozen=True)
class Tree:
    """The segments of m examples in the order of their tokens; a segment's ancestors come before it.

    Attributes:
        example: (s,) an example, 0 to m - 1, that contains the segment.
        start, end: (s,) the segment is that example's tokens [start, end).
        parent: (s,) the segment that ends where this one starts; -1 if it starts at 0.
        ends_in: (m,) the segment that each example ends in.
    """

    example: list[int]
    start: list[int]
    end: list[int]
    parent: list[int]
    ends_in: list[int]

    @property
    def tokens(self) -> int:
        """The tokens of all segments, which a model has to compute."""
        return sum(self.end) - sum(self.start)


def grow_tree(lengths: Sequence[int], shared: Sequence[int], least: int = LEAST_SHARED) -> Tree:
    """The prefix tree of examples in the order of their tokens.

    Args:
        lengths: tokens of each example.
        shared: tokens that each example shares with the one before it; the first number is ignored.
        least: the least number of tokens of a shared segment.
    """
    tree = Tree([], [], [], [], [-1] * len(lengths))
    waiting: list[Branch] = [(range(len(lengths)), 0, -1)] if len(lengths) else []
    while waiting:
        waiting += reversed(_branch(tree, lengths, shared, least, *waiting.pop()))
    return tree


Branch = tuple[range, int, int]  # examples with common first tokens, the number of these, and the segment they end


def _branch(
    tree: Tree, lengths: Sequence[int], shared: Sequence[int], least: int, members: range, depth: int, parent: int
) -> list[Branch]:
    """Adds the segments of `members` that begin at `depth`, below `parent`; returns the branches that continue."""
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
        else:  # all are equal up to the last token and end here
            tree.ends_in[first:last] = [node] * (last - first)
    return further


def find_prefixes(
    examples: Sequence[np.ndarray] | TokenStore, advance: Callable[[int], None] | None = None
) -> Prefixes:
    """Sorts examples by their tokens and compares neighbours.

    Groups of examples that are equal so far are sorted by one block of tokens at a time, and large ones of a store are
    divided by two tokens first: memory is linear in the number of examples, whatever their length, and little for each.

    Args:
        examples: int32 arrays of token ids.
        advance: is called with the number of examples whose position has been found.
    """
    n = len(examples)
    order, shared = np.arange(n), np.zeros(n, dtype=np.int32)
    found: Callable[[int], None] = advance or (lambda count: None)
    waiting: list[Iterator[Group]] = [iter([(0, n, 0)])]
    while waiting:
        group = next(waiting[-1], None)
        if group is None:
            waiting.pop()
        elif group[1] - group[0] > FEW and isinstance(examples, TokenStore):
            waiting.append(_divide(examples.ids, order, shared, *group, found))
        else:
            _sort_few(examples, order, shared, *group, found)
    rank = np.empty(n, dtype=np.int64)
    rank[order] = np.arange(n)
    return Prefixes.of(rank, shared)


Group = tuple[int, int, int]  # examples [first, last) of the order have this many tokens in common


def _sort_few(
    examples: Sequence[np.ndarray] | TokenStore, order: np.ndarray, shared: np.ndarray, first: int, last: int,
    depth: int, advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Sorts a group by its tokens as bytes."""
    groups = [(first, last, depth, BLOCK)]
    while groups:
        first, last, depth, block = groups.pop()
        keys = [examples[at][depth : depth + block].tobytes() for at in order[first:last].tolist()]
        by_key = sorted(range(last - first), key=keys.__getitem__)
        order[first:last] = order[first:last][by_key]
        keys = [keys[at] for at in by_key]
        shared[first + 1 : last] = [depth + _common(*pair) for pair in pairwise(keys)]
        same = _runs(keys, block)
        groups += [(first + a, first + b, depth + block, min(2 * block, MOST_AT_ONCE)) for a, b in same]
        advance((last - first) - sum(b - a for a, b in same))


def _divide(
    ids: Lists, order: np.ndarray, shared: np.ndarray, first: int, last: int, depth: int, advance: Callable[[int], None]
) -> Iterator[Group]:
    """Sorts a large group by the next two tokens after those that all have; gives the groups that have these too."""
    members = order[first:last]  # in ascending order, as every sort is stable
    depth += _common_to_all(ids, members, depth)
    words = np.concatenate([_words(ids.window(part, depth, 2)) for part in _parts(members, FEW)])
    by_word = np.argsort(words, kind="stable")
    order[first:last], words = members[by_word], words[by_word]
    heads = words >> np.uint64(32)
    shared[first + 1 : last] = depth + ((heads[1:] == heads[:-1]) & (heads[1:] > 0))
    starts = np.flatnonzero(np.concatenate([[True], words[1:] != words[:-1]]))
    ends = np.append(starts[1:], len(words))
    # where the second token is missing, equal examples end
    further = (ends - starts > 1) & ((words[starts] & np.uint64(0xFFFFFFFF)) > 0)
    starts, ends = first + starts[further], first + ends[further]
    advance(int(last - first - (ends - starts).sum()))
    return zip(starts, ends, repeat(depth + 2), strict=False)


def _common_to_all(ids: Lists, members: np.ndarray, depth: int) -> int:
    """The number of tokens that all members have in common from `depth` on, or `MOST_AT_ONCE` if they are more."""
    common = ids.window(members[:1], depth, MOST_AT_ONCE)[0]
    common = common[: int((common >= 0).sum())]
    for part in _parts(members, 2**10):
        same = (ids.window(part, depth, len(common)) == common).all(axis=0)
        common = common[: len(same) if same.all() else int(same.argmin())]
        if not len(common):
            break
    return len(common)


def _words(tokens: np.ndarray) -> np.ndarray:
    """uint64 (n,): pairs of tokens (n, 2) as numbers in the order of their bytes; -1, which is none, comes first."""
    values = np.where(tokens >= 0, tokens.view(np.uint32).byteswap().astype(np.uint64) + 1, 0)
    return np.asarray(values[:, 0] << np.uint64(32) | values[:, 1])


def _parts(members: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (members[start : start + size] for start in range(0, len(members), size))


def prefixes_for(store: TokenStore, settings: PackingSettings, cache: Path) -> Prefixes | None:
    """The common beginnings of a store's examples, cached in `cache`; None if the settings turn sharing off."""
    if not settings.share:
        return None
    path = cache / f"prefixes-{store.fingerprint}-{FORMAT}.npz"
    if not path.is_file():
        with progress("finding common beginnings", len(store), "examples") as advance:
            prefixes = find_prefixes(store, advance)
        with atomic_write(path) as draft, draft.open("wb") as file:
            np.savez(file, rank=prefixes.rank, shared=prefixes.shared[0])
    with reading_cached(path), np.load(path) as arrays:
        rank, shared = arrays["rank"], arrays["shared"]
        if len(rank) != len(store) or len(shared) != len(store):
            raise ValueError(f"it has {len(rank):,} examples, not {len(store):,}")
    return Prefixes.of(rank, shared)


def _common(a: bytes, b: bytes) -> int:
    """The number of equal int32 tokens at the beginning of both."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // 4
    return int((np.frombuffer(a, np.int32, size // 4) != np.frombuffer(b, np.int32, size // 4)).argmax())


def _runs(keys: list[bytes], block: int) -> list[tuple[int, int]]:
    """Ranges of two or more equal keys that fill the block, whose examples may differ later."""
    ends = [0, *(at for at in range(1, len(keys)) if keys[at] != keys[at - 1]), len(keys)]
    return [(a, b) for a, b in pairwise(ends) if b - a > 1 and len(keys[a]) == 4 * block]


def _minima(shared: np.ndarray, levels: int) -> np.ndarray:
    """A sparse table: at level j the minimum of the 2^j numbers from each on."""
    n = len(shared)
    table = np.zeros((levels, n), dtype=np.int32)
    table[0] = shared
    for level in range(1, levels):
        half = 2 ** (level - 1)
        table[level] = table[level - 1]
        table[level, : max(0, n - half)] = np.minimum(table[level - 1, : max(0, n - half)], table[level - 1, half:])
    return table


def _range_minimum(table: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The minima over [first, last), from a sparse table; anything where nothing is in between."""
    level = np.frexp(np.maximum(last - first, 1))[1] - 1
    begin, end = table[level, np.minimum(first, table.shape[1] - 1)], table[level, last - 2**level]
    return np.asarray(np.minimum(begin, end))
