"""Damage: bytes changed and files cut in the checkpoints of a real run; none is loaded, the one before is."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arena.config import load_recipe
from arena.data.prepare import prepare_fold
from arena.model.backbone import load_base, load_tokenizer
from arena.model.tuning import adapt
from arena.tasks import task_of
from arena.tasks.preference import CLASSES
from arena.training.checkpoint import load_checkpoint
from arena.training.checkpoint_manager import CheckpointManager
from arena.training.optimizer import make_optimizer, make_schedule, trainable
from tests.torture.ground import Found, Ground, checkpoints_of, differs, start
from tests.torture.processes import ask

KINDS = ("bit", "byte", "block", "cut", "empty", "grown")


def refuses_damage(ground: Ground) -> Found:
    found = Found(
        "byte flips and truncations in checkpoint files", "1,000 of 1,000 refused or rolled back, none loaded"
    )
    place = ground.place("flips")
    answer = ask(lambda: _trials(ground, place, ground.times(1000, 40)), place)
    found.tried, found.held, found.failures = answer["tried"], answer["held"], answer["failures"]
    runs = ground.times(4)
    for turn in range(runs):
        found.count(_goes_on_from_the_one_before(ground, turn))
    kinds = ", ".join(f"{count} {kind}" for kind, count in answer["kinds"].items())
    found.note = f"{kinds}; {answer['controls']} controls loaded; {runs} whole runs went on from the one before"
    return found


def _trials(ground: Ground, place: Path, count: int) -> dict[str, Any]:
    """Damages, looks at what is chosen and loaded, and mends, so many times."""
    torch.set_num_threads(1)
    kept = CheckpointManager(shutil.copytree(checkpoints_of(ground.folder / "straight").folder, place / "checkpoints"))
    before, last = kept.steps()
    state = _state(ground)
    files = [path for path in sorted(kept.folder.rglob("*")) if path.is_file() and str(last) in path.parent.name[-2:]]
    draws, kinds, failures, controls = random.Random(0), Counter[str](), [], 0
    assert len(files) == 6, files
    for turn in range(count):
        path, kind = files[turn % len(files)], KINDS[turn // len(files) % len(KINDS)]
        whole = path.read_bytes()
        path.write_bytes(spoilt(whole, kind, draws))
        try:
            why = _taken(kept, path, before, last, state)
        finally:
            path.write_bytes(whole)
        kinds[kind] += 1
        if why:
            failures.append(f"{path.relative_to(place)}, {kind}: {why}")
        if turn % 50 == 0:
            unread = CheckpointManager(kept.folder)
            assert unread.choose("auto") == kept.step(last) and unread.best == last
            load_checkpoint(kept.step(last), *state)
            controls += 1
    return {
        "tried": count, "held": count - len(failures), "failures": failures, "kinds": kinds, "controls": controls,
    }  # fmt: skip


def _taken(kept: CheckpointManager, path: Path, before: int, last: int, state: tuple[Any, Any, Any]) -> str | None:
    """Whether what was damaged was used, in any way in which it could be."""
    again = CheckpointManager(kept.folder)
    if path.parent.name.startswith("evaluation-"):
        return f"the log-loss {again.costs[last]} was believed" if last in again.costs else None
    if again.choose("auto") != kept.step(before):
        return "it was chosen"
    if last in again.costs:
        return "it was taken for the best"
    for use in (lambda: again.choose(str(kept.step(last))), lambda: load_checkpoint(kept.step(last), *state)):
        weights = _weights(state)
        try:
            use()
            return "it was loaded"
        except ValueError:
            if not np.array_equal(weights, _weights(state)):
                return "it was refused, but the weights were changed"
    kept.step(before).rename(kept.folder / "away")
    try:
        again.choose("auto")
        return "it was chosen where no other was"
    except ValueError:
        return None
    finally:
        (kept.folder / "away").rename(kept.step(before))


def spoilt(whole: bytes, kind: str, draws: random.Random) -> bytes:
    """Other bytes than `whole`, of a kind; half of the changes fall among the first, where headers stand."""
    at = draws.randrange(len(whole) if draws.random() < 0.5 else min(len(whole), 512))
    if kind == "bit":
        return whole[:at] + bytes([whole[at] ^ 1 << draws.randrange(8)]) + whole[at + 1 :]
    if kind == "byte":
        return whole[:at] + bytes([(whole[at] + draws.randrange(1, 256)) % 256]) + whole[at + 1 :]
    if kind == "block":  # as of a disk that lost a page
        size = min(4096, len(whole) - at)
        return whole[:at] + bytes(each ^ 0xFF for each in whole[at : at + size]) + whole[at + size :]
    return {"cut": whole[:at], "empty": b"", "grown": whole + draws.randbytes(draws.randrange(1, 99))}[kind]


def _state(ground: Ground) -> tuple[Any, Any, Any]:
    """Model, optimizer and schedule as the run has them."""
    recipe = load_recipe("demo", ground.overrides())
    prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(recipe.model.base))
    model = adapt(load_base(recipe.model, CLASSES), recipe.model)
    optimizer = make_optimizer(model, recipe.train)
    return model, optimizer, make_schedule(optimizer, recipe.train, 5)


def _weights(state: tuple[Any, Any, Any]) -> np.ndarray:
    return np.concatenate([each.detach().numpy().reshape(-1) for each in trainable(state[0]).values()])


def _goes_on_from_the_one_before(ground: Ground, turn: int) -> str | None:
    """A whole run whose last checkpoint is damaged while it is away ends as the undisturbed one."""
    place, draws = ground.place(f"flips/run{turn}"), random.Random(turn)
    shutil.copytree(ground.folder / "straight", place / "runs")
    kept = checkpoints_of(place / "runs")
    for name in ("metrics.json", "oof.csv"):
        (place / "runs/demo/fold0" / name).unlink()
    shutil.rmtree(place / "runs/demo/fold0/model")
    path = draws.choice(sorted(kept.step(kept.steps()[-1]).iterdir()))
    path.write_bytes(spoilt(path.read_bytes(), draws.choice(KINDS), draws))
    child = start(ground.train(place / "runs"), place / "shown.txt")
    if child.wait() != 0:
        return f"ended with {child.status}: {child.text()[-1500:]}"
    if "passed over" not in child.text():
        return "the damage was not named"
    return differs(ground, place / "runs")
