"""What is sent is there whole or not at all, nothing waits for the store, and the best is never lost."""

from __future__ import annotations

import shutil
import threading
import time
from itertools import accumulate
from pathlib import Path

import fsspec
import pytest

from arena.storage import mirror as module
from arena.storage.manifest import NAME, damage
from arena.storage.remote import Store
from arena.training.checkpoint_manager import CheckpointManager
from tests.storage.faulty import (
    PLACE,
    URL,
    Faulty,
    Messages,
    checkpoint,
    evaluation,
    failing,
    gone,
    mirror,
    slow,
    steps,
)


@pytest.mark.parametrize("url", ["{folder}", "file://{folder}", "memory://runs", URL])
def test_what_is_uploaded_is_fetched_unchanged(tmp_path: Path, url: str) -> None:
    run, fresh, url = tmp_path / "run", tmp_path / "fresh", url.format(folder=tmp_path / "away")
    step = checkpoint(run, 50, loss=1.0)
    (run / "log.jsonl").write_text('{"step": 50}\n')
    sender = mirror(tmp_path, url)
    sender.push(step, best=True, files=[run / "log.jsonl"])
    sender.push(evaluation(step))
    assert sender.close(10) == []
    receiver = mirror(tmp_path, url)
    assert receiver.pull(fresh) == [fresh / "checkpoints/step-00000050"]
    kept = sorted(path.relative_to(run) for path in run.rglob("*"))
    assert sorted(path.relative_to(fresh) for path in fresh.rglob("*")) == kept and len(kept) == 11
    assert all((fresh / path).read_bytes() == (run / path).read_bytes() for path in kept if (run / path).is_file())
    assert not list((tmp_path / "staging").glob("*"))
    if url.startswith("memory"):
        fsspec.filesystem("memory").rm("/runs", recursive=True)


def test_the_newest_and_the_best_are_fetched_unless_they_are_here(tmp_path: Path) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    sender = mirror(tmp_path)
    for number, loss in ((10, 0.9), (20, 0.5), (30, 0.7), (40, None)):
        step = checkpoint(run, number, loss)
        sender.push(step, best=loss == 0.5)
        if loss is not None:
            sender.push(evaluation(step))
        wait(lambda: not sender.waiting and sender.busy is None)
    assert sender.close(10) == []
    assert steps(mirror(tmp_path).pull(fresh)) == [40, 20]
    assert sorted(path.name for path in (fresh / "checkpoints").iterdir()) == [
        "evaluation-00000020", "step-00000020", "step-00000040",
    ]  # fmt: skip
    inode = (fresh / "checkpoints/step-00000040" / NAME).stat().st_ino
    (fresh / "checkpoints/step-00000020/empty").write_text("changed")
    assert steps(mirror(tmp_path).pull(fresh)) == [40, 20]
    assert (fresh / "checkpoints/step-00000040" / NAME).stat().st_ino == inode
    assert damage(fresh / "checkpoints/step-00000020") is None


def test_pushing_never_waits_for_a_slow_store(tmp_path: Path) -> None:
    sender = mirror(tmp_path)
    Faulty.before = staticmethod(slow(0.3))
    folders = [checkpoint(tmp_path / "run", number) for number in range(1, 21)]
    longest = 0.0
    for folder in folders:
        start = time.perf_counter()
        sender.push(folder, best=folder is folders[3])
        longest = max(longest, time.perf_counter() - start)
    assert longest < 0.2, f"{longest:.3f} s: less than one call of the store"
    start = time.perf_counter()
    left = sender.close(0.3)
    assert time.perf_counter() - start < 0.6
    assert "checkpoints/step-00000020" in left and len(left) <= 3, "newest, best, the one under way"
    Faulty.mend()
    sender.thread.join(10)  # or it would go on in the tests that follow
    assert 20 not in complete(), "after the end nothing else is begun"
    store = Store(URL, PLACE)
    start = time.perf_counter()
    Faulty.before = staticmethod(slow(0.2))
    store.put(folders[0], "control")
    assert time.perf_counter() - start > 0.5, "the control: without the queue it would have waited"


