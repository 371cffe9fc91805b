"""What every promise is tried on: a tiny base, rows, the commands, and the results of a run that nothing disturbed."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import arena.demo.synthetic
import arena.inference.infer
import arena.inference.judge_model
import arena.inference.saved
import arena.model.classifier
import arena.reporting.report
import arena.training.run
import arena.training.trainer  # all that a command needs, so that a fork imports nothing
from arena import cli
from arena.inference.logits import LogitsCache
from arena.storage.manifest import damage
from arena.training.checkpoint_manager import CheckpointManager
from tests.helpers import make_base, write_rows
from tests.torture.processes import Child, ask

# several micro-batches a step, random numbers to go on with, a checkpoint each step, two evaluations in five steps
SETTINGS = (
    "data.synthetic_rows=null", "data.folds=3", "prompt.max_length=128", "packing.budget=256", "train.batch_size=8",
    "train.evaluate_every=3", "train.checkpoint_every=1", "model.lora.dropout=0.1",
)  # fmt: skip


@dataclass
class Found:
    """What came of a promise.

    Attributes:
        tried, held: how often, and how often it was kept.
        note: what else was counted.
        failures: what was not kept, in words.
    """

    promise: str
    asked: str
    tried: int = 0
    held: int = 0
    note: str = ""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, why: str | None) -> None:
        """Books one trial; `why` it failed, or None."""
        self.tried += 1
        self.held += why is None
        if why is not None:
            self.failures.append(why)


@dataclass(frozen=True)
class Ground:
    """A folder with all that trials share: `base`, `rows`, `cache`, and the undisturbed run in `straight`."""

    folder: Path
    fraction: float = 1.0

    def times(self, count: int, least: int = 1) -> int:
        """How many of `count` trials this run makes."""
        return max(least, round(count * self.fraction))

    def overrides(self, *more: str) -> list[str]:
        """The settings of a trial."""
        places = (f"model.base={self.folder / 'base'}", f"data.path={self.folder / 'rows'}")
        return [*places, f"data.cache={self.folder / 'cache'}", *SETTINGS, *more]

    def train(self, runs: Path, *more: str) -> list[str]:
        """The arguments of `arena train`."""
        return ["train", "--runs", str(runs), *self.overrides(*more)]

    def infer(self, out: Path, runs: Path | None = None) -> list[str]:
        """The arguments of `arena infer` with the undisturbed run's judge."""
        return ["infer", "--runs", str(runs or self.folder / "straight"), "--out", str(out)]

    @functools.cached_property
    def expected(self) -> dict[str, str]:
        """The results of the undisturbed run."""
        return outcome(self.folder / "straight")

    @functools.cached_property
    def submission(self) -> bytes:
        """The undisturbed submission."""
        return (self.folder / "straight.csv").read_bytes()

    def place(self, name: str) -> Path:
        """A new, empty folder of that name."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place


def prepare(folder: Path, fraction: float) -> Ground:
    """Makes base and rows, trains and judges undisturbed, each in a process of its own."""
    ground = Ground(folder, fraction)
    ask(lambda: str(make_base(folder / "base", num_hidden_layers=2, hidden_size=32, head_dim=16)), folder)
    write_rows(folder / "rows", n=60, n_test=24)
    done(ground.train(folder / "straight"), folder / "train.txt")
    done(ground.infer(folder / "straight.csv"), folder / "infer.txt")
    return ground


def command(arguments: list[str], *, shards: bool = True, pause: float = 0.0) -> None:
    """Runs a command as the shell's `arena` does.

    Args:
        shards: logits are kept after every micro-batch, not every 20 seconds: there is more to break.
        pause: seconds that every forward takes longer, so that signals meet it.
    """
    if shards:
        arena.training.held_out.LogitsCache = functools.partial(LogitsCache, seconds=0.0)
        arena.inference.judge_model.LogitsCache = functools.partial(LogitsCache, seconds=0.0)
    if pause:
        forward = arena.model.classifier.PackedClassifier.forward

        def slow(self: Any, batch: Any) -> Any:
            time.sleep(pause)
            return forward(self, batch)

        arena.model.classifier.PackedClassifier.forward = slow
    sys.argv = ["arena", *arguments]
    cli.main()


def start(arguments: list[str], shown: Path, **options: Any) -> Child:
    """Starts a command in a process of its own."""
    return Child(lambda announce: command(arguments, **options), shown)


def done(arguments: list[str], shown: Path) -> None:
    """Runs a command to its end.

    Raises:
        RuntimeError: it ended otherwise than well; with what it printed.
    """
    child = start(arguments, shown)
    status = child.wait()
    if status != 0:
        raise RuntimeError(f"`arena {arguments[0]}` ended with {status}:\n{child.text()[-2000:]}")


def fold_of(runs: Path) -> Path:
    return runs / "demo/fold0"


def checkpoints_of(runs: Path) -> CheckpointManager:
    return CheckpointManager(fold_of(runs) / "checkpoints")


def outcome(runs: Path) -> dict[str, str]:
    """Digests of all that a finished run came to, less what tells the time."""
    folder = fold_of(runs)
    last = checkpoints_of(runs).steps()[-1]
    files = [
        checkpoints_of(runs).step(last) / "weights.safetensors",
        folder / "oof.csv",
        *sorted((folder / "model").iterdir()),
    ]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    card = json.loads((folder / "model/judge.json").read_text())
    del card["recipe"]["data"]["cache"]  # some trials have one of their own
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = ("log_loss", "accuracy", "steps", "best_step", "micro_batches", "tokens", "unique_tokens")
    return {
        **found,
        "judge.json": json.dumps(card),
        "log": json.dumps(log(runs)),
        "metrics": json.dumps({key: metrics[key] for key in kept}),
    }


def log(runs: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without the times."""
    lines = (fold_of(runs) / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in lines]


def steps_logged(runs: Path) -> int:
    """The last step that the log of a run has a whole line of."""
    path = fold_of(runs) / "log.jsonl"
    last = 0
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            last = max(last, int(json.loads(line)["step"]))
        except ValueError:  # cut short
            continue
    return last


def steps_saved(runs: Path) -> int:
    """The last step that has a whole checkpoint."""
    whole = [step for step in checkpoints_of(runs).steps() if damage(checkpoints_of(runs).step(step)) is None]
    return whole[-1] if whole else 0


def differs(ground: Ground, runs: Path) -> str | None:
    """What of a finished run is not as that of the undisturbed one."""
    if not (fold_of(runs) / "metrics.json").is_file():
        return "it is not finished"
    found = outcome(runs)
    odd = sorted(name for name in found.keys() | ground.expected.keys() if found.get(name) != ground.expected.get(name))
    return f"{', '.join(odd)} of another content" if odd else None
