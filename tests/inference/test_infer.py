"""`arena infer`, killed, signalled and hindered: it goes on to the same submission, which is complete or absent."""

from __future__ import annotations

import errno
import functools
import io
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from arena.inference import infer as writing
from arena.inference import judge_model
from arena.inference.logits import LogitsCache
from arena.inference.saved import SavedJudge, save_judge
from arena.model.backbone import load_base, load_tokenizer
from arena.model.base_files import base_digest
from arena.model.tuning import adapt
from arena.storage.files import write_json
from arena.tasks.preference import CLASSES, COLUMNS
from tests.helpers import Processes, status_of_arena, tiny_recipe, write_rows

# every micro-batch takes a little while and has a shard of its own, so that there is something to be cut
SLOWED = """
import functools, time
import arena.inference.infer, arena.inference.judge_model as judge, arena.model.classifier as classifier
from arena.inference.logits import LogitsCache
judge.LogitsCache = functools.partial(LogitsCache, seconds=0)
forward = classifier.PackedClassifier.forward
def slow(self, batch):
    time.sleep(0.02)
    return forward(self, batch)
classifier.PackedClassifier.forward = slow
"""


def make_run(folder: Path, base: Path, folds: int = 2) -> Path:
    """Finished folds of random judges under `folder/runs/demo`, and rows to judge under `folder/rows`."""
    recipe = tiny_recipe(folder, base, "model.quantization=none", "packing.budget=256")
    write_rows(folder / "rows", n_test=24)
    for fold in range(folds):
        torch.manual_seed(fold)
        model = adapt(load_base(recipe.model, CLASSES), recipe.model)
        with torch.no_grad():
            for parameter in (each for each in model.parameters() if each.requires_grad):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        place = folder / f"runs/demo/fold{fold}"
        prior = np.array([0.3, 0.3, 0.4])
        save_judge(
            model, load_tokenizer(str(base)), SavedJudge(place / "model", recipe, prior, "x", base_digest(str(base)))
        )
        write_json(place / "metrics.json", {})
    return folder


