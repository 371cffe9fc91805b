"""Answers of a file's rows, or of one prompt, as `arena generate` gives them."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import TextStreamer

from arena.data.cells import FieldError
from arena.data.limits import Limits
from arena.data.rows import Cells, read_rows
from arena.distributed import fix_threads
from arena.inference.answer_scores import rouge_l, rouge_scores, says, score_table, squad_scores
from arena.inference.generate import Answer, Generator
from arena.inference.judged_rows import csv_writer, json_line
from arena.inference.prompt_rows import Prompts, Wanted, read_prompts
from arena.inference.prompts import PROMPT
from arena.inference.sampling import Sampling
from arena.progress import console, escape_unprintable
from arena.stopping import Stopped
from arena.storage.files import atomic_write, file_digest, local_path, write_json
from arena.storage.lock import locked

ENDS_FIELD = re.compile(r"[\t\r\n]+")  # in a file of tab-separated values
PLACES = ("data.path", "data.validation", "data.extra", "data.cache")  # where the data that were trained on are now
LIMITS = ("data.max_row_characters", "data.max_turns")
GROUPS = re.compile(r"(model|prompt)\.[a-z_.]+")  # of the other settings


def answer(
    words: Sequence[str], prompt: str | None, sampling: Sampling, wanted: Wanted, *, tokens: int, runs: Path,
    fold: int | None,
) -> None:  # fmt: skip
    """Answers a file's rows or one prompt.

    Args:
        words: the model, two files unless there is a prompt, and settings `key=value`.
        tokens, runs, fold: as for `Generator`.
    """
    settings = [word for word in words if _is_setting(word)]
    names = [word for word in words if word not in settings]
    if len(names) != (3 if prompt is None else 1):
        raise ValueError(
            "give a model and two files, MODEL IN OUT, or a model and --prompt TEXT, but not "
            f"{' '.join(names) or 'nothing'}{'' if prompt is None else ' and --prompt'}; after them can stand settings "
            f"of model and prompt, {', '.join(LIMITS)}, and with --held-out {', '.join(PLACES)}"
        )
    if not wanted.held_out and (places := [word for word in settings if word.partition("=")[0] in PLACES]):
        raise ValueError(f"{places[0]} says where held-out rows are: leave it out, or add --held-out")
    if prompt is not None and wanted != Wanted():
        raise ValueError("--score, --held-out and --limit are for the rows of a file: leave them out with --prompt")
    if tokens < 1:
        raise ValueError(f"--batch is {tokens}: give the most tokens of a batch, such as 16384")
    fix_threads()
    make = partial(Generator, names[0], settings, runs=runs, fold=fold)
    if prompt is None:
        answer_file(make(), Path(names[1]), Path(names[2]), sampling, tokens, wanted)
    else:
        answer_prompt(make, prompt, sampling)


def _is_setting(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and (key in PLACES + LIMITS or GROUPS.fullmatch(key) is not None)


def answer_file(
    generator: Generator, source: Path, out: Path, sampling: Sampling, tokens: int, wanted: Wanted | None = None
) -> None:
    """Writes a file's rows with an answer each, in their order, and their scores to `OUT.scores.json`.

    Args:
        source: CSV, TSV, JSONL or parquet with a column `prompt` or those of the model's task, all of which are passed
            on.
        out: a file of the same kind. Until it is complete, answers are saved in `OUT.parts`, from which the same call
            resumes.
        tokens: of a batch, as for `Generator.answers`.
        wanted: which rows, and how they are scored; by default all, and not at all.

    Raises:
        BadRowsError: rows cannot be used; nothing was answered.
        ValueError: the files are not of one of these kinds, or the same; another process is writing `out`; or answers
            cannot be scored; nothing was answered.
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
    parts, scores_file = (out.with_name(f"{out.name}.{each}") for each in ("parts", "scores.json"))
    wanted, phrase = wanted or Wanted(), generator.recipe.prompt.template.unanswerable
    if wanted.score == "rouge":
        rouge_l()  # reports a missing package before anything is answered
    try:
        with locked(out):
            digest = file_digest(source)
            prompts = read_prompts(source, generator, sampling, wanted)
            asked = phrase if wanted.score == "squad" else None
            answers = generator.answers(prompts.ids, sampling, tokens=tokens, parts=parts, phrase=asked)
            _check_same(source, digest)
            cells = ((answer.text, answer.finish, answer.no_answer)[: len(wanted.columns)] for answer in answers)
            added = [dict(zip(wanted.columns, each, strict=True)) for each in cells]
            with atomic_write(out) as draft:
                WRITERS[kind](source, draft, dict(zip(prompts.rows, added, strict=True)), generator.encoder.limits)
                _check_same(source, digest)  # also while it was copied
                scores_file.unlink(missing_ok=True)  # of earlier answers
            if wanted.score is not None:
                write_json(scores_file, scores := _score(wanted, prompts, answers, phrase, generator, sampling))
            shutil.rmtree(parts, ignore_errors=True)  # if that fails, they only take disk space
    except (Stopped, SystemExit):
        if parts.is_dir():
            console.print(f"the answers so far are saved in {parts}: the same command resumes from them")
        raise
    cut = sum(answer.finish == "length" for answer in answers)
    console.print(
        f"written: {out}, {len(answers):,} rows; {cut:,} answers were cut at {sampling.max_new_tokens:,} tokens"
    )
    if wanted.score is not None:
        console.print(score_table(scores))
        console.print(
            f"written: {scores_file}; {scores['without_reference']:,} rows have no reference and do not count"
        )


