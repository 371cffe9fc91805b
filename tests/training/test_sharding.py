"""Weights shared out over two processes train as whole ones on one do, and take half the memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from arena.config import save_recipe
from tests.helpers import tiny_recipe
from tests.tasks.test_instruction_run import tiny, write_dolly
from tests.training.ranks import TRAIN, Ranks, forking
from tests.training.test_together import steps, weights
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
        bytes_of[name] = sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in parts}.values())
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


def compare(sharded: Path, plain: Path) -> None:
    """The same steps, evaluations and predictions, the same weights at the end and in the saved model."""
    ours, expected = steps(sharded), steps(plain)
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
    plain = ground.train(1, f"{kind}-one", kind)
    whole = ground.train(2, f"{kind}-whole", kind, code=MEASURED)
    sharded = ground.train(2, f"{kind}-sharded", kind, "train.shard=true", code=MEASURED)
    compare(sharded, plain)
    compare(whole, plain)
    for rank in range(2):
        ours, control = sizes(sharded, rank), sizes(whole, rank)
        for name in ("weights", "state"):
            assert 0.4 < ours[name] / control[name] < 0.6, (rank, name, ours, control)
