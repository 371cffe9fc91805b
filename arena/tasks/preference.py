"""Pairwise preference: a conversation with two answers, and which of them a person prefers.

Rows become judge prompts: token ids within `max_length` that always end in the verdict suffix.

The layout of an example, with Gemma's chat markers and the `compact` template:

    <bos><start_of_turn>user
    {instruction}

    {opening}### User:
    {prompt}

    ### Assistant A:
    {answer}

    ### Assistant B:
    {answer}

    {closing}<end_of_turn>
    <start_of_turn>model
    verdict is: [[

Each prompt and answer is tokenised separately, with control tokens in it taken as plain text, and truncated at token
boundaries.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Self

import numpy as np
from datasets import Dataset, Features, List, Value

from arena.data.cells import FieldError, Labels, excerpt, is_blank, label_form, read_probabilities, read_turns
from arena.data.encoder import Encoded, Encoder
from arena.data.limits import Limits
from arena.data.rows import Cells
from arena.data.task import Baseline, Logits, Masks, Task
from arena.data.text_encoder import TextEncoder, as_ids
from arena.data.truncation import Lengths, check_room, choose_cut, continuation_bytes, least_room, shorten
from arena.metrics import METRICS
from arena.prompt_settings import PromptSettings
from arena.settings import Recipe
from arena.tasks.baseline import SWAPPED, fit_baseline
from arena.tasks.examples import EXAMPLES
from arena.tasks.kinds import EXCHANGED, KINDS, kind_of
from arena.tasks.layouts import ANNOTATIONS, CHOSEN, TURNS, Layout, columns_of, layout_of, layout_of_record
from arena.tasks.layouts import WINNER as WORD
from arena.tasks.slices import conversation_slices

CLASSES = ("A", "B", "tie")
COLUMNS = ("winner_model_a", "winner_model_b", "winner_tie")  # of the classes, as the competition names them
A, B, TIE = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
WORDS = {
    "model_a": A, "model_b": B, "tie": TIE, "tie (bothbad)": TIE, "both_bad": TIE, "a_winner": A, "b_winner": B,
    "left": A, "right": B,
}  # fmt: skip

Fields = tuple[np.ndarray, ...]  # int32 token ids of a turn's prompt and answers
Shown = tuple[list[Fields], int, int]  # turns, the number of earlier turns omitted, and the number of tokens omitted


@dataclass(frozen=True)
class Preference(Task):
    """The probabilities that A is preferred, that B is, and of a tie; the second order of a row exchanges A and B.

    Attributes:
        names: the names of columns in files, by those that they have here; equal ones are left out.
    """

    names: tuple[tuple[str, str], ...] = ()
    reading: tuple[Any, ...] = ()

    name = "preference"
    classes = CLASSES
    columns = COLUMNS
    texts = TURNS
    features = Features({name: List(Value("string")) for name in TURNS})
    rows = "conversations"
    group_by = "prompt"
    orders = 2
    missing = "response to judge"
    templates = ("judge", "compact", "pointwise")
    metrics = METRICS
    tie = "tie"
    examples = EXAMPLES
    kinds = KINDS

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        columns = recipe.data.columns
        others = recipe.data.model_copy(update={"columns": columns.model_copy(update={"names": {}})})
        super().of(recipe.model_copy(update={"data": others}))  # refuses settings of other tasks
        if odd := columns.names.keys() - {*TURNS, WORD}:
            raise ValueError(f"data.columns.names has {min(odd)}, but can only name {', '.join((*TURNS, WORD))}")
        renamed = tuple(sorted(columns.names.items()))
        return cls(renamed, renamed)

    def numbers_rows(self, names: Collection[str]) -> bool:
        """In other layouts than the competition's, ids are rare."""
        return not set(TURNS) <= set(columns_of(names))

    def layout_of(self, first: Cells) -> Layout | None:
        return self._of_renamed(layout_of(self._renamed(first)))

    def layout_of_record(self, cells: Cells) -> Layout | None:
        return self._of_renamed(layout_of_record(self._renamed(cells)))

    def _of_renamed(self, layout: Layout | None) -> Layout | None:
        """A layout of cells by their names here, for cells by those of a file."""
        if not self.names:
            return layout
        return self._renamed if layout is None else lambda cells: layout(self._renamed(cells))

    def file_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        given = dict(self.names)
        return tuple(given.get(name, name) for name in columns_of(self._renamed(dict.fromkeys(names))))

    def label_columns(self, names: Sequence[str], labels: Labels) -> tuple[str, ...]:
        """Three numbers, one word, both, or none; only some of the numbers are an error."""
        numbers = label_form([name for name in names if name != WORD], COLUMNS, WORD)
        word = (given,) if (given := dict(self.names).get(WORD, WORD)) in names else (WORD,) if WORD in names else ()
        columns = () if labels == "ignored" else numbers + word
        if labels == "required" and not columns and not {CHOSEN[0], ANNOTATIONS[0]} & set(names):
            raise FieldError(COLUMNS[0], f"is missing; labelled rows need {', '.join(COLUMNS)}, or `{WORD}`")
        return columns

    def read_label(self, cells: Cells, labels: Labels) -> list[float] | None:
        columns = self.label_columns(list(cells), labels)
        if all(is_blank(cells[name]) for name in columns):
            if labels == "required":
                raise FieldError(columns[0], "is blank; label the row or leave it out")
            return None
        numbers = read_probabilities(cells, COLUMNS) if COLUMNS[0] in columns else None
        word = _from_word(cells[WORD]) if WORD in columns else None
        if numbers and word and numbers != word:
            raise FieldError(WORD, f"is {excerpt(cells[WORD])}, but {', '.join(COLUMNS)} are {numbers}; correct one")
        return numbers or word

    def read_texts(self, cells: Cells, limits: Limits) -> Cells:
        """The turns of the prompt and of both answers, padded with None to the same number of turns."""
        texts = {field: read_turns(cells, field) for field in TURNS}
        for field, text in texts.items():
            limits.check_turns(len(text), field)
        turns = max(len(text) for text in texts.values())
        return {field: text + [None] * (turns - len(text)) for field, text in texts.items()}

    def _renamed(self, cells: Cells) -> Cells:
        """The cells of a file by the names of columns here."""
        own = {given: name for name, given in self.names}
        return {own.get(name, name): cell for name, cell in cells.items()}

    def has_input(self, row: Mapping[str, Any]) -> bool:
        """Whether at least one of a row's answers has text that is not blank."""
        return any(text and text.strip() for text in [*row["response_a"], *row["response_b"]])

    def kind(self, row: Mapping[str, Any]) -> int:
        return kind_of(row["response_a"], row["response_b"])

    def encoder(
        self, tokenizer: Any, settings: PromptSettings, memo: MutableMapping[bytes, np.ndarray] | None = None
    ) -> PromptEncoder:
        return PromptEncoder(tokenizer, settings, memo)

    def reorder(self, values: Logits, order: int) -> Logits:
        return values[..., SWAPPED] if order == 1 else values

    def reorder_kind(self, kind: int, order: int) -> int:
        return EXCHANGED[kind] if order == 1 else kind

    def pairs(self, prompt: Any, answers: Sequence[Any]) -> list[Cells]:
        turns = [[each] if isinstance(each, str) else each for each in (prompt, *answers)]
        return [dict(zip(TURNS, (turns[0], a, b), strict=True)) for a, b in combinations(turns[1:], 2)]

    def slices(self, rows: Dataset) -> dict[str, Masks]:
        return conversation_slices(rows)

    def fit_baseline(self, rows: Dataset, labels: np.ndarray, seed: int) -> Baseline:
        return fit_baseline(rows, labels, seed)


