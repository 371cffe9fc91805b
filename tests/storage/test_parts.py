"""Verified parts: results of any kind, joined in the order of their items."""

from __future__ import annotations

from pathlib import Path

import pytest

from arena.storage.parts import InvalidPartError, open_parts

LINES = [f'{{"answer": "number {at}"}}\n'.encode() for at in range(9)]


def check(first: int, end: int, results: bytes) -> tuple[int, int, bytes]:
    if results.count(b"\n") != end - first:
        raise InvalidPartError("it has another number of lines")
    return first, end, results


def largest(first: int, end: int) -> int:
    return 1000 * (end - first)


def test_text_written_in_any_order_is_joined_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_parts(tmp_path, {"model": "a"}) as parts:
        for first, end in ((4, 9), (0, 1), (1, 4)):
            parts.write(first, end, b"".join(LINES[first:end]))
    with open_parts(tmp_path, {"model": "a"}) as parts:
        found = list(parts.read(check, largest))
    assert [each[:2] for each in found] == [(0, 1), (1, 4), (4, 9)]
    assert b"".join(results for _, _, results in found) == b"".join(LINES)
    with open_parts(tmp_path, {"model": "b"}) as other:  # other work has other parts
        assert list(other.read(check, largest)) == []
    with open_parts(tmp_path, {"model": "a"}) as parts:
        parts.write(9, 11, b"one line only\n")
        assert list(parts.read(check, largest)) == found
    assert "it has another number of lines; it is recomputed" in capsys.readouterr().out


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with open_parts(tmp_path, "work"):
        with pytest.raises(ValueError, match="is using"), open_parts(tmp_path, "work"):
            pass
        with open_parts(tmp_path, "other work"):  # control
            pass
