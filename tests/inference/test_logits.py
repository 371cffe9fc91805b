"""Cached logits: what verifies is used, anything else is named, removed and recomputed."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arena.inference.logits import Logits, LogitsCache
from arena.packing.plan import PackPlan, plan_evaluation

FACTS: dict[str, Any] = {"tokens": "abc", "dtype": "float32"}


@pytest.fixture(scope="module")
def plan() -> PackPlan:
    lengths = np.random.default_rng(0).integers(10, 60, 40)
    return plan_evaluation(lengths, np.arange(40), budget=128)


@pytest.fixture
def cache(tmp_path: Path) -> LogitsCache:
    return LogitsCache(tmp_path / "parts", {"judge": "one"}, "here")


def logits_of(plan: PackPlan, *micro_batches: int) -> np.ndarray:
    """Numbers that tell the example that they belong to."""
    examples = np.concatenate([plan.micro_batch(index) for index in micro_batches])
    return (examples[:, None] + np.array([0.25, 0.5, 0.75])).astype(np.float32)


def fill(cache: LogitsCache, plan: PackPlan, *runs: tuple[int, int]) -> list[Path]:
    """Keeps micro-batches first to end of each run as a shard."""
    with cache.open(plan, FACTS) as parts:
        logits = Logits(plan, 3, parts)
        for first, end in runs:
            logits.add(list(range(first, end)), logits_of(plan, *range(first, end)))
        return sorted(parts.folder.iterdir())


def known(cache: LogitsCache, plan: PackPlan, facts: dict[str, Any] = FACTS) -> list[int]:
    with cache.open(plan, facts) as parts:
        logits = Logits(plan, 3, parts)
        _right(logits, plan)
        return np.flatnonzero(logits.known).tolist()


def _right(logits: Logits, plan: PackPlan) -> None:
    """What is known is what was cached, the rest is NaN."""
    every = logits_of(plan, *range(plan.n_micro_batches))
    rows = np.repeat(logits.known, np.diff([0, *plan.micro_ends]))
    np.testing.assert_array_equal(logits.values[rows], every[rows])
    assert np.isnan(logits.values[~rows]).all()


def test_saved_logits_are_read_back(cache: LogitsCache, plan: PackPlan) -> None:
    assert plan.n_micro_batches > 9
    assert known(cache, plan) == []
    fill(cache, plan, (0, 3), (5, 6))
    assert known(cache, plan) == [0, 1, 2, 5]
    with cache.open(plan, FACTS) as parts:  # across a gap: a part on either side
        logits = Logits(plan, 3, parts)
        logits.add([3, 4, 6, 7], logits_of(plan, 3, 4, 6, 7))
        _right(logits, plan)
        assert len(list(parts.folder.iterdir())) == 4
    assert known(cache, plan) == list(range(8))


def damage(rng: np.random.Generator, data: bytes, kind: int) -> bytes:
    header = data.index(b"\n") + 1
    places = [(0, 8), (8, header), (header, len(data)), (0, len(data))]
    first, end = places[kind % 4]
    at = int(rng.integers(first, end))
    if kind < 4:
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    return data[:at] if kind < 8 else data + bytes(rng.integers(0, 256, int(rng.integers(1, 50)), dtype=np.uint8))


def test_no_damage_is_ever_used(cache: LogitsCache, plan: PackPlan, capsys: pytest.CaptureFixture[str]) -> None:
    """300 of 300: a bit in the size, the header, the numbers or anywhere; cut off or grown; and the control is used."""
    rng = np.random.default_rng(0)
    runs = [(0, 2), (2, 5), (5, 9)]
    files = fill(cache, plan, *runs)
    whole = {path: path.read_bytes() for path in files}
    for trial in range(300):
        victim = int(rng.integers(len(files)))
        assert known(cache, plan) == list(range(9))  # control: whole ones are used
        capsys.readouterr()
        data = damage(rng, whole[files[victim]], trial % 9)
        assert data != whole[files[victim]]
        files[victim].write_bytes(data)
        assert known(cache, plan) == [at for at in range(9) if not runs[victim][0] <= at < runs[victim][1]]
        assert files[victim].name in capsys.readouterr().out
        assert not files[victim].exists()
        files[victim].write_bytes(whole[files[victim]])


def test_a_renamed_part_is_not_used(cache: LogitsCache, plan: PackPlan) -> None:
    (path,) = fill(cache, plan, (0, 2))
    for name in ("00000001-00000003" + path.name[17:], "00000000-00000001" + path.name[17:], path.name[:-1], "x"):
        moved = path.rename(path.with_name(name))
        assert known(cache, plan) == [], name
        assert not moved.exists()
        (path,) = fill(cache, plan, (0, 2))
    assert known(cache, plan) == [0, 1]


def named(folder: Path, first: int, end: int, data: bytes) -> Path:
    """A file whose name fits its bytes."""
    path = folder / f"{first:08d}-{end:08d}-{hashlib.sha256(data).hexdigest()}.part"
    path.write_bytes(data)
    return path


def part(header: dict[str, Any], numbers: np.ndarray) -> bytes:
    return json.dumps(header).encode() + b"\n" + numbers.tobytes()


def test_whole_files_of_something_else_are_not_used(
    cache: LogitsCache, plan: PackPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = fill(cache, plan, (0, 2))
    folder, good = path.parent, logits_of(plan, 0, 1)
    header = {"key": folder.name, "first": 0, "end": 2, "machine": "here"}
    path.unlink()
    nan = good.copy()
    nan[1, 2] = np.nan
    odd: list[tuple[int, int, bytes, str]] = [
        (0, 2, part({**header, "key": "0" * 16}, good), "to other work"),
        (0, 2, part({**header, "end": 3}, good), "to other work"),
        (0, 2, part({}, good), "holds something else"),
        (0, 2, part(header, nan), "not logits of these"),
        (0, 2, part(header, good[:-1]), "not logits of these"),
        (0, 2, part(header, good.astype(np.float64)), "not logits of these"),
        (0, 2, good.tobytes(), "holds something else"),
        (0, 2, b"[1, 2]\n" + good.tobytes(), "holds something else"),
        (0, 2, b"", "holds something else"),
        (0, 2, b"\xff" * 64, "holds something else"),
        (0, 2, bytes(2**20), "too large"),
        (2, 2, part({**header, "first": 2}, good[:0]), "holds no items"),
        (0, 10**7, part({**header, "end": 10**7}, good), "to another plan"),
    ]
    for first, end, data, reason in odd:
        bad = named(folder, first, end, data)
        assert known(cache, plan) == [], reason
        assert f"{bad} is not used: it" in (shown := capsys.readouterr().out) and reason in shown
        assert not bad.exists()
    named(folder, 0, 2, part(header, good))  # control
    assert known(cache, plan) == [0, 1]
    named(folder, 0, 2, part({**header, "machine": "there"}, good))
    assert known(cache, plan) == [0, 1]
    assert "another part holds the same" in capsys.readouterr().out


def test_invalid_parts_are_reported_and_removed(
    cache: LogitsCache, plan: PackPlan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = fill(cache, plan, (0, 2))
    path.unlink()
    path.mkdir()
    (path.parent / ".draft").mkdir()
    assert known(cache, plan) == []
    assert "is not used: Is a directory" in capsys.readouterr().out
    assert list(path.parent.iterdir()) == []
    fill(cache, plan, (0, 2))

    def fail(self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert known(cache, plan) == []
    assert "is not used: Input/output error" in capsys.readouterr().out


def test_another_judge_other_facts_or_another_plan_find_nothing(cache: LogitsCache, plan: PackPlan) -> None:
    fill(cache, plan, (0, 4))
    lengths = np.random.default_rng(0).integers(10, 60, 40)
    other = plan_evaluation(lengths, np.arange(40), budget=130)
    assert known(LogitsCache(cache.folder, {"judge": "two"}), plan) == []
    assert known(cache, plan, {**FACTS, "dtype": "bfloat16"}) == []
    assert known(cache, other) == []
    assert known(cache, plan) == [0, 1, 2, 3]  # control, and none of them has removed it


def test_parts_of_another_machine_are_used_and_reported(
    cache: LogitsCache, plan: PackPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(cache, plan, (0, 4))
    assert known(cache, plan) == [0, 1, 2, 3]
    assert "were computed on" not in capsys.readouterr().out
    assert known(LogitsCache(cache.folder, cache.identity, "there"), plan) == [0, 1, 2, 3]
    assert "some results were computed on here; the rest are on there" in capsys.readouterr().out


def test_a_full_disk_leaves_earlier_parts(cache: LogitsCache, plan: PackPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = fill(cache, plan, (0, 2))

    def half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match=r"could not be saved \(No space left on device\).*the same command resumes"):
            fill(cache, plan, (2, 4))
    assert list(path.parent.iterdir()) == [path]
    assert known(cache, plan) == [0, 1]


def test_one_process_at_a_time(cache: LogitsCache, plan: PackPlan) -> None:
    with cache.open(plan, FACTS):
        with pytest.raises(ValueError, match="is using"), cache.open(plan, FACTS):
            pass
        with cache.open(plan, {**FACTS, "dtype": "bfloat16"}):  # control: another judging
            pass
