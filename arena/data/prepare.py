"""Prepares a fold: from a folder of files to the rows, labels and tokens for training and evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from arena.config import Recipe, Template
from arena.data.conversations import read_conversations, repeated, rows_with_responses
from arena.data.folds import leaking, load_or_assign_folds
from arena.data.limits import Limits
from arena.data.rows import READERS
from arena.data.tokens import TokenStore, join, tokenise
from arena.storage.files import fingerprint

# placeholders that other programs use in templates; other braces are ordinary text
PLACEHOLDER = re.compile(
    r"\{\{?\s*(prompt|response_[ab]|answer\w*|question|instruction|conversation|text)\s*\}\}?", re.IGNORECASE
)


@dataclass(frozen=True)
class FoldData:
    """Rows, labels and tokens of one fold. Row numbers count the training file's rows first, then the extra files'.

    Attributes:
        rows: the training file's rows.
        ids: the id of each row for messages; those of extra files include the file.
        labels: float64 (rows, 3), in the order A, B, tie.
        store: tokens of all rows.
        train_rows: rows to train on, without those that have no responses.
        eval_rows: all rows of the held-out fold.
        has_responses: bool (rows,), whether there is anything to judge in a row.
        prior: (3,), mean label of `train_rows`.
        fingerprint: changes when the rows, the fold or the prompt settings change.
        trained_on: fingerprint of the files and of the split, the same for all folds.
        notes: messages about omitted rows.
    """

    rows: Dataset
    ids: list[str]
    labels: np.ndarray
    store: TokenStore
    train_rows: np.ndarray
    eval_rows: np.ndarray
    has_responses: np.ndarray
    prior: np.ndarray
    fingerprint: str
    trained_on: str
    notes: list[str]


def data_file(path: str | Path, kind: str) -> Path:
    """The file called `kind` (train, test) in a data folder, or `path` itself if it is a file.

    Raises:
        ValueError: there is no such file, or more than one.
    """
    place = Path(path)
    if place.is_file():
        return place
    if not place.is_dir():
        raise ValueError(f"data.path: there is no folder or file {place}; give one with DATA= or --data")
    found = [file for ending in READERS if (file := place / f"{kind}{ending}").is_file()]
    if len(found) != 1:
        names = ", ".join(f"{kind}{ending}" for ending in READERS)
        have = f"it has {', '.join(file.name for file in found)}" if found else "it has none of them"
        raise ValueError(f"{place} must have exactly one of {names}; {have}")
    return found[0]


def prepare_fold(recipe: Recipe, fold: int, tokenizer: Any) -> FoldData:
    """Reads, splits and tokenises the data of fold `fold` of a recipe.

    Raises:
        ValueError: a file cannot be used, the fold does not exist, or the template has placeholders; no incomplete
            file is left behind.
    """
    _refuse_placeholders(recipe.prompt.template)
    settings = recipe.data
    if not 0 <= fold < settings.folds:
        raise ValueError(f"there is no fold {fold}: the recipe has folds 0 to {settings.folds - 1}")
    cache = Path(settings.cache)
    limits = Limits(settings.max_row_characters, settings.max_turns)
    rows = read_conversations([data_file(settings.path, "train")], cache, labels="required", limits=limits)
    folds = load_or_assign_folds(rows, settings.folds, settings.fold_seed, cache)
    held_out = np.flatnonzero(folds == fold)
    stores = [_tokens(rows, recipe, tokenizer)]
    labels, responses, selected = [_labels(rows)], [rows_with_responses(rows)], [folds != fold]
    notes, sources, ids = [], [source(rows)], list(rows["id"])
    if settings.extra:
        extra = read_conversations([Path(each) for each in settings.extra], cache, labels="required", limits=limits)
        repeats, leaks = repeated(extra, rows), leaking(extra, rows.select(held_out))
        notes.append(
            f"extra rows: {len(extra):,}, of which {repeats.sum():,} repeat a row and {(leaks & ~repeats).sum():,} "
            "have a prompt of the held-out fold; both are omitted"
        )
        stores.append(_tokens(extra, recipe, tokenizer))
        labels.append(_labels(extra))
        responses.append(rows_with_responses(extra))
        selected.append(~repeats & ~leaks)
        sources.append(source(extra))
        origin = Path(settings.extra[0]).name if len(settings.extra) == 1 else "data.extra"
        ids += [f"{each} ({origin})" for each in extra["id"]]
    answered, chosen = np.concatenate(responses), np.concatenate(selected)
    every_label = np.concatenate(labels)
    train_rows = np.flatnonzero(chosen & answered)
    if not len(train_rows) or not len(held_out):
        raise ValueError(f"fold {fold} has {len(train_rows)} rows to train on and {len(held_out)} to score: add rows")
    if not answered[held_out].any():
        raise ValueError(f"no row of fold {fold} has a response to judge: use other data or fewer folds")
    if omitted := int((chosen & ~answered).sum()):
        notes.append(f"{omitted:,} training rows have no response to judge and are omitted")
    split = [sources, settings.folds, settings.fold_seed]
    return FoldData(
        rows=rows,
        ids=ids,
        labels=every_label,
        store=join(stores) if len(stores) > 1 else stores[0],
        train_rows=train_rows,
        eval_rows=held_out,
        has_responses=answered,
        prior=every_label[train_rows].mean(axis=0),
        fingerprint=fingerprint(split, fold, recipe.prompt.model_dump()),
        trained_on=fingerprint(split),
        notes=notes,
    )


def _refuse_placeholders(template: Template) -> None:
    """Refuses placeholders, which would appear literally in every prompt. Judges trained that way still work."""
    for name, words in template:
        if found := PLACEHOLDER.search(words):
            raise ValueError(
                f"prompt.template.{name} has {found[0]}, but templates have no placeholders: texts are inserted "
                "between the fields, the user's prompt after `user`, the answers after `answer_a` and `answer_b`. "
                "Remove it"
            )


def source(rows: Dataset) -> str:
    """The fingerprint of rows from `read_conversations`, which is the name of their cached file.

    Raises:
        ValueError: these are not all rows of one such file in their original order.
    """
    if len(rows.cache_files) != 1 or rows._indices is not None:
        raise ValueError("these rows are a selection or exist in memory only: write a file and use read_conversations")
    return Path(rows.cache_files[0]["filename"]).stem


def _tokens(rows: Dataset, recipe: Recipe, tokenizer: Any) -> TokenStore:
    both = recipe.train.swap != "never" or recipe.judge.swap
    return tokenise(rows, source(rows), tokenizer, recipe.prompt, Path(recipe.data.cache), both_orders=both)


def _labels(rows: Dataset) -> np.ndarray:
    return np.asarray(rows.with_format("arrow")[:]["label"].combine_chunks().flatten(), dtype=np.float64).reshape(-1, 3)
