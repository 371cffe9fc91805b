"""`arena infer --deadline`: kept on a simulated clock, valid at any moment, and in the end what `arena infer` gives."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from arena.distributed import start_process
from arena.inference import by_worth, deadline, infer_deadline, shares
from arena.inference.by_worth import CHUNK, Tally, chunks, worth
from arena.inference.deadline import Deadline, Pace, deadline_from, seconds_of
from arena.inference.infer import LoadedJudge, average, submission_of
from arena.inference.infer_deadline import infer_within
from arena.inference.judge_model import JudgeModel
from arena.inference.kinds import Kind
from arena.inference.saved import SavedJudge, read_judge
from arena.inference.shares import Job, deal, judge_share, judge_side_by_side
from arena.model.classifier import PackedClassifier
from arena.storage.files import write_json
from tests.helpers import status_of_arena
from tests.inference.test_infer import make_run

COLUMNS = ["winner_model_a", "winner_model_b", "winner_tie"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("8.5h", 30600), ("30m", 1800), ("45s", 45), ("1h30m", 5400), ("1h 0.5m 1s", 3631)]
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "8.5", "8,5h", "8:30", "h", "30min", "1m2h", "-1h", "0s", "nan h"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write hours, minutes and seconds as in 8.5h, 30m or 1h30m"):
        seconds_of(text)


def test_it_counts_from_the_first_process_or_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    first = deadline_from(1e6, tmp_path)
    assert "an earlier call" not in capsys.readouterr().out
    assert first.started < now and first.left() < 0.95 * 1e6
    write_json(tmp_path / "started.json", {"seconds": 1e6, "started": now - 100})
    assert deadline_from(1e6, tmp_path).started == now - 100  # it resumes
    assert f"counts from an earlier call: delete {tmp_path}/started.json to begin anew" in capsys.readouterr().out
    assert deadline_from(50, tmp_path).started == first.started  # that deadline has passed: this is another one
    monkeypatch.setenv("ARENA_STARTED", str(int(now) - 500))
    assert deadline_from(1e6, tmp_path).started == int(now) - 500
    for wrong in ("yesterday", str(int(now) + 500)):
        monkeypatch.setenv("ARENA_STARTED", wrong)
        with pytest.raises(ValueError, match="is not a time in the past"):
            deadline_from(1e6, tmp_path)


class Clock:
    """A clock that advances with each micro-batch: by its number of tokens, give or take 30%."""

    def __init__(self) -> None:
        self.now = self.slowest = 0.0
        self._rng = np.random.default_rng(0)

    def __call__(self) -> float:
        return self.now

    def work(self, tokens: int) -> None:
        taken = tokens * self._rng.uniform(0.7, 1.3)
        self.now, self.slowest = self.now + taken, max(self.slowest, taken)


@pytest.fixture(scope="module")
def folder(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("deadline"), gemma2)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedJudge:
    """Loads the base once for all tests."""
    return LoadedJudge(judges_in(folder)[0].recipe.data)


@pytest.fixture
def clock(folder: Path, loaded: LoadedJudge, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, forward = Clock(), PackedClassifier.forward

    def slow(self: PackedClassifier, batch: object) -> object:
        clock.work(batch.tokens)  # type: ignore[attr-defined]
        return forward(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(PackedClassifier, "forward", slow)
    monkeypatch.setattr(by_worth, "LoadedJudge", lambda data: loaded)
    monkeypatch.setattr(by_worth, "REPORT_SECONDS", 500)  # a dozen reports in all
    monkeypatch.chdir(folder)
    return clock


def judges_in(folder: Path) -> list[SavedJudge]:
    return [read_judge(folder / f"runs/demo/fold{fold}/model") for fold in range(2)]


@pytest.fixture(scope="module")
def whole(folder: Path) -> np.ndarray:
    """What `arena infer` gives."""
    judges = judges_in(folder)
    return average(judges, submission_of(judges[0].task, judges[0].recipe.data, None, folder / "x.csv").rows)


@pytest.fixture
def infer(clock: Clock, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    """What is written within so many seconds of the clock, from now on."""

    def within(seconds: float, name: str = "") -> np.ndarray:
        clock.now = 0.0
        monkeypatch.setattr(infer_deadline, "deadline_from", lambda *_: Deadline(seconds, 0.0, clock))
        out = tmp_path / f"{name or seconds}.csv"
        infer_within("1s", [each.folder for each in judges_in(folder)], None, out)
        table = pd.read_csv(out, dtype={"id": str})
        assert table["id"].tolist() == pd.read_csv(folder / "rows/test.csv", dtype={"id": str})["id"].tolist()
        return table[COLUMNS].to_numpy()

    return within


def test_deadlines_are_kept_with_a_twentieth_to_spare(
    infer: Callable[..., np.ndarray], clock: Clock, whole: np.ndarray, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    np.testing.assert_allclose(infer(1e9), whole, atol=1e-6)
    assert list(tmp_path.iterdir()) == [tmp_path / "1000000000.0.csv"]  # nothing else is left
    everything, done, written = clock.now, [], []
    for part in (0.12, 0.26, 0.4):
        capsys.readouterr()
        written.append(infer(seconds := part * everything / 0.95))
        assert 0.95 * seconds - 3 * clock.slowest < clock.now <= 0.95 * seconds
        shown = " ".join(capsys.readouterr().out.split())
        done.append(sum(map(int, re.findall(r"│ fold\d │ \d │ (\d+) │", shown))))
        unjudged = int((np.abs(written[-1] - [0.3, 0.3, 0.4]).max(axis=1) < 1e-9).sum())
        assert (f"{unjudged} of 24 rows were not judged even once" in shown) == (part < 0.25) == (unjudged > 0)
        assert "the same command resumes from there" in shown
    assert 0 < done[0] < 24 <= done[1] < done[2] < 48
    assert np.abs(written[2] - whole).max() > 1e-3  # control of the first comparison
    np.testing.assert_array_equal(infer(1e-9, f"{seconds}"), written[2])  # it resumes too late: nothing is lost
    assert np.ptp(infer(1e-9), axis=0).max() == 0  # control: there was nothing to lose
    monkeypatch.setattr(deadline, "CAUTION", 0.0)  # control: a micro-batch that does not fit is begun
    infer(seconds := 0.2 * everything)
    assert clock.now > 0.95 * seconds


def test_special_rows_are_predicted_as_without_a_deadline(
    infer: Callable[..., np.ndarray], folder: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_kinds(model: Path, overrides: Sequence[str] = ()) -> SavedJudge:
        kinds = (Kind("same answers", 40, (0.1, 0.1, 0.8)), Kind("A very long", 5, (0.6, 0.2, 0.2)))
        return replace(read_judge(model, overrides), kinds=kinds)

    monkeypatch.setattr(infer_deadline, "read_judge", with_kinds)
    monkeypatch.setattr(LoadedJudge, "become", lambda self, saved: JudgeModel(saved))
    judges = [with_kinds(each.folder) for each in judges_in(folder)]
    submission = submission_of(judges[0].task, judges[0].recipe.data, None, folder / "x.csv")
    expected = average(judges, submission.rows)
    found = infer(1e9, "kinds")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    special = submission.rows.kinds >= 0
    changed = np.abs(found - whole).max(axis=1) > 1e-3
    assert special.any() and np.array_equal(changed, special)


def test_a_mistake_replaces_no_submission(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    out, models = tmp_path / "out.csv", [each.folder for each in judges_in(folder)]
    out.write_text("an earlier one")
    with pytest.raises(ValueError, match=r"model\.base"):
        infer_within("1h", models, None, out, [f"model.base={tmp_path / 'nowhere'}"])
    swaps = iter(["judge.swap=true", "judge.swap=false"])
    monkeypatch.setattr(infer_deadline, "read_judge", lambda model, overrides: read_judge(model, [next(swaps)]))
    with pytest.raises(ValueError, match=r"set judge\.swap=true or judge\.swap=false"):
        infer_within("1h", models, None, out)
    assert out.read_text() == "an earlier one"


def test_each_chunk_has_the_rows_that_gain_most_for_their_time() -> None:
    rng = np.random.default_rng(0)
    close, sure = [0.35, 0.35, 0.3], [0.9, 0.05, 0.05]
    lengths, probabilities = np.array([500, 100, 100, 500, 100]), np.array([close, sure, close, sure, close])
    values = worth(probabilities, lengths)
    assert np.concatenate(chunks(values, lengths, 10)).tolist() == [2, 4, 1, 0, 3]
    lengths, probabilities = rng.integers(100, 2000, 1000), rng.dirichlet([1, 1, 1], 1000)
    found = chunks(worth(probabilities, lengths), lengths, 5000)
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(1000))
    sums = [lengths[each].sum() for each in found]
    assert len(found) == round(lengths.sum() / (CHUNK * 5000)) and max(sums) - min(sums) < 4000
    means = [worth(probabilities[each], lengths[each]).mean() for each in found]
    assert means == sorted(means, reverse=True)


def job_for(folder: Path, tmp_path: Path, started: float) -> Job:
    models = [str(each.folder) for each in judges_in(folder)]
    return Job(models, [], None, str(tmp_path / "x.csv"), 1000.0, started, 0.0, str(tmp_path), 2, os.getpid())


def test_shares_are_joined_in_order(clock: Clock, folder: Path, tmp_path: Path, whole: np.ndarray) -> None:
    job = job_for(folder, tmp_path, time.time())
    for share in range(2):
        judge_share(job, share)
    tallies = [Tally.load(job.tally(share)) for share in range(2)]
    assert [(tally.count > 0).sum() for tally in tallies] == [12, 12]
    found = Tally.joined(tallies).mean(np.zeros(3))
    np.testing.assert_allclose(found, whole, atol=1e-6)
    assert np.abs(found - tallies[0].mean(np.zeros(3))).max() > 0.1  # control: one share is not everything


def test_rows_are_dealt_evenly() -> None:
    lengths = np.random.default_rng(0).lognormal(7, 1, 1000).astype(np.int64)
    dealt = deal(lengths, 4)
    np.testing.assert_array_equal(np.sort(np.concatenate(dealt)), np.arange(1000))
    sums = [lengths[each].sum() for each in dealt]
    assert max(sums) < 1.01 * min(sums)
    assert max(np.add.reduceat(lengths, [0, 250, 500, 750])) > 1.05 * min(sums)  # control: as they come


def test_a_process_that_fails_says_why_and_one_that_is_late_is_not_waited_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    judges, started, reports = judges_in(folder), [], list[Tally]()
    rows = submission_of(judges[0].task, judges[0].recipe.data, None, tmp_path / "x.csv").rows
    monkeypatch.setattr(shares, "start_process", lambda words, log, gpu: start_process(["no.module"], log, gpu))
    with pytest.raises(ValueError, match=r"process \d ended with status 1: .*No module named .*share\d.log"):
        judge_side_by_side(job_for(folder, tmp_path, time.time()), judges, rows, reports.append)
    assert [report.rows.sum() for report in reports] == [0]

    def sleeping(words: object, log: Path, gpu: object) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[-1]

    monkeypatch.setattr(shares, "start_process", sleeping)
    judge_side_by_side(job_for(folder, tmp_path, time.time() - 980), judges, rows, reports.append)
    assert [tally.count.sum() for tally in reports] == [0, 0]
    assert "not all processes ended in time" in capsys.readouterr().out
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_a_process_ends_with_the_one_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *each: sent.append(each))
    shares._end_with(parent=-1)
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_what_a_resumed_process_read_back_says_nothing_about_speed() -> None:
    clock = Clock()
    pace = Pace(Deadline(100, 0, clock))
    with pace.measuring():
        clock.now += 50
    assert pace.expected(1) == 0
    with pace.measuring():
        clock.now += 10
        pace.add(5, 5)
        assert pace.expected(1) == 2
    assert pace.seconds == 10
    assert pace.fits(11) and not pace.fits(12)  # 35 seconds are left, of which a micro-batch takes at most 3 per token
    assert Pace(Deadline(100, 0, clock), reserve=34).has(0.5) and not Pace(Deadline(100, 0, clock), reserve=36).has(0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--deadline", "soon"], "--deadline soon is not a time"),
        (["--at-once", "2"], "--at-once is for work before a deadline"),
        (["--deadline", "1h", "--at-once", "0"], "--at-once is 0: give a number from 1"),
        (["--deadline", "1h", "--recipe", "blend.json"], "blend.json is a blend, and --deadline is for one run"),
    ],
)
def test_wrong_arguments(
    words: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert status_of_arena(monkeypatch, "infer", *words) == 2
    assert message in capsys.readouterr().out
    assert not (folder / "submission.csv").exists()


@pytest.mark.slow  # real processes import torch anew
def test_two_processes(
    folder: Path, loaded: LoadedJudge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert status_of_arena(monkeypatch, "infer", "--out", "one.csv") == 0
    assert status_of_arena(monkeypatch, "infer", "--out", "two.csv", "--deadline", "1h", "--at-once", "2") == 0
    one, two = (pd.read_csv(folder / name) for name in ("one.csv", "two.csv"))
    assert one["id"].tolist() == two["id"].tolist()
    np.testing.assert_allclose(one[COLUMNS], two[COLUMNS], atol=1e-6)
    assert "2 processes share the rows" in capsys.readouterr().out
    assert not (folder / "two.csv.parts").exists()
