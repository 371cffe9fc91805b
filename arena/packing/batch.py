"""`PackedBatch`: judge prompts laid end to end in one row, what they share only once, and where each segment begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from arena.packing.plan import plan_training
from arena.packing.tree import Tree, find_prefixes


class Item(TypedDict, total=False):
    """One example, as `collate` and `VarlenCollator` take it: `input_ids` is required, the rest may be left out."""

    input_ids: Sequence[int] | np.ndarray
    label: Sequence[float] | np.ndarray
    index: int


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: n examples as s segments, T tokens in all, no padding.

    A segment is an example, or a part of one: a beginning that several examples share, or the rest of an example after
    such a beginning. Where nothing is shared, s is n and segment i is example i. Its queries see its own keys and those
    of the segments before it in its examples: of the row's keys, taken in the order `kv_index`, those from
    `cu_seqlens_k[i]` to `cu_seqlens_k[i + 1]`.

    Its fields are also its keys (`batch["cu_seqlens"]`).

    Attributes:
        batch_size: n.
        input_ids: int64 (1, T).
        position_ids: int64 (1, T), the place of each token in its example.
        seq_lens: tokens of each example, shared or not.
        cu_seqlens: int32 (s + 1,), where each segment begins; 0 first, T last.
        max_seq_len: the longest example's tokens.
        label: float32 (n, 3), probabilities of A, B, tie; NaN where there is no label.
        index: int64 (n,), which example of the data set each one is.
        input_text: the examples decoded, or empty where texts were not asked for.
        cu_seqlens_k: int32 (s + 1,), where each segment's keys begin; `cu_seqlens` itself where nothing is shared.
        kv_index: int64 (K,), the place in the row of each key; None where nothing is shared.
        max_segment_len: the longest segment's tokens.
        segment: int64 (n,), the segment that ends with each example's last token.
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
    cu_seqlens_k: Tensor
    kv_index: Tensor | None
    max_segment_len: int
    segment: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that a model computes."""
        return self.input_ids.shape[1]

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(f"{key!r}: a PackedBatch has {', '.join(self.keys())}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        return [field.name for field in fields(self)]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`; from pinned memory the copies do not block."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from which a GPU copies by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {key: change(self[key]) for key in self if isinstance(self[key], Tensor)}
        return replace(self, **changed)


class VarlenCollator:
    """Turns the examples of an optimizer step into its micro-batches; a `collate_fn` for torch's `DataLoader`.

        DataLoader(examples, batch_size=80, collate_fn=VarlenCollator(tokenizer))

    Args:
        tokenizer: decodes `input_text` for people who look at batches; None leaves it empty and costs nothing.
        budget: tokens that a micro-batch may hold.
        share: lay out common beginnings once. A model must then take its keys by `kv_index` and `cu_seqlens_k`; off,
            batches suit any variable-length kernel.
    """

    def __init__(self, tokenizer: Any = None, budget: int = 16384, share: bool = False) -> None:
        self.tokenizer = tokenizer
        self.budget = budget
        self.share = share

    def __call__(self, examples: Sequence[Item]) -> list[PackedBatch]:
        """The least number of micro-batches that holds the examples, evenly loaded.

        Raises:
            ValueError: no examples, an empty one, or one that is longer than the budget.
        """
        ids = [np.asarray(example["input_ids"], dtype=np.int32) for example in examples]
        lengths = np.array([len(each) for each in ids], dtype=np.int64)
        if len(lengths) == 0:
            raise ValueError("a step needs at least one example")
        prefixes = find_prefixes(ids) if self.share else None
        plan = plan_training(
            lengths, np.arange(len(lengths)), step_size=len(lengths), budget=self.budget, prefixes=prefixes
        )
        named: list[Item] = [{"index": at, **example} for at, example in enumerate(examples)]
        return [
            collate([named[at] for at in plan.micro_batch(index)], self.tokenizer, plan.tree(index, lengths))
            for index in plan.of_step(0)
        ]


def collate(examples: Sequence[Item], tokenizer: Any = None, tree: Tree | None = None) -> PackedBatch:
    """Lays examples end to end, in the given order, as one micro-batch.

    Args:
        tokenizer: decodes `input_text`; None leaves it empty.
        tree: what the examples, in the order of the tree, share, which is laid out once; None shares nothing.

    Raises:
        ValueError: no examples, or an empty one.
    """
    ids = [np.asarray(example["input_ids"]) for example in examples]
    missing = [float("nan")] * 3
    labels = np.asarray([example.get("label", missing) for example in examples], dtype=np.float32)
    index = np.array([example.get("index", at) for at, example in enumerate(examples)], dtype=np.int64)
    return lay_out(ids, labels, index, tokenizer, tree)


def lay_out(
    ids: Sequence[np.ndarray], labels: np.ndarray, index: np.ndarray, tokenizer: Any = None, tree: Tree | None = None
) -> PackedBatch:
    """`collate` for columns.

    Args:
        ids: token ids of n examples.
        labels: float32 (n, 3); index: int64 (n,).

    Raises:
        ValueError: no examples, or an empty one.
    """
    seq_lens = [len(each) for each in ids]
    if not seq_lens or min(seq_lens) == 0:
        raise ValueError("a batch needs at least one example, and every example at least one token")
    tree = tree or _plain(seq_lens)
    assert [tree.end[node] for node in tree.ends_in] == seq_lens, "the tree is of other examples, or in another order"
    starts, ends = np.array(tree.start), np.array(tree.end)
    cu_seqlens = np.concatenate([[0], np.cumsum(ends - starts)])
    parts = [ids[at][start:end] for at, start, end in zip(tree.example, tree.start, tree.end, strict=True)]
    boundaries = torch.from_numpy(cu_seqlens.astype(np.int32))
    shares = max(tree.parent) >= 0
    kv_index, cu_seqlens_k = _keys(tree, cu_seqlens) if shares else (None, boundaries)
    return PackedBatch(
        batch_size=len(ids),
        input_ids=torch.from_numpy(np.concatenate(parts, dtype=np.int64))[None],
        position_ids=torch.from_numpy(_ranges(starts, ends - starts))[None],
        seq_lens=seq_lens,
        cu_seqlens=boundaries,
        max_seq_len=max(seq_lens),
        label=torch.from_numpy(labels),
        index=torch.from_numpy(index),
        input_text=[] if tokenizer is None else [tokenizer.decode(each) for each in ids],
        cu_seqlens_k=cu_seqlens_k,
        kv_index=kv_index,
        max_segment_len=int((ends - starts).max()),
        segment=torch.tensor(tree.ends_in),
    )


def _plain(seq_lens: list[int]) -> Tree:
    """Each example a segment."""
    n = len(seq_lens)
    return Tree(list(range(n)), [0] * n, seq_lens, [-1] * n, list(range(n)))


def _keys(tree: Tree, places: np.ndarray) -> tuple[Tensor, Tensor]:
    """`kv_index` and `cu_seqlens_k`: for each segment the places of its ancestors' tokens, then of its own."""
    chains: list[list[int]] = []
    for node, parent in enumerate(tree.parent):
        chains.append([*(chains[parent] if parent >= 0 else []), node])
    nodes = np.fromiter((node for chain in chains for node in chain), dtype=np.int64)
    kv_index = _ranges(places[nodes], np.diff(places)[nodes])
    # a segment that ends at token n of its example has n keys
    boundaries = np.fromiter(accumulate(tree.end, initial=0), dtype=np.int32)
    return torch.from_numpy(kv_index), torch.from_numpy(boundaries)


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64: start, start + 1, ... of each range, end to end."""
    ends = np.cumsum(sizes)
    places = np.arange(ends[-1])
    places += np.repeat(starts - ends + sizes, sizes)
    return places
