"""torch.compile with a higher limit on the variants of a function, and with a dynamic number of rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def compiled(function: Callable[..., Any], variants: int, *, dynamic: bool | None = None) -> Callable[..., Any]:
    """The function, compiled as a whole in its first call; an error if that is not possible, never a slow fallback.

    Args:
        variants: the most variants (one for each dtype, width and so on); exceeding it is an error too.
        dynamic: as in `torch.compile`.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        own_limit: dict[str, Any] = {"recompile_limit": variants}
        return torch.compile(function, fullgraph=True, dynamic=dynamic, **own_limit)
    made = torch.compile(function, fullgraph=True, dynamic=dynamic)

    @wraps(function)
    def run(*args: Any) -> Any:
        raise_limits(variants)
        return made(*args)

    return run


def raise_limits(variants: int) -> None:
    """Lets torch.compile keep this many variants of every function; older versions have no limit per function.

    The limits are raised permanently, which costs far less than changing them around each call. They are checked in
    each call, because a limit set in one thread may not apply in another, such as the backward's. If torch does not
    have these settings, its own limits apply.
    """
    config = getattr(getattr(torch, "_dynamo", None), "config", None)
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        if getattr(config, name, variants) < variants:
            setattr(config, name, variants)


def leave_rows_open(x: Tensor) -> None:
    """Makes the compiler use one variant for all numbers of rows from the start, not from the second number on."""
    mark = getattr(getattr(torch, "_dynamo", None), "maybe_mark_dynamic", None)
    if mark is not None:
        mark(x, 0)
