"""Shrinks a base's config so far that the model it describes runs in milliseconds.

Widths are reduced, and so are the limits on positions and windows; of equal layers one is left.
"""

from __future__ import annotations

import math
import re
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

VOCABULARY = 128
FIRST_TOKEN = 10  # the tokens below may be special
WINDOW = 8  # tokens in every sliding window, chunk or block
ORIGINAL = 24  # positions that an extended rotary embedding was originally trained on
LONGEST = 40  # most positions of the small model
BEYOND = LONGEST + WINDOW + 1  # tokens of a row that exceeds them

HEADS, HEAD_DIM, HIDDEN = 4, 16, 64

# the names of widths in transformers' configs, and their small values
WIDTHS = {
    "vocab_size": VOCABULARY, "intermediate_size": 2 * HIDDEN, "query_pre_attn_scalar": HEAD_DIM,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": HIDDEN, "shared_expert_intermediate_size": HIDDEN,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "qk_head_dim": 24,
    "v_head_dim": 16, "index_head_dim": 16,
}  # fmt: skip
# patterns in the names of limits on windows and positions, and their small values
LIMITS = (
    (re.compile(r"original_max_position"), ORIGINAL),
    (re.compile(r"n_positions|n_ctx|max_position|max_seq_len|max_target_positions"), LONGEST),
    (re.compile(r"window|chunk|topk|local_attention|block_size"), WINDOW),
)
NO_LIMIT = re.compile(r"layers|group|feed_forward")


def miniature(config: PretrainedConfig) -> PretrainedConfig:
    """The same config, but narrow and shallow and with the limits `WINDOW`, `ORIGINAL` and `LONGEST`.

    It still has several query heads per key head, and heads that are together wider than the hidden size, if the base
    has them.
    """
    small = deepcopy(config)
    vars(small).pop("quantization_config", None)  # if the base is stored quantised
    values = config.to_dict()
    for name, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(small, name, _small(name, value))
        elif name == "eos_token_id" and isinstance(value, list):
            small.eos_token_id = 1
    _shrink_heads(small, config, values)
    for name, value in values.items():
        if name.startswith("rope_") and isinstance(value, dict):
            setattr(small, name, _small_rope(value, _head_dim(small), values.get("partial_rotary_factor") or 1.0))
    return _shallow(small)


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The classifier that a config describes, on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(deepcopy(config))
    return model


def _small(name: str, value: int) -> int:
    """The small value of a number in the config."""
    if name in WIDTHS:
        return min(value, WIDTHS[name])
    if name.endswith(("_token_id", "_token_index")):
        return min(value, 1)
    for pattern, limit in LIMITS:
        if pattern.search(name) and not NO_LIMIT.search(name):
            return min(value, limit)
    return value


def _shrink_heads(small: PretrainedConfig, config: PretrainedConfig, values: dict[str, Any]) -> None:
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return
    small.num_attention_heads = HEADS
    for name in ("num_key_value_heads", "num_kv_heads", "num_query_groups"):
        if isinstance(count := values.get(name), int):
            setattr(small, name, HEADS if count == heads else min(count, 2))
    head_dim, turned, width = values.get("head_dim"), values.get("qk_rope_head_dim"), _head_width(values)
    small.hidden_size = HEADS * width
    if isinstance(head_dim, int) and turned:
        small.head_dim = head_dim * WIDTHS["qk_rope_head_dim"] // turned
    elif isinstance(head_dim, int):
        small.head_dim = width if head_dim * heads == config.hidden_size else 2 * width


def _head_width(values: dict[str, Any]) -> int:
    """The least head size whose rotated part has at least two whole frequencies."""
    ropes = [each for name, each in values.items() if name.startswith("rope_") and isinstance(each, dict)]
    ropes += [below for rope in ropes for below in rope.values() if isinstance(below, dict)]
    parts = {float(each.get("partial_rotary_factor") or 1.0) for each in (values, *ropes)}
    widths = (width for width in range(HEAD_DIM, 257, 8))
    return next((w for w in widths if all(int(w * part) % 2 == 0 and int(w * part) >= 4 for part in parts)), HEAD_DIM)


def _head_dim(config: PretrainedConfig) -> int:
    """The head size, of which the rotary embedding may rotate all or a part."""
    stated = getattr(config, "head_dim", None)
    return stated if isinstance(stated, int) else config.hidden_size // config.num_attention_heads


def _small_rope(rope: dict[str, Any], head_dim: int, part: float) -> dict[str, Any]:
    """The small rotary parameters, possibly grouped by kind of layer; their lists have a number for each frequency.

    `part` is the rotated share of a head if they do not give one. From lists for short and long rows, the entry where
    they differ most comes first, where it has the largest effect.
    """
    frequencies = int(head_dim * (rope.get("partial_rotary_factor") or part)) // 2
    short, long = rope.get("short_factor"), rope.get("long_factor")
    first = 0
    if isinstance(short, list) and isinstance(long, list):
        ratios = [abs(math.log(b / a)) for a, b in zip(short, long, strict=False)]
        first = ratios.index(max(ratios))
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            small[name] = _small_rope(value, head_dim, part)
        elif name == "original_max_position_embeddings" and value:
            small[name] = ORIGINAL
        elif isinstance(value, list):
            small[name] = [value[first], *(value[at * len(value) // frequencies] for at in range(1, frequencies))]
        else:
            small[name] = value
    return small


def _shallow(config: PretrainedConfig) -> PretrainedConfig:
    """The config with one layer of each kind and the last layer, or unchanged if that would lose a kind.

    The kinds of layers are read from those lists of the config that have an entry for each layer, and then checked.
    """
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int) or depth <= 2:
        return config
    lists = {name: each for name, each in config.to_dict().items() if isinstance(each, list) and len(each) == depth}
    kinds = [str([each[at] for each in lists.values()]) for at in range(depth)]
    chosen = [*sorted({kinds.index(kind) for kind in kinds}), depth - 1]
    shallow = deepcopy(config)
    shallow.num_hidden_layers = len(chosen)
    for name, each in lists.items():
        setattr(shallow, name, [each[at] for at in chosen])
    return shallow if _kinds_of_layers(shallow) == _kinds_of_layers(config) else config


def _kinds_of_layers(config: PretrainedConfig) -> set[str]:
    """Descriptions of a model's different layers: the classes of their modules, and the modules' plain attributes."""
    model = without_weights(config)
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    layers = next((each for each in lists if len(each) == config.num_hidden_layers), nn.ModuleList())
    return {
        str([(name, type(part).__name__, _facts(part)) for name, part in layer.named_modules()]) for layer in layers
    }


def _facts(part: nn.Module) -> list[tuple[str, Any]]:
    plain = {name: each for name, each in vars(part).items() if isinstance(each, bool | int | str)}
    return sorted((name, each) for name, each in plain.items() if name not in {"layer_idx", "layer_id", "training"})
