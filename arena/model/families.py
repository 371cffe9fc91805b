"""What this package knows of each family of decoders, in one table.

A family that is not in the table runs, and exactly, in transformers' own code. Those in the table also get fused parts,
a last layer that is computed for last tokens only, and a closer estimate of the memory that their layers take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """The defaults describe a family that is not known.

    Attributes:
        norm: class of the norms that have a fused kernel.
        norm_offset: what these norms add to their weight.
        mlp: class of the MLPs `down(activation(gate(x)) * up(x))`.
        rotary_halves: whether the rotary embedding pairs dimension i of a whole head with i + head_dim / 2.
        only_last_tokens: whether layers process each token separately except in attention, and accept
            `position_embeddings`, so that the last one may be computed for last tokens only.
        closing_norms: whether norms also follow attention and MLP.
        query_key_norms: whether each query and key head is normalised.
    """

    norm: str = ""
    norm_offset: float = 0.0
    mlp: str = ""
    rotary_halves: bool = False
    only_last_tokens: bool = False
    closing_norms: bool = False
    query_key_norms: bool = False


def _family(classes: str, **facts: Any) -> Family:
    """A family whose classes in transformers begin with `classes`, and which has all extras."""
    return Family(norm=f"{classes}RMSNorm", mlp=f"{classes}MLP", rotary_halves=True, only_last_tokens=True, **facts)


# by `model_type`; the tests compare each with transformers' own code
FAMILIES = {
    "gemma": _family("Gemma", norm_offset=1.0),
    "gemma2": _family("Gemma2", norm_offset=1.0, closing_norms=True),
    "gemma3_text": _family("Gemma3", norm_offset=1.0, closing_norms=True, query_key_norms=True),
    "llama": _family("Llama"),
    "mistral": _family("Mistral"),
    "qwen2": _family("Qwen2"),
    "qwen3": _family("Qwen3", query_key_norms=True),
}
UNKNOWN = Family()


def family_of(config: Any) -> Family:
    """The family of the model with a transformers config; `UNKNOWN` if it is not in the table."""
    return FAMILIES.get(config.model_type, UNKNOWN)


def unknown_family_note(config: Any) -> str | None:
    """What a model of an unknown family does without, in one line; None for a known family."""
    if config.model_type in FAMILIES:
        return None
    return (
        f"{config.model_type} is not in this package's table of families ({', '.join(FAMILIES)}): it runs exactly, but "
        "without fused norms, MLP and rotary embedding, and its last layer is computed for all tokens"
    )
