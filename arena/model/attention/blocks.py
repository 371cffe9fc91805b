"""The parts of blockwise attention: the queries and keys of a block, its scores, and reusable memory for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of one key head in one block: queries times the group of heads. Few, because half of the diagonal's square is
# wasted; more in bfloat16, whose products are cheaper and need longer rows, and where each block's sum is converted.
ROWS, ROWS_BFLOAT16 = 192, 512
BLOCK_SCORES = 1 << 21  # most scores in one block of all key heads: with many keys a block has fewer rows
FEW_SCORES = 1 << 18  # a segment with no more scores is one block, because blocks would cost more than they save
# Most scores of segments that are computed together, all heads, and most numbers of their keys, which are copied: more
# would not be in the caches, and computing them together gains nothing.
TOGETHER_SCORES, TOGETHER_KEYS = 1 << 20, 1 << 18
MIN_ROWS = 64  # least rows, because smaller matrix products are slow

LOG2_E = math.log2(math.e)


class Segments(NamedTuple):
    """Segments of one shape that follow each other and are computed together.

    Attributes:
        queries, keys: their positions in the packed row.
        n_q, n_k: the queries and keys of one of them.
    """

    queries: slice
    keys: slice
    n_q: int
    n_k: int


def in_groups(lengths: Iterable[tuple[int, int]], heads: int, key_size: int) -> list[Segments]:
    """All segments, grouped where neighbours have one shape and few scores, as both orders of an example do.

    Args:
        lengths: each segment's numbers of queries and keys, as they follow each other.
        heads: of the queries.
        key_size: the numbers in one token's keys, kv_heads * head_dim.
    """
    found, at_q, at_k = list[Segments](), 0, 0
    for (n_q, n_k), same in groupby(lengths):
        left = sum(1 for _ in same)
        most = max(1, min(TOGETHER_SCORES // (heads * n_q * n_k), TOGETHER_KEYS // (key_size * n_k)))
        while left:
            count = min(left, most)
            ends = at_q + count * n_q, at_k + count * n_k
            found.append(Segments(slice(at_q, ends[0]), slice(at_k, ends[1]), n_q, n_k))
            (at_q, at_k), left = ends, left - count
    return found


@dataclass(frozen=True)
class Block:
    """Rows of a segment and the keys that some of them see, both counted from the segment's start.

    `before` is the number of keys up to and including the position of the first query.
    """

    rows: slice
    keys: slice
    group: int
    before: int

    def hide(self, scores: Tensor, window: int | None, space: Space) -> None:
        """Adds minus infinity where a query must not see a key, which is only near the diagonal and the window's edge.

        Args:
            scores: (count * kv_heads, rows, keys) of this block, finite.
        """
        queries, n_k = scores.shape[1] // self.group, scores.shape[2]
        by_query = scores.unflatten(1, (queries, self.group))
        if queries > 1:
            by_query[..., n_k - queries :].add_(space.triangle("after", queries))
        if window is None:
            return
        # the queries up to this one see the block's first key; each one after it sees one key less
        last = window - self.before + self.keys.start
        if (later := queries - 1 - last) > 0:
            by_query[:, last + 1 :, :, :later].add_(space.triangle("before", later))


@dataclass(frozen=True)
class Form:
    """Turns products of queries and keys into exponents of two.

    An exponent is `slope` times the result of `levels`, up to a constant for each row.
    """

    scale: float
    softcap: float | None
    window: int | None

    @property
    def slope(self) -> float:
        return 1.0 if self.softcap is None else 2 * LOG2_E * self.softcap

    def blocks(self, n_q: int, n_k: int, kv_heads: int, group: int, most: int) -> Iterator[Block]:
        """A segment's queries in blocks of at most `most` rows, or in one block if the segment is short."""
        seen = n_k if self.window is None else min(n_k, self.window + most // group)
        rows = min(most, max(MIN_ROWS, BLOCK_SCORES // (kv_heads * seen)))
        rows = max(rows, FEW_SCORES // (kv_heads * n_k))
        step = max(1, rows // group)
        for start in range(0, n_q, step):
            stop = min(start + step, n_q)
            before = start + n_k - n_q + 1
            first = 0 if self.window is None else max(0, before - self.window)
            yield Block(slice(start * group, stop * group), slice(first, stop + n_k - n_q), group, before)

    def levels(self, rows: Tensor, keys: Tensor, space: Space) -> Tensor:
        """(n, rows, keys) from (n, rows, head_dim) and (n, keys, head_dim), n being count * kv_heads."""
        factor = self.scale * LOG2_E if self.softcap is None else 2 * self.scale / self.softcap
        scores = space.product("levels", rows, keys.transpose(1, 2), factor)
        return scores if self.softcap is None else scores.sigmoid_()

    def chain(self, grad: Tensor, levels: Tensor) -> float:
        """Turns the gradient of capped scores in place into that of products, up to the factor that it returns."""
        if self.softcap is None:
            return self.scale
        grad.mul_(levels).addcmul_(grad, levels, value=-1)
        return 4 * self.scale


class Space:
    """Memory for a block's intermediate results, reused for each block, because new memory causes page faults.

    `dtype` is that of the products' factors, and `wide` that of scores, at least float32.
    """

    def __init__(self, like: Tensor) -> None:
        self.device, self.dtype = like.device, like.dtype
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.rows = ROWS if self.dtype == self.wide else ROWS_BFLOAT16
        self.held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised and contiguous, valid until the next `take` of the same name."""
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = torch.empty(size, device=self.device, dtype=dtype)
        return self.held[name][:size].view(shape)

    def triangle(self, side: str, n: int) -> Tensor:
        """(n, 1, n): minus infinity for the keys `after` each query, or for those `before` it and its own; else zero.

        To add it costs a CPU a sixth of what `masked_fill_` takes.
        """
        if side not in self.held or len(self.held[side]) < n:
            full = torch.full((n, n), -math.inf, device=self.device, dtype=self.wide)
            self.held[side] = (full.triu_(1) if side == "after" else full.tril_())[:, None]
        return self.held[side][:n, :, :n]

    def product(self, name: str, a: Tensor, b: Tensor, factor: float) -> Tensor:
        """The batched matrix product times `factor`, in `wide`."""
        shape = (a.shape[0], a.shape[1], b.shape[2])
        out = self.take("product" if self.dtype != self.wide else name, shape, self.dtype)
        torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)
        return out if self.dtype == self.wide else self.take(name, shape, self.wide).copy_(out)

    def narrowed(self, wide: Tensor) -> Tensor:
        """A factor for the next product."""
        return wide if self.dtype == self.wide else self.take("factor", tuple(wide.shape), self.dtype).copy_(wide)
