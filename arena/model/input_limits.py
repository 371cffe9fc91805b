"""The limits of a base's input: the number of positions and of token ids in its config."""

from __future__ import annotations

from typing import Any

from arena.data.tokens import TokenStore


def check_length(config: Any, max_length: int, base: str) -> None:
    """Raises `ValueError` if examples may have more tokens than a base has positions, as far as its config tells."""
    most = positions(config)
    if most is not None and max_length > most:
        raise ValueError(
            f"prompt.max_length is {max_length:,}, but {base} supports at most {most:,} tokens "
            f"(max_position_embeddings in its config): pass prompt.max_length={most} or less"
        )


def positions(config: Any) -> int | None:
    """The number of tokens that a base supports; None if its config does not tell.

    Scaling of rotary embeddings extends the positions that they were trained on; `max_position_embeddings` includes the
    extension in some configs, and not in others.
    """
    text = config.get_text_config()
    most: int | None = getattr(text, "max_position_embeddings", None)
    if most is None:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    scalings = [
        rope,
        *(each for each in rope.values() if isinstance(each, dict)),
    ]  # some configs have one per kind of layer
    stretched = [
        int((each.get("original_max_position_embeddings") or most) * each["factor"])
        for each in scalings
        if each.get("factor")
    ]
    return max(most, *stretched) if stretched else most


def check_ids(config: Any, store: TokenStore, tokenizer: Any, base: str) -> None:
    """Raises `ValueError` if a token of the store has no row in the base's embedding.

    Only tokens that occur are checked, because some published tokenizers have unused ids beyond the embedding.
    """
    rows, largest = config.get_text_config().vocab_size, store.largest_id()
    if largest >= rows:
        raise ValueError(
            f"the tokenizer of {base} gives the token {tokenizer.convert_ids_to_tokens(largest)!r} the id {largest:,}, "
            f"but the embedding has {rows:,} rows: add rows to the base (resize_token_embeddings, then train them), "
            "or use the tokenizer that the base was trained with"
        )
