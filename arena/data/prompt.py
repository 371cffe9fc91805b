"""Encodes conversations as judge prompts: token ids within `max_length` that always end in the verdict suffix.

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

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, pairwise
from typing import Any

import numpy as np

from arena.config import PromptSettings
from arena.data.cells import excerpt
from arena.data.control_tokens import any_of, control_ids
from arena.data.truncation import choose_cut, continuation_bytes, least_room, shorten, vocabulary_size

# Chat markers by model family: the beginning and end of the user's turn, and the beginning of the model's.
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

Fields = tuple[np.ndarray, np.ndarray, np.ndarray]  # int32 token ids of a turn's prompt, answer A, answer B


@dataclass(frozen=True)
class Example:
    """One judge prompt.

    Attributes:
        input_ids: int32, shape (n_tokens,), at most `max_length`.
        turns_dropped: turns of the conversation that were omitted.
        tokens_cut: tokens of its texts that were omitted, including those of dropped turns.
    """

    input_ids: np.ndarray
    turns_dropped: int
    tokens_cut: int


@dataclass(frozen=True)
class Encoded:
    """Judge prompts laid end to end.

    Attributes:
        input_ids: int32 (tokens of all examples,).
        offsets: int32 (n + 1,), the beginning of each example, and the end.
        turns_dropped: int32 (n,), as in `Example`.
        tokens_cut: int32 (n,), as in `Example`.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    turns_dropped: np.ndarray
    tokens_cut: np.ndarray

    def examples(self) -> Iterator[Example]:
        """The examples in order; their `input_ids` are views."""
        counts = zip(self.turns_dropped.tolist(), self.tokens_cut.tolist(), strict=True)
        for (start, end), (dropped, cut) in zip(pairwise(self.offsets.tolist()), counts, strict=True):
            yield Example(self.input_ids[start:end], dropped, cut)


