"""Copies of a run's checkpoints in another store: uploaded in the background during training, fetched on a new machine.

The run's place holds `checkpoints/step-<n>` and `checkpoints/evaluation-<n>` as on the machine, `files-<n>` with the
run's small files at that step, and, once the run is finished, `model` and `files`. Each is a folder with a manifest.

Nothing is retried after a pause, because the stores' clients do that. What could not be uploaded is tried once more
with the next checkpoint, unless that takes its place, and at the end of the run.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from operator import itemgetter
from pathlib import Path
from typing import Any

from arena.progress import format_error, warn
from arena.storage.manifest import NAME, damage, write_manifest
from arena.storage.remote import PermanentError, Store

CHECKPOINTS, STEP, EVALUATION, FILES = "checkpoints", "step-", "evaluation-", "files-"
PAUSES = (1.0, 4.0)  # seconds before the store is read again at the start of a run
SMALL = 2**24  # bytes; smaller files are copied, because a log grows; larger files are never changed in place


@dataclass
class Upload:
    """A staged folder, its name in the store, and its step, which is infinity for a finished run's files."""

    name: str
    number: float
    staged: Path


class Mirror:
    """The place of one run in a store, and the thread that uploads to it.

    `push` and `push_files` never wait for the store and never raise its errors.

    Args:
        url: a folder, or a URL that fsspec supports (`s3://bucket/prefix`).
        place: path of the run below `url`; everything there is taken to belong to this run.
        staging: folder for uploads that are waiting, on the same disk as the checkpoints; it is emptied first.
        fresh: this run does not resume from what is at the place, which is removed once its first checkpoint arrives.
        patience: seconds that the store is given to answer the first check.
        cost: of the manifest of an evaluation, by which its checkpoint is the best: less is better.
        report: is called with each message.

    Raises:
        ValueError: the address, its package, key or permission is wrong. An unreachable store is only a warning.
    """

    def __init__(
        self, url: str, place: str, staging: Path, *, fresh: bool = False, patience: float = 10.0,
        cost: Callable[[dict[str, Any]], float] = itemgetter("log_loss"), report: Callable[[str], None] = warn,
    ) -> None:  # fmt: skip
        self.store, self.staging, self.fresh, self.cost, self.report = Store(url, place), staging, fresh, cost, report
        self.numbers = count()
        self.checkpoints = Path()  # the run's, as last pushed
        self.best = -1  # the step whose uploads are never dropped for later ones
        self.waiting: dict[str, Upload] = {}
        self.busy: Upload | None = None
        self.lock, self.wanted = threading.Lock(), threading.Event()
        self.closing = self.ended = self.prune_failed = False
        self.thread = threading.Thread(target=self._run, daemon=True, name="mirror")
        shutil.rmtree(staging, ignore_errors=True)
        self.failing = self.store.check(patience)  # the reason, while the store fails, which is reported once
        if self.failing is not None:
            report(f"mirror: {url} does not answer ({self.failing}); training continues, and uploads will be tried")

    def push(self, folder: Path, *, best: bool = False, files: Sequence[Path] = ()) -> None:
        """Queues a complete checkpoint (`step-<n>` or `evaluation-<n>`) for upload and returns at once.

        It replaces earlier checkpoints that are still waiting, except the best. `folder` may be removed afterwards,
        because its files are copied or linked into the staging folder.

        Args:
            best: this checkpoint is the best so far, in place of the previous best.
            files: small files to upload before it, such as the log.
        """
        number = _number(folder.name)
        assert number is not None, f"{folder.name} is not the name of a checkpoint"
        if best:
            self.best = number
        if files:
            self._queue(_name(FILES, number), files, number)
        self.checkpoints = folder.parent
        self._queue(f"{CHECKPOINTS}/{folder.name}", [folder], number)

    def push_files(self, name: str, paths: Sequence[Path]) -> None:
        """Queues files and folders, or the content of one folder, in their present state, for upload as `name`.

        Returns once files below 16 MiB are copied. If a file is missing, that is reported and nothing is uploaded.
        """
        self._queue(name, paths, math.inf)

    def close(self, patience: float) -> list[str]:
        """Waits up to `patience` seconds for the remaining uploads; reports and returns the names of those missing."""
        self.closing = True
        self.wanted.set()
        if self.thread.is_alive():
            self.thread.join(patience)
        with self.lock:
            self.ended = True
            names = ([self.busy.name] if self.busy else []) + list(self.waiting)
        if names:
            why = f" ({self.failing})" if self.failing else ""
            self.report(f"mirror: {', '.join(names)} did not arrive at {self.store.url}{why}")
        else:
            shutil.rmtree(self.staging, ignore_errors=True)
        return names

    def _queue(self, name: str, paths: Sequence[Path], number: float) -> None:
        assert not self.closing, "nothing may be pushed after close()"
        upload = Upload(name, number, self.staging / str(next(self.numbers)))
        try:
            upload.staged.mkdir(parents=True)
            alone = len(paths) == 1 and paths[0].is_dir()
            for path in paths[0].iterdir() if alone else paths:
                _link_or_copy(path, upload.staged / path.name)
        except OSError as error:
            shutil.rmtree(upload.staged, ignore_errors=True)
            self.report(f"mirror: {name} is not uploaded: {format_error(error)}")
            return
        with self.lock:
            for each in [each for each in self.waiting.values() if self._is_superseded(each, upload)]:
                shutil.rmtree(self.waiting.pop(each.name).staged, ignore_errors=True)
            self.waiting[name] = upload
        if self.thread.ident is None:
            self.thread.start()
        self.wanted.set()

    def _is_superseded(self, upload: Upload, by: Upload) -> bool:
        return upload.name == by.name or (upload.number < by.number < math.inf and upload.number != self.best)

    def _run(self) -> None:
        """Tries all that is waiting, each time that something is pushed, and for the last time at the end."""
        last = False
        while not last:
            self.wanted.wait()
            self.wanted.clear()
            last = self.closing
            for name in list(self.waiting):
                with self.lock:
                    self.busy = None if self.ended else self.waiting.pop(name, None)
                if self.busy is not None:
                    self._send(self.busy)

    def _send(self, upload: Upload) -> None:
        failed = False
        try:
            if not (upload.staged / NAME).is_file():
                write_manifest(upload.staged, {})
            self.store.put(upload.staged, upload.name)
        except PermanentError as error:
            self.report(f"mirror: {upload.name} is not uploaded: {error}")
        except Exception as error:  # whatever a store raises must not end the thread
            failed, why = True, format_error(error)
            if self.failing is None:
                self.report(f"mirror: {self.store.url} fails ({why}); training continues, and uploads are tried again")
            self.failing = why
        else:
            if self.failing is not None:
                self.report(f"mirror: {self.store.url} works again")
            self.failing = None
            if upload.name.startswith(f"{CHECKPOINTS}/{STEP}"):
                self._prune(int(upload.number))
        with self.lock:
            self.busy = None
            if failed and not any(self._is_superseded(upload, each) for each in self.waiting.values()):
                self.waiting[upload.name] = upload
            else:
                shutil.rmtree(upload.staged, ignore_errors=True)

    def _prune(self, number: int) -> None:
        """Removes what the store still has and this machine does not, once the checkpoint of step `number` has arrived.

        The best checkpoint is never removed. Neither are later steps, because this run may have started while the store
        was unreachable; only a fresh run removes them.
        """
        here = {each for path in self.checkpoints.glob(f"{STEP}*") if (each := _number(path.name)) is not None}
        if number not in here:
            return  # removed here too, maybe with the whole folder, which then does not tell what to keep
        try:
            old = (self._numbers(STEP) | self._numbers(EVALUATION) | self._numbers(FILES)) - here
            if not self.fresh:
                old = {each for each in old if each < number}
                old -= set(self._best_first()[:1] if old else [])
            for each in old:  # the checkpoint first: without it the others are ignored
                for start in (STEP, EVALUATION, FILES):
                    self.store.remove(_name(start, each))
            self.fresh = False
        except Exception as error:  # a store that does not permit removal still accepts uploads
            if not self.prune_failed:
                self.report(f"mirror: old checkpoints cannot be removed from {self.store.url}: {format_error(error)}")
            self.prune_failed = True

    def _numbers(self, start: str) -> set[int]:
        names = self.store.names("" if start == FILES else CHECKPOINTS)
        return {number for name in names if name.startswith(start) and (number := _number(name)) is not None}

    def _best_first(self) -> list[int]:
        """The steps in the store that were evaluated, the best first."""
        costs = {}
        for number in self._numbers(STEP) & self._numbers(EVALUATION):
            try:
                cost = self.cost(self.store.manifest(_name(EVALUATION, number)))
                self.store.manifest(_name(STEP, number))
                costs[number] = float(cost)
            except (PermanentError, KeyError, TypeError, ValueError):
                continue  # `pull` reports it
        return sorted((each for each in costs if math.isfinite(costs[each])), key=lambda each: (costs[each], each))

    def pull(self, run: Path) -> list[Path]:
        """Fetches the newest complete checkpoint, the best one, and the small files that `run` lacks.

        Each is fetched to a scratch folder, verified and renamed; if one is incomplete or damaged, the one before it is
        fetched instead. Complete local copies are not fetched again. An unreachable store is reported as a warning.

        Returns:
            Those of these checkpoints, `run/checkpoints/step-<n>`, that are now on this machine, the newest first.
        """
        fetched: dict[Path, None] = {}
        for pause in (*PAUSES, None):
            try:
                self._pull(run, fetched)
                break
            except Exception as error:  # whatever the store raises
                if pause is not None:  # a new machine must not start anew because of one failed request
                    time.sleep(pause)
                    continue
                reason = format_error(error)
                self.report(f"mirror: {self.store.url} cannot be read ({reason}); this run continues with local files")
        return list(fetched)

    def _pull(self, run: Path, fetched: dict[Path, None]) -> None:
        """`pull`, once; adds to `fetched`."""
        for numbers in (sorted(self._numbers(STEP), reverse=True), self._best_first()):
            for number in numbers:
                if self._fetch(_name(STEP, number), run / _name(STEP, number)):
                    fetched[run / _name(STEP, number)] = None
                    if number in self._numbers(EVALUATION):
                        self._fetch(_name(EVALUATION, number), run / _name(EVALUATION, number))
                    break
        if fetched:
            self._pull_files(run)

    def _fetch(self, name: str, target: Path) -> bool:
        """Fetches a folder, unless there is a complete copy here; False, and a message, if that is not possible."""
        if damage(target) is None:
            return True
        try:
            self.store.fetch(name, target)
        except PermanentError as error:
            self.report(f"mirror: passed over {error}")
            return False
        return True

    def _pull_files(self, run: Path) -> None:
        """Fetches the newest complete `files-<n>`; files that exist in `run` are left as they are."""
        draft = self.staging / str(next(self.numbers))
        try:
            if any(self._fetch(_name(FILES, each), draft) for each in sorted(self._numbers(FILES), reverse=True)):
                for path in draft.iterdir():
                    if path.name != NAME and not (run / path.name).exists():
                        path.rename(run / path.name)
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)


def _name(start: str, number: int) -> str:
    folder = f"{start}{number:08d}"
    return folder if start == FILES else f"{CHECKPOINTS}/{folder}"


def _number(name: str) -> int | None:
    found = re.fullmatch(r"[a-z]+-([0-9]{8,12})", name)
    return int(found[1]) if found else None


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
