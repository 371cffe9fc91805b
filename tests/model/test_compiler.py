"""Room for more variants than torch.compile has by default: for one function where torch has that, else for all."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from arena.model.compiler import compiled, leave_rows_open, raise_limits

LIMITS = ("recompile_limit", "accumulated_recompile_limit")
_compile = torch.compile


def of_older_torch(function: Any, *, fullgraph: bool, dynamic: bool | None) -> Any:
    """torch.compile as it was before it took a limit of its own."""
    return _compile(function, fullgraph=fullgraph, dynamic=dynamic, backend="eager")


def of_newer_torch(function: Any, *, recompile_limit: int, fullgraph: bool, dynamic: bool | None) -> Any:
    return _compile(
        function, fullgraph=fullgraph, dynamic=dynamic, backend="eager", recompile_limit=recompile_limit
    )  # fmt: skip


@pytest.fixture
def limits() -> Iterator[None]:
    before = {name: getattr(torch._dynamo.config, name) for name in LIMITS}
    yield
    for name, value in before.items():
        setattr(torch._dynamo.config, name, value)


HAS_OWN_LIMIT = "recompile_limit" in inspect.signature(torch.compile).parameters
NEWER = pytest.param(of_newer_torch, marks=pytest.mark.skipif(not HAS_OWN_LIMIT, reason="an older torch"))


@pytest.fixture(params=[of_older_torch, NEWER])
def scaled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, limits: None) -> Iterator[Any]:
    """Makes a function of which every exponent is a variant, compiled with room for `variants`."""
    monkeypatch.setattr(torch, "compile", request.param)
    torch._dynamo.reset()

    def make(variants: int) -> Callable[..., Tensor]:
        def power(x: Tensor, exponent: int) -> Tensor:
            return x**exponent

        return compiled(power, variants, dynamic=False)

    yield make
    torch._dynamo.reset()


@pytest.mark.slow
def test_exceeding_the_limit_of_variants_is_an_error(scaled: Any) -> None:
    function, x = scaled(64), torch.full((2,), 0.9)
    for _ in range(2):
        for n in range(64):
            torch.testing.assert_close(function(x, n), x**n)
    with pytest.raises(Exception, match=r"fullgraph=True|recompile_limit"):
        function(x, 64)


def test_also_in_other_threads(scaled: Any) -> None:
    """As in the backward on a GPU: what one thread sets of the compiler's configuration may not hold in another."""
    function, x, found = scaled(20), torch.ones(2), []
    function(x, 0)
    other = threading.Thread(target=lambda: found.extend(function(x, n) for n in range(20)))
    other.start()
    other.join()
    assert len(found) == 20


def test_also_where_a_user_has_lowered_the_limits(scaled: Any) -> None:
    function, x = scaled(20), torch.ones(2)
    function(x, 0)
    with torch._dynamo.config.patch(recompile_limit=4):
        for n in range(1, 15):
            function(x, n)
    assert torch._dynamo.config.recompile_limit != 4
    for n in range(15, 20):
        function(x, n)


def test_a_call_does_not_patch_the_configuration(scaled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patching took longer than the kernel; compiling itself may do it."""
    function, x = scaled(20), torch.ones(2)
    function(x, 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("patched")

    monkeypatch.setattr(type(torch._dynamo.config), "patch", refuse)
    function(x, 1)
    with pytest.raises(AssertionError, match="patched"):
        torch._dynamo.config.patch(recompile_limit=4)


def test_limits_are_raised_and_never_lowered(limits: None) -> None:
    config = torch._dynamo.config
    raise_limits(70)
    assert config.recompile_limit == 70 and config.accumulated_recompile_limit >= 70
    raise_limits(60)
    assert config.recompile_limit == 70


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
    raise_limits(70)
    if gone == "compiler":
        leave_rows_open(torch.zeros(3, 4))
