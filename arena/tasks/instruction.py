"""Instruction tuning: a request, or a conversation, and the assistant's answers, which alone are predicted.

A file is told by its columns: `instruction`, `context` and `response`, as in Dolly; `context`, `question` and
`answers`, as in SQuAD 2.0; or `messages` with roles and contents. Each row becomes one conversation: an optional
context, and exchanges of a prompt and a response. The layout of an example, with Gemma's chat markers:

    <bos><start_of_turn>user
    {instruction}

    {context}

    {prompt}<end_of_turn>
    <start_of_turn>model
    {response}<end_of_turn>

The predicted tokens are those of each response and its end marker. What rows have in common comes first, so that
questions about one context share it. Without chat markers, the template's headings stand before each text, and the
tokenizer's end-of-text token ends a response.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
from datasets import Features, List, Value

from arena.data.cells import FieldError, Labels, excerpt, read_answers, read_text
from arena.data.encoder import Encoded, TokenEncoder, TokenTargets
from arena.data.limits import Limits
from arena.data.messages import read_exchanges
from arena.data.rows import Cells, required
from arena.data.task import TokenTask
from arena.data.text_encoder import TextEncoder, as_ids, chat_family
from arena.data.truncation import check_room, continuation_bytes, even_cap, shorten
from arena.metrics import perplexity, token_log_loss
from arena.prompt_settings import PromptSettings
from arena.settings import Recipe

MESSAGES = ("messages",)
QUESTION = ("context", "question")
INSTRUCTION = ("instruction",)
RESPONSES = {QUESTION: "answers", INSTRUCTION: "response"}  # the columns of the responses
TEXTS = ("prompt", "response")

Exchange = tuple[np.ndarray, np.ndarray]  # int32 token ids of a prompt and a response, which is empty if there is none
Conversation = tuple[np.ndarray, list[Exchange]]  # a row's context, empty if there is none, and its exchanges


@dataclass(frozen=True)
class Instruction(TokenTask):
    """Answers to instructions. A checked row's `prompt` is its context, or null, and then the prompt of each exchange.

    Attributes:
        unanswerable: the answer to a question that has none.
    """

    unanswerable: str = "unanswerable"
    reading: tuple[Any, ...] = ("unanswerable",)

    name = "instruction"
    columns = ("nll", "tokens")
    texts = TEXTS
    features = Features({name: List(Value("string")) for name in TEXTS})
    rows = "instructions"
    group_by = "prompt"
    missing = "response"
    templates = ("instruct",)
    metrics = MappingProxyType({"log_loss": token_log_loss, "perplexity": perplexity})

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        super().of(recipe)  # refuses settings of other tasks
        phrase = recipe.prompt.template.unanswerable
        return cls(phrase, (phrase,))

    def numbers_rows(self, names: Collection[str]) -> bool:
        return True

    def file_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """The columns of the layout, with `instruction` also a context if there is one."""
        layout = _layout(names)
        return ("context", *layout) if layout == INSTRUCTION and "context" in names else layout

    def label_columns(self, names: Sequence[str], labels: Labels) -> tuple[str, ...]:
        """The column of the responses, which labelled rows need."""
        column = RESPONSES.get(_layout(names))
        if column is None or labels == "ignored":
            return ()
        if labels == "required":
            required([column], names)
        return (column,) if column in names else ()

    def read_texts(self, cells: Cells, limits: Limits) -> Cells:
        layout = _layout(list(cells))
        if layout == MESSAGES:
            return _read_messages(cells, limits)
        context, prompt = (read_text(cells, name) for name in ("context", layout[-1]))
        if prompt is None:
            raise FieldError(layout[-1], "is empty or missing; write a text or leave the row out")
        answer = self._read_answer(cells) if layout == QUESTION else read_text(cells, "response")
        return {"prompt": [context, prompt], "response": [answer]}

    def has_input(self, row: Mapping[str, Any]) -> bool:
        """Whether at least one response has text that is not blank."""
        return any(text and text.strip() for text in row["response"])

    def encoder(
        self, tokenizer: Any, settings: PromptSettings, memo: MutableMapping[bytes, np.ndarray] | None = None
    ) -> InstructionEncoder:
        return InstructionEncoder(tokenizer, settings, memo)

    def _read_answer(self, cells: Cells) -> str | None:
        """The first of the answers; the phrase for a question that has none."""
        answers = read_answers(cells)
        return None if answers is None else read_text({"answers": (answers or [self.unanswerable])[0]}, "answers")


def _layout(names: Sequence[str]) -> tuple[str, ...]:
    """The columns by which a file's layout is told. Raises `FieldError` if it is none that is known."""
    for layout in (MESSAGES, QUESTION, INSTRUCTION):
        if layout[-1] in names:
            return layout
    raise FieldError(
        "instruction",
        "is missing, and so are question and messages; give instruction and response, context, question and answers, "
        f"or messages. The columns found are {excerpt(', '.join(names), 200)}",
    )


