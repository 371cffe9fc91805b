"""The last decoder layer, computed for the last token of each segment only.

A classifier reads one token of each example. Every layer but the last passes all tokens to the next. The last layer
needs keys and values of all tokens, but queries, output projection, norms and MLP only for the tokens that are read.

The layer's own code runs twice: first over all tokens up to its call of attention, which captures the keys and values
and stops; then over the last tokens, whose attention uses the captured keys and values. An exception ends the first run
because everything else would cost more or depend on more: letting attention return would add the output projection and
the MLP of all tokens, and computing keys and values here would repeat each family's projections, norms and rotary
embedding, which are transformers' to change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import unwrap
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

MARK = "takes_last_token"


class KeyValueCapture:
    """Captures the last layer's keys and values of all tokens for its queries."""

    def __init__(self) -> None:
        self.captured: tuple[Tensor, Tensor] | None = None

    def keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Captures its arguments and raises `KeysCaptured` in the first call; returns the captured ones later."""
        if self.captured is None:
            self.captured = key, value
            raise KeysCaptured
        return self.captured


class KeysCaptured(Exception):  # noqa: N818 - it ends a run but is not an error
    """Ends the last layer's first run."""


def only_last_tokens(layer: nn.Module) -> None:
    """Makes a decoder's last layer return the states of each segment's last token: (1, s, hidden) for (1, T, hidden).

    This applies to calls with `last_token`, int64 (s,), the positions of these tokens; other calls are unchanged.
    """
    whole = layer.forward
    # without the gradient checkpointing that transformers may have wrapped around it
    bare = MethodType(unwrap(type(layer).forward), layer)

    layer.forward = partial(_run, whole, bare)  # not a closure, so that a copy of the layer uses its own weights
    setattr(layer, MARK, True)


def _run(
    whole: Callable[..., Any], bare: Callable[..., Any], hidden_states: Tensor, *,
    last_token: Tensor | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """Replaces the layer's forward: runs all of it, or with `last_token` only the last tokens."""
    if last_token is None:
        return whole(hidden_states, **kwargs)
    stage = KeyValueCapture()
    stage.captured = _keys_and_values(bare, kwargs, hidden_states)
    return bare(hidden_states[:, last_token], **_of_last_tokens(kwargs, last_token), last_layer=stage)


def takes_last_token(decoder: nn.Module) -> bool:
    """Whether a decoder may be called with `last_token`."""
    layers: Any = getattr(decoder, "layers", None)
    return bool(layers) and getattr(layers[-1], MARK, False)


def _keys_and_values(
    forward: Callable[..., Any], kwargs: dict[str, Any], hidden_states: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The keys and values of a layer for all tokens, (1, kv_heads, T, head_dim) each."""
    stage = KeyValueCapture()
    try:
        forward(hidden_states, **kwargs, last_layer=stage)
    except KeysCaptured:
        return stage.captured
    raise AssertionError("the last layer did not call attention")


def _of_last_tokens(kwargs: dict[str, Any], last_token: Tensor) -> dict[str, Any]:
    """A layer's keyword arguments for a row with one query per segment."""
    cos, sin = kwargs["position_embeddings"]
    changed: dict[str, Any] = {
        "position_embeddings": (cos[:, last_token], sin[:, last_token]),
        "cu_seq_lens_q": torch.arange(len(last_token) + 1, dtype=torch.int32, device=last_token.device),
        "max_length_q": 1,
    }
    if kwargs.get("position_ids") is not None:
        changed["position_ids"] = kwargs["position_ids"][:, last_token]
    return {**kwargs, **changed}
