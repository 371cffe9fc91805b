"""Checkpoints that are whole or not there: every byte counts, two limits, damaged ones named and passed over."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from arena.manifest import NAME, damage, read_manifest, write_manifest
from arena.training.checkpoint import load_checkpoint, random_states, save_checkpoint, set_random_states
from arena.training.shelf import Shelf


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))


def save(shelf: Shelf, step: int, loss: float | None = None) -> Small:
    model = Small()
    with torch.no_grad():
        model.weight.add_(step)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    save_checkpoint(shelf.step(step), model, optimizer, schedule, {"done": {"step": step}})
    if loss is not None:
        shelf.judge(step, {"log_loss": loss}, np.full((2, 3), 1 / 3))
    return model


def load(folder: Path) -> Small:
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    load_checkpoint(folder, model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    return model


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    saved = save(shelf, 7)
    assert torch.equal(load(shelf.step(7)).weight, saved.weight)
    assert read_manifest(shelf.step(7))["done"] == {"step": 7}


def test_random_states_of_all_libraries_come_back() -> None:
    random.seed(3)
    random.gauss(0, 1)
    np.random.seed(4)
    np.random.normal()
    torch.manual_seed(5)
    states = random_states()
    drawn = [(random.gauss(0, 1), np.random.normal(), float(torch.rand(()))) for _ in range(2)][0:1]
    random.random(), np.random.rand(), torch.rand(3)
    tensors, plain = states
    set_random_states((tensors, json.loads(json.dumps(plain))))
    assert [(random.gauss(0, 1), np.random.normal(), float(torch.rand(())))] == drawn


def test_every_changed_byte_and_every_cut_is_seen(tmp_path: Path) -> None:
    """A thousand flips and truncations over all files: the checkpoint is refused, the one before is taken."""
    shelf = Shelf(tmp_path)
    save(shelf, 1)
    save(shelf, 2)
    files = sorted(path for path in shelf.step(2).iterdir())
    assert len(files) == 4
    draws = random.Random(0)
    for turn in range(1000):
        path = files[turn % len(files)]
        whole = path.read_bytes()
        if turn % 5 == 4:
            changed = whole[: draws.randrange(len(whole))]
        else:
            at = draws.randrange(len(whole))
            changed = whole[:at] + bytes([whole[at] ^ (1 << draws.randrange(8))]) + whole[at + 1 :]
        path.write_bytes(changed)
        assert damage(shelf.step(2)) is not None, (path, turn)
        if turn % 50 == 0:
            with pytest.raises(ValueError, match="not whole"):
                load(shelf.step(2))
            assert shelf.choose("auto") == shelf.step(1)
        path.write_bytes(whole)
    assert shelf.choose("auto") == shelf.step(2)


def test_what_is_missing_or_does_not_belong_is_named(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    save(shelf, 1)
    folder = shelf.step(1)
    (folder / "more").write_text("")
    assert damage(folder) == "more does not belong to it"
    (folder / "more").unlink()
    (folder / "random.safetensors").rename(folder / "other")
    assert damage(folder) == "other does not belong to it"
    (folder / "other").unlink()
    assert damage(folder) == "random.safetensors is missing"
    (folder / NAME).unlink()
    assert "never completed" in str(damage(folder))


def test_manifests_of_other_versions_and_other_texts(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", "nan", "[" * 5000, '{"sha256": 1}'):
        (tmp_path / NAME).write_text(text)
        assert "damaged" in str(damage(tmp_path))
    (tmp_path / NAME).unlink()
    write_manifest(tmp_path, {"a": 1})
    assert read_manifest(tmp_path)["a"] == 1
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes() + b" ")
    assert "damaged" in str(damage(tmp_path))


def test_the_best_is_never_removed_for_the_last(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, keep_last=2, keep_best=1)
    for step, loss in enumerate([0.9, 0.5, 0.7, 0.8, 0.6], 1):
        save(shelf, step, loss)
        shelf.tidy()
    assert shelf.steps() == [2, 4, 5] and shelf.best == 2
    again = Shelf(tmp_path)
    assert again.losses == {2: 0.5, 4: 0.8, 5: 0.6} and again.choose("best") == again.step(2)
    more = Shelf(tmp_path, keep_last=1, keep_best=2)
    more.tidy()
    assert more.steps() == [2, 5]


def test_nothing_whole_is_said_and_never_taken_for_a_beginning(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    assert shelf.choose("auto") is None
    with pytest.raises(ValueError, match="no checkpoint that was judged"):
        shelf.choose("best")
    save(shelf, 1)
    (shelf.step(1) / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole .*--fresh"):
        shelf.choose("auto")
    with pytest.raises(ValueError, match="there is no such folder"):
        shelf.choose(str(tmp_path / "nowhere"))


def test_going_on_from_an_earlier_one_sets_the_later_ones_aside(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, keep_last=9)
    for step in (1, 2, 3):
        save(shelf, step, 1.0 / step)
    assert shelf.best == 3
    shelf.leave_after(1)
    assert shelf.steps() == [1] and shelf.best == 1
    (aside,) = tmp_path.glob("aside-*")
    assert sorted(path.name for path in aside.iterdir()) == [
        "judged-00000002", "judged-00000003", "step-00000002", "step-00000003",
    ]  # fmt: skip
    shutil.rmtree(aside)
    shelf.leave_after(1)
    assert not list(tmp_path.glob("aside-*"))
