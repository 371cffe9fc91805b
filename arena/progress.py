"""Long work: its progress as a rich bar or, where there is no terminal, as plain lines; and items made ahead."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from itertools import islice
from typing import Any, TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Output:
    """A text stream that forwards writes to another stream and never raises if they fail.

    Output must not end a run: after a closed pipe (`arena train | head`), a full disk behind `> log` or a closed
    terminal only the rest of the output is lost. Characters that the stream cannot encode are escaped.

    Args:
        stream: returns the stream to write to, or None if the process has none.
    """

    def __init__(self, stream: Callable[[], TextIO | None]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"only text can be written, not {type(text).__name__}")
        self._guarded(lambda stream: stream.write(_encodable(text, stream)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._guarded(lambda stream: stream.flush())

    def _guarded(self, work: Callable[[TextIO], object]) -> None:
        stream = self._stream()
        if stream is None:
            return
        try:
            work(stream)
        except (BlockingIOError, RuntimeError):  # a full non-blocking pipe, or a signal handler during another write
            pass  # the next write may succeed
        except Exception:
            _silence(stream)

    def isatty(self) -> bool:
        try:
            return bool(getattr(self._stream(), "isatty", bool)())
        except ValueError:  # closed
            return False

    @property
    def encoding(self) -> str:
        return getattr(self._stream(), "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)


def _encodable(text: str, stream: TextIO) -> str:
    """The text, with escapes for characters that the stream cannot encode."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _silence(stream: TextIO) -> None:
    """Redirects a stream, including its buffer, to the null device.

    Otherwise the interpreter fails to flush the stream at exit, and the process ends with status 120.
    """
    with suppress(Exception):  # a closed stream, or one without a descriptor
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


def guard_output() -> None:
    """Makes standard output and error safe to write to for the rest of the process; call it once at the start."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed (`>&-`): the next opened file would get its number, and receive what libraries print
            os.open(os.devnull, os.O_RDWR)
    stdout, stderr = sys.stdout, sys.stderr
    if not isinstance(stdout, Output):
        sys.stdout, sys.stderr = cast(TextIO, Output(lambda: stdout)), cast(TextIO, Output(lambda: stderr))


def _stdout() -> TextIO | None:
    """The current standard output, without rich's proxy while a bar is drawn."""
    return cast("TextIO | None", getattr(sys.stdout, "rich_proxied_file", sys.stdout))


for _name in ("COLUMNS", "LINES"):
    if not re.fullmatch("[1-9][0-9]*", os.environ.get(_name, "80"), re.ASCII):
        del os.environ[_name]  # a size of 0 would hide all output

LEVELS = ("info", "warning", "error")  # of messages
_is_quiet = ContextVar("is_quiet", default=False)  # of a thread
STYLES = {"yellow": "warning", "red": "error"}  # in which those after `info` are shown


class Messages(Console):
    """A console that shows messages from a level on."""

    _level = "info"

    @contextmanager
    def showing(self, level: str) -> Iterator[None]:
        """Shows only messages of a level and of those after it in the block, in all threads."""
        before, self._level = self._level, level
        try:
            yield
        finally:
            self._level = before

    @contextmanager
    def quiet_here(self) -> Iterator[None]:
        """Shows only warnings and errors in the block, in this thread."""
        before = _is_quiet.set(True)
        try:
            yield
        finally:
            _is_quiet.reset(before)

    def shows(self, style: Any = None) -> bool:
        """Whether messages of a style are shown."""
        level = "warning" if _is_quiet.get() and self._level == LEVELS[0] else self._level
        return LEVELS.index(STYLES.get(style, "info")) >= LEVELS.index(level)

    def print(self, *objects: Any, style: Any = None, **options: Any) -> None:
        if self.shows(style):
            super().print(*objects, style=style, **options)


# paths and texts may hold [brackets]
console = Messages(file=cast(TextIO, Output(_stdout)), highlight=False, soft_wrap=True, markup=False)

PLAIN_INTERVAL = 10.0  # seconds between two plain lines

Advance = Callable[..., None]
T = TypeVar("T")


def escape_unprintable(text: str) -> str:
    """A text that any terminal can show: control characters and invalid characters are escaped."""
    spelled = "".join(each if each in "\n\t" or each.isprintable() else repr(each)[1:-1] for each in text)
    return spelled.encode("utf-8", "backslashreplace").decode("utf-8")


def format_error(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")


def warn(text: str) -> None:
    """Shows a warning."""
    console.print(text, style="yellow")


@contextmanager
def optional(what: str, advice: str = "") -> Iterator[None]:
    """Turns any error in the block into a warning: for extras whose failure must not lose a result.

    Args:
        what: the action, for the warning.
        advice: how to get the same later.
    """
    try:
        yield
    except Exception as error:
        warn(escape_unprintable(f"warning: {what} failed ({format_error(error)}){advice and f'; {advice}'}"))


def quiet() -> None:
    """Silences the notices of libraries; this package reports the relevant ones itself.

    Warnings of bitsandbytes are shown, except one (see `arena/__init__.py`): a library that does not fit the card is a
    real problem.
    """
    import logging as python_logging
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    python_logging.getLogger("huggingface_hub").setLevel(python_logging.ERROR)
    logging.set_verbosity_error()
    if not console.is_terminal:
        logging.disable_progress_bar()


@contextmanager
def loading_quietly() -> Iterator[None]:
    """Silences transformers' report about a missing head, and its progress bar if the output is not a terminal."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not console.is_terminal:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def progress(title: str, total: int | None, unit: str = "rows", done: int = 0) -> Iterator[Advance]:
    """Shows the progress of some work and the remaining time.

    Yields `advance(count, note="")`, to be called when `count` more units are done.

    Args:
        total: the number of units, or None if it is unknown.
        done: units done by an earlier process, which the estimate of the remaining time leaves out.
    """
    with _bar(title, total, done) if console.is_terminal else _lines(title, total, unit, done) as advance:
        yield advance


@contextmanager
def _bar(title: str, total: int | None, done: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.shows()) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def advance(count: int = 1, note: str = "") -> None:
            bar.update(task, advance=count, note=note)

        yield advance


@contextmanager
def _lines(title: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    before = done

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL or done == total:
            return
        last = now
        parts = [f"{title}: {done:,}{of} {unit}", duration(now - start)]
        if total is not None and done > before:
            parts.append(f"{duration((now - start) * (total - done) / (done - before))} left")
        console.print(", ".join([*parts, *([note] if note else [])]))

    of = "" if total is None else f" of {total:,}"
    yield advance
    one = unit.removesuffix("s") if done == 1 else unit
    console.print(f"{title}: {done:,} {one} in {time.monotonic() - start:.1f} s")


def duration(seconds: float) -> str:
    """A time in its two largest units, such as `8 s`, `4 min 10 s` or `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def ahead(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yields the same items, up to `depth` of which are made in a background thread before they are needed.

    An error in making an item is raised in that item's place. This pays if making an item releases Python's global
    lock for a while (a tokenizer, large copies) or if the caller waits for another device.
    """
    source = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as maker:
        waiting: list[Future[list[T]]] = [maker.submit(lambda: list(islice(source, 1))) for _ in range(depth)]
        while made := waiting.pop(0).result():
            waiting.append(maker.submit(lambda: list(islice(source, 1))))
            yield made[0]