def _from_word(cell: Any) -> list[float]:
    word = cell.strip().casefold() if isinstance(cell, str) else None
    if word not in WORDS:
        raise FieldError(WORD, f"is {excerpt(cell)}; write one of {', '.join(WORDS)}")
    return list(WORDS[word])


class PromptEncoder(Encoder):
    """Turns conversations into judge prompts, for one tokenizer, template and length.

    Args:
        settings: template, chat markers, `max_length`.
        memo: as for `TextEncoder`.

    Raises:
        ValueError: the tokenizer is not a fast one, or `max_length` is too small for the template and one truncated
            turn; from any method, if a text cannot be tokenised without a control token.
    """

    def __init__(
        self, tokenizer: Any, settings: PromptSettings, memo: MutableMapping[bytes, np.ndarray] | None = None
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, settings.max_length
        self._texts = TextEncoder(tokenizer, memo)
        self._is_continuation = continuation_bytes(tokenizer)
        plain, template = self._texts.plain, settings.template
        user_open, user_close, model_open = self._texts.chat(settings.chat)
        self.prefix = user_open + plain(template.instruction + "\n\n") + plain(template.opening)
        self.suffix = plain(template.closing) + user_close + model_open + plain(template.verdict)
        self._pointwise = settings.pointwise
        answers = [template.answer] if settings.pointwise else [template.answer_a, template.answer_b]
        self.headings = [plain(heading) for heading in (template.user, *answers)]
        self.cut, self.cut_turns = plain(template.cut), plain(template.cut_turns)
        self.constant_ids = [self.prefix, self.suffix]
        separator = plain(template.separator)
        self._overhead = sum(map(len, self.headings)) + len(self.headings) * len(separator)
        self._room = settings.max_length - len(self.prefix) - len(self.suffix)
        least = least_room(len(self.headings), self._overhead, len(self.cut), len(self.cut_turns))
        check_room(self._room, least, settings.max_length)
        self._user, self._end = as_ids(self.headings[0]), as_ids(separator)
        self._answers = [as_ids(separator + heading) for heading in self.headings[1:]]
        self.missing = plain(template.missing)
        self._missing, self._cut = as_ids(self.missing), as_ids(self.cut)
        self._prefix, self._suffix = as_ids(self.prefix), as_ids(self.suffix)
        self._prefix_cut = as_ids(self.prefix + self.cut_turns)

    def tokenise(self, rows: Mapping[str, Sequence[Any]]) -> list[list[Fields]]:
        """The token ids of every field, by row and turn; the texts of all rows are tokenised in one call."""
        turns = [list(zip(*fields, strict=True)) for fields in zip(*(rows[name] for name in TURNS), strict=True)]
        texts = dict.fromkeys(text for row in turns for turn in row for text in turn if text is not None)
        ids: dict[Any, np.ndarray] = {None: self._missing, **self._texts.user_texts(texts)}
        return [[(ids[prompt], ids[a], ids[b]) for prompt, a, b in row] for row in turns]

    def lay_out(self, rows: Sequence[list[Fields]], *, orders: int) -> Encoded:
        """Truncates the tokenised conversations; both orders of a conversation have the same truncation."""
        examples, turns_dropped, tokens_cut = [], [], []
        for turns in rows:
            for shown, dropped, cut in self._by_order(turns)[:orders]:
                examples.append(self._pieces(shown, dropped))
                turns_dropped.append(dropped)
                tokens_cut.append(cut)
        encoded = Encoded.of(examples, turns_dropped, tokens_cut)
        assert np.diff(encoded.offsets).max(initial=0) <= self.max_length
        return encoded

    def parts(self) -> dict[str, Any]:
        headings = [each.tolist() for each in (self._user, *self._answers)]
        return {
            "begin": self.prefix, "headings": headings, "separator": self._end.tolist(), "end": self.suffix,
            "missing": self.missing, "control": self._texts.refused_ids(),
        }  # fmt: skip

    def _by_order(self, turns: list[Fields]) -> list[Shown]:
        """What each order shows. If that is one side, the longer one is cut as the other would be beside its prompt."""
        if not self._pointwise:
            shown, dropped, cut = self._shorten_turns(turns, [tuple(map(len, turn)) for turn in turns])
            return [(shown, dropped, cut), ([(prompt, b, a) for prompt, a, b in shown], dropped, cut)]
        lengths = [(len(prompt), max(len(a), len(b))) for prompt, a, b in turns]
        sides = [(prompt, a) for prompt, a, _ in turns], [(prompt, b) for prompt, _, b in turns]
        return [self._shorten_turns(side, lengths) for side in sides]

    def _pieces(self, turns: Sequence[Fields], dropped: int) -> list[np.ndarray]:
        pieces = [self._prefix_cut if dropped else self._prefix]
        for prompt, *answers in turns:
            pieces += (self._user, prompt)
            for heading, answer in zip(self._answers, answers, strict=True):
                pieces += (heading, answer)
            pieces.append(self._end)
        pieces.append(self._suffix)
        return pieces

    def _shorten_turns(self, turns: Sequence[Fields], lengths: Sequence[Lengths]) -> Shown:
        """What is shown of a conversation whose fields are taken to have these lengths."""
        cut = choose_cut(lengths, self._room, self._overhead, len(self.cut), len(self.cut_turns))
        first, shown = cut.first_turn, list(turns[cut.first_turn :])
        lost = sum(len(field) for turn in turns[:first] for field in turn)
        for at, (fields, caps) in enumerate(zip(shown, cut.caps, strict=True)):
            if caps != lengths[first + at]:
                cuts = [
                    shorten(ids, cap, self._cut, self._is_continuation) for ids, cap in zip(fields, caps, strict=True)
                ]
                shown[at] = tuple(ids for ids, _ in cuts)
                lost += sum(omitted for _, omitted in cuts)
        return shown, first, lost