def _read_messages(cells: Cells, limits: Limits) -> Cells:
    """The exchanges of a chat, without a context: by that rows would be grouped."""
    exchanges = read_exchanges(cells, "messages")
    limits.check_turns(len(exchanges), "messages")
    prompts, responses = zip(*exchanges, strict=True)
    return {"prompt": [None, *prompts], "response": list(responses)}


class Shown(NamedTuple):
    """The part of a conversation that fits into an example, whether its last response is whole, and what was cut."""

    context: np.ndarray
    exchanges: list[Exchange]
    ended: bool
    tokens_cut: int


class InstructionEncoder(TokenEncoder):
    """Turns conversations into examples, for one tokenizer, template and length.

    What does not fit into `max_length` is omitted in this order: tokens of the context, down to a few with the cut
    mark; the last exchanges, except the first one; then tokens of prompt and response, which share the room evenly. The
    context gets the room that is left. A truncated context or prompt shows the cut mark; a truncated response ends
    without its end marker.

    Args:
        settings: template, chat markers, `max_length`.
        memo: as for `TextEncoder`.

    Raises:
        ValueError: the tokenizer is not a fast one or has nothing that ends a response, or `max_length` is too small
            for the template; from any method, if a text cannot be tokenised without a control token.
    """

    def __init__(
        self, tokenizer: Any, settings: PromptSettings, memo: MutableMapping[bytes, np.ndarray] | None = None
    ) -> None:
        self._texts = TextEncoder(tokenizer, memo)
        self._is_continuation = continuation_bytes(tokenizer)
        plain, template = self._texts.plain, settings.template
        opening, close, answer = self._texts.chat(settings.chat)
        again, separator = opening[tokenizer.bos_token_id is not None :], plain(template.separator)
        before_answer, context, first = close + answer, list[int](), list[int]()
        if chat_family(tokenizer, settings.chat) == "plain":
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has no end-of-text token, which ends a response: use another base")
            close, before_answer = [tokenizer.eos_token_id, *separator], separator + plain(template.response)
            context, first = plain(template.context), plain(template.user)
            again = first
        instruction = plain(template.instruction + template.separator) if template.instruction else []
        self.constant_ids = [
            opening + instruction, context, separator, first, close[1:] + again, before_answer, close[:1],
            plain(template.cut),
        ]  # fmt: skip
        pieces = map(as_ids, self.constant_ids)
        self._prefix, self._context, self._gap, self._first, self._later, self._answer, self._end, self._cut = pieces
        self.end_ids = tuple(close[:1])
        self._room, self._least = settings.max_length - len(self._prefix), len(self._cut) + 2
        least = len(self._context) + len(self._gap) + self._around(0) + 3 * self._least
        check_room(self._room, least, settings.max_length)

    def tokenise(self, rows: Mapping[str, Sequence[Any]]) -> list[Conversation]:
        """The token ids of every text; the texts of all rows are tokenised in one call."""
        texts = dict.fromkeys(text for name in TEXTS for row in rows[name] for text in row if text is not None)
        ids: dict[Any, np.ndarray] = {None: as_ids([]), **self._texts.user_texts(texts)}
        return [
            (ids[prompts[0]], [(ids[prompt], ids[own]) for prompt, own in zip(prompts[1:], responses, strict=True)])
            for prompts, responses in zip(*(rows[name] for name in TEXTS), strict=True)
        ]

    def lay_out(self, rows: Sequence[Conversation], *, orders: int) -> Encoded:
        assert orders == 1, "an instruction has one order"
        examples, places, dropped, cut, targets_cut = [], [], [], [], []
        for context, exchanges in rows:
            answered = 1 + max((at for at, (_, response) in enumerate(exchanges) if len(response)), default=0)
            shown = self._shorten(context, exchanges[:answered])
            pieces, targets = self._pieces(shown.context, shown.exchanges, ended=shown.ended)
            examples.append(pieces)
            places.append(targets)
            dropped.append(answered - len(shown.exchanges))
            targets_cut.append(_targets(exchanges, ended=True) - _targets(shown.exchanges, ended=shown.ended))
            cut.append(shown.tokens_cut)
        return Encoded.of(examples, dropped, cut, TokenTargets.of(places, targets_cut))

    def prompts(self, rows: Sequence[Conversation]) -> list[np.ndarray]:
        """The int32 token ids that a model continues with the last response of each row; nothing is cut."""
        asked = [(context, [*exchanges[:-1], (exchanges[-1][0], as_ids([]))]) for context, exchanges in rows]
        return [np.concatenate(self._pieces(*each, ended=False)[0]) for each in asked]

    def _around(self, at: int) -> int:
        """The tokens around the prompt and the response of an exchange."""
        return len(self._later if at else self._first) + len(self._answer) + len(self._end)

    def _shorten(self, context: np.ndarray, exchanges: list[Exchange]) -> Shown:
        room = self._room - (len(self._context) + len(self._gap) if len(context) else 0)
        least = min(len(context), self._least)
        ends = np.cumsum([self._around(at) + sum(map(len, each)) for at, each in enumerate(exchanges)])
        kept = max(1, int(np.searchsorted(ends, room - least, side="right")))
        lost = sum(sum(map(len, each)) for each in exchanges[kept:])
        shown, ended = exchanges[:kept], True
        if (excess := int(ends[kept - 1]) + least - room) > 0:
            prompt, response = shown[0]
            cap = even_cap((len(prompt), len(response)), len(prompt) + len(response) - excess)
            prompt, lost_of_prompt = shorten(prompt, cap, self._cut, self._is_continuation)
            shown, ended = [(prompt, response[:cap])], len(response) <= cap
            lost += lost_of_prompt + max(0, len(response) - cap)
        context, lost_of_context = shorten(
            context, max(least, room - int(ends[kept - 1])), self._cut, self._is_continuation
        )
        return Shown(context, shown, ended, lost + lost_of_context)

    def _pieces(
        self, context: np.ndarray, exchanges: Sequence[Exchange], *, ended: bool
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The pieces of an example, and the places of its targets. The last response has no end unless `ended`."""
        pieces = [self._prefix, *([self._context, context, self._gap] if len(context) else [])]
        size, places = sum(map(len, pieces)), [as_ids([])]
        for at, (prompt, response) in enumerate(exchanges):
            end = self._end if ended or at + 1 < len(exchanges) else self._end[:0]
            own = [self._later if at else self._first, prompt, self._answer, response, end]
            size += sum(map(len, own))
            predicted = len(response) + len(end) if len(response) else 0
            places.append(np.arange(size - predicted - 1, size - 1, dtype=np.int32))
            pieces += own
        return pieces, np.concatenate(places)


def _targets(exchanges: Sequence[Exchange], *, ended: bool) -> int:
    """The number of targets of exchanges: the tokens of each response, and its end marker."""
    return sum(len(response) + 1 for _, response in exchanges if len(response)) - (not ended)
