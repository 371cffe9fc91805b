"""Which tokens of a vocabulary steer a model, and so must never come out of a user's text."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

# Added tokens that are ordinary text: white space, and the markup that some vocabularies hold as single tokens.
_TEXT_TOKEN = re.compile(
    r"[\s\u2581]*|</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|p|br|li|ul|ol|pre)>"
)


def control_ids(tokenizer: Any) -> dict[int, str]:
    """The control tokens, id to text.

    Every special token, and every added token (`<unused0>`, `[@BOS@]`) that is not plain text. Some tokenizers pad with
    a token of plain text, such as `!`; nothing is padded here, so it stays text.
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
    """A pattern that finds any of the texts, the longest first."""
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _is_text(content: str) -> bool:
    """White space, known markup, a single character, or letters, digits and white space only."""
    return bool(_TEXT_TOKEN.fullmatch(content)) or len(content) == 1 or all(map(_is_of_words, content))


def _is_of_words(character: str) -> bool:
    """A letter (or a mark on one), a number, or white space."""
    return unicodedata.category(character)[0] in "LMN" or character.isspace() or character == "\u2581"