class PromptEncoder:
    """Turns conversations into `Example`s for one tokenizer, template and length.

    Args:
        tokenizer: a fast transformers tokenizer; it needs no chat template.
        settings: template, chat markers, `max_length`.
        memo: caches token ids between calls by a digest of the text; within a call no text is tokenised twice.

    Raises:
        ValueError: the tokenizer is not a fast one, or `max_length` is too small for the template and one truncated
            turn; from any method, if a text cannot be tokenised without a control token.
    """

    def __init__(
        self, tokenizer: Any, settings: PromptSettings, memo: MutableMapping[bytes, np.ndarray] | None = None
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: the base needs a tokenizer.json")
        self.tokenizer = tokenizer
        self.max_length = settings.max_length
        self._memo = memo
        self._control = control_ids(tokenizer)
        self._is_control = np.zeros(vocabulary_size(tokenizer), dtype=bool)
        steering = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        known = set(self._control) - ({tokenizer.unk_token_id} - steering)  # which replaces any unknown character
        self._is_control[list(known)] = True
        self._control_text = any_of(tuple(self._control.values()))
        self._is_continuation = continuation_bytes(tokenizer)

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
                f"prompt.max_length {settings.max_length} is too small for this template, which takes at least "
                f"{settings.max_length - self._room + least} tokens; raise max_length or shorten the template"
            )
        user, a, b = self.headings
        between = user, self.separator + a, self.separator + b, self.separator
        self._user, self._answer_a, self._answer_b, self._end = map(_ids, between)
        self._missing, self._cut = _ids(self.missing), _ids(self.cut)
        self._prefix, self._suffix = _ids(self.prefix), _ids(self.suffix)
        self._prefix_cut = _ids(self.prefix + self.cut_turns)

    def encode(self, rows: Mapping[str, Sequence[Any]], *, both_orders: bool) -> Iterator[Example]:
        """Encodes a batch of conversations.

        Args:
            rows: columns `prompt`, `response_a`, `response_b`: per row a list of turns, each a text or None.
            both_orders: encode each conversation twice, as given and with A and B exchanged.

        Yields:
            One example per row, in order; with `both_orders` two adjacent ones, with the same truncation.
        """
        yield from self.lay_out(self.tokenise(rows), both_orders=both_orders).examples()

    def tokenise(self, rows: Mapping[str, Sequence[Any]]) -> list[list[Fields]]:
        """The token ids of every field, by row and turn; the texts of all rows are tokenised in one call."""
        columns = rows["prompt"], rows["response_a"], rows["response_b"]
        turns = [list(zip(*fields, strict=True)) for fields in zip(*columns, strict=True)]
        texts = dict.fromkeys(text for row in turns for turn in row for text in turn if text is not None)
        ids: dict[Any, np.ndarray] = {None: self._missing, **self._fields(texts)}
        return [[(ids[prompt], ids[a], ids[b]) for prompt, a, b in row] for row in turns]

    def lay_out(self, rows: Sequence[list[Fields]], *, both_orders: bool) -> Encoded:
        """Truncates the tokenised conversations and lays them out, each in the given order or in both orders."""
        pieces, lengths, counts = [], [], []
        for turns in rows:
            shown, dropped, cut = self._shorten_turns(turns)
            orders = [shown, [(prompt, b, a) for prompt, a, b in shown]] if both_orders else [shown]
            for order in orders:
                example = self._pieces(order, dropped)
                pieces += example
                lengths.append(sum(map(len, example)))
                counts.append((dropped, cut))
        assert max(lengths, default=0) <= self.max_length
        turns_dropped, tokens_cut = np.array(counts, dtype=np.int32).reshape(-1, 2).T
        offsets = np.cumsum([0, *lengths], dtype=np.int32)
        return Encoded(np.concatenate([_ids([]), *pieces]), offsets, turns_dropped, tokens_cut)

    def _fields(self, texts: Collection[str]) -> dict[str, np.ndarray]:
        """The int32 token ids of each of these user texts, without control tokens."""
        memo: MutableMapping[bytes, np.ndarray] = {} if self._memo is None else self._memo
        keys = {text: blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts}
        found = {text: ids for text, key in keys.items() if (ids := memo.get(key)) is not None}
        new = [text for text in keys if text not in found]
        for text, ids in zip(new, self._tokenise_new(new), strict=True):
            found[text] = memo[keys[text]] = ids
        return found

    def _tokenise_new(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        lists = self._encode(texts)
        ends = np.cumsum([0, *map(len, lists)])
        flat = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(ends[-1]))
        ids = [flat[start:end] for start, end in pairwise(ends.tolist())]
        control = np.flatnonzero(self._is_control[flat])
        for index in np.unique(np.searchsorted(ends, control, side="right") - 1).tolist():
            ids[index] = _ids(self._without_control(texts[index]))
        return ids

    def _without_control(self, text: str) -> list[int]:
        """Encodes a text that contains control tokens' texts: it is split inside each, so that none is recognised."""
        breaks = [0, *(match.start() + 1 for match in self._control_text.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in pairwise(breaks) if start < end]
        ids: list[int] = []
        for piece in pieces:
            [part] = self._encode([piece])
            if self._is_control[part].any():
                part = [token for ids_ in self._encode(list(piece)) for token in ids_]
            ids += part
        if self._is_control[ids].any():
            token = next(self._control[token] for token in ids if self._is_control[token])
            raise ValueError(
                f"the text {excerpt(text)} cannot be tokenised without {token!r}, which is a control token of this "
                "tokenizer: change the text, or use a base whose tokenizer can represent it as plain text"
            )
        return ids

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Does the same as `tokenizer(texts, add_special_tokens=False, split_special_tokens=True)`, but faster.

        That call makes these settings too, every time, so they do not affect other callers.
        """
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenise_new([text])[0].tolist()) if text else []

    def _trusted(self, text: str) -> list[int]:
        """Token ids of this package's own markers, in which control tokens are recognised."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _pieces(self, turns: list[Fields], dropped: int) -> list[np.ndarray]:
        pieces = [self._prefix_cut if dropped else self._prefix]
        for prompt, a, b in turns:
            pieces += (self._user, prompt, self._answer_a, a, self._answer_b, b, self._end)
        pieces.append(self._suffix)
        return pieces

    def _shorten_turns(self, turns: list[Fields]) -> tuple[list[Fields], int, int]:
        """The turns as shown, the number of earlier turns omitted, and the number of tokens omitted."""
        lengths = [(len(prompt), len(a), len(b)) for prompt, a, b in turns]
        cut = choose_cut(lengths, self._room, self._overhead, len(self.cut), len(self.cut_turns))
        first, shown = cut.first_turn, turns[cut.first_turn :]
        lost = sum(map(sum, lengths[:first]))
        for at, (fields, caps) in enumerate(zip(shown, cut.caps, strict=True)):
            if caps != lengths[first + at]:
                (prompt, lost_p), (a, lost_a), (b, lost_b) = (
                    shorten(ids, cap, self._cut, self._is_continuation) for ids, cap in zip(fields, caps, strict=True)
                )
                shown[at] = prompt, a, b
                lost += lost_p + lost_a + lost_b
        return shown, first, lost


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def chat_family(tokenizer: Any, chat: str = "auto") -> str:
    """The key of `CHAT_MARKERS` that fits a tokenizer's vocabulary, unless `chat` names one.

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