class Infer(Processes):
    """Real processes of `arena infer` in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, SLOWED)
        self.out = folder / "submission.csv"

    def infer(self) -> int:
        """Starts one; its process id."""
        return self.start("shown.txt", "infer")

    def shown(self) -> str:
        return (self.folder / "shown.txt").read_text()

    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("submission.csv.parts/fold*/[!.]*/[!.]*.part"))

    def wait_for(self, count: int, *, or_submission: bool = True) -> None:
        """Until there are so many shards, or the submission is there."""
        until = time.monotonic() + 60
        while len(self.shards()) < count and not (or_submission and self.out.exists()) and time.monotonic() < until:
            time.sleep(0.002)
        assert time.monotonic() < until


@pytest.fixture(scope="module")
def folder(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("infer"), gemma2)


@pytest.fixture(scope="module")
def infer(folder: Path) -> Iterator[Infer]:
    processes = Infer(folder)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def whole(infer: Infer) -> bytes:
    """The submission of a run that nothing disturbs."""
    infer.infer()
    assert infer.status() == 0, infer.shown()
    assert list(infer.folder.glob("*submission.csv?*")) == []  # neither shards nor lock are left
    return infer.out.read_bytes()


@pytest.mark.slow  # and in `make torture`
def test_killed_at_random_moments_it_resumes_to_the_same_submission(infer: Infer, whole: bytes) -> None:
    rng = np.random.default_rng(0)
    killed = done = went_on = 0
    while killed < 20:
        infer.out.unlink(missing_ok=True)
        went_on += bool(infer.shards())
        pid = infer.infer()
        infer.wait_for(len(infer.shards()) + int(rng.integers(0, 6)))
        time.sleep(float(rng.uniform(0, 0.05)))
        os.kill(pid, signal.SIGKILL)
        if infer.status() == 0:  # it was faster
            assert infer.out.read_bytes() == whole
            done += 1
            assert done < 40
            continue
        killed += 1
        assert not infer.out.exists() or infer.out.read_bytes() == whole  # complete or absent
    infer.out.unlink(missing_ok=True)
    infer.infer()
    assert infer.status() == 0, infer.shown()
    assert infer.out.read_bytes() == whole
    assert went_on >= 5  # control: there was something to go on with


def test_it_resumes_from_parts(infer: Infer, whole: bytes) -> None:
    """A damaged shard is named and recomputed; the others are not touched."""
    infer.out.unlink(missing_ok=True)
    pid = infer.infer()
    infer.wait_for(6)
    os.kill(pid, signal.SIGKILL)
    infer.status()
    shards = infer.shards()
    assert len(shards) >= 6
    data = bytearray(shards[2].read_bytes())
    data[-5] ^= 1
    shards[2].write_bytes(data)
    kept = {path.name for path in shards} - {shards[2].name}
    pid = infer.infer()
    infer.wait_for(len(shards) + 1)
    os.kill(pid, signal.SIGKILL)
    infer.status()
    assert f"{shards[2].name} is not used: it is damaged" in infer.shown()
    assert kept < {path.name for path in infer.shards()}
    infer.infer()
    assert infer.status() == 0
    assert infer.out.read_bytes() == whole


def test_killed_before_a_deadline_it_leaves_a_valid_submission_and_resumes(infer: Infer, whole: bytes) -> None:
    infer.out.unlink(missing_ok=True)
    rows, words = infer.folder / "rows", ("shown.txt", "infer", "--deadline", "1h")
    ids = pd.read_csv(rows / "test.csv", dtype={"id": str})["id"].tolist()
    for parts, is_judged in ((1, False), (12, True)):  # the first pass has fewer than 12
        pid = infer.start(*words)
        infer.wait_for(parts, or_submission=False)
        os.kill(pid, signal.SIGKILL)
        assert infer.status() == -signal.SIGKILL
        writing.check_submission(infer.out, ids, COLUMNS, rows / "sample_submission.csv")
        assert (len(set(map(tuple, numbers(infer.out.read_bytes())))) > 1) == is_judged
        assert "submission.csv is valid from now on: 0 of 24 rows are judged" in infer.shown()
    kept = set(infer.shards())
    infer.start(*words)
    infer.wait_for(len(kept) + 1, or_submission=False)
    assert kept < set(infer.shards())
    assert infer.status() == 0, infer.shown()
    assert "submission.csv is valid from now on: 24 of 24 rows are judged" in infer.shown()
    np.testing.assert_allclose(numbers(infer.out.read_bytes()), numbers(whole), atol=1e-6)
    assert list(infer.folder.glob("*submission.csv?*")) == []


def numbers(submission: bytes) -> np.ndarray:
    """The probabilities in a submission."""
    return pd.read_csv(io.BytesIO(submission))[list(COLUMNS)].to_numpy()


@pytest.mark.slow  # and in `make torture`
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_well(infer: Infer, whole: bytes, number: int, status: int) -> None:
    for shards in (0, 3, 8):
        infer.out.unlink(missing_ok=True)
        pid = infer.infer()
        infer.wait_for(len(infer.shards()) + shards)
        time.sleep(0.01)
        start = time.monotonic()
        os.kill(pid, number)
        if not shards:
            infer.status()  # it may not even have begun: the moments in which it has are those below
            continue
        assert infer.status() == status, infer.shown()
        assert time.monotonic() - start < 10
        assert "the same command resumes from them" in infer.shown()
        assert not infer.out.exists()
    infer.infer()
    assert infer.status() == 0
    assert infer.out.read_bytes() == whole


def test_a_second_one_at_the_same_submission_is_refused(
    infer: Infer, whole: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    infer.out.unlink(missing_ok=True)
    pid = infer.infer()
    infer.wait_for(2)
    assert run(monkeypatch, infer.folder) == 2
    assert f"process {pid} is using submission.csv" in capsys.readouterr().out
    assert infer.status() == 0
    assert infer.out.read_bytes() == whole


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> int:
    """The exit status of `arena infer` in this process."""
    monkeypatch.chdir(folder)
    return status_of_arena(monkeypatch, "infer", *words)


def test_the_models_alone_judge_the_same_and_are_exported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, without recipes, scores and training rows; one fold of two gives other numbers."""
    assert run(monkeypatch, folder, "--out", str(tmp_path / "all.csv")) == 0
    for fold in (0, 1):
        shutil.copytree(folder / f"runs/demo/fold{fold}/model", tmp_path / f"judges/fold{fold}/model")
    shutil.copy(folder / "rows/test.csv", tmp_path)
    data = ("--data", "test.csv", f"data.cache={tmp_path / 'cache'}")
    for name, judged in (("judges", "copied.csv"), ("judges/fold1/model", "one.csv")):
        assert run(monkeypatch, tmp_path, "--recipe", name, "--out", judged, *data) == 0
    assert (tmp_path / "copied.csv").read_bytes() == (tmp_path / "all.csv").read_bytes()
    assert (tmp_path / "one.csv").read_bytes() != (tmp_path / "all.csv").read_bytes()
    assert status_of_arena(monkeypatch, "export", "--recipe", "judges/fold1/model", "--out", "plain") == 0
    assert (tmp_path / "plain/model.safetensors").is_file()


