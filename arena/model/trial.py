"""Whether a backend runs on a GPU, and with the right numbers, found by running it once.

A build of flash-attn may lack the card or the head size, and FlexAttention's tiles may not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from arena.distributed import is_out_of_memory
from arena.model.reference import reference

LENGTHS = (100, 28)  # tokens of two segments
HEADS, KV_HEADS = 4, 2
WINDOW = 64
SOFTCAP = 5.0  # of scores of about 4
TOLERANCE = 0.05  # bfloat16 is 0.01 off, a mistake in window, soft cap or boundaries several times as much


@dataclass(frozen=True)
class Trial:
    """A call to be tried.

    Attributes:
        softcap: whether scores are capped.
        training: whether the backward is run too.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    softcap: bool
    training: bool


_outcomes: dict[tuple[str, Trial], str | None] = {}
_ruled_out: dict[str, str] = {}
_lock = Lock()


def rule_out(name: str, reason: str) -> None:
    """Has a backend not even be tried: what another process has found, which it ended."""
    _ruled_out[name] = reason


def why_it_fails(name: str, attend: Callable[..., Tensor], trial: Trial) -> str | None:
    """The first line of the error that a backend's small call ends with, None where it runs; tried once in a process.

    Raises:
        Exception: the call's own error, where memory was used up, or where the device answers to nothing any more.
    """
    if name in _ruled_out:
        return _ruled_out[name]
    with_backward = replace(trial, training=True)
    if _outcomes.get((name, with_backward), "") is None:
        return None  # it runs with its backward, so it does without
    if (name, trial) in _outcomes:
        return _outcomes[name, trial]
    if _in_backward():  # the engine has one thread a device: a backward of ours would wait for it, and it for ours
        return None
    with _lock:
        if (name, trial) not in _outcomes:
            # In a thread of its own: autocast, inference mode, hooks on what autograd saves and the compiler's settings
            # are those of a thread, and a layer asks from within any of them.
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
                except RuntimeError:  # not this backend's lack: whatever is run next would fail as well
                    raise error from None
            return first_line(error)
    return None


def _run(attend: Callable[..., Tensor], trial: Trial) -> None:
    """A forward and backward of two segments, without and with a window, held to the exact backend.

    Raises:
        ValueError: the numbers are others.
    """
    ends = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32, device=trial.device)
    for window in (None, WINDOW):
        options = {"scale": trial.head_dim**-0.5, "softcap": SOFTCAP if trial.softcap else None, "window": window}
        states = _states(trial)
        found = _results(attend, states, ends, options, trial.training)
        exact = _results(reference, [each.float() for each in states], ends, options, trial.training)
        for name, ours, right in zip(("output", "gradient of q", "of k", "of v"), found, exact, strict=False):
            error = float((ours.float() - right).norm() / right.norm())
            if not error <= TOLERANCE:  # not a number, too
                raise ValueError(f"its numbers are wrong: the {name} is {error:.0%} off the exact one")
    if trial.device.type == "cuda":
        torch.cuda.synchronize()  # what a kernel ends with is told when it is waited for


def _states(trial: Trial) -> list[Tensor]:
    """q, k and v of random numbers, the same each time, with scores for which the soft cap matters."""
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
    """What an error says, without the lines that only say that one was raised, and without a full stop."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.endswith("raised:")]
    return told[0][:300].rstrip(".") if told else type(error).__name__
