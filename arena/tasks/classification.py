"""Classification: a text, or a pair of texts, and which of several classes it belongs to.

The layout of an example, with Gemma's chat markers and the `classify` template:

    <bos><start_of_turn>user
    {instruction}
    The classes are: {names of the classes}

    {opening}Text: {text}
    Second text: {second text, if rows are pairs}
    {closing}<end_of_turn>
    <start_of_turn>model
    Answer:

The texts are tokenised separately, with control tokens in them taken as plain text, and truncated at token boundaries.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from datasets import Dataset, Features, Value
from sklearn.metrics import confusion_matrix, f1_score

from arena.data.cells import FieldError, Labels, excerpt, is_blank, label_form, read_probabilities, whole_characters
from arena.data.encoder import Encoded, Encoder
from arena.data.limits import Limits
from arena.data.rows import Cells
from arena.data.task import Baseline, Task
from arena.data.text_encoder import TextEncoder, as_ids
from arena.data.truncation import check_room, continuation_bytes, even_cap, shorten
from arena.metrics import METRICS
from arena.prompt_settings import PromptSettings
from arena.settings import Recipe
from arena.tasks.baseline import fit_text_baseline

Texts = tuple[np.ndarray, ...]  # int32 token ids of a row's text, and of its second text if rows are pairs


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """The probability of each of a recipe's classes, from one or two columns of a recipe's choice.

    Attributes:
        label: the column with the label as a class's name or number; soft labels have the columns of predictions.
    """

    classes: tuple[str, ...]
    columns: tuple[str, ...]
    texts: tuple[str, ...]
    label: str
    features: Features
    group_by: str
    reading: tuple[Any, ...]

    name = "classification"
    rows = "texts"
    missing = "text"
    templates = ("classify",)
    metrics = METRICS

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        classes, columns = recipe.classes, recipe.data.columns
        if len(set(classes)) < max(2, len(classes)) or any(not name or name != name.strip() for name in classes):
            raise ValueError(
                f"classes is [{', '.join(classes)}], but task=classification needs two or more different names without "
                "white space around them, in the order of their numbers, such as classes=[negative, positive]"
            )
        texts = (columns.text,) if columns.pair is None else (columns.text, columns.pair)
        if len({"id", *texts, columns.label}) != len(texts) + 2 or "label" in texts:
            raise ValueError(
                f"data.columns names {', '.join((*texts, columns.label))}: texts and label need columns of their own, "
                "other than id, and texts other than label: rename them in the file"
            )
        return cls(
            classes=classes,
            columns=tuple(f"p_{name}" for name in classes),
            texts=texts,
            label=columns.label,
            features=Features({name: Value("string") for name in texts}),
            group_by=columns.text,
            reading=(classes, texts, columns.label),
        )

    def numbers_rows(self, names: Collection[str]) -> bool:
        return True

    def label_columns(self, names: Sequence[str], labels: Labels) -> tuple[str, ...]:
        """One word or number, the probabilities of all classes, or none."""
        columns = () if labels == "ignored" else label_form(names, self.columns, self.label)
        if labels == "required" and not columns:
            raise FieldError(
                self.label, f"is missing; name the label's column in data.columns.label, or give {self.columns[0]} and "
                "so on with a probability for each class"
            )  # fmt: skip
        return columns

    def read_texts(self, cells: Cells, limits: Limits) -> Cells:
        return {name: _text(cells, name) for name in self.texts}

    def read_label(self, cells: Cells, labels: Labels) -> list[float] | None:
        columns = self.label_columns(list(cells), labels)
        if all(self._is_no_label(cells[name]) for name in columns):
            if labels == "required":
                raise FieldError(columns[0], f"is {excerpt(cells[columns[0]])}; label the row or leave it out")
            return None
        if columns == self.columns:
            return read_probabilities(cells, columns)
        number = self._number(cells[self.label])
        return [float(at == number) for at in range(len(self.classes))]

    def has_input(self, row: Mapping[str, Any]) -> bool:
        """Whether at least one of a row's texts is not blank."""
        return not all(is_blank(row[name]) for name in self.texts)

    def encoder(
        self, tokenizer: Any, settings: PromptSettings, memo: MutableMapping[bytes, np.ndarray] | None = None
    ) -> ClassificationEncoder:
        return ClassificationEncoder(self, tokenizer, settings, memo)

    def further_scores(self, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
        """The macro-averaged F1 score, and by the label's most probable class how often each class was predicted."""
        pair, every = (labels.argmax(axis=1), probabilities.argmax(axis=1)), range(len(self.classes))
        counts = confusion_matrix(*pair, labels=every).tolist()
        return {
            "macro_f1": float(f1_score(*pair, labels=every, average="macro", zero_division=0.0)),
            "confusion": {
                name: dict(zip(self.classes, row, strict=True)) for name, row in zip(self.classes, counts, strict=True)
            },
        }

    def fit_baseline(self, rows: Dataset, labels: np.ndarray, seed: int) -> Baseline:
        texts = list(self.texts)
        fitted = fit_text_baseline(rows.select_columns(texts), labels, seed)
        return lambda others: fitted(others.select_columns(texts))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The number of a class by its name, and by the number as text unless a name is a number itself."""
        names = {name: at for at, name in enumerate(self.classes)}
        if any(_as_number(name) is not None for name in names):
            return names
        return names | {str(at): at for at in range(len(names))}

    def _number(self, cell: Any) -> int:
        """The number of the class that a label names. Raises `FieldError` if it names none."""
        number = _as_number(cell)
        for word in (cell.strip() if isinstance(cell, str) else None, None if number is None else str(number)):
            if word in self._numbers:
                return self._numbers[word]
        known = ", ".join(self._numbers)
        raise FieldError(self.label, f"is {excerpt(cell)}; write one of {known if len(known) < 500 else 'classes'}")

    def _is_no_label(self, cell: Any) -> bool:
        """Whether a label is blank, or -1 as in test files of public data sets."""
        return is_blank(cell) or ("-1" not in self.classes and _as_number(cell) == -1)


def _as_number(cell: Any) -> int | None:
    """The whole number that a cell or a name is, such as 1, "1" or 1.0; None for anything else."""
    try:
        number = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() else None


def _text(cells: Cells, name: str) -> str | None:
    if name not in cells:  # as in one row of JSONL
        raise FieldError(name, "is missing; write a text or null, or name another column in data.columns")
    if is_blank(cells[name]):
        return None
    if not isinstance(cells[name], str):
        raise FieldError(name, f"is {excerpt(cells[name])}; write a text or null")
    return whole_characters(cells[name])


class ClassificationEncoder(Encoder):
    """Turns texts into prompts, for one tokenizer, template and length.

    Args:
        settings: template, chat markers, `max_length`.
        memo: as for `TextEncoder`.

    Raises:
        ValueError: the tokenizer is not a fast one, or `max_length` is too small for the template and truncated texts;
            from any method, if a text cannot be tokenised without a control token.
    """

    def __init__(
        self,
        task: Classification,
        tokenizer: Any,
        settings: PromptSettings,
        memo: MutableMapping[bytes, np.ndarray] | None = None,
    ) -> None:
        self._columns, self._texts = task.texts, TextEncoder(tokenizer, memo)
        self._is_continuation = continuation_bytes(tokenizer)
        plain, template = self._texts.plain, settings.template
        user_open, user_close, model_open = self._texts.chat(settings.chat)
        names = template.classes + ", ".join(task.classes) if template.classes else ""
        beginning = "\n".join(part for part in (template.instruction, names) if part)
        prefix = user_open + plain(beginning and beginning + "\n\n") + plain(template.opening)
        suffix = plain(template.closing) + user_close + model_open + plain(template.verdict)
        separator, cut = plain(template.separator), plain(template.cut)
        before = [prefix + plain(template.text), separator + plain(template.pair)][: len(task.texts)]
        self.constant_ids = [*before, separator + suffix]
        self._around = [as_ids(part) for part in self.constant_ids]
        self._missing, self._cut = as_ids(plain(template.missing)), as_ids(cut)
        self._room = settings.max_length - sum(map(len, self._around))
        least = len(task.texts) * (len(cut) + 2)  # a token before and after the mark
        check_room(self._room, least, settings.max_length)

    def tokenise(self, rows: Mapping[str, Sequence[Any]]) -> list[Texts]:
        """The token ids of each row's texts; the texts of all rows are tokenised in one call."""
        columns = [rows[name] for name in self._columns]
        known = self._texts.user_texts({text for texts in columns for text in texts if text is not None})
        ids: dict[Any, np.ndarray] = {None: self._missing, **known}
        return [tuple(ids[text] for text in texts) for texts in zip(*columns, strict=True)]

    def lay_out(self, rows: Sequence[Texts], *, orders: int) -> Encoded:
        """Truncates the texts of each row evenly: what the shorter one does not need goes to the other."""
        examples, tokens_cut = [], []
        for texts in rows:
            cap = even_cap([len(ids) for ids in texts], self._room)
            shown = [shorten(ids, cap, self._cut, self._is_continuation) for ids in texts]
            pieces = [piece for pair in zip(self._around, (ids for ids, _ in shown), strict=False) for piece in pair]
            examples.append([*pieces, self._around[-1]])
            tokens_cut.append(sum(lost for _, lost in shown))
        return Encoded.of(examples, [0] * len(rows), tokens_cut)
