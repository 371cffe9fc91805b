"""Whether a backend runs on this machine: what it needs of card, packages and compilers, and one small call on a GPU.

The call shows whether the numbers are right too. A build of flash-attn may not support the card or the head size, and
FlexAttention's tiles may not fit.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from arena.distributed import is_out_of_memory
from arena.model.attention.reference import reference
from arena.model.card import Card, Kind

AMPERE = (8, 0)
LENGTHS = (100, 28)  # tokens of two segments
HEADS, KV_HEADS = 4, 2
WINDOW = 64
SOFTCAP = 5.0  # for scores of about 4
TOLERANCE = 0.05  # bfloat16 differs by 0.01, and a wrong window, softcap or boundary by several times the tolerance


@dataclass(frozen=True)
class Trial:
    """A call to try.

    Attributes:
        softcap: whether scores are capped.
        training: whether to run the backward too.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    softcap: bool
    training: bool


def older_than_ampere(card: Card) -> str | None:
    """Why a kernel for cards from Ampere on cannot run on a GPU; None if it can."""
    if card.capability >= AMPERE:
        return None
    return f"it needs compute capability 8.0, but {card.name} has {card.capability[0]}.{card.capability[1]}"


def cannot_compile(kind: Kind = "cuda") -> str | None:
    """Why torch cannot compile for a GPU or a CPU here; None if it can."""
    if kind == "cpu":
        return compiler_missing(("g++", "clang++"), "CXX")
    return triton_missing() or compiler_missing(("gcc", "clang"), "CC")


@cache
def triton_missing() -> str | None:
    """Why triton cannot be used; None if it can."""
    return import_error("triton", "triton")


@cache
def compiler_missing(names: tuple[str, ...], variable: str) -> str | None:
    """Why the code that torch generates cannot be compiled on this machine; None if it can."""
    if os.environ.get(variable) or any(map(shutil.which, names)):
        return None
    return f"it needs a compiler for its kernels, and there is none ({' or '.join(names)})"


def import_error(module: str, title: str) -> str | None:
    """Why a module cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a library built for another torch raises any of these
        lines = str(error).strip().splitlines()
        return f"{title} cannot be imported ({lines[0] if lines else type(error).__name__})"
    return None


_outcomes: dict[tuple[str, Trial], str | None] = {}
_ruled_out: dict[str, str] = {}
_lock = Lock()


def rule_out(name: str, reason: str) -> None:
    """Excludes a backend without trying it, because it crashed another process."""
    _ruled_out[name] = reason


def why_it_fails(name: str, attend: Callable[..., Tensor], trial: Trial) -> str | None:
    """The first line of the error that a small call of a backend raises; None if it runs. Tried once per process.

    Raises:
        Exception: the call's own error, if memory was exhausted or the device no longer responds.
    """
    if name in _ruled_out:
        return _ruled_out[name]
    with_backward = replace(trial, training=True)
    if _outcomes.get((name, with_backward), "") is None:
        return None  # it runs with its backward, so it also runs without
    if (name, trial) in _outcomes:
        return _outcomes[name, trial]
    if _in_backward():  # the engine has one thread per device, so a backward here would deadlock
        return None
    with _lock:
        if (name, trial) not in _outcomes:
            # In a separate thread, because a layer may call this under autocast, inference mode, hooks on saved tensors
            # and compiler settings, all of which belong to the thread.
            with ThreadPoolExecutor(1) as thread:
                _outcomes[name, trial] = thread.submit(_try, attend, trial).result()
        return _outcomes[name, trial]


def _in_backward() -> bool:
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def _try(attend: Callable[..., Tensor], trial: Trial) -> str | None:
    cuda = trial.device.type == "cuda"
    with torch.cuda.device(trial.device) if cuda else nullcontext():
        try:
            _run(attend, trial)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if cuda:
                try:
                    torch.cuda.synchronize()
                except RuntimeError:  # not specific to this backend: any later call would fail too
                    raise error from None
            return first_line(error)
    return None


def _run(attend: Callable[..., Tensor], trial: Trial) -> None:
    """Compares a forward and backward of two segments, without and with a window, with the exact backend.

    Raises:
        ValueError: the numbers differ.
    """
    ends = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32, device=trial.device)
    names = "output", "gradient of q", "of k", "of v"
    for window in (None, WINDOW):
        options = {"scale": trial.head_dim**-0.5, "softcap": SOFTCAP if trial.softcap else None, "window": window}
        states = _states(trial)
        outputs = _results(attend, states, ends, options, trial.training)
        expected = _results(reference, [each.float() for each in states], ends, options, trial.training)
        for name, output, right in zip(names, outputs, expected, strict=False):
            error = float((output.float() - right).norm() / right.norm())
            if not error <= TOLERANCE:  # also for NaN
                raise ValueError(f"its numbers are wrong: the {name} differs by {error:.0%} from the exact one")
    if trial.device.type == "cuda":
        torch.cuda.synchronize()  # a kernel's error is raised when it is waited for


def _states(trial: Trial) -> list[Tensor]:
    """Fixed random q, k and v, with scores large enough for the softcap to matter."""
    generator = torch.Generator().manual_seed(0)
    states = []
    for heads, factor in ((HEADS, 2.0), (KV_HEADS, 2.0), (KV_HEADS, 1.0)):
        shape = (sum(LENGTHS), heads, trial.head_dim)
        state = torch.empty(shape, dtype=trial.dtype, device=trial.device)
        states.append(state.copy_(factor * torch.randn(shape, generator=generator)))
    return states


def _results(
    attend: Callable[..., Tensor], states: list[Tensor], ends: Tensor, options: dict[str, Any], training: bool
) -> list[Tensor]:
    """The output, and in training the gradients of q, k and v."""
    leaves = [each.detach().requires_grad_(training) for each in states]
    out = attend(*leaves, ends, ends, max(LENGTHS), max(LENGTHS), **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, states[0].to(out.dtype))] if training else [out]


def first_line(error: BaseException) -> str:
    """The first informative line of an error's message, without a full stop."""
    lines = [line.strip() for line in str(error).splitlines()]
    informative = [line for line in lines if line and not line.endswith("raised:")]
    return informative[0][:300].rstrip(".") if informative else type(error).__name__
