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

from arena.storage.manifest import NAME, damage, read_manifest, write_manifest
from arena.training.checkpoint import load_checkpoint, random_states, save_checkpoint, set_random_states
from arena.training.checkpoint_manager import CheckpointManager
from arena.training.optimizer import trainable


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))


def save(manager: CheckpointManager, step: int, loss: float | None = None) -> Small:
    model = Small()
    with torch.no_grad():
        model.weight.add_(step)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    save_checkpoint(manager.step(step), trainable(model), optimizer.state_dict(), schedule, {"done": {"step": step}})
    if loss is not None:
        manager.save_evaluation(step, {"log_loss": loss}, np.full((2, 3), 1 / 3))
    return model


def load(folder: Path) -> Small:
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    load_checkpoint(folder, model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    return model


def test_a_checkpoint_restores_what_was_saved(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    saved = save(manager, 7)
    assert torch.equal(load(manager.step(7)).weight, saved.weight)
    assert read_manifest(manager.step(7))["done"] == {"step": 7}


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
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    save(manager, 2)
    files = sorted(path for path in manager.step(2).iterdir())
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
        assert damage(manager.step(2)) is not None, (path, turn)
        if turn % 50 == 0:
            with pytest.raises(ValueError, match="cannot be loaded"):
                load(manager.step(2))
            assert manager.choose("auto") == manager.step(1)
        path.write_bytes(whole)
    assert manager.choose("auto") == manager.step(2)


def test_what_is_missing_or_does_not_belong_is_named(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    folder = manager.step(1)
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


def test_a_checkpoint_of_an_earlier_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("arena.storage.manifest.FORMAT", 3)
        save(manager, 1)
        assert manager.choose("auto") == manager.step(1)  # control: that version reads it
    with pytest.raises(
        ValueError, match=r"can be resumed \(.*another version of arena \(format 3, this one reads 4\).*--fresh"
    ):
        manager.choose("auto")
    with pytest.raises(ValueError, match="another version of arena"):
        load(manager.step(1))


def test_the_best_is_never_removed_for_the_last(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=2, keep_best=1)
    for step, loss in enumerate([0.9, 0.5, 0.7, 0.8, 0.6], 1):
        save(manager, step, loss)
        manager.prune()
    assert manager.steps() == [2, 4, 5] and manager.best == 2
    again = CheckpointManager(tmp_path)
    assert again.costs == {2: 0.5, 4: 0.8, 5: 0.6} and again.choose("best") == again.step(2)
    more = CheckpointManager(tmp_path, keep_last=1, keep_best=2)
    more.prune()
    assert more.steps() == [2, 5]


def test_no_complete_checkpoint_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    assert manager.choose("auto") is None
    with pytest.raises(ValueError, match="no checkpoint that was evaluated"):
        manager.choose("best")
    save(manager, 1)
    (manager.step(1) / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be resumed .*--fresh"):
        manager.choose("auto")
    with pytest.raises(ValueError, match="there is no such folder"):
        manager.choose(str(tmp_path / "nowhere"))


def test_resuming_from_an_earlier_one_archives_the_later_ones(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=9)
    for step in (1, 2, 3):
        save(manager, step, 1.0 / step)
    assert manager.best == 3
    manager.archive_after(1)
    assert manager.steps() == [1] and manager.best == 1
    (archive,) = tmp_path.glob("archive-*")
    assert sorted(path.name for path in archive.iterdir()) == [
        "evaluation-00000002", "evaluation-00000003", "step-00000002", "step-00000003",
    ]  # fmt: skip
    shutil.rmtree(archive)
    manager.archive_after(1)
    assert not list(tmp_path.glob("archive-*"))
