"""Answers of a file's rows, or of one prompt, as `arena generate` gives them."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import TextStreamer

from arena.data.cells import FieldError, is_utf8
from arena.data.dataset import BadRowsError
from arena.data.limits import Limits
from arena.data.rows import Cells, read_rows
from arena.distributed import fix_threads
from arena.inference.generate import Answer, Generator
from arena.inference.prompts import PROMPT
from arena.inference.sampling import Sampling
from arena.progress import console, escape_unprintable
from arena.stopping import Stopped
from arena.storage.files import atomic_write, file_digest, local_path
from arena.storage.lock import locked

COLUMNS = ("answer", "finish")  # added to the file's own
SETTING = re.compile(r"(model|prompt)\.[a-z_.]+=")


def answer(
    words: Sequence[str], prompt: str | None, sampling: Sampling, *, tokens: int, runs: Path, fold: int | None
) -> None:
    """Answers a file's rows or one prompt.

    Args:
        words: the model, two files unless there is a prompt, and settings `key=value`.
        tokens, runs, fold: as for `Generator`.
    """
    settings = [word for word in words if SETTING.match(word)]
    names = [word for word in words if word not in settings]
    if len(names) != (3 if prompt is None else 1):
        raise ValueError(
            "give a model and two files, MODEL IN OUT, or a model and --prompt TEXT, but not "
            f"{' '.join(names) or 'nothing'}{'' if prompt is None else ' and --prompt'}"
        )
    if tokens < 1:
        raise ValueError(f"--batch is {tokens}: give the most tokens of a batch, such as 16384")
    fix_threads()
    make = partial(Generator, names[0], settings, runs=runs, fold=fold)
    if prompt is None:
        answer_file(make(), Path(names[1]), Path(names[2]), sampling, tokens)
    else:
        answer_prompt(make, prompt, sampling)


def answer_file(generator: Generator, source: Path, out: Path, sampling: Sampling, tokens: int) -> None:
    """Writes a file's rows with an answer each, in their order.

    Args:
        source: CSV, JSONL or parquet with a column `prompt` or those of the model's task. All columns are passed on.
        out: a file of the same kind. Until it is complete, answers are saved in `OUT.parts`, from which the same call
            resumes.
        tokens: of a batch, as for `Generator.answers`.

    Raises:
        BadRowsError: rows cannot be used; nothing was answered.
        ValueError: the files are not of one of these kinds, or the same; or another process is writing `out`.
        Stopped: a signal arrived; the answers so far are saved.
    """
    kind = source.suffix.lower()
    if kind not in WRITERS:
        raise ValueError(f"{source}: name a file that ends in {', '.join(WRITERS)}")
    if not source.is_file():
        raise ValueError(f"there is no file {source}: check the path")
    local_path(out, "the file to write,", [kind])
    if out.exists() and out.samefile(source):
        raise ValueError(f"{source} would be replaced by its answers: name another file to write")
    parts = out.with_name(f"{out.name}.parts")
    try:
        with locked(out):
            digest = file_digest(source)
            answers = generator.answers(read_prompts(source, generator, sampling), sampling, tokens=tokens, parts=parts)
            if file_digest(source) != digest:
                raise ValueError(f"{source} was changed meanwhile: the same command answers the prompts that changed")
            with atomic_write(out) as draft:
                WRITERS[kind](source, draft, answers)
            shutil.rmtree(parts, ignore_errors=True)  # if that fails, they only take disk space
    except (Stopped, SystemExit):
        if parts.is_dir():
            console.print(f"the answers so far are saved in {parts}: the same command resumes from them")
        raise
    cut = sum(answer.finish == "length" for answer in answers)
    console.print(
        f"written: {out}, {len(answers):,} rows; {cut:,} answers were cut at {sampling.max_new_tokens:,} tokens"
    )


def answer_prompt(generator: Callable[[], Generator], prompt: str, sampling: Sampling) -> None:
    """Prints the answer to a prompt: word by word on a terminal, and to a pipe or a file nothing but the text.

    Args:
        generator: makes the generator; what that prints is no part of the answer.
    """
    is_terminal = console.is_terminal
    with nullcontext() if is_terminal else redirect_stdout(sys.stderr):
        made = generator()
        try:
            ids = made.encode({PROMPT: prompt}, sampling)
        except FieldError as problem:
            raise ValueError(f"the {problem.field} {problem.what}") from None
        made.model  # noqa: B018 - loads it
    streamer = _Terminal(made.tokenizer) if is_terminal else _Plain(made.tokenizer)
    (answered,) = made.batch([ids], [0], sampling, streamer)
    if is_terminal and made.read(answered).finish == "length":
        console.print(f"(cut at {sampling.max_new_tokens:,} tokens: --max-new-tokens allows more)", style="yellow")


class _Plain(TextStreamer):
    """Prints an answer without control tokens, among them the one that ends it."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Terminal(_Plain):
    """Does the same without characters that would steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(escape_unprintable(text), stream_end)


def read_prompts(source: Path, generator: Generator, sampling: Sampling) -> list[np.ndarray]:
    """The token ids of the prompt of each row.

    Raises:
        BadRowsError: rows or the file cannot be used.
    """
    prompts, bad = [], BadRowsError()

    def choose(names: list[str]) -> list[str]:
        _check_free(names)
        wanted = generator.encoder.columns(names)
        return wanted if source.suffix.lower() == ".parquet" else names  # other columns are passed on unread

    for where, cells in read_rows(source, choose, Limits()):
        try:
            if isinstance(cells, FieldError):
                raise cells
            _check_free(cells)
            prompts.append(generator.encode(cells, sampling))
        except FieldError as problem:
            bad.add(source, where, problem)
    if bad.count:
        raise bad
    return prompts


def _check_free(names: Any) -> None:
    for name in COLUMNS:
        if name in names:
            raise FieldError(name, "is a column of the file, but answers are written there; rename it")


def _answered(source: Path, answers: Sequence[Answer]) -> Iterator[Cells]:
    for (_, cells), answer in zip(read_rows(source, list, Limits()), answers, strict=True):
        assert not isinstance(cells, FieldError), "the rows were checked"
        yield {**cells, **dict(zip(COLUMNS, (answer.text, answer.finish), strict=True))}


def _write_csv(source: Path, draft: Path, answers: Sequence[Answer]) -> None:
    with draft.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        for number, cells in enumerate(_answered(source, answers)):
            if number == 0:
                writer.writerow(cells)
            writer.writerow(cells.values())


def _write_jsonl(source: Path, draft: Path, answers: Sequence[Answer]) -> None:
    with draft.open("w", encoding="utf-8", newline="\n") as handle:
        for cells in _answered(source, answers):
            line = json.dumps(cells, ensure_ascii=False)
            handle.write((line if is_utf8(line) else json.dumps(cells)) + "\n")


def _write_parquet(source: Path, draft: Path, answers: Sequence[Answer]) -> None:
    added = [pa.array([answer.text for answer in answers]), pa.array([answer.finish for answer in answers])]
    with pq.ParquetFile(source) as file:
        schema = file.schema_arrow
        for name in COLUMNS:
            schema = schema.append(pa.field(name, pa.string()))
        with pq.ParquetWriter(draft, schema) as writer:
            start = 0
            for index in range(file.num_row_groups):
                table = file.read_row_group(index)
                for name, column in zip(COLUMNS, added, strict=True):
                    table = table.append_column(name, column.slice(start, len(table)))
                start += len(table)
                writer.write_table(table)


WRITERS: dict[str, Callable[[Path, Path, Sequence[Answer]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
