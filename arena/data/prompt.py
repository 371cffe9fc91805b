"""Conversations to judge prompts: token ids within `max_length` that always end in the verdict suffix.

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

Each prompt and answer is tokenised by itself, with control tokens in it kept as plain text, and is cut between tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from arena.config import PromptSettings
from arena.data.truncation import choose_cut, least_room

# Chat markers by model family: what opens the user's turn, closes it, and opens the model's.
CHAT_MARKERS = {
    "gemma": ("<start_of_turn>user\n", "<end_of_turn>\n", "<start_of_turn>model\n"),
    "chatml": ("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "plain": ("", "\n", ""),
}

# Added tokens that are ordinary text: white space, and the markup that some vocabularies hold as single tokens.
_TEXT_TOKEN = re.compile(
    r"[\s\u2581]*|</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|p|br|li|ul|ol|pre)>"
)

Fields = tuple[list[int], list[int], list[int]]  # token ids of a turn's prompt, answer A, answer B


@dataclass(frozen=True)
class Example:
    """One judge prompt.

    Attributes:
        input_ids: int32, shape (n_tokens,), at most `max_length`.
        turns_dropped: turns of the conversation that were left out.
        tokens_cut: tokens of its texts that were left out, those of dropped turns included.
    """

    input_ids: np.ndarray
    turns_dropped: int
    tokens_cut: int


class PromptEncoder:
    """Turns conversations into `Example`s for one tokenizer, template and length.

    Args:
        tokenizer: a fast transformers tokenizer; it needs no chat template.
        settings: template, chat markers, `max_length`.

    Raises:
        ValueError: the tokenizer is not a fast one, or `max_length` cannot hold the template and one cut turn.
    """

    def __init__(self, tokenizer: Any, settings: PromptSettings) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: the base needs a tokenizer.json")
        self.tokenizer = tokenizer
        self.max_length = settings.max_length
        self._control = control_ids(tokenizer)
        self._is_control = np.zeros(len(tokenizer), dtype=bool)
        self._is_control[list(self._control)] = True
        self._control_text = _any_of(self._control.values())
        self._is_continuation = _continuation_bytes(tokenizer)

        template = settings.template
        user_open, user_close, model_open = (
            self._trusted(text) for text in CHAT_MARKERS[chat_family(tokenizer, settings.chat)]
        )
        plain = self._plain
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.prefix = bos + user_open + plain(template.instruction + "\n\n") + plain(template.opening)
        self.suffix = plain(template.closing) + user_close + model_open + plain(template.verdict)
        self.headings = plain(template.user), plain(template.answer_a), plain(template.answer_b)
        self.separator = plain(template.separator)
        self.missing = plain(template.missing)
        self.cut = plain(template.cut)
        self.cut_turns = plain(template.cut_turns)
        self._overhead = sum(map(len, self.headings)) + 3 * len(self.separator)
        self._room = settings.max_length - len(self.prefix) - len(self.suffix)
        least = least_room(self._overhead, len(self.cut), len(self.cut_turns))
        if self._room < least:
            raise ValueError(
                f"prompt.max_length {settings.max_length} cannot hold this template: it takes "
                f"{settings.max_length - self._room + least} tokens at least; raise max_length or shorten the template"
            )

    def encode(self, rows: Mapping[str, Sequence[Any]], *, both_orders: bool) -> Iterator[Example]:
        """Encodes a batch of conversations.

        Args:
            rows: columns `prompt`, `response_a`, `response_b`: per row a list of turns, each a text or None.
            both_orders: give each conversation twice, as it stands and with A and B exchanged.

        Yields:
            One example per row in order; with `both_orders` two in a row, of the same tokens and the same cuts.
        """
        for turns in self._tokenise(rows):
            yield self._assemble(turns)
            if both_orders:
                yield self._assemble([(prompt, b, a) for prompt, a, b in turns])

    def _tokenise(self, rows: Mapping[str, Sequence[Any]]) -> Iterator[list[Fields]]:
        """Token ids of every field, the texts of all rows handed to the tokenizer at once."""
        columns = rows["prompt"], rows["response_a"], rows["response_b"]
        turns = [list(zip(*fields, strict=True)) for fields in zip(*columns, strict=True)]
        texts = [text for row in turns for turn in row for text in turn if text is not None]
        ids = iter(self._fields(texts))
        for row in turns:
            fields = [[self.missing if text is None else next(ids) for text in turn] for turn in row]
            yield [(prompt, a, b) for prompt, a, b in fields]

    def _fields(self, texts: list[str]) -> list[list[int]]:
        """Token ids of user texts; none is a control token."""
        if not texts:
            return []
        batch = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
        encoded: list[list[int]] = batch["input_ids"]
        for index, ids in enumerate(encoded):
            if ids and self._is_control[ids].any():
                encoded[index] = self._without_control(texts[index])
        return encoded

    def _without_control(self, text: str) -> list[int]:
        """Encodes a text that spells control tokens: it is split inside each of them, so that none is recognised."""
        breaks = [0, *(match.start() + 1 for match in self._control_text.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in pairwise(breaks) if start < end]
        ids: list[int] = []
        for piece in pieces:
            part = self._encode(piece)
            if self._is_control[part].any():
                part = [token for character in piece for token in self._encode(character)]
            ids += part
        assert not self._is_control[ids].any(), "a control token came out of plain text"
        return ids

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _plain(self, text: str) -> list[int]:
        return self._fields([text])[0] if text else []

    def _trusted(self, text: str) -> list[int]:
        """Token ids of our own markers, in which control tokens are meant."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _assemble(self, turns: list[Fields]) -> Example:
        lengths = [(len(prompt), len(a), len(b)) for prompt, a, b in turns]
        cut = choose_cut(lengths, self._room, self._overhead, len(self.cut), len(self.cut_turns))
        ids = list(self.prefix)
        if cut.first_turn:
            ids += self.cut_turns
        lost = sum(sum(each) for each in lengths[: cut.first_turn])
        for fields, caps in zip(turns[cut.first_turn :], cut.caps, strict=True):
            for heading, field, cap in zip(self.headings, fields, caps, strict=True):
                kept, missing = self._shorten(field, cap)
                ids += heading
                ids += kept
                ids += self.separator
                lost += missing
        ids += self.suffix
        assert len(ids) <= self.max_length
        return Example(np.asarray(ids, dtype=np.int32), cut.first_turn, lost)

    def _shorten(self, ids: list[int], cap: int) -> tuple[list[int], int]:
        """The beginning (two thirds) and the end of a text around the cut mark, and how many of its tokens are gone."""
        if len(ids) <= cap:
            return ids, 0
        keep = cap - len(self.cut)
        head = min(-(-2 * keep // 3), keep - 1)
        tail = len(ids) - (keep - head)
        while head > 0 and self._is_continuation[ids[head]]:  # do not cut inside a character made of byte tokens
            head -= 1
        while tail < len(ids) and self._is_continuation[ids[tail]]:
            tail += 1
        return ids[:head] + self.cut + ids[tail:], tail - head


def control_ids(tokenizer: Any) -> dict[int, str]:
    """The tokens, id to text, that steer a model and so must never come out of user text.

    Every special token, and every added token that is not plain white space or markup (`<unused0>`, `[@BOS@]`).
    """
    added = tokenizer.added_tokens_decoder
    return {
        index: str(token.content)
        for index, token in added.items()
        if token.special or not _TEXT_TOKEN.fullmatch(token.content)
    }


def chat_family(tokenizer: Any, chat: str = "auto") -> str:
    """The key of `CHAT_MARKERS` that a tokenizer's vocabulary calls for, unless `chat` names one.

    Raises:
        ValueError: `chat` names a family whose markers are not in the vocabulary.
    """
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    marks = {"gemma": "<start_of_turn>", "chatml": "<|im_start|>", "llama3": "<|start_header_id|>"}
    if chat == "auto":
        return next((family for family, mark in marks.items() if mark in known), "plain")
    if chat != "plain" and marks[chat] not in known:
        raise ValueError(f"prompt.chat is {chat!r}, but the tokenizer has no {marks[chat]}: use `auto` or `plain`")
    return chat


@lru_cache(maxsize=8)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _any_of(texts: Any) -> re.Pattern[str]:
    """A pattern that finds any of the texts, the longest first."""
    return _pattern(tuple(sorted(texts, key=lambda text: (-len(text), text))))


def _continuation_bytes(tokenizer: Any) -> np.ndarray:
    """bool (vocabulary,): tokens that are a byte in the middle of a UTF-8 character (byte fallback)."""
    flags = np.zeros(len(tokenizer), dtype=bool)
    vocabulary = tokenizer.get_vocab()
    for token in (f"<0x{byte:02X}>" for byte in range(0x80, 0xC0)):
        if token in vocabulary:
            flags[vocabulary[token]] = True
    return flags
