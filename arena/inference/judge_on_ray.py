"""Judges the windows of `arena judge` on a Ray cluster: its actors judge, and this process reads and saves.

A task on this machine reads windows one after another, Ray Data hands them to actors that have loaded the judge, and
what comes back is saved as the same parts that `judge_windows` writes. Only the judge has to be on the other machines.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayError, RayTaskError

from arena.data.records import rows_in_memory
from arena.data.task import Task
from arena.distributed import fix_threads
from arena.inference.judge import Judge
from arena.inference.judge_work import Checked, Work, judge_window, machine_name, read_windows
from arena.stopping import ending_at_once
from arena.storage.parts import Parts

ATTEMPTS = 6  # at a window, of which all but the last ended with the death of the actor
QUEUED = 2  # windows that an actor has been given, so that it need not wait for the next
ONE_WINDOW = 1  # byte: blocks are cut after each row, which is a window


def judge_windows_on_ray(
    work: Work, parts: Parts, todo: Sequence[int], done: int, load: Callable[[], Judge], *, cpus: int = 1
) -> None:
    """Judges windows as `judge_windows` does, on all GPUs of a cluster; if it has none, on its CPUs.

    Args:
        cpus: of each actor, if there are no GPUs.

    Raises:
        FloatingPointError: none of many rows of a window got finite logits.
        ValueError: each actor dies of the same window.
        OSError: Ray could not go on, as where no actor can load the judge.
    """
    with _cluster(), work.judging(todo, done) as advance, _first_cause():
        results = _results(work, todo, load, cpus)
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                at = row["window"]
                Parts(parts.folder, parts.key, row["machine"]).write(at, at + 1, row["results"])
                advance(work.sizes[at])


def _results(work: Work, todo: Sequence[int], load: Callable[[], Judge], cpus: int) -> Any:
    """A data set of a row for each window, in any order, each of which is made when the one before it was taken."""
    device = {"num_gpus": 1, "num_cpus": 0} if ray.cluster_resources().get("GPU") else {"num_cpus": cpus}
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    windows = ray.data.read_datasource(_Windows(work, todo), override_num_blocks=1, num_cpus=0, label_selector=here)
    lasting = {"max_restarts": -1, "max_task_retries": -1, "num_cpus": 0, "label_selector": here}
    attempts = ray.remote(_Attempts).options(**lasting).remote()  # begun again, it only allows more attempts
    return windows.map_batches(
        _Actor, fn_constructor_args=[work.task, work.width, load, Path.cwd(), attempts], batch_size=None,
        batch_format="pyarrow", compute=ActorPoolStrategy(min_size=1, max_tasks_in_flight_per_actor=QUEUED), **device,
    )  # fmt: skip


class _Windows(Datasource):
    """Windows of rows, which are read where the files are."""

    def __init__(self, work: Work, todo: Sequence[int]) -> None:
        super().__init__()
        self._read = partial(_blocks, work, todo)

    def get_name(self) -> str:
        return "Windows"

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._read, unknown)]


def _blocks(work: Work, todo: Sequence[int]) -> Iterator[pa.Table]:
    for checked in read_windows(work, todo):
        yield pa.table({"window": pa.array([_as_json(checked)], pa.large_binary())})


def _as_json(checked: Checked) -> bytes:
    rows, problems = checked.rows.table.to_list(), list(checked.problems.items())
    return json.dumps([checked.at, checked.name, rows, checked.where, problems]).encode()


def _from_json(text: bytes, task: Task) -> Checked:
    at, name, rows, where, problems = json.loads(text)
    found = {row: (field, what) for row, (field, what) in problems}
    return Checked(at, name, replace(rows_in_memory(rows, task), fingerprint=f"window{at}"), where, found)


class _Attempts:
    """Counts how often each window was begun.

    Ray repeats what an actor that died was given without end. Its own limit would also count each try to reach a
    machine that is gone, of which there are many until that is noticed.
    """

    def __init__(self) -> None:
        self.counts = Counter[int]()

    def begin(self, window: int) -> int:
        self.counts[window] += 1
        return self.counts[window]


class _Actor:
    """Judges windows with a judge that it loads once.

    Args:
        folder: in which the command runs, from which paths to the judge start.
        attempts: the actor that counts them.
    """

    def __init__(self, task: Task, width: int, load: Callable[[], Judge], folder: Path, attempts: Any) -> None:
        os.chdir(folder)
        fix_threads()
        self.task, self.width, self.attempts, self.judge = task, width, attempts, load()

    def __call__(self, batch: pa.Table) -> pa.Table:
        windows = [_from_json(text.as_py(), self.task) for text in batch["window"]]
        for each in windows:
            if ray.get(self.attempts.begin.remote(each.at)) > ATTEMPTS:
                raise ValueError(
                    f"{each.name}, {each.where[0]} to {each.where[-1]}: {ATTEMPTS} processes that judged these rows "
                    "died, as where memory runs out; see Ray's log for the reason. The same command resumes"
                )
        results = [judge_window(self.judge, each, self.width, None).as_bytes() for each in windows]
        return pa.table(
            {"window": [each.at for each in windows], "results": results, "machine": [machine_name()] * len(windows)}
        )


@contextmanager
def _cluster() -> Iterator[None]:
    """Connects to the cluster that this process has joined, that RAY_ADDRESS names or that runs here; or starts one."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised
    owns = not ray.is_initialized()
    if owns:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        try:
            ray.init("auto", **options)
        except ConnectionError:
            ray.init("local", num_cpus=len(os.sched_getaffinity(0)), include_dashboard=False, **options)
    context = DataContext.get_current().copy()
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    context.target_max_block_size = ONE_WINDOW
    try:
        with DataContext.current(context), ending_at_once():  # Ray has a handler of its own for SIGTERM
            yield
    finally:
        if owns:
            ray.shutdown()


@contextmanager
def _first_cause() -> Iterator[None]:
    """Raises what an actor raised, without what Ray wraps it in."""
    try:
        yield
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, ValueError | FloatingPointError):
            raise cause from None
        last = str(error).strip().splitlines()[-1]
        raise OSError(f"Ray could not go on ({last}): fix the cause, and the same command resumes") from error
