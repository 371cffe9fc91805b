"""A run that is asked to end saves, says so, and goes on exactly, wherever it was: in a step, in an evaluation."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from arena.inference.logits import LogitsCache
from arena.stopping import MORE_TO_DO, Stop, Stopped, ending_at_once, stopping
from arena.storage.mirror import Mirror
from arena.training import held_out as held_out_module
from arena.training.run import run_fold
from tests.helpers import tiny_recipe
from tests.training.test_trainer import log, make, weights

SMALL = ("packing.budget=128", "model.lora.dropout=0.1")  # several micro-batches a step, and random numbers to resume


class Asked(Stop):
    """Asks for the end at the nth time it is called, and notes how often that was."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def __call__(self) -> bool:
        self.calls += 1
        if self.calls == self.at:
            self.signal = signal.SIGTERM
        return self.signal is not None


@pytest.fixture(autouse=True)
def shards_of_one_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out_module, "LogitsCache", partial(LogitsCache, seconds=0.0))


def run(folder: Path, base: Path, at: int | None) -> tuple[Any, Asked]:
    trainer = make(folder, base, *SMALL)
    trainer.stop = Asked(at)
    trainer.trained = trainer.run()  # type: ignore[attr-defined]
    return trainer, trainer.stop


@pytest.mark.parametrize("apart", [40, pytest.param(5, marks=pytest.mark.slow)])
def test_interrupted_anywhere_it_resumes_to_the_same_bits(apart: int, gemma2: Path, tmp_path: Path) -> None:
    straight, asked = run(tmp_path / "straight", gemma2, None)
    assert straight.plan.n_micro_batches > 2 * straight.plan.n_steps
    points = sorted({1, 2, 5, *range(7, asked.calls, apart), asked.calls - 1})
    assert len(points) >= 5
    where = set()
    for at in points:
        folder = tmp_path / f"at{at}"
        with pytest.raises(Stopped) as ended:
            run(folder, gemma2, at)
        assert ended.value.status == 128 + signal.SIGTERM
        where.add("evaluation" if list((folder / "run/logits").glob("*")) else "training")
        resumed, _ = run(folder, gemma2, None)
        assert torch.equal(weights(resumed), weights(straight)), at
        assert log(resumed) == log(straight), at
        assert resumed.trained.best.probabilities.tobytes() == straight.trained.best.probabilities.tobytes(), at
        assert resumed.checkpoints.steps() == straight.checkpoints.steps()
    assert where == {"training", "evaluation"}


def test_another_random_state_would_be_seen(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the random states of the step's beginning the resumed run is another."""
    straight, _ = run(tmp_path / "straight", gemma2, None)
    monkeypatch.setattr("arena.training.trainer.set_random_states", lambda states: None)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", gemma2, 2)
    monkeypatch.undo()
    resumed, _ = run(tmp_path / "cut", gemma2, None)
    assert not torch.equal(weights(resumed), weights(straight))


def test_a_deadline_ends_a_fold_and_the_same_call_resumes(gemma2: Path, tmp_path: Path) -> None:
    whole = run_fold(tiny_recipe(tmp_path, gemma2), 0, tmp_path / "whole")
    times = 0
    while True:
        recipe = tiny_recipe(tmp_path, gemma2, "train.max_seconds=0.001" if times < 4 else "train.max_seconds=600")
        try:
            metrics = run_fold(recipe, 0, tmp_path / "runs")
            break
        except Stopped as ended:
            assert ended.status == MORE_TO_DO and "0.001 seconds" in str(ended)
            times += 1
    assert times == 4
    for key in ("log_loss", "steps", "tokens", "best_step"):
        assert metrics[key] == whole[key]
    same = [(tmp_path / runs / "demo/fold0/oof.csv").read_bytes() for runs in ("whole", "runs")]
    assert same[0] == same[1]
    assert not (tmp_path / "runs/demo/fold0/logits").exists()


def test_signals_are_noted_once_and_handlers_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stopping() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop() and stop.stopped().status == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_hang_up_is_noted_and_a_second_one_changes_nothing() -> None:
    with ending_at_once():
        at_once = signal.getsignal(signal.SIGHUP)
        with stopping() as stop:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)  # the shell and the kernel both send one
            assert stop() and stop.stopped().status == 129
        assert signal.getsignal(signal.SIGHUP) == at_once
        with pytest.raises(SystemExit) as end:
            signal.raise_signal(signal.SIGHUP)
    assert end.value.code == 129


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ending_at_once(), stopping() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_resume_from_the_best_a_path_or_never(gemma2: Path, tmp_path: Path) -> None:
    straight = make(tmp_path, gemma2, "train.keep_last=9")
    straight.run()
    assert straight.checkpoints.steps() == [2, 3, 4, 5]
    end = weights(straight).clone()
    again = make(tmp_path, gemma2, "train.keep_last=9", f"train.resume={straight.checkpoints.step(2)}")
    again.run()
    assert torch.equal(weights(again), end) and log(again) == log(straight)
    assert len(list((tmp_path / "run/checkpoints").glob("archive-*/step-*"))) == 3
    best = make(tmp_path, gemma2, "train.keep_last=9", "train.resume=best")
    best.resume()
    assert best.done.step == again.checkpoints.best
    never = make(tmp_path, gemma2, "train.keep_last=9", "train.resume=never")
    never.resume()
    assert never.done.step == 0


