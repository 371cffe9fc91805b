"""Tiny GGUF files, written from tiny bases as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

from arena.model.safety import SAFE, WEIGHTS
from tests.helpers import CONTROL

QUANTISED = "mlp.down_proj.weight"
Tensors = dict[str, np.ndarray]


def write_gguf(
    base: Path,
    path: Path,
    *,
    change: Callable[[Tensors], None] = lambda tensors: None,
    add: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    architecture: str = "gemma3",
    kind: str = "model",
) -> Path:
    """Writes a Gemma-3 base of `make_base` as a GGUF file, its down projections in 8 bits.

    Args:
        change: what to do to the tensors, by their names in GGUF.
        add: what else to write to the header.
    """
    config, tokenizer = AutoConfig.from_pretrained(base, **SAFE), AutoTokenizer.from_pretrained(base, **SAFE)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config.sliding_window)
    _add_tokenizer(writer, tokenizer)
    add(writer)
    tensors = _tensors(base, config)
    change(tensors)
    for name, values in tensors.items():
        if "ffn_down" in name:
            kind_of = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind_of), raw_dtype=kind_of)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    added = set(tokenizer.get_added_vocab())

    def kind(token: str) -> gguf.TokenType:
        if token in CONTROL:
            return gguf.TokenType.CONTROL
        if token in added:
            return gguf.TokenType.USER_DEFINED
        return gguf.TokenType.BYTE if token.startswith("<0x") else gguf.TokenType.NORMAL

    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(at) for at in range(len(tokens))])
    writer.add_token_types([kind(token) for token in tokens])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)


def _tensors(base: Path, config: Any) -> Tensors:
    """The weights of a base by their names in GGUF, where Gemma's norms are stored with the 1 that they add."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    tensors = {}
    for name, values in load_file(base / WEIGHTS).items():
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None, name
        tensors[known] = values + 1 if "norm" in name else values
    return tensors
