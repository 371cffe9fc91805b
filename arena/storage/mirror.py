"""Copies of a run's checkpoints in another store: uploaded in the background during training, fetched on a new machine.

The run's place holds `checkpoints/step-<n>` and `checkpoints/evaluation-<n>` as on the machine, `files-<n>` with the
run's small files at that step, and, once the run is finished, `model` and `files`. Each is a folder with a manifest.
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

from arena.progress import console, format_error
from arena.storage.manifest import NAME, damage, write_manifest
from arena.storage.remote import PermanentError, Store
from arena.storage.sender import Job, Sender

CHECKPOINTS, STEP, EVALUATION, FILES = "checkpoints", "step-", "evaluation-", "files-"
SMALL = 2**24  # bytes; smaller files are copied, because a log grows; larger files are never changed in place
FETCH_PAUSES = (1.0, 3.0)  # seconds before a folder that could not be fetched is tried again


class Mirror:
    """The place of one run in a store, and the thread that uploads to it.

    `push` and `push_files` never wait for the store and never raise its errors.

    Args:
        url: a folder, or a URL that fsspec supports (`s3://bucket/prefix`).
        place: path of the run below `url`; everything there is taken to belong to this run.
        staging: folder for uploads that are waiting, on the same disk as the checkpoints; it is emptied first.
        fresh: this run does not resume from what is at the place, which is removed once its first checkpoint arrives.
        patience: seconds that the store is given to answer the first check.
        report: is called with each message.
        pauses: seconds before a failed upload is retried: the first time, and at most.

    Raises:
        ValueError: the address, its package, key or permission is wrong. An unreachable store is only a warning.
    """

    def __init__(
        self, url: str, place: str, staging: Path, *, fresh: bool = False, patience: float = 10.0,
        report: Callable[[str], None] = console.print, pauses: tuple[float, float] = (1.0, 60.0),
    ) -> None:  # fmt: skip
        self.store, self.staging, self.fresh, self.report = Store(url, place), staging, fresh, report
        self.sender = Sender(url, report, *pauses)
        self.numbers = count()
        self.prune_failed = False  # whether this was reported already
        shutil.rmtree(staging, ignore_errors=True)
        why = self.store.check(patience)
        if why is not None:
            self.sender.failing = why
            report(f"mirror: {url} does not answer ({why}); training continues, and uploads are retried")

    def push(self, folder: Path, *, best: bool = False, files: Sequence[Path] = ()) -> None:
        """Queues a complete checkpoint (`step-<n>` or `evaluation-<n>`) for upload and returns at once.

        It replaces earlier checkpoints that are still waiting, except the best. Pushing the same checkpoint again does
        nothing. `folder` may be removed afterwards, because its files are linked into the staging folder.

        Args:
            best: this checkpoint is the best so far, in place of the previous best.
            files: small files to upload before it, such as the log.
        """
        number = _number(folder.name)
        assert number is not None, f"{folder.name} is not the name of a checkpoint"
        if best:
            self.sender.protect(number)
        name = f"{CHECKPOINTS}/{folder.name}"
        if name in self.sender.done or self.sender.pending(name):
            return
        if files:
            self._submit(f"{FILES}{number:08d}", files, number)
        staged = self._new_staging_folder()
        source = staged if _link_folder(folder, staged) else folder

        def work() -> None:
            self.store.put(source, name)
            if folder.name.startswith(STEP):
                self._prune(folder.parent, number)

        self.sender.submit(Job(name, number, work, lambda: shutil.rmtree(staged, ignore_errors=True)))

    def push_files(self, name: str, paths: Sequence[Path]) -> None:
        """Queues files and folders, or the content of one folder, in their present state, for upload as `name`.

        Returns once files below 16 MiB are copied. If a file is missing, that is reported and nothing is uploaded.
        """
        self._submit(name, paths, math.inf)

    def _submit(self, name: str, paths: Sequence[Path], number: float) -> None:
        staged = self._new_staging_folder()
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            if len(paths) == 1 and paths[0].is_dir():
                _link_or_copy(paths[0], staged)
            else:
                staged.mkdir()
                for path in paths:
                    _link_or_copy(path, staged / path.name)
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            self.report(f"mirror: {name} is not uploaded: {format_error(error)}")
            return

        def work() -> None:
            if not (staged / NAME).is_file():
                write_manifest(staged, {})
            self.store.put(staged, name)

        self.sender.submit(Job(name, number, work, lambda: shutil.rmtree(staged, ignore_errors=True)))

    def _new_staging_folder(self) -> Path:
        return self.staging / str(next(self.numbers))

    def close(self, patience_seconds: float) -> list[str]:
        """Waits a bounded time for the remaining uploads; reports and returns the names of those still missing."""
        left = self.sender.close(patience_seconds)
        if not left:
            shutil.rmtree(self.staging, ignore_errors=True)
        return left

    def _prune(self, local: Path, number: int) -> None:
        """Removes what the store still has and this machine does not, once the checkpoint of step `number` has arrived.

        The best checkpoint is never removed. Neither are later steps, because this run may have started while the store
        was unreachable; only a fresh run removes them.
        """
        here = {each for path in local.glob(f"{STEP}*") if (each := _number(path.name)) is not None}
        if number not in here:
            return  # removed here too, maybe with the whole folder, which then does not tell what to keep
        try:
            old = (self._numbers(STEP) | self._numbers(EVALUATION) | self._numbers(FILES)) - here
            if not self.fresh:
                old = {each for each in old if each < number}
                old -= set(self._by_loss()[:1] if old else [])
            self._remove(old)
            self.fresh = False
        except Exception as error:  # a store that does not permit removal still accepts uploads
            if not self.prune_failed:
                self.report(f"mirror: old checkpoints cannot be removed from {self.store.url}: {format_error(error)}")
            self.prune_failed = True

    def _remove(self, numbers: set[int]) -> None:
        """Removes all folders of these steps, the checkpoint first: without it the others are ignored."""
        for folder, start in ((CHECKPOINTS, STEP), (CHECKPOINTS, EVALUATION), ("", FILES)):
            for name in self.store.names(folder):
                if name.startswith(start) and _number(name) in numbers:
                    self.store.remove(f"{folder}/{name}".lstrip("/"))

    def _numbers(self, start: str) -> set[int]:
        names = self.store.names("" if start == FILES else CHECKPOINTS)
        return {number for name in names if name.startswith(start) and (number := _number(name)) is not None}

    def _by_loss(self) -> list[int]:
        """The steps in the store that were evaluated, the best first."""
        losses = {}
        for number in self._numbers(STEP) & self._numbers(EVALUATION):
            try:
                loss = self.store.manifest(f"{CHECKPOINTS}/{EVALUATION}{number:08d}")["log_loss"]
                self.store.manifest(f"{CHECKPOINTS}/{STEP}{number:08d}")
                losses[number] = float(loss)
            except (PermanentError, KeyError, TypeError, ValueError):
                continue  # `pull` reports it
        return sorted((each for each in losses if math.isfinite(losses[each])), key=lambda each: (losses[each], each))

    def newest(self) -> int | None:
        """The step of the newest checkpoint in the store that has a manifest; `pull` verifies its files."""
        for number in sorted(self._numbers(STEP), reverse=True):
            try:
                self.store.manifest(f"{CHECKPOINTS}/{STEP}{number:08d}")
                return number
            except PermanentError:
                continue
        return None

    def pull(self, run: Path) -> list[Path]:
        """Fetches the newest complete checkpoint, the best one, and the small files that `run` lacks.

        Each is fetched to a scratch folder, verified and renamed. One that is incomplete or damaged is reported, and
        the one before it is fetched instead. Complete local copies are not fetched again. An unreachable store is
        reported as a warning.

        Returns:
            Those of these checkpoints, `run/checkpoints/step-<n>`, that are now on this machine, the newest first.
        """
        found: dict[Path, None] = {}
        try:
            for numbers in (sorted(self._numbers(STEP), reverse=True), self._by_loss()):
                found.update(dict.fromkeys(self._fetch_first(numbers, run)))
            if found:
                self._pull_files(run)
        except Exception as error:  # whatever the store raises
            self.report(
                f"mirror: {self.store.url} cannot be read ({format_error(error)}); this run continues with local files"
            )
        return list(found)

    def _fetch_first(self, numbers: Sequence[int], run: Path) -> list[Path]:
        """The first of these steps that can be fetched complete, if any, along with its evaluation if there is one."""
        judged = self._numbers(EVALUATION) if numbers else set()
        for number in numbers:
            name = f"{CHECKPOINTS}/{STEP}{number:08d}"
            if self._ensure_fetched(name, run):
                if number in judged:
                    self._ensure_fetched(f"{CHECKPOINTS}/{EVALUATION}{number:08d}", run)
                return [run / name]
        return []

    def _ensure_fetched(self, name: str, run: Path) -> bool:
        """Fetches a folder, unless there is a complete copy here; False if that is not possible."""
        if damage(run / name) is None:
            return True
        try:
            self._fetch(name, run / name)
        except PermanentError as error:
            self.report(f"mirror: passed over {error}")
            return False
        return True

    def _fetch(self, name: str, target: Path) -> None:
        for pause in (*FETCH_PAUSES, None):
            try:
                self.store.fetch(name, target)
                return
            except Exception as error:  # whatever the store raises
                if pause is None or isinstance(error, PermanentError):
                    raise
            time.sleep(pause)

    def _pull_files(self, run: Path) -> None:
        """Fetches the newest complete `files-<n>`; files that exist in `run` are left as they are."""
        for number in sorted(self._numbers(FILES), reverse=True):
            draft = self._new_staging_folder()
            try:
                self._fetch(f"{FILES}{number:08d}", draft)
                for path in draft.iterdir():
                    if path.name != NAME and not (run / path.name).exists():
                        path.rename(run / path.name)
                return
            except PermanentError as error:
                self.report(f"mirror: passed over {error}")
            finally:
                shutil.rmtree(draft, ignore_errors=True)


def _number(name: str) -> int | None:
    found = re.fullmatch(r"[a-z]+-([0-9]{8,12})", name)
    return int(found[1]) if found else None


def _link_folder(folder: Path, target: Path) -> bool:
    """Hard-links a folder's files, which never change once written, so that nothing is copied.

    Returns False if the file system does not support hard links; the folder is then read in place.
    """
    try:
        target.mkdir(parents=True)
        for path in sorted(folder.rglob("*")):
            place = target / path.relative_to(folder)
            place.mkdir() if path.is_dir() else os.link(path, place)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True


def _link_or_copy(path: Path, target: Path) -> None:
    if path.is_dir():
        target.mkdir()
        for each in path.iterdir():
            _link_or_copy(each, target / each.name)
        return
    if path.stat().st_size > SMALL:
        with suppress(OSError):  # no hard links on this file system
            os.link(path, target)
            return
    shutil.copyfile(path, target)