def _check_same(source: Path, digest: str) -> None:
    if file_digest(source) != digest:
        raise ValueError(f"{source} was changed meanwhile: run the same command again, which answers all of its rows")


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


def _score(
    wanted: Wanted, prompts: Prompts, answers: Sequence[Answer], phrase: str, generator: Generator, sampling: Sampling
) -> dict[str, Any]:
    """What `OUT.scores.json` holds: the scores of the answers of rows with a reference."""
    every = zip(answers, prompts.references, prompts.groups, strict=True)
    known = [(answer, each, group) for answer, each, group in every if each is not None]
    facts = {
        "score": wanted.score, "model": str(generator.folder or generator.recipe.model.base),
        "held_out": wanted.held_out, "limit": wanted.limit, "sampling": asdict(sampling), "rows": len(known),
        "without_reference": len(answers) - len(known),
    }  # fmt: skip
    texts, groups = [answer.text for answer, _, _ in known], [group for _, _, group in known]
    if wanted.score == "rouge":
        return {**facts, **rouge_scores(texts, [each or [phrase] for _, each, _ in known], groups)}
    return {
        **facts,
        "no_answer_phrase": phrase,
        **squad_scores(
            ["" if says(text, phrase) else text for text in texts],
            [[own for own in each if not says(own, phrase)] for _, each, _ in known],
            np.array([answer.no_answer for answer, _, _ in known]),
            groups,
        ),
    }


Added = Mapping[int, Cells]  # what is added to each row that was answered, by its number in the file


def _answered(source: Path, added: Added, limits: Limits) -> Iterator[Cells]:
    last = max(added)
    for number, (_, cells) in enumerate(read_rows(source, list, limits)):
        if number in added:
            assert not isinstance(cells, FieldError), "the rows were checked"
            yield {**cells, **added[number]}
        if number == last:
            return


def _write_csv(source: Path, draft: Path, added: Added, limits: Limits) -> None:
    with draft.open("w", encoding="utf-8", newline="") as handle:
        write = csv_writer(handle)
        for number, cells in enumerate(_answered(source, added, limits)):
            for fields in (cells.keys(), cells.values()) if number == 0 else (cells.values(),):
                write(fields)


def _write_tsv(source: Path, draft: Path, added: Added, limits: Limits) -> None:
    """Nothing is quoted there: what would end a field or a row becomes a space."""
    with draft.open("w", encoding="utf-8", newline="") as handle:
        for number, cells in enumerate(_answered(source, added, limits)):
            for fields in (cells.keys(), cells.values()) if number == 0 else (cells.values(),):
                handle.write("\t".join(ENDS_FIELD.sub(" ", str(each)) for each in fields) + "\n")


def _write_jsonl(source: Path, draft: Path, added: Added, limits: Limits) -> None:
    with draft.open("w", encoding="utf-8", newline="\n") as handle:
        handle.writelines(map(json_line, _answered(source, added, limits)))


def _write_parquet(source: Path, draft: Path, added: Added, limits: Limits) -> None:
    types = {name: pa.array([cell]).type for name, cell in next(iter(added.values())).items()}
    with pq.ParquetFile(source) as file:
        schema = file.schema_arrow
        for name, kind in types.items():
            schema = schema.append(pa.field(name, kind))
        with pq.ParquetWriter(draft, schema) as writer:
            end = 0
            for index in range(file.num_row_groups):
                start, end = end, end + file.metadata.row_group(index).num_rows
                if not (rows := [row for row in range(start, end) if row in added]):
                    continue
                table = file.read_row_group(index)
                if len(rows) < len(table):
                    table = table.take([row - start for row in rows])
                for name, kind in types.items():
                    table = table.append_column(name, pa.array([added[row][name] for row in rows], kind))
                writer.write_table(table)


WRITERS: dict[str, Callable[[Path, Path, Added, Limits], None]] = {
    ".csv": _write_csv,
    ".tsv": _write_tsv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
