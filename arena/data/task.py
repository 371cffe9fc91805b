"""What a task is: everything that knows what a row means. `arena/tasks` holds one file for each task.

Reading, folds, tokens, packing, the model, training and evaluation know rows, examples and targets only. An example is
one sequence of token ids; a row gives one, or several that show it in other orders, such as with A and B exchanged.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from datasets import Dataset, Features

from arena.data.cells import Labels
from arena.data.encoder import Encoder, TokenEncoder
from arena.data.limits import Limits
from arena.data.rows import Cells
from arena.metrics import Metric
from arena.prompt_settings import PromptSettings
from arena.settings import ColumnSettings, Recipe

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

Logits = TypeVar("Logits", np.ndarray, "Tensor")
Baseline = Callable[[Dataset], np.ndarray]  # the probabilities of rows by a simple model, float64 (n, C)
Masks = Mapping[str, np.ndarray]  # by a value that rows may have, which of them have it: bool (n,)


class Task(ABC):
    """What a row means. A task is a frozen dataclass, whose fields are the settings on which its rows depend.

    Attributes:
        name: its key in `arena.tasks.TASKS`, which a recipe names as `task`.
        classes: the names of the classes, in the order of the head's outputs; a `TokenTask` has none.
        columns: the columns of predictions in files: the probabilities of the classes, in the same order.
        texts: the columns of a checked row that an encoder reads.
        features: the types of these columns in a checked row.
        rows: what its rows are called; no two tasks that read the same files differently may share it.
        reading: settings by which the same files are read differently, for the names of cached rows.
        group_by: the column of texts by which rows are grouped: rows of a group are never in two folds.
        orders: in how many orders a row can be shown.
        missing: in words, what a row lacks if `has_input` is false.
        templates: the built-in templates for its prompts, the usual one first; none: any.
        metrics: by name, computed on the held-out rows for `metrics.json`; `train.best_metric` names the one that
            chooses the best checkpoint. `log_loss` must be one of them.
        tie: the class of a tie, if there is one: agreement is also given without ties.
        examples: rows to try a judge on, by a few words each; a text may stand for a list of one turn.
        kinds: of special rows, of which training rows say more than a judge may have learned; a row is of one at most.
    """

    name: str
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    texts: tuple[str, ...]
    features: Features
    rows: str
    reading: tuple[Any, ...] = ()
    group_by: str
    orders: int = 1
    missing: str
    templates: tuple[str, ...] = ()
    metrics: Mapping[str, Metric]
    tie: str | None = None
    examples: Mapping[str, Cells] = {}
    kinds: tuple[str, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The task as a recipe sets it. Raises `ValueError` for settings that do not fit it."""
        for key, is_set in (("classes", recipe.classes), ("data.columns", recipe.data.columns != ColumnSettings())):
            if is_set:
                raise ValueError(f"{key} is set, but task={cls.name} has its own: leave it out, or name another task")
        return cls()

    def file_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """The columns from which texts are read, in a file that has columns of these names; by default `texts`.

        A JSONL file is read with all its keys instead.
        """
        return self.texts

    def numbers_rows(self, names: Collection[str]) -> bool:
        """Whether the rows of a file with columns of these names, but no ids, are identified by their numbers."""
        return False

    def layout_of(self, first: Cells) -> Callable[[Cells], Cells] | None:
        """What turns the cells of a file with this first row into those that `read_texts` reads; None: nothing."""
        return None

    def layout_of_record(self, cells: Cells) -> Callable[[Cells], Cells] | None:
        """As `layout_of`, for one row in memory, which stands for itself."""
        return self.layout_of(cells)

    @abstractmethod
    def label_columns(self, names: Sequence[str], labels: Labels) -> tuple[str, ...]:
        """The columns of a file that hold the label. Raises `FieldError` if there is none although it is required."""

    @abstractmethod
    def read_texts(self, cells: Cells, limits: Limits) -> Cells:
        """A row's texts, of the types in `features`. Raises `FieldError` for a cell that cannot be used."""

    @abstractmethod
    def read_label(self, cells: Cells, labels: Labels) -> list[float] | None:
        """The probabilities of the classes, which sum to 1; None if the row has no label.

        Raises `FieldError` for an invalid label, and for a missing one if labels are required.
        """

    @abstractmethod
    def has_input(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has anything to predict from. Other rows are not trained on, and get the training prior."""

    def kind(self, row: Mapping[str, Any]) -> int:
        """The number of a row's kind in `kinds`; -1: none."""
        return -1

    @abstractmethod
    def encoder(
        self, tokenizer: Any, settings: PromptSettings, memo: MutableMapping[bytes, np.ndarray] | None = None
    ) -> Encoder:
        """The encoder for a tokenizer.

        Args:
            memo: caches token ids between calls by a digest of the text.

        Raises:
            ValueError: the tokenizer or the settings cannot be used.
        """

    def group(self, texts: str | Sequence[str | None] | None) -> str:
        """The key by which rows are grouped: the first text that is not blank, regardless of case and white space.

        Compatibility forms are normalised too (NFKC). The key of a row without text is "".

        Args:
            texts: a row's column `group_by`: a text, or the turns of a prompt.
        """
        every = [texts] if isinstance(texts, str) else texts or []
        first = next((text for text in every if text and text.strip()), "")
        folded = unicodedata.normalize("NFKC", first).casefold()
        return " ".join(unicodedata.normalize("NFKC", folded).split())  # casefold can undo the composed form

    def reorder(self, values: Logits, order: int) -> Logits:
        """Probabilities or logits (..., C) of rows as they are for the same rows in another order, or back."""
        assert order == 0, f"{self.name} has one order"
        return values

    def joins(self, prompt: PromptSettings) -> bool:
        """Whether the examples of a row each show one side of it, and are predicted together."""
        return prompt.pointwise and self.orders > 1

    def join(self, logits: Logits) -> Logits:
        """The logits (n, C) of rows, in order 0, whose orders each show one side alone: (n, orders, C), added up.

        The softmax of the sum is a Bradley-Terry model with ties of the sides' scores.
        """
        shown = [self.reorder(logits[:, order], order) for order in range(self.orders)]
        return sum(shown[1:], start=shown[0])

    def reorder_kind(self, kind: int, order: int) -> int:
        """The kind of rows of a kind as they are in another order, or back."""
        assert order == 0, f"{self.name} has one order"
        return kind

    def pairs(self, prompt: Any, answers: Sequence[Any]) -> list[Cells]:
        """The rows that compare each of some answers with each later one: (0, 1), (0, 2), ..., (1, 2), ...

        Raises:
            ValueError: the task compares no answers.
        """
        raise ValueError(f"a judge of the task {self.name} compares no answers: rank with one of task=preference")

    def slices(self, rows: Dataset) -> Mapping[str, Masks]:
        """By property of a row, such as its language, the rows with each of its values, which are scored separately."""
        return {}

    def further_scores(self, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
        """Scores that are no means over rows, for `metrics.json`; they have no intervals.

        Args:
            labels, probabilities: float64 (n, C).
        """
        return {}

    def fit_baseline(self, rows: Dataset, labels: np.ndarray, seed: int) -> Baseline | None:
        """Fits a simple model for comparison to checked rows and their labels (n, C); None: this task has none."""
        return None


class TokenTask(Task):
    """A task without classes, which predicts tokens of its examples (`TokenTargets`) with the base's own output layer.

    Attributes:
        columns: what `PackedLanguageModel` gives for an example, with 0 for a row without targets.
    """

    classes = ()

    def read_label(self, cells: Cells, labels: Labels) -> None:
        """Rows have no labels."""

    @abstractmethod
    def encoder(
        self, tokenizer: Any, settings: PromptSettings, memo: MutableMapping[bytes, np.ndarray] | None = None
    ) -> TokenEncoder:
        """As for any task."""
