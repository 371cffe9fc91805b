"""`arena judge --engine ray`: the same file as without Ray, after an interruption, and although workers die."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from arena import JudgeBatches
from arena.inference import judge_inputs
from arena.storage.parts import Parts
from tests.helpers import status_of_arena, tiny_recipe
from tests.inference.test_judge_files import rows_of
from tests.inference.test_judge_model import saved

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from arena.inference import judge_on_ray  # noqa: E402 - which imports Ray

SMALL = {"include_dashboard": False, "object_store_memory": 200_000_000, "log_to_driver": False}


@pytest.fixture(scope="module")
def run(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    saved(folder / "run" / "fold0", tiny_recipe(folder, gemma2, "packing.budget=4096"))
    return folder / "run"


def set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default anything else goes first


@pytest.fixture
def one_actor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of this machine with room for one actor."""
    set_up(monkeypatch)
    ray.init("local", num_cpus=1, **SMALL)
    yield
    ray.shutdown()


@pytest.fixture
def source(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Many windows of two rows, and a row that cannot be judged."""
    monkeypatch.setattr(judge_inputs, "WINDOW_ROWS", 2)
    lines = [json.dumps({**row, "id": f"{time}-{row['id']}"}) for time in range(8) for row in rows_of(run)]
    lines[3:3] = [json.dumps({**rows_of(run)[0], "response_b": 3})]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "in.jsonl"


class Once(threading.Thread):
    """Does something once a part is saved, and notes how many were saved then."""

    def __init__(self, out: Path, at: int, action: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.out, self.at, self.action, self.saved = out, at, action, 0
        self.start()

    def run(self) -> None:
        until = time.monotonic() + 600
        while time.monotonic() < until and len(parts_of(self.out)) < self.at:
            time.sleep(0.002)
        self.saved = len(parts_of(self.out))
        self.action()


def parts_of(out: Path) -> list[Path]:
    return sorted(out.with_name(f"{out.name}.parts").glob("*/*/[!.]*.part"))


def kill_actor() -> None:
    (actor,) = (each for each in psutil.Process().children(recursive=True) if "MapWorker" in " ".join(each.cmdline()))
    actor.send_signal(signal.SIGKILL)


def check_same(found: Path, wanted: Path) -> None:
    """Files of rows and of rejections are the same, byte for byte."""
    assert found.read_bytes() == wanted.read_bytes()
    beside = (path.with_name(f"{path.name}.rejected.jsonl").read_bytes() for path in (found, wanted))
    assert next(beside) == next(beside) != b""


@pytest.mark.slow
def test_interrupted_and_with_a_killed_actor_it_writes_the_same_file(
    run: Path, source: Path, one_actor: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out, written = tmp_path / "whole.parquet", tmp_path / "out.parquet", []
    assert status_of_arena(monkeypatch, "judge", run, source, whole) == 0
    windows, write = (8 * len(rows_of(run)) + 2) // 2, Parts.write

    def interrupted(self: Parts, first: int, end: int, results: bytes) -> None:
        write(self, first, end, results)
        written.append(first)
        if len(written) == 5:
            raise SystemExit(143)

    monkeypatch.setattr(Parts, "write", interrupted)
    words = "judge", run, source, out, "--engine=ray"
    assert status_of_arena(monkeypatch, *words) == 143
    assert len(parts_of(out)) == 5 and not out.exists()
    killed = Once(out, 8, kill_actor)
    assert status_of_arena(monkeypatch, *words) == 0
    killed.join()
    assert 8 <= killed.saved < windows - 5, "the actor was killed amid the work"
    assert sorted(written) == list(range(windows)), "each window is saved once, and none again"
    check_same(out, whole)


class Dying(judge_on_ray._Actor):
    """Does not survive the third window."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        found = super().__call__(batch)  # which counts the attempt
        if found["window"].to_pylist() == [2]:
            os._exit(1)
        return found


@pytest.mark.slow
def test_a_window_of_which_each_actor_dies(
    run: Path, source: Path, one_actor: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(judge_on_ray, "_Actor", Dying)
    out = tmp_path / "out.parquet"
    assert status_of_arena(monkeypatch, "judge", run, source, out, "--engine=ray") == 2
    message = " ".join(capsys.readouterr().out.split())
    assert "in.jsonl, line 5 to line 6: 6 processes that judged these rows died" in message, message
    assert not out.exists()


@pytest.mark.slow
def test_a_pipeline_of_ray_data(run: Path, one_actor: None) -> None:
    table = pa.Table.from_pylist(rows_of(run))
    batches = ray.data.from_arrow(table).map_batches(
        JudgeBatches, fn_constructor_args=[str(run)], batch_format="pyarrow", concurrency=1
    )
    found = pa.concat_tables(batches.iter_batches(batch_format="pyarrow"))
    assert found.equals(JudgeBatches(run)(table))


@pytest.mark.slow
def test_a_node_that_is_lost(run: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    assert status_of_arena(monkeypatch, "judge", run, source, whole) == 0
    set_up(monkeypatch)
    small = {"object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 0})
    try:
        other, _ = (cluster.add_node(num_cpus=1, object_store_memory=100_000_000) for _ in range(2))
        ray.init(cluster.address, log_to_driver=False)
        lost = Once(out, 3, lambda: cluster.remove_node(other, allow_graceful=False))
        assert status_of_arena(monkeypatch, "judge", run, source, out, "--engine=ray") == 0
        lost.join()
        assert 3 <= lost.saved < (8 * len(rows_of(run)) + 2) // 2
    finally:
        ray.shutdown()
        cluster.shutdown()
    check_same(out, whole)
