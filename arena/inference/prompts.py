"""The token ids of prompts, up to where the model's answer begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arena.data.cells import FieldError, excerpt, whole_characters
from arena.data.text_encoder import TextEncoder, chat_family

PROMPT = "prompt"  # the column of prompts


class PromptEncoder:
    """The token ids of rows with a `prompt`: the user's turn between chat markers, after which the model's begins.

    Without chat markers a prompt is a text that is continued.

    Attributes:
        stop: the tokens that end an answer.

    Raises:
        ValueError: the tokenizer has none.
    """

    def __init__(self, tokenizer: Any, chat: str) -> None:
        self._texts = TextEncoder(tokenizer)
        self._opening, close, answer = self._texts.chat(chat)
        self._closing = [] if chat_family(tokenizer, chat) == "plain" else close + answer
        ends = [tokenizer.eos_token_id, *self._closing[:1]]
        self.stop = sorted({int(end) for end in ends if end is not None})
        if not self.stop:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no token that ends an answer (eos_token)")

    def encode(self, cells: Mapping[str, Any]) -> np.ndarray:
        """The int32 token ids of a row. Raises `FieldError` for a prompt that cannot be used."""
        text = cells.get(PROMPT)
        if not isinstance(text, str) or not text.strip():
            raise FieldError(PROMPT, f"is {excerpt(text)}; write a text, or leave the row out")
        text = whole_characters(text)
        try:
            ids = self._texts.user_texts([text])[text]
        except ValueError as error:
            raise FieldError(PROMPT, str(error)) from None
        return np.concatenate([self._opening, ids, self._closing]).astype(np.int32)
