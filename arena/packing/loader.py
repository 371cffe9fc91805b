"""The data loader: for each optimizer step, the list of its micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from arena.data.tokens import TokenStore
from arena.packing.batch import Item, PackedBatch, collate
from arena.packing.plan import PackPlan


class PackedLoader:
    """Iterates over the steps of a plan; iterating again starts again.

        for batch in loader:                # one optimizer step
            for micro_batch in batch:       # at most `plan.budget` tokens
                micro_batch["input_ids"], micro_batch["cu_seqlens"]

    Args:
        store: token ids.
        labels: float (n, 3) for the examples of the store, or None.
        plan: what to load; its example indices are indices into the store.
        tokenizer: decodes `input_text` for people who look at batches; None leaves it empty and costs nothing.
        rank: which of `plan.ranks` this process is.
        start: steps to leave out at the beginning, those an interrupted run has already done.
    """

    def __init__(
        self,
        store: TokenStore,
        labels: np.ndarray | None,
        plan: PackPlan,
        tokenizer: Any = None,
        *,
        rank: int = 0,
        start: int = 0,
    ) -> None:
        self.store, self.labels, self.plan = store, labels, plan
        self.tokenizer, self.rank, self.start = tokenizer, rank, start

    def __len__(self) -> int:
        """Steps that an iteration gives."""
        return max(0, self.plan.n_steps - self.start)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        for step in range(self.start, self.plan.n_steps):
            yield [self._collate(members) for members in self.plan.step(step, self.rank) if len(members)]

    def _collate(self, members: np.ndarray) -> PackedBatch:
        """The micro-batch of these examples."""
        items: list[Item] = []
        for index in members.tolist():
            item: Item = {"input_ids": self.store[index], "index": index}
            if self.labels is not None:
                item["label"] = self.labels[index]
            items.append(item)
        return collate(items, self.tokenizer)
