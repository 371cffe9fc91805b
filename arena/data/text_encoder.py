"""Turns texts into token ids: user texts without control tokens, and this package's own texts with them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, MutableMapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, pairwise
from typing import Any

import numpy as np

from arena.data.cells import excerpt
from arena.data.truncation import vocabulary_size

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

# Added tokens that are ordinary text: white space, and markup that some vocabularies have as single tokens.
_TEXT_TOKEN = re.compile(
    r"[\s\u2581]*|</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|p|br|li|ul|ol|pre)>"
)


def control_ids(tokenizer: Any) -> dict[int, str]:
    """The control tokens, by id: every special token, and every added token (`<unused0>`, `[@BOS@]`) that is not text.

    Some tokenizers pad with an ordinary token such as `!`; nothing is padded here, so it counts as text.
    """
    steering = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    added = tokenizer.added_tokens_decoder.items()
    return {
        index: str(token.content)
        for index, token in added
        if not _is_text(token.content) or (token.special and (index != tokenizer.pad_token_id or index in steering))
    }


@lru_cache(maxsize=8)
def any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, preferring the longest."""
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _is_text(content: str) -> bool:
    """Whether a token is white space, known markup, a single character, or only letters, digits and white space."""
    return bool(_TEXT_TOKEN.fullmatch(content)) or len(content) == 1 or all(map(_is_of_words, content))


def _is_of_words(character: str) -> bool:
    """Whether a character is a letter (or a mark on one), a digit, or white space."""
    return unicodedata.category(character)[0] in "LMN" or character.isspace() or character == "\u2581"


def as_ids(ids: Sequence[int]) -> np.ndarray:
    """Token ids as an int32 array."""
    return np.array(ids, dtype=np.int32)


class TextEncoder:
    """The token ids of texts, for one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer; it needs no chat template.
        memo: caches token ids between calls by a digest of the text; within a call no text is tokenised twice.

    Raises:
        ValueError: the tokenizer is not a fast one; from any method, if a text cannot be tokenised without a control
            token.
    """

    def __init__(self, tokenizer: Any, memo: MutableMapping[bytes, np.ndarray] | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: the base needs a tokenizer.json")
        self.tokenizer = tokenizer
        self._memo = memo
        self._control = control_ids(tokenizer)
        self._is_control = np.zeros(vocabulary_size(tokenizer), dtype=bool)
        steering = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        known = set(self._control) - ({tokenizer.unk_token_id} - steering)  # which replaces any unknown character
        self._is_control[list(known)] = True
        self._control_text = any_of(tuple(self._control.values()))

    def refused_ids(self) -> list[int]:
        """The control tokens that no text is encoded to."""
        return [int(each) for each in np.flatnonzero(self._is_control)]

    def chat(self, family: str) -> tuple[list[int], list[int], list[int]]:
        """The beginning and end of the user's turn, and the beginning of the model's; `<bos>` comes first, if any.

        Args:
            family: one of `CHAT_MARKERS`, or `auto`: the one that fits the tokenizer's vocabulary.

        Raises:
            ValueError: the family's markers are not in the vocabulary.
        """
        start, end, answer = map(self._trusted, CHAT_MARKERS[chat_family(self.tokenizer, family)])
        bos = self.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + start, end, answer

    def plain(self, text: str) -> list[int]:
        """The token ids of one text of a template, without control tokens."""
        return list(self._tokenise([text])[0].tolist()) if text else []

    def user_texts(self, texts: Collection[str]) -> dict[str, np.ndarray]:
        """The int32 token ids of each of these user texts, without control tokens."""
        memo: MutableMapping[bytes, np.ndarray] = {} if self._memo is None else self._memo
        keys = {text: blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts}
        ids_of = {text: ids for text, key in keys.items() if (ids := memo.get(key)) is not None}
        new = [text for text in keys if text not in ids_of]
        for text, ids in zip(new, self._tokenise(new), strict=True):
            ids_of[text] = memo[keys[text]] = ids
        return ids_of

    def _tokenise(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        lists = self._encode(texts)
        ends = np.cumsum([0, *map(len, lists)])
        flat = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(ends[-1]))
        ids = [flat[start:end] for start, end in pairwise(ends.tolist())]
        control = np.flatnonzero(self._is_control[flat])
        for index in np.unique(np.searchsorted(ends, control, side="right") - 1).tolist():
            ids[index] = as_ids(self._without_control(texts[index]))
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

    def _trusted(self, text: str) -> list[int]:
        """Token ids of this package's own markers, in which control tokens are recognised."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def chat_family(tokenizer: Any, chat: str = "auto") -> str:
    """The key of `CHAT_MARKERS` that fits a tokenizer's vocabulary, unless `chat` names one.

    Raises:
        ValueError: `chat` names a family whose markers are not in the vocabulary.
    """
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    openings = {family: re.match("<.*?>", markers[0]) for family, markers in CHAT_MARKERS.items()}
    marks = {family: opening[0] for family, opening in openings.items() if opening}
    if chat == "auto":
        return next((family for family, mark in marks.items() if mark in known), "plain")
    if chat != "plain" and marks[chat] not in known:
        raise ValueError(f"prompt.chat is {chat!r}, but the tokenizer has no {marks[chat]}: use `auto` or `plain`")
    return chat
