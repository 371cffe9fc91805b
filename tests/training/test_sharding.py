"""Weights shared out over two processes train as whole ones on one do, and take half the memory."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from arena.config import change, load_recipe, save_recipe
from arena.model.sharding import check_sharding
from tests.helpers import tiny_recipe
from tests.tasks.test_instruction_run import tiny, write_dolly
from tests.training.ranks import TRAIN, Ranks, forking
from tests.training.test_together import FAILING, MODERATELY, WAITING, steps, weights
from tests.training.test_trainer import relative

KINDS = {
    "lora": ["model.checkpointing=elementwise_and_mlp"],
    "full": ["model.tune=full", "model.checkpointing=elementwise", "train.lr=1e-4"],
}
# After training, each rank writes the bytes that its weights and the optimizer's state take.
MEASURED = """
before = trainer.Trainer.run
def measured(self):
    found = before(self)
    state = [each for values in self.optimizer.state.values() for each in values.values()]
    bytes_of = {}
    for name, tensors in (("weights", self.classifier.parameters()), ("state", state)):
        parts = [getattr(each, "_local_tensor", each) for each in tensors if each.dim()]
        storages = [each.untyped_storage() for each in parts]
        bytes_of[name] = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
    with open(f"{self.folder}-bytes-{rank}", "w") as file:
        json.dump(bytes_of, file)
    return found
run.Trainer.run = measured
cli.main()
"""
FORGOTTEN = (
    "from arena.model import sharding\nsharding.FSDPModule.set_gradient_divide_factor = lambda self, factor: None\n"
)


@dataclass(frozen=True)
class Ground:
    """Recipes by name, and ranks to train them with."""

    ranks: Ranks
    folder: Path

    def start(self, count: int, runs: str, kind: str, *settings: str, code: str = TRAIN) -> list[int]:
        recipe = self.folder / f"{kind}.yaml"
        words = ["train", "--fold", "0", "--recipe", recipe, "--runs", self.folder / runs, *settings]
        return self.ranks.start(count, *words, code=code)

    def train(self, count: int, runs: str, kind: str, *settings: str, code: str = TRAIN) -> Path:
        """Trains to the end with so many processes."""
        ends = self.ranks.ends(self.start(count, runs, kind, *settings, code=code))
        assert ends == [0] * count, "\n".join(self.ranks.shown(rank) for rank in range(count))
        return next((self.folder / runs).glob("*/fold0"))

    def plain(self, kind: str) -> Path:
        """A run of one process, trained when it is first asked for."""
        return self._once(1, f"{kind}-one", kind)

    def sharded(self, kind: str) -> Path:
        """A run of two processes that share the weights out, trained when it is first asked for."""
        return self._once(2, f"{kind}-sharded", kind, "train.shard=true")

    def _once(self, count: int, runs: str, kind: str, *settings: str) -> Path:
        done = next((self.folder / runs).glob("*/fold0/metrics.json"), None)
        return self.train(count, runs, kind, *settings, code=MEASURED) if done is None else done.parent


@pytest.fixture(scope="module")
def ground(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("sharding")
    common = ["model.quantization=none", "model.dtype=float32", "train.batch_size=6", "packing.budget=512"]
    common += ["train.checkpoint_every=1", "train.evaluate_every=3", "train.keep_last=20"]
    for kind, settings in KINDS.items():
        recipe = tiny_recipe(folder, gemma2, *common, *settings)
        (folder / f"{kind}.yaml").write_text(save_recipe(recipe), encoding="utf-8")
    language = tiny(folder, gemma2, write_dolly(folder / "dolly"), "train.epochs=1", "train.lr=1e-3")
    (folder / "language.yaml").write_text(save_recipe(language), encoding="utf-8")
    with forking(folder) as ranks:
        yield Ground(ranks, folder)


def compare(sharded: Path, plain: Path, after: int = 0) -> None:
    """The same steps, evaluations and predictions, and the same weights at the end.

    Args:
        after: the step from which the sharded run was resumed.
    """
    ours, expected = ([line for line in steps(each) if line["step"] > after] for each in (sharded, plain))
    assert len(ours) == len(expected) > 3
    for line, other in zip(ours, expected, strict=True):
        assert line.keys() == other.keys() and line["step"] == other["step"]
        for name in {"loss", "grad_norm", "log_loss", "eval_log_loss"} & line.keys():
            assert line[name] == pytest.approx(other[name], rel=1e-5), (name, line["step"])
    assert relative(weights(sharded), weights(plain)) < 1e-4
    predicted, of_plain = (
        pd.read_csv(each / "oof.csv").select_dtypes(float).to_numpy() for each in (sharded, plain)
    )  # fmt: skip
    assert np.allclose(predicted, of_plain, atol=1e-4)


def sizes(run: Path, rank: int) -> dict[str, int]:
    found: dict[str, int] = json.loads(run.with_name(f"fold0-bytes-{rank}").read_text())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_sharded_processes_train_as_one(ground: Ground, kind: str) -> None:
    compare(ground.sharded(kind), ground.plain(kind))


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_each_process_holds_half(ground: Ground, kind: str) -> None:
    """Of the weights and of the optimizer's state that each has otherwise."""
    whole = ground.train(2, f"{kind}-whole", kind, code=MEASURED)
    for rank in range(2):
        ours, control = sizes(ground.sharded(kind), rank), sizes(whole, rank)
        for name in ("weights", "state"):
            assert 0.49 < ours[name] / control[name] < 0.52, (rank, name, ours, control)