def test_a_waiting_upload_is_superseded_unless_it_is_the_best(tmp_path: Path) -> None:
    hold = threading.Event()
    sender = mirror(tmp_path)
    Faulty.before = staticmethod(lambda path: (hold.wait(10), None)[1])
    folders = {number: checkpoint(tmp_path / "run", number) for number in (1, 2, 3, 4, 5)}
    for number, folder in folders.items():
        sender.push(folder, best=number == 3)
        if number == 1:
            wait(lambda: sender.busy is not None)
    assert list(sender.waiting) == ["checkpoints/step-00000003", "checkpoints/step-00000005"]
    assert len(list((tmp_path / "staging").iterdir())) == 3, "what was given up takes no room"
    hold.set()
    assert sender.close(10) == []
    assert complete() == {1, 3, 5}
    assert not (tmp_path / "staging").exists()


def test_a_superseded_checkpoint_that_turns_out_best_is_sent(tmp_path: Path) -> None:
    hold = threading.Event()
    sender = mirror(tmp_path)
    Faulty.before = staticmethod(lambda path: (hold.wait(10), None)[1])
    for number in (1, 2, 3):
        sender.push(checkpoint(tmp_path / "run", number))
        wait(lambda: sender.busy is not None)
    assert "checkpoints/step-00000002" not in sender.waiting
    sender.push(tmp_path / "run/checkpoints/step-00000002", best=True)
    hold.set()
    assert sender.close(10) == []
    assert complete() == {1, 2, 3}


def test_failed_uploads_are_retried_with_the_next_or_at_the_end_and_reported_once(tmp_path: Path) -> None:
    messages = Messages()
    sender = mirror(tmp_path, messages=messages)
    Faulty.before = staticmethod(failing(2))
    sender.push(checkpoint(tmp_path / "run", 1), best=True)
    wait(lambda: sender.failing is not None and sender.busy is None)
    assert complete() == set() and list(sender.waiting) == ["checkpoints/step-00000001"]
    sender.push(checkpoint(tmp_path / "run", 2))  # 1 is tried again before it
    wait(lambda: complete() == {2})
    assert sender.close(10) == []
    assert complete() == {1, 2}
    assert (
        messages.about("fails (ConnectionError: no route)") == 1
        and messages.about("works again") == 1
        and len(messages) == 2
    )


def test_failed_uploads_are_superseded_by_the_next(tmp_path: Path) -> None:
    sender = mirror(tmp_path)
    Faulty.before = staticmethod(gone)
    for number in (1, 2):
        sender.push(checkpoint(tmp_path / "run", number))
        wait(lambda: sender.busy is None and not sender.wanted.is_set())
    assert list(sender.waiting) == ["checkpoints/step-00000002"]
    assert [path.name for path in (tmp_path / "staging").iterdir()] == ["1"]
    Faulty.mend()
    assert sender.close(10) == [] and complete() == {2}


def test_an_unreachable_store(tmp_path: Path) -> None:
    messages = Messages()
    Faulty.before = staticmethod(gone)
    sender = mirror(tmp_path, messages=messages)
    assert messages.about("does not answer") == 1
    for number in range(1, 6):
        sender.push(checkpoint(tmp_path / "run", number), best=number == 2)
        time.sleep(0.05)
    start = time.perf_counter()
    left = sender.close(1)
    assert time.perf_counter() - start < 2
    assert sorted(left) == ["checkpoints/step-00000002", "checkpoints/step-00000005"]
    assert len(messages) == 2 and "did not arrive" in messages[1] and "the store is down" in messages[1]


def test_a_corrupted_upload_is_detected_when_it_is_fetched(tmp_path: Path) -> None:
    store, messages = Store(URL, PLACE), Messages()
    for number in (1, 2):
        store.put(checkpoint(tmp_path / "run", number), f"checkpoints/step-{number:08d}")
        Faulty.change = staticmethod(lambda data: bytes([data[0] ^ 1]) + data[1:] if data[:1] == b"\0" else data)
    assert steps(mirror(tmp_path, messages=messages).pull(tmp_path / "fresh")) == [1]
    assert messages.about("step-00000002: weights.safetensors is damaged: its SHA-256 differs") == 1


def test_an_incomplete_upload_is_never_a_checkpoint(tmp_path: Path) -> None:
    sender = mirror(tmp_path)
    Faulty.change = staticmethod(lambda data: data[:-1])
    sender.push(checkpoint(tmp_path / "run", 1))
    assert sender.close(0.3) == ["checkpoints/step-00000001"]
    assert complete() == set() and not any(path.endswith(NAME) for path in Faulty.puts)


