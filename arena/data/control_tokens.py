"""Which tokens of a vocabulary are control tokens, which a user's text must never produce."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

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
