"""`PackedBatch`: judge prompts laid end to end in one row, what they share only once, and where each segment begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arena.packing.examples import Item, read_examples
from arena.packing.plan import plan_training
from arena.packing.tree import Tree, find_prefixes


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: n examples as s segments, T tokens in all, no padding.

    A segment is an example, or a part of one: a beginning that several examples share, or the rest of an example after
    such a beginning. Where nothing is shared, s is n and segment i is example i. Its queries see its own keys and those
    of the segments before it in its examples: of the row's keys, taken in the order `kv_index`, those from
    `cu_seqlens_k[i]` to `cu_seqlens_k[i + 1]`.

    What it holds can also be read by key (`batch["input_ids"]`). A batch that cannot have a correct `cu_seqlens` or
    `label` does not list it among its keys, and asking for it raises a `ValueError`.

    Attributes:
        batch_size: n.
        input_ids: int64 (1, T).
        position_ids: int64 (1, T), the place of each token in its example.
        seq_lens: tokens of each example, shared or not.
        cu_seqlens_q: int32 (s + 1,), where each segment, and so its queries, begins; 0 first, T last.
        cu_seqlens: int32 (n + 1,), where each example begins; only where nothing is shared, and then `cu_seqlens_q`.
        max_seq_len: the longest example's tokens.
        label: float32 (n, 3), probabilities of A, B, tie; only where the examples are labelled.
        labels: what `label` gives, or None.
        index: int64 (n,), which example of the data set each one is.
        input_text: the examples decoded, or empty where texts were not asked for.
        cu_seqlens_k: int32 (s + 1,), where each segment's keys begin; `cu_seqlens_q` itself where nothing is shared.
        kv_index: int64 (K,), the place in the row of each key; None where nothing is shared.
        max_segment_len: the longest segment's tokens.
        segment: int64 (n,), the segment that ends with each example's last token.
    """

    batch_size: int
    input_ids: Tensor
    position_ids: Tensor
    seq_lens: list[int]
    cu_seqlens_q: Tensor
    max_seq_len: int
    labels: Tensor | None
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

    @property
    def cu_seqlens(self) -> Tensor:
        if not self._one_segment_each:
            raise ValueError(
                "this batch shares what its examples have in common, so it has no cu_seqlens: a plain variable-length "
                "kernel would compute wrong numbers without an error. Load it without sharing (packing.share=false, or "
                "share=False for VarlenCollator), or use attention that takes cu_seqlens_q, cu_seqlens_k and kv_index"
            )
        return self.cu_seqlens_q

    @property
    def label(self) -> Tensor:
        if self.labels is None:
            raise ValueError(
                "this batch has no labels: give PackedLoader the labels of its examples, as in "
                "example_labels(data.labels, data.store), or give each example a label"
            )
        return self.labels

    @property
    def _one_segment_each(self) -> bool:
        """Whether segment i is the whole of example i. Equal examples may share one segment."""
        return self.kv_index is None and len(self.cu_seqlens_q) == self.batch_size + 1

    def __getitem__(self, key: str) -> Any:
        if key not in (*self.keys(), "cu_seqlens", "label"):
            raise KeyError(f"{key!r}: a PackedBatch has {', '.join(self.keys())}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        held = [field.name for field in fields(self) if field.name != "labels"]
        return held + ["cu_seqlens"] * self._one_segment_each + ["label"] * (self.labels is not None)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`; from pinned memory the copies do not block."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from which a GPU copies by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(each) for name, each in held.items() if isinstance(each, Tensor)}
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
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            raise ValueError(f"tokenizer is a {type(tokenizer).__name__}: give a tokenizer that is loaded, or None")
        if not isinstance(budget, int) or budget < 1:
            raise ValueError(f"budget is {budget!r}: give the tokens that a micro-batch may hold, such as 16384")
        self.tokenizer = tokenizer
        self.budget = budget
        self.share = share

    def __call__(self, examples: Sequence[Item]) -> list[PackedBatch]:
        """The least number of micro-batches that holds the examples, evenly loaded.

        Raises:
            ValueError: no examples, one that is longer than the budget, or one that cannot be used (`read_examples`).
        """
        ids, labels, index = read_examples(examples)
        lengths = np.array([len(each) for each in ids], dtype=np.int64)
        prefixes = find_prefixes(ids) if self.share else None
        plan = plan_training(
            lengths, np.arange(len(lengths)), step_size=len(lengths), budget=self.budget, prefixes=prefixes
        )
        batches = []
        for number in plan.of_step(0):
            members = plan.micro_batch(number)
            chosen, tree = [ids[at] for at in members], plan.tree(number, lengths)
            batches.append(
                lay_out(chosen, None if labels is None else labels[members], index[members], self.tokenizer, tree)
            )
        return batches


def collate(examples: Sequence[Item], tokenizer: Any = None, tree: Tree | None = None) -> PackedBatch:
    """Lays examples end to end, in the given order, as one micro-batch.

    Args:
        tokenizer: decodes `input_text`; None leaves it empty.
        tree: what the examples, in the order of the tree, share, which is laid out once; None shares nothing.

    Raises:
        ValueError: no examples, or one that cannot be used (`read_examples`).
    """
    return lay_out(*read_examples(examples), tokenizer, tree)


def lay_out(
    ids: Sequence[np.ndarray],
    labels: np.ndarray | None,
    index: np.ndarray,
    tokenizer: Any = None,
    tree: Tree | None = None,
) -> PackedBatch:
    """Like `collate`, for examples that were read into columns.

    Args:
        ids: token ids of n examples.
        labels: float32 (n, 3), or None; index: int64 (n,).

    Raises:
        ValueError: no examples, or an empty one.
    """
    seq_lens = [len(each) for each in ids]
    if not seq_lens or min(seq_lens) == 0:
        raise ValueError("a batch needs at least one example, and every example at least one token")
    tree = tree or _plain(seq_lens)
    assert [tree.end[node] for node in tree.ends_in] == seq_lens, "the tree is of other examples, or in another order"
    starts, ends = np.array(tree.start), np.array(tree.end)
    places = np.concatenate([[0], np.cumsum(ends - starts)])
    parts = [ids[at][start:end] for at, start, end in zip(tree.example, tree.start, tree.end, strict=True)]
    boundaries = torch.from_numpy(places.astype(np.int32))
    shares = max(tree.parent) >= 0
    kv_index, cu_seqlens_k = _keys(tree, places) if shares else (None, boundaries)
    return PackedBatch(
        batch_size=len(ids),
        input_ids=torch.from_numpy(np.concatenate(parts, dtype=np.int64))[None],
        position_ids=torch.from_numpy(_ranges(starts, ends - starts))[None],
        seq_lens=seq_lens,
        cu_seqlens_q=boundaries,
        max_seq_len=max(seq_lens),
        labels=None if labels is None else torch.from_numpy(labels),
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
