"""Settings of the compiler: used where torch has them, left out where it has not."""

from __future__ import annotations

import pytest
import torch

from arena.model.compiler import leave_rows_open, variants_allowed


def test_limits_hold_while_they_last() -> None:
    config = torch._dynamo.config
    before = config.recompile_limit, config.accumulated_recompile_limit
    with variants_allowed(70, 700):
        assert (config.recompile_limit, config.accumulated_recompile_limit) == (70, 700)
    assert (config.recompile_limit, config.accumulated_recompile_limit) == before


def test_rows_are_left_open() -> None:
    x = torch.zeros(3, 4)
    leave_rows_open(x)
    assert x._dynamo_weak_dynamic_indices == {0}


class Bare:
    """A config or a compiler without these settings."""


@pytest.mark.parametrize("gone", ["config", "limits", "compiler"])
def test_a_torch_without_them_runs_by_its_own(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if gone == "compiler":
        monkeypatch.setattr(torch, "_dynamo", Bare())
    elif gone == "config":
        monkeypatch.setattr(torch._dynamo, "config", None)
    else:
        monkeypatch.setattr(torch._dynamo, "config", Bare())
    with variants_allowed(70, 700):
        if gone == "compiler":
            leave_rows_open(torch.zeros(3, 4))
