"""What is kept of over-long conversations."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arena.data.truncation import choose_cut, even_cap, least_room

OVERHEAD, MARK, TURNS_MARK = 7, 3, 5
turns_of_any_length = st.lists(st.tuples(*[st.integers(0, 60)] * 3), min_size=1, max_size=5)


def shown(turns: list[tuple[int, int, int]], room: int) -> int:
    cut = choose_cut(turns, room, OVERHEAD, MARK, TURNS_MARK)
    return (TURNS_MARK if cut.first_turn else 0) + sum(OVERHEAD + sum(caps) for caps in cut.caps)


@given(turns=turns_of_any_length, extra=st.integers(0, 300))
def test_fits_and_keeps_both_answers_alike(turns: list[tuple[int, int, int]], extra: int) -> None:
    room = least_room(3, OVERHEAD, MARK, TURNS_MARK) + extra
    cut = choose_cut(turns, room, OVERHEAD, MARK, TURNS_MARK)
    assert shown(turns, room) <= room
    assert len(cut.caps) == len(turns) - cut.first_turn >= 1
    for whole, caps in zip(turns[cut.first_turn :], cut.caps, strict=True):
        for length, cap in zip(whole, caps, strict=True):
            assert cap == length or MARK + 2 <= cap < length  # whole, or room for a mark and a token on either side
    for whole, caps in zip(turns[cut.first_turn + 1 :], cut.caps[1:], strict=True):
        assert whole == caps  # only the first turn shown may be cut


@given(turns=turns_of_any_length, extra=st.integers(0, 300))
def test_exchanging_the_answers_exchanges_the_caps(turns: list[tuple[int, int, int]], extra: int) -> None:
    room = least_room(3, OVERHEAD, MARK, TURNS_MARK) + extra
    straight = choose_cut(turns, room, OVERHEAD, MARK, TURNS_MARK)
    swapped = choose_cut([(p, b, a) for p, a, b in turns], room, OVERHEAD, MARK, TURNS_MARK)
    assert swapped.first_turn == straight.first_turn
    assert swapped.caps == tuple((p, b, a) for p, a, b in straight.caps)


@given(turns=turns_of_any_length)
def test_nothing_is_cut_where_all_fits(turns: list[tuple[int, int, int]]) -> None:
    room = max(least_room(3, OVERHEAD, MARK, TURNS_MARK), sum(OVERHEAD + sum(turn) for turn in turns))
    assert choose_cut(turns, room, OVERHEAD, MARK, TURNS_MARK).caps == tuple(turns)


def test_by_hand() -> None:
    turns = [(10, 10, 10), (10, 100, 40), (5, 6, 7)]
    # 60 tokens: the last turn takes 7 + 18, then the second has 35 - 7 - 5 = 23 of its 150: 10 + 100 + 40 at 7 each
    cut = choose_cut(turns, 60, OVERHEAD, MARK, TURNS_MARK)
    assert (cut.first_turn, cut.caps) == (1, ((7, 7, 7), (5, 6, 7)))
    # 50 tokens: the 13 left for the second turn show too little of it
    assert choose_cut(turns, 50, OVERHEAD, MARK, TURNS_MARK).first_turn == 2


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=5), room=st.integers(0, 200))
def test_even_cap_is_the_largest_that_fits(lengths: list[int], room: int) -> None:
    cap = even_cap(lengths, room)
    assert sum(min(length, cap) for length in lengths) <= room
    if cap < max(lengths):
        assert sum(min(length, cap + 1) for length in lengths) > room
