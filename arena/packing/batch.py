"""`PackedBatch`: examples laid end to end in one row, with common beginnings only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arena.packing.examples import Columns, Item, read_examples
from arena.packing.plan import plan_training
from arena.packing.tree import Tree, find_prefixes


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: n examples as s segments, T tokens in all, without padding.

    A segment is an example or a part of one: a beginning that several examples share, or the rest of an example after
    such a beginning. If nothing is shared, s is n and segment i is example i. A segment's queries see its own keys and
    those of the preceding segments of the same example: of the row's keys in the order of `kv_index`, those from
    `cu_seqlens_k[i]` to `cu_seqlens_k[i + 1]`.

    The names in `keys()` can also be read by key (`batch["input_ids"]`). A batch without a correct `cu_seqlens` or
    `label` does not list it among its keys, and reading it raises a `ValueError`.

    Attributes:
        batch_size: n.
        input_ids: int64 (1, T).
        position_ids: int64 (1, T), the position of each token in its example.
        seq_lens: tokens of each example, shared or not.
        cu_seqlens_q: int32 (s + 1,), the beginning of each segment and so of its queries; 0 first, T last.
        cu_seqlens: int32 (n + 1,), the beginning of each example; equal to `cu_seqlens_q`, and only if nothing is
            shared.
        max_seq_len: tokens of the longest example.
        positions: int64 (m,), the positions in the row that the head reads: each example's last token, so that m is n;
            or, for targets that are tokens, the token before each. A token that two examples share can be read twice.
        targets: float32 (n, C), the probabilities of the classes; or int64 (m,) token ids; None without targets.
        label: the targets, if they are probabilities.
        index: int64 (n,), the index of each example in the data set.
        input_text: the decoded examples; empty unless requested.
        cu_seqlens_k: int32 (s + 1,), the beginning of each segment's keys; `cu_seqlens_q` itself if nothing is shared.
        kv_index: int64 (K,), the position in the row of each key; None if nothing is shared.
        max_segment_len: tokens of the longest segment.
        segment: int64 (n,), the segment that ends with each example's last token.
        targets_each: int64 (n,), how many targets each example has, if they are tokens; None: only last tokens are
            read.
    """

    batch_size: int
    input_ids: Tensor
    position_ids: Tensor
    seq_lens: list[int]
    cu_seqlens_q: Tensor
    max_seq_len: int
    positions: Tensor
    targets: Tensor | None
    index: Tensor
    input_text: list[str]
    cu_seqlens_k: Tensor
    kv_index: Tensor | None
    max_segment_len: int
    segment: Tensor
    targets_each: Tensor | None = None

    @property
    def reads_last(self) -> bool:
        """Whether only last tokens are read."""
        return self.targets_each is None

    @property
    def tokens(self) -> int:
        """Tokens that a model computes."""
        return self.input_ids.shape[1]

    @property
    def cu_seqlens(self) -> Tensor:
        if not self._one_segment_each:
            raise ValueError(
                "this batch shares common beginnings, so it has no cu_seqlens: a plain variable-length kernel would "
                "compute wrong numbers without an error. Load it without sharing (packing.share=false, or share=False "
                "for VarlenCollator), or use attention that takes cu_seqlens_q, cu_seqlens_k and kv_index"
            )
        return self.cu_seqlens_q

    @property
    def label(self) -> Tensor:
        if self.targets is not None and self.targets.ndim == 1:
            raise ValueError("this batch has token targets (`labels`), not probabilities of classes: read its targets")
        if self.targets is None:
            raise ValueError(
                "this batch has no labels: pass PackedLoader the targets of its examples, such as data.targets, or "
                "give each example a label"
            )
        return self.targets

    @property
    def _one_segment_each(self) -> bool:
        """Whether segment i is all of example i. Equal examples may share one segment."""
        return self.kv_index is None and len(self.cu_seqlens_q) == self.batch_size + 1

    def __getitem__(self, key: str) -> Any:
        if key not in (*self.keys(), "cu_seqlens", "label"):
            raise KeyError(f"{key!r}: a PackedBatch has {', '.join(self.keys())}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        labelled = self.targets is not None and self.targets.ndim > 1
        hidden = {name for name in ("targets", "targets_each") if getattr(self, name) is None}
        held = [field.name for field in fields(self) if field.name not in hidden]
        return held + ["cu_seqlens"] * self._one_segment_each + ["label"] * labelled

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`; from pinned memory the copies do not block."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from which a GPU copies asynchronously."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(each) for name, each in held.items() if isinstance(each, Tensor)}
        return replace(self, **changed)


class VarlenCollator:
    """Turns the examples of an optimizer step into its micro-batches; a `collate_fn` for torch's `DataLoader`.

        DataLoader(examples, batch_size=80, collate_fn=VarlenCollator(tokenizer))

    Args:
        tokenizer: decodes `input_text` for inspection; None leaves it empty and takes no time.
        budget: the most tokens in a micro-batch.
        share: lay out common beginnings once; the model must then use `kv_index` and `cu_seqlens_k`. Without sharing,
            batches suit any variable-length kernel.
    """

    def __init__(self, tokenizer: Any = None, budget: int = 16384, share: bool = False) -> None:
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            raise ValueError(f"tokenizer is a {type(tokenizer).__name__}: give a loaded tokenizer, or None")
        if not isinstance(budget, int) or budget < 1:
            raise ValueError(f"budget is {budget!r}: give the most tokens in a micro-batch, such as 16384")
        self.tokenizer = tokenizer
        self.budget = budget
        self.share = share

    def __call__(self, examples: Sequence[Item]) -> list[PackedBatch]:
        """Packs the examples into the least number of micro-batches, evenly loaded.

        Raises:
            ValueError: there are no examples, one is longer than the budget, or one is invalid (`read_examples`).
        """
        columns = read_examples(examples)
        lengths = np.array([len(each) for each in columns.ids], dtype=np.int64)
        prefixes = find_prefixes(columns.ids) if self.share else None
        plan = plan_training(
            lengths, np.arange(len(lengths)), step_size=len(lengths), budget=self.budget, prefixes=prefixes
        )
        batches = []
        for number in plan.of_step(0):
            members = plan.micro_batch(number)
            batches.append(lay_out(columns.take(members), self.tokenizer, plan.tree(number, lengths)))
        return batches


def collate(examples: Sequence[Item], tokenizer: Any = None, tree: Tree | None = None) -> PackedBatch:
    """Lays examples end to end, in the given order, as one micro-batch.

    Args:
        tokenizer: decodes `input_text`; None leaves it empty.
        tree: the common beginnings of the examples, which are in the order of the tree; None shares nothing.

    Raises:
        ValueError: there are no examples, or one is invalid (`read_examples`).
    """
    return lay_out(read_examples(examples), tokenizer, tree)


def lay_out(columns: Columns, tokenizer: Any = None, tree: Tree | None = None) -> PackedBatch:
    """Like `collate`, for examples in columns.

    Raises:
        ValueError: there are no examples, or one is empty.
    """
    ids = columns.ids
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
        positions=torch.from_numpy(_positions(tree, places, columns.places)),
        targets=None if columns.targets is None else torch.from_numpy(columns.targets),
        index=torch.from_numpy(columns.index),
        input_text=[] if tokenizer is None else [tokenizer.decode(each) for each in ids],
        cu_seqlens_k=cu_seqlens_k,
        kv_index=kv_index,
        max_segment_len=int((ends - starts).max()),
        segment=torch.tensor(tree.ends_in),
        targets_each=None if columns.places is None else torch.tensor([len(each) for each in columns.places]),
    )


def _plain(seq_lens: list[int]) -> Tree:
    """The tree in which each example is a segment."""
    n = len(seq_lens)
    return Tree(list(range(n)), [0] * n, seq_lens, [-1] * n, list(range(n)))


def _positions(tree: Tree, starts: np.ndarray, places: list[np.ndarray] | None) -> np.ndarray:
    """int64 (m,): where the head reads in the row.

    Args:
        starts: (s + 1,), the position in the row of each segment, and the end.
        places: the positions in each example; None: its last one.
    """
    if places is None:
        return np.asarray(starts[np.array(tree.ends_in) + 1] - 1)
    positions = [np.zeros(0, dtype=np.int64)]
    for node, within in zip(tree.ends_in, places, strict=True):
        chain = [node]
        while tree.parent[chain[-1]] >= 0:
            chain.append(tree.parent[chain[-1]])
        segments = np.array(chain[::-1])
        begin = np.array(tree.start)[segments]
        holds = np.searchsorted(begin, within, side="right") - 1
        positions.append(starts[segments[holds]] + within - begin[holds])
    return np.concatenate(positions)


def _keys(tree: Tree, places: np.ndarray) -> tuple[Tensor, Tensor]:
    """`kv_index` and `cu_seqlens_k`: for each segment the positions of its ancestors' tokens, then of its own."""
    chains: list[list[int]] = []
    for node, parent in enumerate(tree.parent):
        chains.append([*(chains[parent] if parent >= 0 else []), node])
    nodes = np.fromiter((node for chain in chains for node in chain), dtype=np.int64)
    kv_index = _ranges(places[nodes], np.diff(places)[nodes])
    # a segment that ends at token n of its example has n keys
    boundaries = np.fromiter(accumulate(tree.end, initial=0), dtype=np.int32)
    return torch.from_numpy(kv_index), torch.from_numpy(boundaries)


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64: the numbers start, start + 1, ... of each range, end to end."""
    ends = np.cumsum(sizes)
    places = np.arange(ends[-1])
    places += np.repeat(starts - ends + sizes, sizes)
    return places
