"""Disks that are full, read-only or gone: a clear error, what was there before whole, and it goes on."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arena.storage.manifest import damage
from tests.torture.ground import Found, Ground, checkpoints_of, fold_of, start, steps_saved
from tests.torture.processes import Child, ask
from tests.torture.signals import begun, same_in_the_end

NEWUSER, NEWNS = 0x10000000, 0x00020000
RDONLY, REMOUNT, REC, PRIVATE = 1, 32, 16384, 1 << 18
SIZE = 32  # MiB of the small disk
FREE = (0, 4, 60, 150, 250, 330)  # KiB left on it before the run goes on; a checkpoint is 344
LATE = (0, 8, 60, 120)  # KiB left on it before the judge is written, which is 144


def survives_disks(ground: Ground) -> Found:
    found = Found("disk full, read-only, gone", "a clear error, the state before intact, goes on")
    place = ground.place("disk")
    answer = ask(lambda: _in_own_mounts(ground, place), place)
    for why in answer["whys"]:
        found.count(why)
    found.count(_gone(ground))
    found.note = answer["note"]
    return found


def _in_own_mounts(ground: Ground, place: Path) -> dict[str, Any]:
    """All trials on a small disk that only this process and its children see."""
    disk = place / "small"
    disk.mkdir()
    refused = _mount_privately(disk)
    if refused:
        return {
            "whys": [],
            "note": f"no small disk can be mounted here ({refused}): only the vanished folder was tried",
        }
    early, late = FREE[::-1][: ground.times(len(FREE), 2)], LATE[: ground.times(len(LATE))]
    whys = [_full(ground, disk, free) for free in early] + [_full_at_the_end(ground, disk, free) for free in late]
    whys += [_full_while_judging(ground, disk), _read_only(ground, disk)]
    note = (
        f"a disk with {', '.join(map(str, early))} KiB left while training, {', '.join(map(str, late))} KiB while the "
    )
    return {
        "whys": whys,
        "note": note + "judge is written, 0 KiB while inferring; a read-only one; a folder moved away",
    }


def _mount_privately(disk: Path) -> str | None:
    """Mounts a small disk in a mount namespace of its own, which goes with the process; why that cannot be."""
    library, user, group = ctypes.CDLL(None, use_errno=True), os.geteuid(), os.getegid()
    if library.unshare(NEWNS if user == 0 else NEWUSER | NEWNS):
        return os.strerror(ctypes.get_errno())
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if library.mount(b"none", b"/", None, REC | PRIVATE, None) or _mount(disk, 0):
        return os.strerror(ctypes.get_errno())
    return None


def _mount(disk: Path, flags: int) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    return int(library.mount(b"tmpfs", str(disk).encode(), b"tmpfs", flags, f"size={SIZE}m".encode()))


def _cleared(disk: Path) -> Path:
    """A folder on the small disk, which is empty but for it."""
    for each in disk.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    (disk / "trial").mkdir()
    return disk / "trial"


def _cut(ground: Ground, disk: Path) -> Path:
    """An interrupted run on the small disk."""
    place = _cleared(disk)
    child = begun(ground, place, "training", 3)
    assert child.hear() == "now", child.text()
    child.send(signal.SIGTERM)
    assert child.wait() == 143 and steps_saved(place / "runs") == 2, child.text()
    return place


def _fill(disk: Path, free: int) -> Path:
    """Fills the disk but for so many KiB."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
    os.truncate(filler, max(0, filler.stat().st_size - free * 1024))
    return filler


def _told(child: Child, words: str) -> str | None:
    """What is wrong with how a command says that it cannot write."""
    status, text = child.wait(), child.text()
    if status != 2 or "Traceback" in text or words.lower() not in text.lower():
        return f"ended with {status}: {text.strip().splitlines()[-1]}"
    return None


def _full(ground: Ground, disk: Path, free: int) -> str | None:
    place = _cut(ground, disk)
    before = _whole(place)
    filler = _fill(disk, free)
    why = _told(start(ground.train(place / "runs"), ground.folder / f"disk/full{free}.txt"), "No space left")
    return _mended(ground, place, before, why, filler.unlink, f"{free} KiB left")


def _full_at_the_end(ground: Ground, disk: Path, free: int) -> str | None:
    """The disk is filled by another when all is trained and the judge is about to be written."""
    place, go = _cleared(disk), ground.folder / f"disk/go{free}"
    child = begun(ground, place, "finishing", 1, go)
    assert child.hear() == "now", child.text()
    before, filler = _whole(place), _fill(disk, free)
    go.touch()
    why = _told(child, "No space left")
    return _mended(ground, place, before, why, filler.unlink, f"{free} KiB left for the judge")


def _whole(place: Path) -> dict[str, float]:
    """The checkpoints that are whole, by the time they were made."""
    found = checkpoints_of(place / "runs")
    return {str(step): found.step(step).stat().st_mtime for step in found.steps() if damage(found.step(step)) is None}


def _mended(
    ground: Ground, place: Path, before: dict[str, float], why: str | None, mend: Callable[[], object], what: str
) -> str | None:
    """Whether the state before is intact, and the same command goes on once the disk is mended."""
    after, found = _whole(place), checkpoints_of(place / "runs")
    whys = [why] if why else []
    torn = [step for step in found.steps() if str(step) not in after]
    if torn or not after or max(map(int, after)) < max(map(int, before)):
        whys.append(f"whole before: {sorted(before)}, then {sorted(after)}, damaged {torn}")
    if (fold_of(place / "runs") / "metrics.json").exists():
        whys.append("it was said to be finished")
    mend()
    later = same_in_the_end(ground, place, "training")
    whys += [later] if later else ["the state was intact, and it went on to the same end"] if whys else []
    return f"{what}: {'; '.join(whys)}" if whys else None


def _read_only(ground: Ground, disk: Path) -> str | None:
    place = _cut(ground, disk)
    before = _whole(place)
    assert _mount(disk, REMOUNT | RDONLY) == 0
    why = _told(start(ground.train(place / "runs"), ground.folder / "disk/read-only.txt"), "cannot be written to")
    return _mended(ground, place, before, why, lambda: _mount(disk, REMOUNT), "read-only")


def _full_while_judging(ground: Ground, disk: Path) -> str | None:
    place = _cleared(disk)
    filler = _fill(disk, 0)
    out = place / "submission.csv"
    why = _told(start(ground.infer(out), ground.folder / "disk/infer.txt"), "No space left")
    if not why and out.exists():
        why = "a submission was written"
    filler.unlink()
    why = why or same_in_the_end(ground, place, "inferring")
    return why and f"inferring on a full disk: {why}"


def _gone(ground: Ground) -> str | None:
    """The run's folder is removed while it trains: said, and not made again with half a run in it."""
    place = ground.place("disk-gone")
    child = begun(ground, place, "training", 3)
    assert child.hear() == "now", child.text()
    fold_of(place / "runs").rename(place / "away")
    status, text = child.wait(), child.text()
    if status != 2 or "Traceback" in text or "gone" not in text:
        return f"vanished folder: ended with {status}: {text[-1500:]}"
    if fold_of(place / "runs").exists():
        return f"vanished folder: it was made again: {[path.name for path in fold_of(place / 'runs').iterdir()]}"
    fold_of(place / "runs").parent.mkdir(parents=True, exist_ok=True)  # made for the lock, and removed with it
    (place / "away").rename(fold_of(place / "runs"))
    why = same_in_the_end(ground, place, "training")
    return why and f"vanished folder: {why}"