def test_a_vanished_folder_and_a_full_disk_are_errors(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path / "gone", gemma2)
    (tmp_path / "gone/run").rmdir()
    with pytest.raises(OSError, match="run"):
        trainer.run()
    assert not (tmp_path / "gone/run/checkpoints").exists()
    full = make(tmp_path / "full", gemma2)
    calls = []

    def no_space(path: Path, *_: Any) -> None:
        calls.append(path)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("arena.training.checkpoint.write_manifest", no_space)
    with pytest.raises(OSError, match="No space left"):
        full.run()
    assert calls and full.checkpoints.steps() == [] and not list((tmp_path / "full/run/checkpoints").glob(".*"))


def test_nan_while_judging_is_a_failure(gemma2: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path, gemma2)
    score = trainer.classifier.model.base_model.model.score

    def poison(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out if trainer.classifier.training else out * float("nan")

    score.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match="not finite, first"):
        trainer.run()
    assert trainer.checkpoints.steps()[-1] == 3 and trainer.checkpoints.best is None
    assert not any("eval_log_loss" in json.loads(line) for line in trainer.log.path.read_text().splitlines())


def test_resumed_from_a_mirror_equals_resumed_from_disk(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends, its machine gone: on a fresh one the same call goes on from the store, to the same bytes."""
    whole = run_fold(tiny_recipe(tmp_path, gemma2), 0, tmp_path / "whole")
    store = tmp_path / "store"
    store.mkdir()
    elsewhere = f"train.mirror={store}"
    with pytest.raises(Stopped):
        run_fold(tiny_recipe(tmp_path, gemma2, elsewhere, "train.max_seconds=0.001"), 0, tmp_path / "first")
    assert list(store.rglob("step-*/manifest.json"))
    pulled: list[Path] = []
    pull = Mirror.pull
    monkeypatch.setattr(Mirror, "pull", lambda self, run: (found := pull(self, run), pulled.extend(found))[0])
    metrics = run_fold(tiny_recipe(tmp_path, gemma2, elsewhere), 0, tmp_path / "second")
    assert any(path.name.startswith("step-") for path in pulled)
    assert metrics["log_loss"] == whole["log_loss"] and metrics["steps"] == whole["steps"]
    for name in ("oof.csv", "model/adapter_model.safetensors"):
        files = [tmp_path / runs / "demo/fold0" / name for runs in ("whole", "second")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    steps = [
        len([line for line in (tmp_path / runs / "demo/fold0/log.jsonl").read_text().splitlines() if '"loss"' in line])
        for runs in ("whole", "second")
    ]
    assert steps[0] == steps[1] == whole["steps"]
    assert list(store.rglob("model/adapter_model.safetensors")), "the finished judge is there too"


def test_resuming_from_a_checkpoint_elsewhere_that_was_not_evaluated(gemma2: Path, tmp_path: Path) -> None:
    straight = make(tmp_path / "straight", gemma2, "train.keep_last=9")
    straight.run()
    elsewhere = make(tmp_path / "new", gemma2, "train.keep_last=9", f"train.resume={straight.checkpoints.step(3)}")
    elsewhere.run()
    assert torch.equal(weights(elsewhere), weights(straight))
    assert elsewhere.checkpoints.costs == straight.checkpoints.costs and elsewhere.checkpoints.steps() == [3, 4, 5]
