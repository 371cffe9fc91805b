"""`PackedBatch`: judge prompts laid end to end in one row, and where each begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from arena.packing.plan import plan_training


class Item(TypedDict, total=False):
    """One example, as `collate` and `VarlenCollator` take it: `input_ids` is required, the rest may be left out."""

    input_ids: Sequence[int] | np.ndarray
    label: Sequence[float] | np.ndarray
    index: int


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: n examples, T tokens in all, no padding.

    Its fields are also its keys (`batch["cu_seqlens"]`).

    Attributes:
        batch_size: n.
        input_ids: int64 (1, T).
        position_ids: int64 (1, T), starting at 0 with each example.
        seq_lens: tokens of each example.
        cu_seqlens: int32 (n + 1,), where each example begins; 0 first, T last.
        max_seq_len: the longest example's tokens.
        label: float32 (n, 3), probabilities of A, B, tie; NaN where there is no label.
        index: int64 (n,), which example of the data set each one is.
        input_text: the examples decoded, or empty where texts were not asked for.
    """

    batch_size: int
    input_ids: Tensor
    position_ids: Tensor
    seq_lens: list[int]
    cu_seqlens: Tensor
    max_seq_len: int
    label: Tensor
    index: Tensor
    input_text: list[str]

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(f"{key!r}: a PackedBatch has {', '.join(self.keys())}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        return [field.name for field in fields(self)]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {}
        for key in self:
            if isinstance(self[key], Tensor):
                moved[key] = self[key].to(device)
        return replace(self, **moved)


class VarlenCollator:
    """Turns the examples of an optimizer step into its micro-batches; a `collate_fn` for torch's `DataLoader`.

        DataLoader(examples, batch_size=80, collate_fn=VarlenCollator(tokenizer))

    Args:
        tokenizer: decodes `input_text` for people who look at batches; None leaves it empty and costs nothing.
        budget: tokens that a micro-batch may hold.
    """

    def __init__(self, tokenizer: Any = None, budget: int = 16384) -> None:
        self.tokenizer = tokenizer
        self.budget = budget

    def __call__(self, examples: Sequence[Item]) -> list[PackedBatch]:
        """The least number of micro-batches that holds the examples, evenly loaded.

        Raises:
            ValueError: no examples, an empty one, or one that is longer than the budget.
        """
        lengths = np.array([len(example["input_ids"]) for example in examples], dtype=np.int64)
        if len(lengths) == 0:
            raise ValueError("a step needs at least one example")
        plan = plan_training(lengths, np.arange(len(lengths)), step_size=len(lengths), budget=self.budget)
        named: list[Item] = [{"index": at, **example} for at, example in enumerate(examples)]
        return [collate([named[at] for at in members], self.tokenizer) for members in plan.step(0)]


def collate(examples: Sequence[Item], tokenizer: Any = None) -> PackedBatch:
    """Lays examples end to end, in the given order, as one micro-batch.

    Args:
        tokenizer: decodes `input_text`; None leaves it empty.

    Raises:
        ValueError: no examples, or an empty one.
    """
    ids = [np.asarray(example["input_ids"]) for example in examples]
    lengths = np.array([len(each) for each in ids], dtype=np.int64)
    if len(lengths) == 0 or (lengths == 0).any():
        raise ValueError("a batch needs at least one example, and every example at least one token")
    ends = np.cumsum(lengths)
    cu_seqlens = np.concatenate([[0], ends])
    positions = np.arange(ends[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    missing = [float("nan")] * 3
    labels = np.asarray([example.get("label", missing) for example in examples], dtype=np.float32)
    return PackedBatch(
        batch_size=len(ids),
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        position_ids=torch.from_numpy(positions)[None],
        seq_lens=lengths.tolist(),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seq_len=int(lengths.max()),
        label=torch.from_numpy(labels),
        index=torch.tensor([example.get("index", at) for at, example in enumerate(examples)]),
        input_text=[] if tokenizer is None else [tokenizer.decode(each) for each in ids],
    )