def test_another_number_of_processes_resumes_it(ground: Ground) -> None:
    """A checkpoint of two sharded processes resumes on one, and that of one whole model on two sharded."""
    whole, sharded = ground.plain("lora"), ground.sharded("lora")
    from_step = "checkpoints/step-00000003"
    compare(ground.train(1, "resumed-on-one", "lora", f"train.resume={sharded / from_step}"), whole, after=3)
    words = "train.shard=true", f"train.resume={whole / from_step}"
    resumed = ground.train(2, "resumed-sharded", "lora", *words, code=MEASURED)
    compare(resumed, whole, after=3)
    assert sizes(resumed, 0)["state"] == sizes(sharded, 0)["state"]  # no part keeps the memory of the whole


@pytest.mark.slow
def test_language_models_are_sharded_too(ground: Ground) -> None:
    """With an output layer that is also the embedding, trained or not."""
    for name, settings in {"adapters": [], "all": ["model.tune=full"]}.items():
        plain = ground.train(1, f"language-{name}", "language", *settings)
        compare(ground.train(2, f"language-{name}-2", "language", "train.shard=true", *settings), plain)


def test_gradients_that_are_averaged_would_be_seen(ground: Ground) -> None:
    """The control: as FSDP does by itself, the first step has half the gradient."""
    wrong = steps(ground.train(2, "averaged", "lora", "train.shard=true", code=FORGOTTEN + TRAIN))[0]
    first = steps(ground.plain("lora"))[0]
    assert wrong["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert wrong["grad_norm"] == pytest.approx(first["grad_norm"] / 2, rel=1e-4)


@pytest.mark.slow
def test_half_precision_is_within_its_noise(ground: Ground) -> None:
    """Sharded and whole bfloat16 differ from each other about as little as each does from float32."""
    for kind in KINDS:
        exact = ground.plain(kind)
        runs = [
            ground.train(2, f"{kind}-half-{shard}", kind, "model.dtype=bfloat16", f"train.shard={shard}")
            for shard in ("false", "true")
        ]
        losses, of_whole, of_sharded = (
            np.array([line["loss"] for line in steps(each) if "loss" in line]) for each in (exact, *runs)
        )
        noise = np.abs(of_whole - losses).max()
        assert 0 < np.abs(of_sharded - losses).max() < 3 * noise


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.quantization=nf4"], "bitsandbytes #1945"),
        (["model.quantization=int8"], "model.quantization=int8"),
        (["model.quantization=none", "model.dtype=float16"], "overflow in float16"),
        (["model.quantization=none", "train.optimizer=adamw8bit"], "set train.optimizer=adamw"),
        (["model.quantization=none", "train.track=wandb", "train.tracking.watch=all"], "needs whole weights"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: list[str], words: str) -> None:
    recipe = load_recipe("demo", settings)
    check_sharding(recipe)
    with pytest.raises(ValueError, match=words):
        check_sharding(change(recipe, ["train.shard=true"]))


# The second rank fails within the forward of a micro-batch.
BREAKING = """
from arena.model.memory import fused
before, count = fused._norm, []
def breaks(*args):
    count.append(1)
    if rank == 1 and len(count) == 50:
        raise RuntimeError("out of memory")
    return before(*args)
fused._norm = breaks
cli.main()
"""


def test_a_rank_that_fails_ends_all(ground: Ground) -> None:
    pids = ground.start(2, "failing", "lora", "train.shard=true", code=FAILING)
    assert ground.ranks.ends(pids, MODERATELY) == [2, 2]
    assert "process 1 failed: the second step of this rank" in ground.ranks.shown(0)


def test_a_rank_that_fails_where_others_wait_for_it_ends_all(ground: Ground) -> None:
    pids = ground.start(2, "breaking", "lora", "train.shard=true", code=BREAKING)
    assert ground.ranks.ends(pids, MODERATELY) == [2, 1]
    assert "another process of this run has ended" in ground.ranks.shown(0)
    assert "RuntimeError: out of memory" in ground.ranks.shown(1)


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_rank_stops_all(ground: Ground, tmp_path: Path, signalled: int) -> None:
    """Within a step, which all give up and take anew."""
    code = f"os.environ['PAUSES'] = {str(tmp_path)!r}\n{WAITING}"
    pids = ground.start(2, f"signal-{signalled}", "lora", "train.shard=true", code=code)
    while len(list(tmp_path.glob("paused-*"))) < 2:
        time.sleep(0.02)
    os.kill(pids[signalled], signal.SIGTERM)
    (tmp_path / "go").touch()
    assert ground.ranks.ends(pids, MODERATELY) == [143, 143]
    run = ground.train(2, f"signal-{signalled}", "lora", "train.shard=true")
    compare(run, ground.plain("lora"))
