"""Judges files of rows of any size, here or at a URL, in windows whose results are saved, as `arena judge` does."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import astuple, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from arena import __version__
from arena.data.limits import Limits
from arena.inference.blend import is_blend, read_blend
from arena.inference.find import find_models
from arena.inference.infer_blend import judges_of
from arena.inference.judge import Judge
from arena.inference.judge_inputs import Input, open_inputs
from arena.inference.judge_work import Share, Work, judge_windows
from arena.inference.judged_rows import WRITERS, Added, Table, json_line, parquet_schema
from arena.inference.saved import SavedJudge, check_alike, read_judge
from arena.progress import console, warn
from arena.storage.files import file_digest, fingerprint, write_json
from arena.storage.parts import Parts
from arena.storage.remote import file_system, remove_anywhere, store_errors, url_of, write_anywhere

KINDS = {".tsv": ".csv", ".json": ".jsonl"}  # in which files of these kinds are written into a folder
Engine = Callable[[Work, Parts, Sequence[int], int, Callable[[], Judge]], None]  # as `judge_windows`


def judge_files(
    names: Sequence[str], source: str, out: str, settings: Sequence[str], *, runs: Path, orders: bool, share: Share,
    joins: bool, engine: Engine = judge_windows,
) -> None:  # fmt: skip
    """Judges the rows of files and writes them with their probabilities.

    Args:
        names: of judges, as for `Judge.from_pretrained`.
        source: a file, a folder or a pattern, here or at a URL.
        out: a file, or a folder if it ends in a slash, here or at a URL.
        settings: of the judge to change.
        orders: whether the probabilities of each order are written too.
        share: which of several shares of the rows is judged; of a single one the results are written too.
        joins: the shares are judged, and are to be written.
        engine: judges windows as `judge_windows` does.

    Raises:
        ValueError: a judge, a file or a setting cannot be used, or shares are missing.
        Stopped: a signal arrived; what was judged so far is saved.
    """
    saved, identity = _identity(names, settings, runs)
    task, limits = saved[0].task, Limits.of(saved[0].recipe.data)
    n_orders = min(task.orders if each.recipe.reads_all_orders else 1 for each in saved)
    if orders and n_orders == 1:
        raise ValueError("--orders: this judge reads one order: set judge.swap=true, or leave --orders out")
    started, judged = time.monotonic(), 0
    with open_inputs(source, task, limits) as inputs:
        targets = _targets(source, out, inputs)
        made_from = {
            "judge": identity,
            "input": [[each.path.suffix.lower(), each.digest, fingerprint(each.ends)] for each in inputs],
            "settings": [__version__, orders, list(astuple(limits)), list(map(str, task.reading))],
        }
        parts = _parts_folder(out)
        work = Work(inputs, task, limits, n_orders if orders else 0, parts / fingerprint(made_from), made_from)
        tables = _tables(targets, work)
        _say_others(parts, work)
        _begin(work, out, targets, share[1] if joins else 0)
        load = partial(_load, names, settings, runs)
        with ExitStack() as stack:
            shares = [(at + 1, share[1]) for at in range(share[1])] if joins else [share]
            every = [stack.enter_context(work.open(each)) for each in shares]
            done = [{window.at for window in work.read(each)} for each in every]
            if joins:
                _check_complete(work, shares, done)
            else:
                judged = _judge(work, every[0], share, done[0], engine, load)
                if share[1] > 1:
                    console.print(f"share {share[0]} of {share[1]} is in {parts}: --join {share[1]} writes {out}")
                    return
            with console.showing("warning"):  # what is to be said of parts was said when they were first read
                rejected, tokens, logical = _write(work, every, tables, out).tolist()
        _remove(work.folder)
    rows, seconds = sum(map(len, inputs)), time.monotonic() - started
    beside = f" ({_rejected_file(out)})" if rejected else ""
    console.print(
        f"written: {out}, {rows - rejected:,} rows; {rejected:,} were rejected{beside}; {tokens:,} tokens were "
        f"computed of {logical:,}, the others are shared; {judged:,} rows "
        f"were judged now, in {seconds:.1f} s, {judged / seconds:,.1f} a second"
    )


def _remove(results: Path) -> None:
    """Removes the folder of results, and the one around it unless other work has results there."""
    with suppress(OSError):  # if it fails, they only take disk space
        shutil.rmtree(results)
        results.parent.rmdir()


def _identity(names: Sequence[str], settings: Sequence[str], runs: Path) -> tuple[list[SavedJudge], list[Any]]:
    """The judges, and what determines what they say, as JSON; nothing is loaded."""
    beside = []
    if is_blend(names[0]):
        blend = read_blend(Path(names[0]))
        used = [each for each, weight in zip(blend.members, blend.blend.weights, strict=True) if weight > 0]
        saved = [each for folds in judges_of(used, settings).values() for each in folds]
        beside = [file_digest(Path(path)) for path in (names[0], *(m.path for m in used if m.kind == "baseline"))]
        if beside[1:] and any(each.startswith("data.columns.") for each in settings):
            raise ValueError(f"{names[0]} fits its baseline to files with its own columns: rename those of the rows")
        if not saved:
            raise ValueError(f"{names[0]} uses no run: it is not a judge")
    else:
        saved = [read_judge(model, settings) for name in names for model in find_models(name, runs)]
        check_alike(saved)
    fields = {"model": True, "packing": True, "judge": True}
    settled = [each.recipe.model_dump(mode="json", include=fields) for each in saved]
    for each in settled:
        each["model"].pop("base")  # which counts by its content
    return saved, [[each.digest, each.base, own] for each, own in zip(saved, settled, strict=True)] + beside


def _targets(source: str, out: str, inputs: Sequence[Input]) -> dict[str, list[Input]]:
    """Where to write, and the files whose rows are written there.

    Raises:
        ValueError: it cannot be written there, or what is to be read would be replaced.
    """
    if "/" not in file_system(out, out)[1].rstrip("/"):
        raise ValueError(f"{out} is the root of all folders there: name a file or a folder in it")
    below = {}
    for each in inputs:
        name = Path(each.below)
        below[each.name] = out + name.with_suffix(KINDS.get(name.suffix.lower(), name.suffix.lower())).as_posix()
    if not out.endswith("/"):
        if Path(out).suffix.lower() not in WRITERS:
            raise ValueError(
                f"{out}: name a file that ends in {', '.join(WRITERS)}, or a folder with a slash at its end"
            )
        below = dict.fromkeys(below, out)
    elif len(set(below.values())) < len(below):
        raise ValueError(
            f"{source}: several files would be written to one: give them names that differ in more than the ending"
        )
    read, folder = {_real(each.name) for each in inputs}, _real(source).rstrip("/") + "/"
    for target in (*below.values(), _rejected_file(out)):
        if _real(target) in read or _real(target).startswith(folder):
            raise ValueError(f"{target} is among the files to read: name another place to write to")
        _check_place(target)
    found: dict[str, list[Input]] = {}
    for each in inputs:
        found.setdefault(below[each.name], []).append(each)
    return found


def _rejected_file(out: str) -> str:
    """Where rejected rows are written."""
    return f"{out.rstrip('/')}.rejected.jsonl"


def _parts_folder(out: str) -> Path:
    """Where results are saved until all are written: beside them, or for a URL in the working directory."""
    fs, path = file_system(out, out)
    place = Path(path.rstrip("/"))
    if isinstance(fs, LocalFileSystem):
        return place.with_name(f"{place.name}.parts")
    return Path(f"{place.name}.{fingerprint(url_of(out.rstrip('/')))[:8]}.parts")  # URLs may end in the same name


def _is_there(place: str) -> bool:
    """Whether there is a file at a path or URL."""
    fs, path = file_system(place, place)
    with store_errors(place):
        return bool(fs.isfile(path))


def _real(place: str) -> str:
    """The one URL of a path or URL, whichever links lead there."""
    fs, path = file_system(place, place)
    return str(fs.unstrip_protocol(os.path.realpath(path))) if isinstance(fs, LocalFileSystem) else url_of(place)


def _check_place(target: str) -> None:
    """Raises `ValueError` if no file can be written to a path here."""
    fs, path = file_system(target, target)
    if not isinstance(fs, LocalFileSystem):
        return
    if Path(path).is_dir():
        raise ValueError(f"{target} is a folder: name a file, or a folder with a slash at its end")
    parent = next(each for each in Path(path).parents if each.exists())
    if not parent.is_dir():
        raise ValueError(f"{target} cannot be written, because {parent} is not a folder: name another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{target} cannot be written, because {parent} permits no new files: name another place")


def _load(names: Sequence[str], settings: Sequence[str], runs: Path) -> Judge:
    """Loads the judge; unlike its own method, this function can be sent to other processes."""
    return Judge.from_pretrained(*names, settings=settings, runs=runs)


def _judge(work: Work, parts: Parts, share: Share, done: set[int], engine: Engine, load: Callable[[], Judge]) -> int:
    """Judges what of a share is not done yet; how many rows these are."""
    todo, sizes = sorted(set(work.share(share)) - done), work.sizes
    if todo:
        engine(work, parts, todo, sum(sizes[at] for at in done), load)
    return sum(sizes[at] for at in todo)


def _say_others(parts: Path, work: Work) -> None:
    """Says what of other work is saved there, and not used."""
    for manifest in sorted(parts.glob("*/manifest.json")):
        if manifest.parent != work.folder:
            with suppress(OSError, ValueError):
                other = json.loads(manifest.read_text(encoding="utf-8"))
                odd = [name for name, own in work.made_from.items() if other.get(name) != own]
                warn(f"{manifest.parent} has results that differ in {' and '.join(odd)}: they are not used")


def _begin(work: Work, out: str, targets: Iterable[str], joined: int) -> None:
    """Says what the work is made from, beside its results; shares that are to be joined must have begun."""
    if joined and not work.folder.is_dir():
        if all(map(_is_there, targets)):
            raise ValueError(f"{out} is there, and {work.folder.parent} has no shares to join: they were joined before")
        raise ValueError(f"of {joined} shares none is finished, the first --shard 1/{joined}: run them")
    write_json(work.folder / "manifest.json", work.made_from)


def _check_complete(work: Work, shares: Sequence[Share], done: Sequence[set[int]]) -> None:
    odd = [number for (number, of), own in zip(shares, done, strict=True) if set(work.share((number, of))) - own]
    if odd:
        raise ValueError(
            f"of {len(shares)} shares some are not finished, the first --shard {odd[0]}/{len(shares)}: run them"
        )


def _tables(targets: dict[str, list[Input]], work: Work) -> dict[str, Table]:
    """What is written to each file, without its results; types that it cannot have are found before these are there."""
    columns, limits = work.columns(), work.limits
    schemas = {
        target: parquet_schema(own, columns, limits) if target.lower().endswith(".parquet") else None
        for target, own in targets.items()
    }
    return {target: Table(own, columns, limits, schemas[target]) for target, own in targets.items()}


def _write(work: Work, every: Sequence[Parts], tables: dict[str, Table], out: str) -> np.ndarray:
    """Writes the rows with their results, and those that were rejected: how many these are, and the tokens."""
    windows, facts = chain.from_iterable(map(work.read, every)), np.zeros(3, dtype=np.int64)
    numbers = count()
    with tempfile.TemporaryDirectory(prefix="arena-judge-") as folder:
        beside = Path(folder) / "rejected.jsonl"
        with beside.open("w", encoding="utf-8") as rejected:

            def added(each: Input) -> Added:
                for _ in each.ends:
                    window = next(windows, None)
                    if window is None or window.at != next(numbers):
                        raise ValueError(f"results in {work.folder} are damaged: run the same command again")
                    for where, field, what in window.rejected:
                        rejected.write(json_line({"file": each.name, "row": where, "field": field, "why": what}))
                    facts[:] += (len(window.rejected), *window.tokens)
                    yield from work.cells(window)

            for target, table in tables.items():
                with write_anywhere(target) as draft:
                    WRITERS[Path(target).suffix.lower()](draft, replace(table, added=map(added, table.inputs)))
                    for each in table.inputs:
                        each.check_same()
        name = _rejected_file(out)
        if facts[0]:
            with write_anywhere(name) as draft:
                shutil.copyfile(beside, draft)
        else:
            remove_anywhere(name)  # of earlier rows
    return facts
