"""Ranks that fail, stop, are killed or become another number: none waits for one that is gone, and no work is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from arena.config import save_recipe
from arena.settings import Recipe
from tests.helpers import tiny_recipe
from tests.training.ranks import TRAIN, Ranks, forking
from tests.training.test_trainer import log_lines, relative

MODERATELY = 60  # seconds in which processes that lost another one have to end, on a busy machine
# What three ranks make of work that succeeds, fails or stops on some of them.
TOGETHER = """
accelerator, seen = processes.start(0), {}
def told(work, **options):
    try:
        return ranks.together(accelerator, work, **options)
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "status", None)]
def fails(at, error):
    if rank in at:
        raise error
    return rank
seen["results"] = told(lambda: rank * 10)
seen["patient"] = told(lambda: rank, patient=True)
seen["fails"] = told(lambda: fails([1], ValueError("no rows")))
seen["breaks"] = told(lambda: fails([2], KeyError("x")))
seen["stops"] = told(lambda: fails([2], Stopped("ended by SIGTERM", 143)))
seen["both"] = told(lambda: fails([0], Stopped("ended", 3)) if rank < 1 else fails([1], OSError("full")))
seen["own"] = ranks.on_every_rank(accelerator, lambda: rank)
order = []
def noted():
    order.append(rank)
    with open(f"{sys.argv[1]}/order", "a") as file:
        file.write(f"{rank}\\n")
    if rank == 0:
        time.sleep(0.3)
    return rank
seen["local"] = ranks.local_first(accelerator, noted)
ranks.BUCKET = 4
parameters = [torch.zeros(shape, dtype=dtype) for shape, dtype in
              (((3,), torch.float32), ((2, 2), torch.float32), ((2,), torch.float64), ((9,), torch.float32))]
for at, each in enumerate(parameters):
    if rank != 1 and not (rank == 2 and at == 1):  # a rank without gradients, and one that lacks some
        each.grad = torch.full_like(each, rank + 1.0)
ranks.sum_gradients(accelerator, parameters)
seen["sums"] = [each.grad.tolist() for each in parameters]
with open(f"{sys.argv[1]}/seen-{rank}", "w") as file:
    json.dump(seen, file)
"""
# The second rank fails in its second step.
FAILING = """
before, count = trainer.accumulate, []
def fails(*args):
    count.append(1)
    if rank == 1 and len(count) == 2:
        raise ValueError("the second step of this rank")
    return before(*args)
trainer.accumulate = fails
cli.main()
"""
# A rank waits in its third step, until it is told to go on, for a signal to be sent meanwhile.
WAITING = """
before, count = trainer.accumulate, []
def waits(*args):
    count.append(1)
    if len(count) == 3:
        open(f"{os.environ['PAUSES']}/paused-{rank}", "w").close()
        while not os.path.exists(f"{os.environ['PAUSES']}/go"):
            time.sleep(0.01)
    return before(*args)
