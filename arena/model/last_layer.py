"""The last decoder layer, computed for the last token of each segment alone.

A classifier reads one token of each example. Every layer but the last feeds all tokens to the next; the last one has to
give keys and values for all tokens, but queries, output projection, norms and MLP only for the tokens that are read.

The layer's own code is run, twice: over all tokens until it asks for attention, which keeps the keys and values and
goes no further; then over the last tokens, whose attention is given those keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import unwrap
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Decoders whose layers treat each token by itself but for attention and take `position_embeddings` (tests/model/
# test_last_layer.py holds each to the whole layer's result).
FAMILIES = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")

MARK = "takes_last_token"


class KeyValueCapture:
    """Where the last layer's keys and values of all tokens wait for its queries."""

    def __init__(self) -> None:
        self.captured: tuple[Tensor, Tensor] | None = None

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """On the first call keeps what it is given and raises `KeysCaptured`; later gives back what it has kept."""
        if self.captured is None:
            self.captured = key, value
            raise KeysCaptured
        return self.captured


class KeysCaptured(Exception):  # noqa: N818 - it ends a run, it is no error
    """Ends the last layer's first run."""


def is_safe(model_type: str) -> bool:
    """Whether `only_last_tokens` is known to be right for a family of models."""
    return model_type in FAMILIES


def only_last_tokens(layer: nn.Module) -> None:
    """Makes a decoder's last layer give the states of each segment's last token: (1, s, hidden) for (1, T, hidden).

    It does so in calls with `last_token`, int64 (s,), the places of these tokens; other calls are left as they are.
    """
    whole = layer.forward
    # without the gradient checkpointing that transformers may have wrapped around it
    bare = MethodType(unwrap(type(layer).forward), layer)

    layer.forward = partial(_run, whole, bare)  # no closure: a copy of the layer must run with its own weights
    setattr(layer, MARK, True)


def _run(
    whole: Callable[..., Any], bare: Callable[..., Any], hidden_states: Tensor, *,
    last_token: Tensor | None = None, **given: Any,
) -> Any:  # fmt: skip
    """In place of the layer's forward: all of it, or with `last_token` the last tokens alone."""
    if last_token is None:
        return whole(hidden_states, **given)
    stage = KeyValueCapture()
    stage.captured = _keys_and_values(bare, given, hidden_states)
    return bare(hidden_states[:, last_token], **_of_last_tokens(given, last_token), last_layer=stage)


def takes_last_token(decoder: nn.Module) -> bool:
    """Whether a decoder may be called with `last_token`."""
    layers: Any = getattr(decoder, "layers", None)
    return bool(layers) and getattr(layers[-1], MARK, False)


def _keys_and_values(
    forward: Callable[..., Any], given: dict[str, Any], hidden_states: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The keys and values of a layer for all tokens, (1, kv_heads, T, head_dim) each."""
    stage = KeyValueCapture()
    try:
        forward(hidden_states, **given, last_layer=stage)
    except KeysCaptured:
        return stage.captured
    raise AssertionError("the last layer did not ask for attention")


def _of_last_tokens(given: dict[str, Any], last_token: Tensor) -> dict[str, Any]:
    """A layer's keyword arguments for a row of one query a segment."""
    cos, sin = given["position_embeddings"]
    changed: dict[str, Any] = {
        "position_embeddings": (cos[:, last_token], sin[:, last_token]),
        "cu_seq_lens_q": torch.arange(len(last_token) + 1, dtype=torch.int32, device=last_token.device),
        "max_length_q": 1,
    }
    if given.get("position_ids") is not None:
        changed["position_ids"] = given["position_ids"][:, last_token]
    return {**given, **changed}
