"""A look at one real micro-batch: its examples decoded, what was cut, its boundaries, and who attends to whom."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from arena.data.tokens import TokenStore
from arena.packing.batch import PackedBatch
from arena.packing.plan import PackPlan
from arena.progress import console

SHOWN = 20  # tokens decoded at either end of an example


def print_plan(plan: PackPlan) -> None:
    """Prints how well a training plan packs."""
    least, count = plan.least_micro_batches, plan.n_micro_batches
    console.print(
        f"plan: {plan.n_steps:,} steps, {count:,} micro-batches ({count / least:.4f} x the least possible {least:,}), "
        f"fill rate {plan.fill_rate:.1%}, fewest/most tokens in a step {plan.evenness.mean():.4f} on average, "
        f"{plan.evenness.min():.4f} at worst"
    )


def print_evaluation_plan(plan: PackPlan) -> None:
    """Prints how well a plan over a whole set packs."""
    least, count = plan.least_micro_batches, plan.n_micro_batches
    console.print(
        f"all rows in one order, as evaluation packs them: {count:,} micro-batches ({count / least:.4f} x the least "
        f"possible {least:,}), fill rate {plan.fill_rate:.1%}"
    )


def print_batch(batch: PackedBatch, store: TokenStore, tokenizer: Any, budget: int) -> None:
    """Prints a micro-batch, an example after the other."""
    total = int(batch.cu_seqlens[-1])
    longest = batch.max_seq_len * batch.batch_size
    console.print(
        f"micro-batch: {batch.batch_size} examples, {total:,} of {budget:,} tokens, fill rate {total / budget:.1%}; "
        f"padded to its longest example it would take {longest:,} ({total / longest:.1%} useful)"
    )
    console.print(f"cu_seqlens {batch.cu_seqlens.tolist()}")
    examples = [store[index] for index in batch.index.tolist()]
    shared = _common_prefix(examples)
    console.print(f"all begin with the same {shared:,} tokens: {_words(tokenizer, examples[0][:SHOWN])} ...")
    for at, (index, ids) in enumerate(zip(batch.index.tolist(), examples, strict=True)):
        start, end = batch.cu_seqlens[at : at + 2].tolist()
        cut = f"; {store.tokens_cut[index]:,} tokens cut" if store.tokens_cut[index] else ""
        dropped = f", {store.turns_dropped[index]} turns left out" if store.turns_dropped[index] else ""
        console.print(f"{_name(index, store.orders)}: {len(ids):,} tokens, {start:,} to {end:,}{cut}{dropped}")
        console.print(f"  begins ... {_words(tokenizer, ids[shared : shared + SHOWN])}")
        console.print(f"  ends   ... {_words(tokenizer, ids[-SHOWN:])}")


def draw_attention(batch: PackedBatch, window: int | None, path: Path) -> Path:
    """Draws which keys each query of a batch sees: one triangle an example, and the sliding window's band within it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Polygon

    ends = batch.cu_seqlens.tolist()
    figure, axes = pyplot.subplots(figsize=(7, 7), layout="constrained")
    for at, (start, end) in enumerate(pairwise(ends)):
        axes.add_patch(Polygon([(start, start), (start, end), (end, end)], color=f"C{at % 10}", alpha=0.35, lw=0))
        if window is not None and window < end - start:
            band = [(start, start), (start, start + window), (end - window, end), (end, end)]
            axes.add_patch(Polygon(band, color=f"C{at % 10}", alpha=0.6, lw=0))
    limits = (0, ends[-1])
    axes.set(xlim=limits, ylim=limits[::-1], xlabel="key", ylabel="query", aspect="equal")
    note = "" if window is None else f"; dark: the sliding window of {window:,}"
    axes.set_title(
        f"who sees whom: {batch.batch_size} examples in one row of {ends[-1]:,} tokens{note}", fontsize="medium"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _common_prefix(examples: list[np.ndarray]) -> int:
    """How many tokens at the beginning all examples share."""
    shortest = min(map(len, examples))
    same = np.all([each[:shortest] == examples[0][:shortest] for each in examples], axis=0)
    return int(shortest if same.all() else same.argmin())


def _name(index: int, orders: int) -> str:
    row, order = divmod(index, orders)
    return f"row {row}{' swapped' if order else ''}"


def _words(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids).replace("\n", "⏎"))
