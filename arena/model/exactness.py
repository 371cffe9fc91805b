"""Checks on a small model of the same kind that packing does not change a base's numbers, before the base is used.

Packed attention knows where each row begins, but a base may mix rows in other ways: by a recurrent state, by rotary
frequencies that depend on the longest row of a batch, or by inputs of its attention that packed attention does not
support. No list of bases can cover that. So the base's config is shrunk, and the model that it describes is run with
random weights: packed, with shared beginnings, alone, and one row at a time through plain transformers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import cache as cached
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from arena.model.attention.varlen import NAME
from arena.model.backbone import HEAD, as_classifier, take_over
from arena.model.classifier import PackedClassifier
from arena.model.miniature import BEYOND, FIRST_TOKEN, LONGEST, ORIGINAL, WINDOW, miniature, without_weights
from arena.model.tuning import adapt
from arena.packing.batch import PackedBatch, collate
from arena.packing.tree import find_prefixes, grow_tree
from arena.settings import LoraSettings, ModelSettings
from arena.storage.files import fingerprint, user_cache, write_json

FIXED_ROPE = {"default", "linear", "yarn", "llama3"}  # rotary embeddings that do not depend on the length of a row
TOLERANCE = 1e-5  # relative to the largest logit, in float32
CONTROL = 1e-3  # the least change that a wrong boundary or window must cause

# settings of the small model; its adapters add nothing, so the recipe's adapters do not matter
SIMPLEST: dict[str, Any] = {
    "dtype": "float32", "quantization": "none", "attention": "reference", "checkpointing": "none",
    "lora": LoraSettings(),
}  # fmt: skip


def check_exact(
    config: PretrainedConfig,
    settings: ModelSettings,
    max_length: int,
    *,
    trained: bool = False,
    cache: Path | None = None,
) -> None:
    """Checks that a base computes the same numbers for a row in a packed batch as for that row alone.

    This takes a second or two. A base that passes is remembered by its config, the settings, this package's code, and
    the versions of transformers and torch, and is not checked again.

    Args:
        config: of the base; it is not changed.
        max_length: tokens of the longest row that the base will be given.
        trained: whether a judge was already trained on the base, so that changing settings means training again.
        cache: where bases that passed are remembered; None: in the user's cache.

    Raises:
        ValueError: a row's numbers would depend on the other rows, or the base cannot be used on packed batches.
    """
    settings = settings.model_copy(update=SIMPLEST)
    longest = longest_row(config, max_length)
    described = config.to_dict(), settings.model_dump(mode="json", exclude={"base", "revision"}), longest
    versions = transformers.__version__, torch.__version__, _code()
    note = (cache or user_cache()) / f"exact-{fingerprint(*described, *versions)}.json"
    if note.is_file():
        return
    if why := why_not_exact(config, settings, longest):
        advice = _shorter_rows(config, settings, longest, "train the fold again with" if trained else "set")
        raise ValueError(f"model.base: {settings.base!r} cannot be used on packed batches: {why}{advice}")
    with suppress(OSError):  # the check is then repeated next time
        write_json(note, {"model_type": config.model_type, "longest_row": longest, "transformers": versions[0]})


def why_not_exact(config: PretrainedConfig, settings: ModelSettings, longest: int) -> str | None:
    """Why a base is not exact on packed batches, in a few words; None if it is, to 1e-5 in float32.

    Args:
        settings: of a model in float32, with `SIMPLEST`.
        longest: tokens of the small model's longest row; see `longest_row`.
    """
    try:
        if why := _wrong_kind(config):
            return why
        with _repeatable():
            return _compare(miniature(config), settings, longest)
    except Exception as error:  # a modeling file may raise any error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return f"a small {config.model_type} could not be run on packed batches ({kind}{reason})"


def longest_row(config: PretrainedConfig, max_length: int) -> int:
    """Tokens of the small model's longest row, which exceeds the limits that `max_length` exceeds for the base."""
    original, most = _limits(config)
    if max_length > most:
        return BEYOND
    return ORIGINAL if max_length <= original < math.inf else LONGEST


