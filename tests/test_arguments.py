"""Settings on both sides of a flag."""

from __future__ import annotations

import pytest

from arena.command_line import settings_first
from arena.commands import Train
from benchmarks.small import Small


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("a=1 --data D b=2", "a=1 b=2 --data D"),
        ("--data D=1 a=1", "a=1 --data D=1"),  # a value with a = in it is no setting
        ("--data=D a=1 --fresh b=2 --fold 0 c=3", "a=1 b=2 c=3 --data=D --fresh --fold 0"),
        ("--no-fresh a=1", "a=1 --no-fresh"),
        ("a=1 -h b=2", "a=1 b=2 -h"),
        ("stray --data D a=1", "stray a=1 --data D"),
        ("--data", "--data"),
    ],
)
def test_settings_come_first_and_values_stay_with_their_flags(typed: str, read: str) -> None:
    assert settings_first(Train, typed.split()) == read.split()


def test_a_flag_of_many_values_keeps_them() -> None:
    flags = ["--workloads", "autoj", "odd=1", "--variants", "ab"]
    assert settings_first(Small, [*flags, "c=3", "--layers", "2", "d=4"]) == ["c=3", "d=4", *flags, "--layers", "2"]