trainer.accumulate = waits
cli.main()
"""


@dataclass(frozen=True)
class Ground:
    """A recipe, ranks to train it with, and the run of two that nothing disturbed."""

    ranks: Ranks
    recipe: Recipe
    folder: Path
    seconds: float

    def words(self, runs: str, *settings: str) -> list[str | Path]:
        return [
            "train", "--fold", "0", "--recipe", self.folder / "recipe.yaml", "--runs", self.folder / runs, *settings,
        ]  # fmt: skip

    def run(self, runs: str) -> Path:
        return self.folder / runs / "demo/fold0"

    def train(self, count: int, runs: str, *settings: str) -> Path:
        """Trains to the end with so many processes."""
        ends = self.ranks.ends(self.ranks.start(count, *self.words(runs, *settings)))
        assert ends == [0] * count, self.ranks.shown(0)
        return self.run(runs)


@pytest.fixture(scope="module")
def ground(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("together")
    settings = ["model.quantization=none", "model.dtype=float32", "train.checkpoint_every=1"]
    recipe = tiny_recipe(
        folder, gemma2, *settings, "train.keep_last=20", "train.evaluate_every=4", "train.batch_size=6"
    )
    (folder / "recipe.yaml").write_text(save_recipe(recipe), encoding="utf-8")
    with forking(folder) as ranks:
        made = Ground(ranks, recipe, folder, 0.0)
        made.train(2, "straight")
        start = time.monotonic()
        made.train(2, "dropout", "model.lora.dropout=0.1")
        yield Ground(ranks, recipe, folder, time.monotonic() - start)


def weights(run: Path) -> torch.Tensor:
    """Those of the last step, all in one row."""
    last = max((run / "checkpoints").glob("step-*"))
    saved = load_file(last / "weights.safetensors")
    return torch.cat([saved[name].reshape(-1) for name in sorted(saved)])


def steps(run: Path) -> list[dict[str, Any]]:
    """The log without times, and without what depends on the number of ranks."""
    apart = ("second", "micro_batches", "fill_rate", "unique")
    return [
        {key: line[key] for key in line if not any(each in key for each in apart)}
        for line in log_lines(run / "log.jsonl")
    ]


def test_ranks_agree_on_results_failures_and_stops(ground: Ground, tmp_path: Path) -> None:
    assert ground.ranks.ends(ground.ranks.start(3, tmp_path, code=TOGETHER)) == [0, 0, 0], ground.ranks.shown(0)
    seen = [json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in range(3)]
    for rank, each in enumerate(seen):
        assert each["results"] == [0, 10, 20] and each["patient"] == [0, 1, 2]
        own, other = ["ValueError", "no rows", None], ["ValueError", "process 1 failed: no rows", None]
        assert each["fails"] == (own if rank == 1 else other)
        own, other = ["KeyError", "'x'", None], ["RuntimeError", "process 2 failed with KeyError: 'x'", None]
        assert each["breaks"] == (own if rank == 2 else other)
        assert each["stops"] == ["Stopped", "ended by SIGTERM", 143]  # on all, with the status of the one
        assert each["both"][0] == ("OSError" if rank == 1 else "ValueError")  # an error counts before a stop
        assert each["own"] == each["local"] == rank
        assert each["sums"] == [[4.0] * 3, [[1.0] * 2] * 2, [4.0] * 2, [4.0] * 9]
    assert (tmp_path / "order").read_text().split()[0] == "0"  # the first of the machine, and only then the others


def test_a_rank_that_fails_ends_all(ground: Ground) -> None:
    found = ground.ranks.ends(ground.ranks.start(2, *ground.words("failing"), code=FAILING), MODERATELY)
    assert found == [2, 2]
    assert "process 1 failed: the second step of this rank" in ground.ranks.shown(0)


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_rank_stops_all(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, signalled: int
) -> None:
    """Within a step, which all give up and take anew; also the random numbers of dropout are the same to the bit."""
    words = ground.words(f"signal-{signalled}", "model.lora.dropout=0.1")
    code = f"os.environ['PAUSES'] = {str(tmp_path)!r}\n{WAITING}"
    pids = ground.ranks.start(2, *words, code=code)
    while len(list(tmp_path.glob("paused-*"))) < 2:
        time.sleep(0.02)
    os.kill(pids[signalled], signal.SIGTERM)
    (tmp_path / "go").touch()
    assert ground.ranks.ends(pids, MODERATELY) == [143, 143]
    run = ground.train(2, f"signal-{signalled}", "model.lora.dropout=0.1")
    assert torch.equal(weights(run), weights(ground.run("dropout")))
    assert steps(run) == steps(ground.run("dropout"))


def killed(ground: Ground, seed: int, *, all_ranks: bool) -> None:
    """Kills one rank of two, or both, at a random moment; the run resumes to the same end."""
    draw, name = np.random.default_rng([seed, all_ranks]), f"killed-{seed}-{all_ranks}"
    pids = ground.ranks.start(2, *ground.words(name, "model.lora.dropout=0.1"))
    time.sleep(draw.uniform(0.3, 1) * ground.seconds)
    lost = pids if all_ranks else [pids[int(draw.integers(2))]]
    for pid in lost:
        os.kill(pid, signal.SIGKILL)  # until it is waited for, the id is that of the process, also if it has ended
    ends = ground.ranks.ends(pids, MODERATELY)
    assert None not in ends, f"seed {seed}: a rank hangs\n{ground.ranks.shown(0)}\n{ground.ranks.shown(1)}"
    run = ground.train(2, name, "model.lora.dropout=0.1")
    assert torch.equal(weights(run), weights(ground.run("dropout"))) and steps(run) == steps(ground.run("dropout"))


@pytest.mark.parametrize("all_ranks", [False, True])
def test_killed_ranks_resume(ground: Ground, all_ranks: bool) -> None:
    for seed in range(2):
        killed(ground, seed, all_ranks=all_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("all_ranks", [False, True])
def test_ranks_killed_at_many_moments_resume(ground: Ground, all_ranks: bool) -> None:
    for seed in range(2, 32):
        killed(ground, seed, all_ranks=all_ranks)


def test_killed_ranks_whose_disk_is_gone_resume_from_the_mirror(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a spot machine: of all that the run wrote only the mirror is left, and the same command goes on."""
    (tmp_path / "mirror").mkdir()
    words = ground.words("lost", "model.lora.dropout=0.1", f"train.mirror={tmp_path / 'mirror'}")
    pids = ground.ranks.start(2, *words, code=f"os.environ['PAUSES'] = {str(tmp_path)!r}\n{WAITING}")
    started = time.monotonic()
    while len(list(tmp_path.glob("paused-*"))) < 2 or not list(tmp_path.rglob("step-00000002/manifest.json")):
        assert time.monotonic() < started + MODERATELY, ground.ranks.shown(0)
        time.sleep(0.02)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert ground.ranks.ends(pids) == [-signal.SIGKILL] * 2
    assert [line["step"] for line in steps(ground.run("lost"))] == [1, 2]
    shutil.rmtree(ground.folder / "lost")
    assert ground.ranks.ends(ground.ranks.start(2, *words)) == [0, 0], ground.ranks.shown(0)
    assert "step-00000002" in ground.ranks.shown(0).partition("fetched from")[2]
    assert torch.equal(weights(ground.run("lost")), weights(ground.run("dropout")))
    assert steps(ground.run("lost")) == steps(ground.run("dropout"))


