"""Settings of torch.compile outside of torch's public interface, used where this version of torch has them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def variants_allowed(of_a_function: int, in_all: int) -> AbstractContextManager[Any]:
    """Within the block torch.compile may keep this many variants of a function.

    Where torch has no such settings its own limits hold. With `fullgraph=True`, which all of our compiled functions
    have, going beyond them is an error, never a slow run.
    """
    config = getattr(getattr(torch, "_dynamo", None), "config", None)
    wanted = {"recompile_limit": of_a_function, "accumulated_recompile_limit": in_all}
    known = {name: limit for name, limit in wanted.items() if hasattr(config, name)}
    return config.patch(**known) if config is not None and known else nullcontext()


def leave_rows_open(x: Tensor) -> None:
    """Has the compiler make one variant for all numbers of rows; else it does so once it has seen a second number."""
    mark = getattr(getattr(torch, "_dynamo", None), "maybe_mark_dynamic", None)
    if mark is not None:
        mark(x, 0)
