"""What a benchmark is made of: the model's size, the rows, the precision."""

from __future__ import annotations

from dataclasses import dataclass

VARIANTS = "abcde"
ONCE = "e"  # variants that are timed once: they take longest and are compared with least
WORKLOADS = ("autoj", "competition")
TASKS = {
    "train": "training step",
    "infer": "inference, one order",
    "both": "inference, both orders",
}
AUTOJ_MEAN, COMPETITION_MEAN = 887.0, 1250.0  # tokens of an example


@dataclass(frozen=True)
class Size:
    """A Gemma-2 whose layers spend most of their time in linear layers, as those of the large ones do.

    Every variant's time grows with the number of layers, so that more of them mean waiting more than other ratios. What
    they do change is the weight of the last layer, of which ours computes the last tokens only: a quarter here, a 42nd
    in Gemma-2-9B.
    """

    hidden: int = 512
    intermediate: int = 2048
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    window: int = 4096
    softcap: float = 50.0
    vocabulary: int = 8192


@dataclass(frozen=True)
class BenchSettings:
    """One benchmark.

    Attributes:
        rows: Auto-J conversations in a step, a multiple of `batch`; of the longer ones of the competition about as many
            tokens are taken.
        repeats: how often each variant is timed, in turn with the others.
        check_rows: conversations on which the variants must agree first, half of them from each workload.
        budget: tokens that a packed micro-batch may hold.
        batch: examples in a padded batch.
        longest: tokens at which examples are cut.
        dtype: of the frozen weights and of autocast, for all variants alike.
        variants: which of `VARIANTS`; times are compared with the first one.
        workloads: which of `WORKLOADS`.
        checkpointing: recompute activations in the backward, as one does for large models.
    """

    rows: int = 32
    repeats: int = 3
    check_rows: int = 2
    budget: int = 8192
    batch: int = 8
    longest: int = 4096
    dtype: str = "bfloat16"
    seed: int = 0
    variants: str = VARIANTS
    workloads: tuple[str, ...] = WORKLOADS
    checkpointing: bool = True
    size: Size = Size()

    def __post_init__(self) -> None:
        """Raises `ValueError` for a setting that cannot be measured."""
        if self.rows % self.batch or self.rows < 1:
            raise ValueError(f"rows ({self.rows}) must be a multiple of the padded batches' {self.batch} examples")
        if self.longest > self.budget:
            raise ValueError(f"a budget of {self.budget} tokens cannot hold an example of {self.longest}")
        if not self.variants or set(self.variants) - set(VARIANTS):
            raise ValueError(f"variants {self.variants!r}: name some of the letters {VARIANTS}")
        if not self.workloads or set(self.workloads) - set(WORKLOADS):
            raise ValueError(f"workloads {', '.join(self.workloads)!r}: name some of {', '.join(WORKLOADS)}")
        if self.repeats < 1 or self.check_rows < 2:
            raise ValueError("a benchmark needs a repeat and two rows to check at least")

    def rows_of(self, workload: str) -> int:
        """Conversations in a step of a workload, a multiple of `batch`."""
        if workload != "competition":
            return self.rows
        return max(self.batch, int(self.rows * AUTOJ_MEAN / COMPETITION_MEAN) // self.batch * self.batch)