def resumed(ground: Ground, count: int, of: str, step: int) -> None:
    """A checkpoint resumes on another number of ranks: the same examples in each step, the same end."""
    straight = ground.run(of)
    checkpoint = straight / f"checkpoints/step-{step:08d}"
    run = ground.train(count, f"{of}-{step}-on-{count}", f"train.resume={checkpoint}")
    whole, rest = steps(straight), steps(run)
    rest = [line for line in rest if line["step"] > step]
    whole = [line for line in whole if line["step"] > step]
    assert len(rest) == len(whole) > 2
    for line, other in zip(rest, whole, strict=True):
        assert line["step"] == other["step"] and line.get("tokens") == other.get("tokens")
        for name in ("loss", "grad_norm", "log_loss", "eval_log_loss"):
            assert (name in line) == (name in other)
            assert name not in line or line[name] == pytest.approx(other[name], rel=1e-5)
    assert relative(weights(run), weights(straight)) < 1e-5


def test_a_checkpoint_of_two_ranks_resumes_on_one(ground: Ground) -> None:
    resumed(ground, 1, "straight", 3)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 4])
def test_a_checkpoint_of_two_ranks_resumes_on_more(ground: Ground, count: int) -> None:
    resumed(ground, count, "straight", 3)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_other_numbers_of_ranks_train_alike(ground: Ground, count: int) -> None:
    run = ground.train(count, f"straight-of-{count}")
    for name in ("loss", "grad_norm", "log_loss"):
        one, two = ([line[name] for line in steps(each) if name in line] for each in (run, ground.run("straight")))
        assert one == pytest.approx(two, rel=1e-5)
    assert relative(weights(run), weights(ground.run("straight"))) < 1e-4


def test_a_dropped_rank_would_be_seen(ground: Ground) -> None:
    """The control: without the gradient of one rank, the first step has another norm."""
    code = "ranks.distributed.all_reduce = lambda flat: flat.zero_() if rank else None\n" + TRAIN
    ground.ranks.ends(ground.ranks.start(2, *ground.words("dropped"), code=code))
    first, wrong = (steps(ground.run(each))[0] for each in ("straight", "dropped"))
    assert wrong["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert abs(wrong["grad_norm"] / first["grad_norm"] - 1) > 0.01