def test_every_cut_leaves_the_one_before(tmp_path: Path) -> None:
    """Cut at every file boundary, on both sides of it, and all over the files and the manifest."""
    run = tmp_path / "run"
    first, second = checkpoint(run, 1), checkpoint(run, 2)
    sizes = [path.stat().st_size for path in sorted(second.rglob("*")) if path.is_file() and path.name != NAME]
    ends = [0, *accumulate([*sizes, (second / NAME).stat().st_size])]
    size = ends[-1]
    cuts = {*range(0, size, 8), *(end + by for end in ends for by in (-1, 0, 1))} & {*range(size)}
    store = Store(URL, PLACE)
    store.put(first, f"checkpoints/{first.name}")
    before = dict(Faulty.store)
    receiver = mirror(tmp_path)
    for cut in sorted(cuts):
        Faulty.cut_after = cut
        with pytest.raises(ConnectionError):
            store.put(second, f"checkpoints/{second.name}")
        Faulty.mend()
        shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
        assert steps(receiver.pull(tmp_path / "fresh")) == [1], cut
        Faulty.store.clear()
        Faulty.store.update(before)
    Faulty.cut_after = size + 1
    store.put(second, f"checkpoints/{second.name}")
    Faulty.mend()
    assert steps(receiver.pull(tmp_path / "fresh")) == [2], "the control: not cut"


def test_another_run_s_folder_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    store = Store(URL, PLACE)
    store.put(checkpoint(tmp_path / "old", 1), "checkpoints/step-00000001")
    new = checkpoint(tmp_path / "new", 1)
    (new / "weights.safetensors").write_bytes(b"others")
    (new / NAME).unlink()
    module.write_manifest(new, {"step": 1})
    Faulty.cut_after = 3
    with pytest.raises(ConnectionError):
        store.put(new, "checkpoints/step-00000001")
    Faulty.mend()
    assert complete() == set() and mirror(tmp_path).pull(tmp_path / "fresh") == [], "neither the old nor half the new"
    store.put(new, "checkpoints/step-00000001")
    (found,) = mirror(tmp_path).pull(tmp_path / "fresh")
    assert (found / "weights.safetensors").read_bytes() == b"others"


def test_removal_here_while_it_waits_or_is_sent_does_no_harm(tmp_path: Path) -> None:
    run, messages = tmp_path / "run", Messages()
    sender = mirror(tmp_path, messages=messages)
    Faulty.before = staticmethod(slow(0.02))
    for number in (1, 2):
        step = checkpoint(run, number)
        sender.push(step)
        shutil.rmtree(step)
    assert sender.close(10) == [] and messages == []
    assert steps(mirror(tmp_path).pull(tmp_path / "fresh")) == [2]


def test_without_hard_links_removal_does_no_harm_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        refused.append(args)
        raise OSError("no hard links here")

    refused: list[object] = []
    monkeypatch.setattr(module, "SMALL", 10)
    monkeypatch.setattr(module.os, "link", refuse)
    messages, hold = Messages(), threading.Event()
    sender = mirror(tmp_path, messages=messages)
    Faulty.before = staticmethod(lambda path: (hold.wait(10), None)[1])
    step = checkpoint(tmp_path / "run", 1)
    sender.push(step)
    shutil.rmtree(step)
    hold.set()
    assert sender.close(10) == [] and messages == [] and len(refused) == 3
    assert steps(mirror(tmp_path).pull(tmp_path / "fresh")) == [1]


def test_a_locally_damaged_file_is_never_uploaded(tmp_path: Path) -> None:
    messages, step = Messages(), checkpoint(tmp_path / "run", 1)
    data = (step / "weights.safetensors").read_bytes()
    (step / "weights.safetensors").write_bytes(b"x" + data[1:])
    sender = mirror(tmp_path, messages=messages)
    sender.push(step)
    assert sender.close(10) == []
    assert messages.about("its SHA-256 differs") == 1 and complete() == set()


def test_pruned_checkpoints_are_removed_from_the_store_but_not_the_best(tmp_path: Path) -> None:
    run = tmp_path / "run"
    store = Store(URL, PLACE)
    for number, loss in ((10, 0.9), (20, 0.5), (30, 0.7)):
        step = checkpoint(tmp_path / "elsewhere", number, loss)
        for each in (step, evaluation(step)):
            store.put(each, f"checkpoints/{each.name}")
    store.put(checkpoint(tmp_path / "elsewhere", 90), "checkpoints/step-00000090")
    sender = mirror(tmp_path)
    sender.push(checkpoint(run, 40))
    assert sender.close(10) == []
    assert complete() == {20, 40, 90}, "the best stays, and what another machine may have made after it"
    assert not any("00000010" in path or "00000030" in path for path in Faulty.store)
    sender = mirror(tmp_path, fresh=True)
    sender.push(checkpoint(run, 50))
    assert sender.close(10) == []
    assert complete() == {40, 50}, "a run that was begun anew leaves nothing of the one before"


