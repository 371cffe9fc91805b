"""A run's checkpoints elsewhere: sent in the background while it trains, fetched on a fresh machine.

What stands below the run's place: `checkpoints/step-<n>` and `checkpoints/judged-<n>` as on the machine, `files-<n>`
with the run's small files as they were then, and at the end `model` and `files`; each a folder with a manifest.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from arena.manifest import NAME, damage, write_manifest
from arena.mirror.sender import Job, Sender
from arena.mirror.store import Hopeless, Store
from arena.progress import console, said

CHECKPOINTS, STEP, JUDGED, FILES = "checkpoints", "step-", "judged-", "files-"
SMALL = 2**24  # bytes; smaller files are copied, because a log grows; larger ones are never changed in place
FETCH_PAUSES = (1.0, 3.0)  # seconds before a folder that could not be fetched is tried again


class Mirror:
    """The place of one run in a store, and the thread that sends to it.

    `push` and `push_files` never wait for the store, and raise nothing of what it raises.

    Args:
        url: a folder or a URL that fsspec knows (`s3://bucket/prefix`).
        place: path of the run below it; what stands there is taken for this run's.
        aside: folder on the disk of the checkpoints for what waits to be sent; emptied first.
        anew: this run does not go on from what stands at the place: that is removed once its first checkpoint is there.
        patience: seconds that the store has to answer at first.
        say: takes messages.
        pauses: seconds before what failed is tried again: at first, and at most.

    Raises:
        ValueError: the address, its package, key or permission is wrong. A store that is down is said, no error.
    """

    def __init__(
        self, url: str, place: str, aside: Path, *, anew: bool = False, patience: float = 10.0,
        say: Callable[[str], None] = console.print, pauses: tuple[float, float] = (1.0, 60.0),
    ) -> None:  # fmt: skip
        self.store, self.aside, self.anew, self.say = Store(url, place), aside, anew, say
        self.sender = Sender(url, say, *pauses)
        self.numbers = count()
        self.untidy = False  # whether it was said that old checkpoints stay there
        shutil.rmtree(aside, ignore_errors=True)
        why = self.store.check(patience)
        if why is not None:
            self.sender.failing = why
            say(f"mirror: {url} does not answer now ({why}); training continues, and it is tried again")

    def push(self, folder: Path, *, best: bool = False, files: Sequence[Path] = ()) -> None:
        """Takes a complete checkpoint (`step-<n>` or `judged-<n>`) to be sent; returns at once.

        An earlier one that still waits gives way, unless it is the best. Called again with what was sent, or waits, it
        sends nothing twice. Later removal of `folder` does no harm: its files are linked aside.

        Args:
            best: it is the best so far; the one before is no longer.
            files: small files that go before it, such as the log.
        """
        number = _number(folder.name)
        assert number is not None, f"{folder.name} is no name of a checkpoint"
        if best:
            self.sender.spare(number)
        name = f"{CHECKPOINTS}/{folder.name}"
        if name in self.sender.done or self.sender.pending(name):
            return
        if files:
            self._submit(f"{FILES}{number:08d}", files, number)
        kept = self._aside()
        source = kept if _link_folder(folder, kept) else folder

        def work() -> None:
            self.store.put(source, name)
            if folder.name.startswith(STEP):
                self._tidy(folder.parent, number)

        self.sender.submit(Job(name, number, work, lambda: shutil.rmtree(kept, ignore_errors=True)))

    def push_files(self, name: str, paths: Sequence[Path]) -> None:
        """Takes files and folders, or the content of one folder, as they are now, to be sent as the folder `name`.

        Returns at once but for copying files below 16 MiB. A file that is not there is said, and nothing sent.
        """
        self._submit(name, paths, math.inf)

    def _submit(self, name: str, paths: Sequence[Path], number: float) -> None:
        kept = self._aside()
        try:
            self.aside.mkdir(parents=True, exist_ok=True)
            if len(paths) == 1 and paths[0].is_dir():
                _keep(paths[0], kept)
            else:
                kept.mkdir()
                for path in paths:
                    _keep(path, kept / path.name)
        except OSError as error:
            shutil.rmtree(kept, ignore_errors=True)
            self.say(f"mirror: {name} is left out: {said(error)}")
            return

        def work() -> None:
            if not (kept / NAME).is_file():
                write_manifest(kept, {})
            self.store.put(kept, name)

        self.sender.submit(Job(name, number, work, lambda: shutil.rmtree(kept, ignore_errors=True)))

    def _aside(self) -> Path:
        return self.aside / str(next(self.numbers))

    def close(self, patience_seconds: float) -> list[str]:
        """Waits a bounded time for what is left; says and gives the names of what has not arrived."""
        left = self.sender.close(patience_seconds)
        if not left:
            shutil.rmtree(self.aside, ignore_errors=True)
        return left

    def _tidy(self, local: Path, number: int) -> None:
        """Removes what is kept there and no longer here, once the checkpoint of step `number` is there.

        Never the best; and never what was made after this step, for this run may have begun while the store was down,
        unless it was begun anew.
        """
        here = {each for path in local.glob(f"{STEP}*") if (each := _number(path.name)) is not None}
        if number not in here:
            return  # this one is gone here as well: the folder may be, and says nothing about what to keep
        try:
            old = (self._numbers(STEP) | self._numbers(JUDGED) | self._numbers(FILES)) - here
            if not self.anew:
                old = {each for each in old if each < number}
                old -= set(self._by_loss()[:1] if old else [])
            self._remove(old)
            self.anew = False
        except Exception as error:  # a store that lets nothing be removed still keeps what is sent
            if not self.untidy:
                self.say(f"mirror: old checkpoints stay at {self.store.url}: {said(error)}")
            self.untidy = True

    def _remove(self, numbers: set[int]) -> None:
        """All folders of these numbers. The checkpoint goes first: without it the others count for nothing."""
        for folder, start in ((CHECKPOINTS, STEP), (CHECKPOINTS, JUDGED), ("", FILES)):
            for name in self.store.names(folder):
                if name.startswith(start) and _number(name) in numbers:
                    self.store.remove(f"{folder}/{name}".lstrip("/"))

    def _numbers(self, start: str) -> set[int]:
        names = self.store.names("" if start == FILES else CHECKPOINTS)
        return {number for name in names if name.startswith(start) and (number := _number(name)) is not None}

    def _by_loss(self) -> list[int]:
        """The steps there that were judged, the best first."""
        losses = {}
        for number in self._numbers(STEP) & self._numbers(JUDGED):
            try:
                loss = self.store.manifest(f"{CHECKPOINTS}/{JUDGED}{number:08d}")["log_loss"]
                self.store.manifest(f"{CHECKPOINTS}/{STEP}{number:08d}")
                losses[number] = float(loss)
            except (Hopeless, KeyError, TypeError, ValueError):
                continue  # `pull` names it
        return sorted((each for each in losses if math.isfinite(losses[each])), key=lambda each: (losses[each], each))

    def newest(self) -> int | None:
        """The step of the newest checkpoint there that has a manifest; its files are verified by `pull`."""
        for number in sorted(self._numbers(STEP), reverse=True):
            try:
                self.store.manifest(f"{CHECKPOINTS}/{STEP}{number:08d}")
                return number
            except Hopeless:
                continue
        return None

    def pull(self, run: Path) -> list[Path]:
        """Fetches the newest checkpoint that is whole there, the best, and the small files that `run` lacks.

        Each is fetched aside, verified and renamed; one that is incomplete or damaged is named, and the one before it
        is taken. What is whole here is not fetched again. A store that is down is said, no error.

        Returns:
            The checkpoints `run/checkpoints/step-<n>` that are now here of those, the newest first.
        """
        found: dict[Path, None] = {}
        try:
            for numbers in (sorted(self._numbers(STEP), reverse=True), self._by_loss()):
                found.update(dict.fromkeys(self._first(numbers, run)))
            if found:
                self._pull_files(run)
        except Exception as error:  # whatever the store raises
            self.say(f"mirror: {self.store.url} cannot be read ({said(error)}); this run continues with what is here")
        return list(found)

    def _first(self, numbers: Sequence[int], run: Path) -> list[Path]:
        """The first of these steps that can be had whole, if any; its judgement comes with it, where there is one."""
        judged = self._numbers(JUDGED) if numbers else set()
        for number in numbers:
            name = f"{CHECKPOINTS}/{STEP}{number:08d}"
            if self._have(name, run):
                if number in judged:
                    self._have(f"{CHECKPOINTS}/{JUDGED}{number:08d}", run)
                return [run / name]
        return []

    def _have(self, name: str, run: Path) -> bool:
        """Fetches a folder, unless it is here whole; False where it cannot be had."""
        if damage(run / name) is None:
            return True
        try:
            self._fetch(name, run / name)
        except Hopeless as error:
            self.say(f"mirror: passed over {error}")
            return False
        return True

    def _fetch(self, name: str, target: Path) -> None:
        for pause in (*FETCH_PAUSES, None):
            try:
                self.store.fetch(name, target)
                return
            except Exception as error:  # whatever the store raises
                if pause is None or isinstance(error, Hopeless):
                    raise
            time.sleep(pause)

    def _pull_files(self, run: Path) -> None:
        """Those of the newest `files-<n>` that is whole; what stands in `run` stays."""
        for number in sorted(self._numbers(FILES), reverse=True):
            draft = self._aside()
            try:
                self._fetch(f"{FILES}{number:08d}", draft)
                for path in draft.iterdir():
                    if path.name != NAME and not (run / path.name).exists():
                        path.rename(run / path.name)
                return
            except Hopeless as error:
                self.say(f"mirror: passed over {error}")
            finally:
                shutil.rmtree(draft, ignore_errors=True)


def _number(name: str) -> int | None:
    found = re.fullmatch(r"[a-z]+-([0-9]{8,12})", name)
    return int(found[1]) if found else None


def _link_folder(folder: Path, target: Path) -> bool:
    """Hard links of a folder's files, which are never changed once written: nothing is copied. False where the file
    system has none; the folder is then read where it stands."""
    try:
        target.mkdir(parents=True)
        for path in sorted(folder.rglob("*")):
            place = target / path.relative_to(folder)
            place.mkdir() if path.is_dir() else os.link(path, place)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True


def _keep(path: Path, target: Path) -> None:
    if path.is_dir():
        target.mkdir()
        for each in path.iterdir():
            _keep(each, target / each.name)
        return
    if path.stat().st_size > SMALL:
        with suppress(OSError):  # no hard links on this file system
            os.link(path, target)
            return
    shutil.copyfile(path, target)
