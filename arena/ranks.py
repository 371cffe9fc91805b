"""What the processes of a run do and decide together: all of them get the same results, or all of them raise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn

from arena.stopping import Stopped

PATIENCE = timedelta(hours=6)  # while one process tokenises, downloads or loads
BUCKET = 2**24  # numbers that are summed in one call
TURNS = "arena_turns"  # the attribute of a sharded model that holds the group in which ranks agree on turns

T = TypeVar("T")
Failure = tuple[type[Exception], str, int]  # an error, its message, and the exit status of a stop

USERS_ERRORS = (ValueError, OSError, FloatingPointError)


class Released(Exception):  # noqa: N818 - it ends a rank's work but is not an error
    """Ends a rank's work because another rank has failed or was stopped, which that one reports."""


class BrokenOffError(Exception):
    """Work failed where the other ranks wait for this one; its cause ends this process, and so the others."""


def together(accelerator: Accelerator, work: Callable[[], T], *, patient: bool = False) -> list[T]:
    """Does some work on every rank, and returns the results of all ranks in their order, which are equal everywhere.

    If it fails on some ranks, all raise, so that none waits for one that has given up: those on which it failed their
    own error, the others what the first of these reports. An error counts before a stop.

    Args:
        patient: wait for the other ranks for hours instead of minutes.

    Raises:
        ConnectionError: another process has ended, or did not answer in time.
    """
    if accelerator.num_processes == 1:
        return [work()]
    value: T | None = None
    failure: Failure | None = None
    error: Exception | None = None
    with _naming_lost_processes():
        group = distributed.new_group(backend="gloo", timeout=PATIENCE) if patient else None
    try:
        value = work()
    except Released:
        pass
    except BrokenOffError as broken:
        cause = broken.__cause__
        assert cause is not None, "it is raised from an error"
        is_lost = isinstance(cause, distributed.DistError) or "gloo" in str(cause)  # of NCCL, or of gloo
        raise (_lost(cause) if is_lost else cause) from cause.__cause__
    except Exception as caught:
        error, failure = caught, (type(caught), str(caught), getattr(caught, "status", 0))
    outcomes: list[Any] = [None] * accelerator.num_processes
    with _naming_lost_processes():
        distributed.all_gather_object(outcomes, (value, failure), group)
    failures = {rank: each for rank, (_, each) in enumerate(outcomes) if each is not None}
    if failures:
        _raise(failures, error)
    return [each for each, _ in outcomes]


def on_every_rank(accelerator: Accelerator, work: Callable[[], T], *, patient: bool = False) -> T:
    """This rank's own result of some work, which all ranks do; if it fails on some, all raise, as in `together`."""
    mine: list[T] = []
    together(accelerator, partial(_keep, mine, work), patient=patient)
    return mine[0]


def on_first_rank(accelerator: Accelerator, work: Callable[[], object], *, patient: bool = False) -> None:
    """Does some work on the first rank, while the others wait."""
    together(accelerator, lambda: work() if accelerator.is_main_process else None, patient=patient)


def local_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """The result of some work on every rank, which one rank of each machine does before its others.

    What it leaves in a cache they find there, also if machines share no disk.
    """
    mine: list[T] = []
    for is_turn in (accelerator.is_local_main_process, not accelerator.is_local_main_process):
        together(accelerator, partial(_keep, mine, work) if is_turn else _nothing, patient=True)
    return mine[0]


def sum_gradients(accelerator: Accelerator, parameters: Iterable[Tensor]) -> None:
    """Sums the gradients of all ranks, which may have had different numbers of micro-batches, or none.

    They are summed once a step and in few calls: a call for each of a few hundred adapters takes longer than their
    numbers do. DDP would overlap this with the backward of the last micro-batch, but it needs the same number of
    micro-batches on all ranks, and divides by the number of ranks; `docs/distributed.md` compares the three.

    Raises:
        ConnectionError: another process has ended, or did not answer in time.
    """
    if accelerator.num_processes == 1:
        return
    for bucket in _buckets(parameters):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        with _naming_lost_processes():
            distributed.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def in_turns(classifier: nn.Module, work: Callable[[], T], idle: Callable[[], object]) -> T:
    """Does some work, for which each rank may run a sharded model another number of times, or not at all.

    Before it runs the model, a rank waits for all ranks to announce that they run it too, or that they are done. A rank
    that is done takes part through `idle` until all are. If one fails or is stopped between two runs of the model, the
    others end before their next one. For a model that is not sharded, this only does the work.

    Args:
        idle: runs the model once, as `work` does, without any effect.

    Raises:
        Released: another rank has failed or was stopped.
        BrokenOffError: the work failed where the other ranks wait for this one and cannot be told.
    """
    group = getattr(classifier, TURNS, None)
    if group is None:
        return work()

    def announce(*, busy: bool, failed: bool = False) -> bool:
        """Whether any rank is busy."""
        said = torch.tensor([busy, failed], dtype=torch.int32)
        distributed.all_reduce(said, distributed.ReduceOp.MAX, group)
        if said[1] and not failed:
            raise Released
        return bool(said[0])

    def before(*_: object) -> None:
        announce(busy=True)

    hook = classifier.register_forward_pre_hook(before, prepend=True)
    try:
        value = work()
        hook.remove()
        while announce(busy=False):
            idle()
        return value
    except Released:
        raise
    except (Stopped, *USERS_ERRORS):
        announce(busy=False, failed=True)
        raise
    except Exception as error:
        raise BrokenOffError from error
    finally:
        hook.remove()


def _keep(results: list[T], work: Callable[[], T]) -> None:
    results.append(work())


def _nothing() -> None:
    pass


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients, zeros where there are none, in parts of one dtype and of about `BUCKET` numbers."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        size = sum(each.numel() for each in bucket) + parameter.grad.numel()
        if bucket and (parameter.grad.dtype != bucket[0].dtype or size > BUCKET):
            yield bucket
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        yield bucket


def _raise(failures: dict[int, Failure], error: Exception | None) -> None:
    """Raises this rank's own error, or else, as what they are, those of another."""
    errors = {rank: each for rank, each in failures.items() if not issubclass(each[0], Stopped)}
    if error is not None and (not errors or not isinstance(error, Stopped)):
        raise error
    rank, (kind, message, status) = next(iter((errors or failures).items()))
    if issubclass(kind, Stopped):
        raise Stopped(message, status)
    if issubclass(kind, USERS_ERRORS):
        raise ValueError(f"process {rank} failed: {message}")
    raise RuntimeError(f"process {rank} failed with {kind.__name__}: {message}")


@contextmanager
def _naming_lost_processes() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's errors of connections and of time are all of this class
        raise _lost(error) from error


def _lost(error: BaseException) -> ConnectionError:
    return ConnectionError(
        "another process of this run has ended, or did not answer in time: see its messages. The same command "
        f"resumes the run ({str(error).splitlines()[0]})"
    )
