"""Whether a backend runs on a GPU, found by running it: a build of flash-attn may lack the card or the head size."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import Lock

import torch
from torch import Tensor

from arena.distributed import is_out_of_memory

LENGTHS = (100, 28)  # tokens of two segments
HEADS, KV_HEADS = 2, 1
WINDOW = 64
SOFTCAP = 50.0


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


_found: dict[tuple[str, Trial], str | None] = {}
_lock = Lock()


def why_it_fails(name: str, attend: Callable[..., Tensor], trial: Trial) -> str | None:
    """The first line of the error that a backend's small call ends with, None where it runs; tried once in a process.

    Raises:
        Exception: the call's own error, where memory was used up, or where the device answers to nothing any more.
    """
    with_backward = replace(trial, training=True)
    if _found.get((name, with_backward), "") is None:
        return None  # it runs with its backward, so it does without
    if (name, trial) in _found:
        return _found[name, trial]
    if _in_backward():  # the engine has one thread a device: a backward of ours would wait for it, and it for ours
        return None
    with _lock:
        if (name, trial) not in _found:
            # In a thread of its own: autocast, inference mode, hooks on what autograd saves and the compiler's settings
            # are those of a thread, and a layer asks from within any of them.
            with ThreadPoolExecutor(1) as thread:
                _found[name, trial] = thread.submit(_try, attend, trial).result()
        return _found[name, trial]


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
    """A forward and backward of two segments, without and with a window, which builds can lack too."""
    device, head_dim = trial.device, trial.head_dim
    ends = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32, device=device)
    for window in (None, WINDOW):
        q, k, v = (
            torch.ones(
                sum(LENGTHS), heads, head_dim, dtype=trial.dtype, device=device, requires_grad=trial.training
            )
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )  # fmt: skip
        out = attend(
            q, k, v, ends, ends, max(LENGTHS), max(LENGTHS),
            scale=head_dim**-0.5, softcap=SOFTCAP if trial.softcap else None, window=window,
        )  # fmt: skip
        if trial.training:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    if device.type == "cuda":
        torch.cuda.synchronize()  # what a kernel ends with is told when it is waited for


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that only say that one was raised, and without a full stop."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.endswith("raised:")]
    return told[0][:300].rstrip(".") if told else type(error).__name__