def _limits(config: PretrainedConfig) -> tuple[float, float]:
    """The number of positions beyond which the rotary embedding may change, and the number of all positions."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in (rope, *rope.values()) if isinstance(each, dict)]
    changing = [each for each in kinds if each.get("rope_type", "default") not in FIXED_ROPE]
    above = getattr(config, "original_max_position_embeddings", None)
    limits = [each.get("original_max_position_embeddings") or above for each in changing]
    most = getattr(config, "max_position_embeddings", None)
    return min(filter(None, limits), default=math.inf), most if isinstance(most, int) else math.inf


def _shorter_rows(config: PretrainedConfig, settings: ModelSettings, longest: int, remedy: str) -> str:
    """Advice if a base is exact for shorter rows."""
    original, most = _limits(config)
    for limit, rows in ((most, LONGEST), (original, ORIGINAL)):
        if rows < longest and limit < math.inf and why_not_exact(config, settings, rows) is None:
            return f". Rows of at most {limit} tokens are exact: {remedy} prompt.max_length={limit}"
    return ""


def _wrong_kind(config: PretrainedConfig) -> str | None:
    """Why a base is not a text decoder with replaceable attention; None if it is."""
    if config.is_encoder_decoder:
        return "it has an encoder in addition to its decoder"
    if config.get_text_config() is not config:
        return "it is a multimodal model; use a model of its text part alone"
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return "transformers has no sequence classifier over it"
    if not MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]._supports_attention_backend:
        return "its attention cannot be replaced (transformers does not call it through AttentionInterface)"
    model = without_weights(miniature(config))
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        return f"its classifier has no linear layer `{HEAD}` over the last token, as decoders have in transformers"
    if not hasattr(getattr(model, model.base_model_prefix), "layers"):
        return "its decoder does not hold its layers in `layers`"
    return None


def _compare(small: PretrainedConfig, settings: ModelSettings, longest: int) -> str | None:
    plain, model = _models(small, settings)
    rows = _rows(longest, small.vocab_size)
    expected = torch.cat([plain(input_ids=torch.from_numpy(row)[None].long()).logits for row in rows])
    packed, order, shared = collate([{"input_ids": row} for row in rows]), *_sharing(rows)
    alone = _apart(torch.cat([model(collate([{"input_ids": row}])) for row in rows]), expected)
    if not alone <= TOLERANCE:
        return f"packed attention differs from its own even for a single row (relative difference {alone:.1g})"
    for batch, right in ((packed, expected), (shared, expected[order])):
        together = _apart(model(batch), right)
        if not together <= TOLERANCE:
            return f"a row's numbers depend on the rows beside it (relative difference {together:.1g})"
    # controls that the comparison must detect: two rows taken for one, and a window that is one token too wide
    if not _apart(model(_in_pairs(packed)), expected[1::2]) > CONTROL:
        return "two rows taken for one give the same numbers, so the comparison proves nothing"
    windows = [each for each in model.modules() if _has_window(each)]
    for module in windows:
        setattr(module, "sliding_window", WINDOW + 1)  # noqa: B010 - a name that torch's modules do not declare
    if windows and not _apart(model(packed), expected) > CONTROL:
        return "a wider window gives the same numbers, so the comparison proves nothing about it"
    model.train()(packed)  # fails if the base cannot be trained, for example because of dropout in attention
    return None


def _has_window(module: Any) -> bool:
    """Whether an attention module uses a sliding window; some have a width but a flag that turns it off."""
    return isinstance(getattr(module, "sliding_window", None), int) and getattr(module, "is_sliding", True)


def _models(small: PretrainedConfig, settings: ModelSettings) -> tuple[PreTrainedModel, PackedClassifier]:
    """Two models with the same random weights: transformers' own, and this package's with adapters that add nothing."""
    as_classifier(small, ("0", "1", "2"))
    plain, model = (
        AutoModelForSequenceClassification.from_config(deepcopy(small), attn_implementation=name, dtype=torch.float32)
        for name in ("eager", NAME)
    )
    for name, parameter in plain.named_parameters():
        if parameter.ndim > 1:  # large enough for every part to affect the logits
            parameter.normal_(std=1.0 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    take_over(model, settings)
    model.load_state_dict(plain.state_dict())
    return plain.eval(), PackedClassifier(adapt(model, settings)).eval()


def _rows(longest: int, vocabulary: int) -> list[np.ndarray]:
    """An even number of rows, int32 (n,) each, with lengths around each limit and with common beginnings."""
    around = {1, 2, *(limit + off for limit in (WINDOW, ORIGINAL, LONGEST) for off in (-1, 0, 1)), longest}
    lengths = [n for n in sorted(around) if n <= longest]
    lengths += [longest // 2] * (len(lengths) % 2)
    rng = np.random.default_rng(0)
    rng.shuffle(lengths)
    common, *rows = (rng.integers(FIRST_TOKEN, vocabulary, n, dtype=np.int32) for n in (longest, *lengths))
    for at, row in enumerate(rows):
        begins = (0, len(row) // 2, len(row) - 1)[at % 3]
        row[:begins] = common[:begins]
    return rows


def _sharing(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, PackedBatch]:
    """The order of the rows in a batch with every common beginning laid out once, and that batch."""
    prefixes = find_prefixes(rows)
    order = np.argsort(prefixes.rank)
    shared = prefixes.between(prefixes.rank[order])
    tree = grow_tree([len(rows[at]) for at in order], shared.tolist(), least=1)
    return order, collate([{"input_ids": rows[at]} for at in order], tree=tree)


def _in_pairs(batch: PackedBatch) -> PackedBatch:
    """A batch that shares nothing, with every two rows taken for one."""
    ends = batch.cu_seqlens_q[::2]
    longest, segment = int(ends.diff().max()), torch.arange(len(ends) - 1)
    return replace(
        batch,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seq_len=longest,
        max_segment_len=longest,
        segment=segment,
        positions=ends[1:].long() - 1,
    )


@cached
def _code() -> str:
    """Fingerprint of the code that lays out and computes batches."""
    package = Path(__file__).parents[1]
    modules = sorted([*(package / "model").rglob("*.py"), *(package / "packing").rglob("*.py")])
    return fingerprint(*(path.read_bytes() for path in modules))


def _apart(actual: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest logit."""
    return float((actual - expected).abs().max() / expected.abs().max())


@contextmanager
def _repeatable() -> Iterator[None]:
    """Uses fixed random numbers without touching the run's, one thread as there is little work, and no warnings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)