def test_a_full_disk_leaves_the_old_submission_and_earlier_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "full" / "submission.csv"
    out.parent.mkdir()
    out.write_text("an older submission")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "check_submission", full)
        assert run(monkeypatch, folder, "--out", str(out)) == 2
    assert "No space left on device" in capsys.readouterr().out
    assert out.read_text() == "an older submission"
    assert sorted(path.name for path in out.parent.iterdir()) == ["submission.csv", "submission.csv.parts"]
    assert run(monkeypatch, folder, "--out", str(out)) == 0  # control: with room it is written
    assert out.read_text() != "an older submission"
    assert [path.name for path in out.parent.iterdir()] == ["submission.csv"]


def test_an_unwritable_place_is_an_error_before_anything_is_judged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").write_text("x")
    assert run(monkeypatch, folder, "--out", "file/submission.csv") == 2
    shown = capsys.readouterr().out
    assert "file cannot be written to" in shown and "judging" not in shown
    place = folder / "readonly"
    place.mkdir()
    (place / "submission.csv").write_text("an older submission")
    real = os.open

    def refuse(path: object, flags: int, *args: int, **named: int) -> int:
        if "readonly" in str(path) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *args, **named)  # type: ignore[call-overload,no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert run(monkeypatch, folder, "--out", "readonly/submission.csv") == 2
    shown = capsys.readouterr().out
    assert "readonly cannot be written to (Read-only file system)" in shown and "judging" not in shown
    assert (place / "submission.csv").read_text() == "an older submission"
    assert [path.name for path in place.iterdir()] == ["submission.csv"]
    assert run(monkeypatch, folder, "--out", "readonly/submission.csv") == 0  # control


def test_a_disk_that_fills_while_judging_leaves_earlier_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge_model, "LogitsCache", functools.partial(LogitsCache, seconds=0))
    out, room, real = folder / "filling.csv", [4], Path.write_bytes

    def write(self: Path, data: bytes) -> int:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    def kept() -> list[str]:
        return sorted(path.name for path in folder.glob("filling.csv.parts/*/[!.]*/[!.]*"))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        assert run(monkeypatch, folder, "--out", str(out)) == 2
        shown = capsys.readouterr().out
        assert "results could not be saved (No space left on device)" in shown and "Traceback" not in shown
        first = kept()
        assert len(first) == 4 and not out.exists()
        room[0] = 3
        assert run(monkeypatch, folder, "--out", str(out)) == 2
        assert len(kept()) == 7 and set(first) < set(kept())  # it went on
    assert run(monkeypatch, folder, "--out", str(out)) == 0
    assert out.is_file() and not list(folder.glob("filling.csv.parts"))
