"""What a base can be given: as many positions and as many token ids as its config says."""

from __future__ import annotations

from typing import Any

from arena.data.tokens import TokenStore


def check_length(config: Any, max_length: int, base: str) -> None:
    """Raises `ValueError` where examples may have more tokens than a base has positions. Not all configs tell."""
    most = positions(config)
    if most is not None and max_length > most:
        raise ValueError(
            f"prompt.max_length is {max_length:,}, but {base} reads at most {most:,} tokens (max_position_embeddings "
            f"in its config): pass prompt.max_length={most}, or less"
        )


def positions(config: Any) -> int | None:
    """The tokens of the longest text that a base is made for; None where its config does not tell.

    Scaling of rotary embeddings stretches the positions that they were trained on; some configs count the stretched
    ones as `max_position_embeddings`, others the original ones.
    """
    text = config.get_text_config()
    most: int | None = getattr(text, "max_position_embeddings", None)
    if most is None:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    scalings = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # some have one for a kind of layer
    stretched = [
        int((each.get("original_max_position_embeddings") or most) * each["factor"])
        for each in scalings
        if each.get("factor")
    ]
    return max(most, *stretched) if stretched else most


def check_ids(config: Any, store: TokenStore, tokenizer: Any, base: str) -> None:
    """Raises `ValueError` where a token of the store has no row in the base's embedding.

    Only tokens that occur count: some published tokenizers know ids beyond the embedding that they never give.
    """
    rows, largest = config.get_text_config().vocab_size, store.largest_id()
    if largest >= rows:
        raise ValueError(
            f"the tokenizer of {base} gives the token {tokenizer.convert_ids_to_tokens(largest)!r} the id {largest:,}, "
            f"but the embedding has {rows:,} rows: add rows to the base (resize_token_embeddings, then train them), "
            "or use the tokenizer that it was trained with"
        )
