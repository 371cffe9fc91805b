"""A look at one real micro-batch: its examples decoded, what was cut, its boundaries, and who attends to whom."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from arena.data.tokens import TokenStore
from arena.packing.batch import PackedBatch
from arena.progress import console

SHOWN = 12  # tokens decoded at either end of an example


def print_batch(batch: PackedBatch, store: TokenStore, tokenizer: Any, budget: int) -> None:
    """Prints a micro-batch, an example a line."""
    total = int(batch.cu_seqlens[-1])
    longest = batch.max_seq_len * batch.batch_size
    console.print(
        f"one micro-batch: {batch.batch_size} examples, {total:,} of {budget:,} tokens, "
        f"fill rate {total / budget:.1%}; padded to its longest example it would take {longest:,} ({total / longest:.1%} useful)"
    )
    console.print(f"cu_seqlens {batch.cu_seqlens.tolist()}")
    table = Table(show_lines=False)
    for name in ("example", "tokens", "at", "cut", "turns left out", "begins", "ends"):
        table.add_column(name, justify="left" if name in ("begins", "ends") else "right")
    for at, index in enumerate(batch.index.tolist()):
        ids = store[index]
        start = int(batch.cu_seqlens[at])
        table.add_row(
            _name(index, store.orders), f"{len(ids):,}", f"{start:,}", f"{store.tokens_cut[index]:,}",
            str(store.turns_dropped[index]), _words(tokenizer, ids[:SHOWN]), _words(tokenizer, ids[-SHOWN:]),
        )  # fmt: skip
    console.print(table)


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


def _name(index: int, orders: int) -> str:
    row, order = divmod(index, orders)
    return f"row {row}{' swapped' if order else ''}"


def _words(tokenizer: Any, ids: Any) -> str:
    return escape(tokenizer.decode(ids).replace("\n", "⏎"))