def test_a_run_folder_that_vanished_removes_nothing_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Store(URL, PLACE).put(checkpoint(tmp_path / "elsewhere", 1), "checkpoints/step-00000001")
    sender = mirror(tmp_path)
    Faulty.before = staticmethod(slow(0.02))
    sender.push(checkpoint(run, 2))
    shutil.rmtree(run)
    assert sender.close(10) == []
    assert complete() == {1, 2}


def test_a_store_that_lets_nothing_be_removed_still_keeps_what_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Faulty, *args: object, **kwargs: object) -> None:
        raise PermissionError("no deletes")

    messages = Messages()
    Store(URL, PLACE).put(checkpoint(tmp_path / "elsewhere", 1), "checkpoints/step-00000001")
    monkeypatch.setattr(Faulty, "rm_file", refuse)
    sender = mirror(tmp_path, messages=messages)
    for number in (2, 3):
        sender.push(checkpoint(tmp_path / "run", number))
        wait(lambda number=number: number in complete())
    assert sender.close(10) == []
    assert complete() == {1, 2, 3} and messages.about("old checkpoints cannot be removed") == 1 and len(messages) == 1


def test_files_of_a_run_as_they_were(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model/adapter.safetensors").write_bytes(b"a" * (module.SMALL + 1))
    (run / "metrics.json").write_text("{}")
    log = run / "log.jsonl"
    log.write_text("one\n")
    sender = mirror(tmp_path, url=str(tmp_path / "away"))
    sender.push_files("files", [log, run / "metrics.json", run / "nothing"])
    sender.push_files("files", [log, run / "metrics.json"])
    sender.push_files("model", [run / "model"])
    log.write_text("one\ntwo\n")
    assert sender.close(10) == []
    away = tmp_path / "away" / PLACE
    assert (away / "files/log.jsonl").read_text() == "one\n"
    assert (away / "model/adapter.safetensors").stat().st_size == module.SMALL + 1
    assert damage(away / "files") is None and damage(away / "model") is None


def test_what_a_killed_run_left_staged_is_removed(tmp_path: Path) -> None:
    (tmp_path / "staging/7").mkdir(parents=True)
    (tmp_path / "staging/7/weights.safetensors").touch()
    sender = mirror(tmp_path)
    assert not (tmp_path / "staging").exists()
    sender.push(checkpoint(tmp_path / "run", 1))
    assert sender.close(10) == []


def test_fetched_checkpoints_are_used_by_the_checkpoint_manager(tmp_path: Path) -> None:
    sender = mirror(tmp_path)
    for number, loss in ((10, 0.4), (20, 0.6)):
        step = checkpoint(tmp_path / "run", number, loss)
        sender.push(step, best=number == 10)
        sender.push(evaluation(step))
    assert sender.close(10) == []
    mirror(tmp_path).pull(tmp_path / "fresh")
    fresh, kept = CheckpointManager(tmp_path / "fresh/checkpoints"), CheckpointManager(tmp_path / "run/checkpoints")
    assert fresh.choose("auto") == fresh.step(20) and fresh.choose("best") == fresh.step(10)
    assert fresh.costs == kept.costs == {10: 0.4, 20: 0.6}


def wait(done: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def complete() -> set[int]:
    """The checkpoints in the store that have their manifest."""
    paths = [path.split("/") for path in list(Faulty.store) if path.endswith(f"/{NAME}")]
    return {int(path[-2][5:]) for path in paths if path[-2].startswith("step-")}


@pytest.mark.parametrize(("failures", "steps_here"), [(1, [40]), (2, [40]), (3, [])])
def test_a_new_machine_does_not_start_again_because_of_a_hiccup(
    tmp_path: Path, failures: int, steps_here: list[int]
) -> None:
    sender = mirror(tmp_path)
    sender.push(checkpoint(tmp_path / "run", 40))
    assert sender.close(10) == []
    receiver = mirror(tmp_path)
    Faulty.before = staticmethod(failing(failures))
    assert steps(receiver.pull(tmp_path / "fresh")) == steps_here  # the third is the control
