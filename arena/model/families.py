"""What this package knows of each family of decoders, in one table.

A family that is not in the table runs, and exactly, in transformers' own code. Those in the table also get fused parts,
a last layer that is computed for last tokens only, and a closer estimate of the memory that their layers take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig, PretrainedConfig


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


def _gemma2(**sizes: int) -> Gemma2Config:
    """The config that the published sizes of Gemma-2 have in common (Gemma Team, 2024, arXiv:2408.00118)."""
    return Gemma2Config(
        vocab_size=256000, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, max_position_embeddings=8192,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, rms_norm_eps=1e-6, initializer_range=0.02,
        hidden_activation="gelu_pytorch_tanh", attention_dropout=0.0, attention_bias=False, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, **sizes,
    )  # fmt: skip


_2B = _gemma2(
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4
)
_9B = _gemma2(
    hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8
)

_FIRST_2B = GemmaConfig(  # Gemma 1 and 1.1
    hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1,
    head_dim=256, vocab_size=256000, max_position_embeddings=8192,
)  # fmt: skip

_270M = Gemma3TextConfig(
    hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
    head_dim=256, query_pre_attn_scalar=256, sliding_window=512, vocab_size=262144, max_position_embeddings=32768,
)  # fmt: skip

ARCHITECTURES: Mapping[str, PretrainedConfig] = {
    "google/gemma-1.1-2b-it": _FIRST_2B,
    "google/gemma-2-2b": _2B,
    "google/gemma-2-2b-it": _2B,
    "google/gemma-2-9b": _9B,
    "google/gemma-2-9b-it": _9B,
    "gemma-3-270m": _270M,
}
