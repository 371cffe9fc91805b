"""torch.compile with room for more variants of a function than it has by default, and with open numbers of rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def compiled(function: Callable[..., Any], variants: int, *, dynamic: bool | None = None) -> Callable[..., Any]:
    """The function, compiled whole when it is first called: where that cannot be done it is an error, never a slow run.

    Args:
        variants: kept at most, one for each dtype, width and so on; one more is an error too.
        dynamic: as in `torch.compile`.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        own_limit: dict[str, Any] = {"recompile_limit": variants}
        return torch.compile(function, fullgraph=True, dynamic=dynamic, **own_limit)
    made = torch.compile(function, fullgraph=True, dynamic=dynamic)

    @wraps(function)
    def run(*given: Any) -> Any:
        raise_limits(variants)
        return made(*given)

    return run


def raise_limits(variants: int) -> None:
    """Has torch.compile keep this many variants of any function: older versions of torch have no limit for one alone.

    Raised and left so, which costs far less at each call than to raise and lower them around it; but looked at in each
    call, as a limit that was set in one thread may not hold in another, such as the backward's. Where torch has no
    such settings its own limits hold.
    """
    config = getattr(getattr(torch, "_dynamo", None), "config", None)
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        if getattr(config, name, variants) < variants:
            setattr(config, name, variants)


def leave_rows_open(x: Tensor) -> None:
    """Has the compiler make one variant for all numbers of rows; else it does so once it has seen a second number."""
    mark = getattr(getattr(torch, "_dynamo", None), "maybe_mark_dynamic", None)
    if mark is not None:
        mark(x, 0)
