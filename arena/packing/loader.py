"""The data loader: yields for each optimizer step the list of its micro-batches; `background.ahead` prefetches them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from arena.data.tokens import TokenStore
from arena.packing.batch import PackedBatch, lay_out
from arena.packing.examples import Columns, token_targets
from arena.packing.plan import PackPlan


class PackedLoader:
    """Iterates over the steps of a plan, from the start each time.

        for batch in loader:                # one optimizer step
            for micro_batch in batch:       # at most `plan.budget` tokens
                micro_batch["input_ids"], micro_batch["cu_seqlens_q"], micro_batch["label"]

    Args:
        store: token ids. If it has places, the targets are the tokens that follow them.
        targets: float32 (n, C) for the n examples of the store, such as `FoldData.targets`; None gives batches without
            `label`, for inference and for targets that are tokens.
        plan: what to load; its example indices are indices into the store.
        tokenizer: decodes `input_text` for inspection; None leaves it empty and takes no time.
        rank: the rank of this process among `plan.ranks`.
        start: steps to skip at the beginning, which an interrupted run has already done.
        pin: put batches into page-locked memory, from which a GPU copies asynchronously.

    Raises:
        ValueError: the numbers of targets and examples differ, as with rows' labels for a store with both orders.
    """

    def __init__(
        self,
        store: TokenStore,
        targets: np.ndarray | None,
        plan: PackPlan,
        tokenizer: Any = None,
        *,
        rank: int = 0,
        start: int = 0,
        pin: bool = False,
    ) -> None:
        if targets is not None and len(targets) != len(store):
            raise ValueError(
                f"there are {len(targets):,} targets, but the store has {len(store):,} examples: pass data.targets"
            )
        if targets is not None and targets.ndim != 2:
            raise ValueError(f"targets have the shape {targets.shape}: give a row of probabilities for each example")
        self.store, self.plan = store, plan
        self.targets = None if targets is None else targets.astype(np.float32, copy=False)
        self.tokenizer, self.rank, self.start, self.pin = tokenizer, rank, start, pin

    def __len__(self) -> int:
        """The number of steps that an iteration yields."""
        return max(0, self.plan.n_steps - self.start)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        for step in range(self.start, self.plan.n_steps):
            yield list(self._step(step))

    def micro_batches(self) -> Iterator[PackedBatch]:
        """The micro-batches of all steps, one by one: for evaluation, whose single step is the whole set."""
        for step in range(self.start, self.plan.n_steps):
            yield from self._step(step)

    def _step(self, step: int) -> Iterator[PackedBatch]:
        every = self.plan.of_step(step, self.rank)
        return (self.micro_batch(index) for index in every if len(self.plan.micro_batch(index)))

    def micro_batch(self, index: int) -> PackedBatch:
        """One micro-batch of the plan, by its index."""
        columns = self._columns(self.plan.micro_batch(index))
        batch = lay_out(columns, self.tokenizer, self.plan.tree(index, self.store.lengths))
        return batch.pin_memory() if self.pin else batch

    def _columns(self, members: np.ndarray) -> Columns:
        ids = self.store.ids.take(members)
        if self.store.places is not None:
            return token_targets(ids, members, self.store.places.take(members))
        return Columns(ids, members, None if self.targets is None else self.targets[members])
