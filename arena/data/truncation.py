"""Truncation of long conversations: which turns and tokens to keep, decided by lengths alone, and the cut of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Lengths = tuple[int, ...]  # tokens of a turn's prompt and answers


@dataclass(frozen=True)
class Cut:
    """The part of a conversation to keep.

    Attributes:
        first_turn: index of the first turn to keep; the turns before it are omitted.
        caps: for each of these turns, the most tokens of its prompt and answers, including marks of truncation.
    """

    first_turn: int
    caps: tuple[Lengths, ...]


def least_room(fields: int, overhead: int, mark: int, turns_mark: int) -> int:
    """The fewest tokens that can show any conversation: one turn with all its fields truncated to a minimum."""
    return turns_mark + overhead + fields * _least(mark)


def choose_cut(turns: Sequence[Lengths], room: int, overhead: int, mark: int, turns_mark: int) -> Cut:
    """Chooses what to keep so that it fits in `room` tokens.

    The latest turns are kept whole as long as they fit. The turn before them is truncated if at least an eighth of it
    fits, and otherwise omitted along with all earlier turns; the last turn is always shown. In a truncated turn, the
    prompt and answers share the room evenly, and what one does not need goes to the others, A and B alike.

    Args:
        turns: lengths in tokens of each turn's fields.
        room: tokens for all turns together, at least `least_room`.
        overhead: tokens around the fields of one turn (headings, separators).
        mark: tokens of the mark of a truncated text.
        turns_mark: tokens of the mark for omitted turns.
    """
    first, left = len(turns), room
    while first > 0:
        rest = left - overhead - sum(turns[first - 1])
        if rest < (turns_mark if first > 1 else 0):
            break
        first, left = first - 1, rest
    if first == 0:
        return Cut(0, tuple(turns))
    partial = _partial(turns[first - 1], left - overhead - (turns_mark if first > 1 else 0), mark, first == len(turns))
    if partial is None:
        return Cut(first, tuple(turns[first:]))
    return Cut(first - 1, (partial, *turns[first:]))


def _partial(turn: Lengths, room: int, mark: int, must: bool) -> Lengths | None:
    """The caps of a turn's fields that fit in `room` tokens together, or None if that would show too little."""
    if not must and (room < len(turn) * _least(mark) or 8 * room < sum(turn)):
        return None
    cap = even_cap(turn, room)
    return tuple(min(length, cap) for length in turn)


def _least(mark: int) -> int:
    """Tokens of the shortest truncated field: one before the mark, one after."""
    return mark + 2


def even_cap(lengths: Sequence[int], room: int) -> int:
    """The largest cap with `sum(min(length, cap)) <= room`: what a short field does not need goes to longer ones."""
    cap, left = 0, room
    ordered = sorted(lengths)
    for done, length in enumerate(ordered):
        share = left // (len(ordered) - done)
        if length > share:
            return share
        cap, left = length, left - length
    return cap


def shorten(ids: np.ndarray, cap: int, mark: np.ndarray, is_continuation: np.ndarray) -> tuple[np.ndarray, int]:
    """The beginning (two thirds) and the end of a text around the mark, and the number of tokens omitted.

    Args:
        ids: int32 (n,), token ids of the text; returned unchanged if n <= `cap`.
        cap: the most tokens to return, including the mark.
        mark: int32 (m,), token ids of the mark.
        is_continuation: bool (vocabulary,), as from `continuation_bytes`.
    """
    if len(ids) <= cap:
        return ids, 0
    keep = cap - len(mark)
    head = min(-(-2 * keep // 3), keep - 1)
    tail = len(ids) - (keep - head)
    while head > 0 and is_continuation[ids[head]]:  # do not cut inside a character made of byte tokens
        head -= 1
    while tail < len(ids) and is_continuation[ids[tail]]:
        tail += 1
    return np.concatenate([ids[:head], mark, ids[tail:]]), tail - head


def check_room(room: int, least: int, max_length: int) -> None:
    """Checks that a template leaves enough of `max_length`.

    Args:
        room: the tokens that it leaves for texts.
        least: the tokens that they need, however they are truncated.

    Raises:
        ValueError: it does not.
    """
    if room < least:
        raise ValueError(
            f"prompt.max_length {max_length} is too small for this template, which takes at least "
            f"{max_length - room + least} tokens; raise max_length or shorten the template"
        )


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id; as ids may have gaps, this can exceed the number of tokens."""
    return int(max(tokenizer.get_vocab().values())) + 1


def continuation_bytes(tokenizer: Any) -> np.ndarray:
    """bool (vocabulary,): tokens for a continuation byte of a UTF-8 character (byte fallback)."""
    flags = np.zeros(vocabulary_size(tokenizer), dtype=bool)
    for byte in range(0x80, 0xC0):
        if (token := tokenizer.backend_tokenizer.token_to_id(f"<0x{byte:02X}>")) is not None:
            flags[token] = True
    return flags
