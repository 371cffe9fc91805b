"""Progress of long work: a rich bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True, markup=False)  # paths and texts may hold [brackets]

PLAIN_INTERVAL = 10.0  # seconds between two plain lines

Advance = Callable[..., None]


def printable(text: str) -> str:
    """A text that any terminal can show: what steers one, and what is no character, is spelled out."""
    spelled = "".join(each if each in "\n\t" or each.isprintable() else repr(each)[1:-1] for each in text)
    return spelled.encode("utf-8", "backslashreplace").decode("utf-8")


def quiet() -> None:
    """Keeps the libraries' own notices off the screen; what matters of them is said by this package.

    bitsandbytes' warnings stay (see `arena/__init__.py` for the one that does not): a library that does not fit the
    card is a real problem.
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
    """Without transformers' report of a head that the base does not have, and without its bar in plain output."""
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
    """Shows how far some work is and how long it will take.

    Gives `advance(count, note="")`, to be called as `count` more units are done.

    Args:
        total: the number of units, or None when it is not known beforehand.
        done: units that were done by an earlier process; the time left is reckoned from the others.
    """
    with _bar(title, total, done) if console.is_terminal else _lines(title, total, unit, done) as advance:
        yield advance


@contextmanager
def _bar(title: str, total: int | None, done: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
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
    console.print(f"{title}: {done:,} {unit} in {time.monotonic() - start:.1f} s")


def duration(seconds: float) -> str:
    """A time in its two largest units, such as `8 s`, `4 min 10 s` or `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
