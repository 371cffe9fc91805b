"""Shows one real micro-batch: its decoded examples, truncation, boundaries, and attention pattern."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arena.data.prepare import prepare_fold
from arena.data.tokens import TokenStore
from arena.distributed import peak_memory
from arena.model.backbone import load_tokenizer, sliding_window
from arena.packing.batch import PackedBatch
from arena.packing.loader import PackedLoader
from arena.packing.plan import PackPlan, plan_evaluation
from arena.packing.tree import prefixes_for
from arena.progress import console
from arena.reporting.report import new_figure
from arena.settings import Recipe
from arena.tasks import task_of
from arena.training.batches import plan_fold

SHOWN = 20  # tokens decoded at either end of a segment


def inspect_fold(recipe: Recipe, fold: int, step: int, out: Path) -> None:
    """Prints the plan of a fold and the first micro-batch of an optimizer step, and draws it into the file `out`.

    Raises:
        ValueError: the plan has no such step.
    """
    tokenizer = load_tokenizer(recipe.model.base, recipe.model.revision)
    data = prepare_fold(recipe, task_of(recipe), fold, tokenizer)
    prefixes = prefixes_for(data.store, recipe.packing, Path(recipe.data.cache))
    plan = plan_fold(recipe, data, prefixes=prefixes)
    if not 0 <= step < plan.n_steps:
        raise ValueError(f"there is no step {step}: the plan has steps 0 to {plan.n_steps - 1}")
    print_plan(plan)
    first_orders = np.arange(0, len(data.store), data.store.orders)
    print_evaluation_plan(plan_evaluation(data.store.lengths, first_orders, budget=plan.budget, prefixes=prefixes))
    batch = next(iter(PackedLoader(data.store, None, plan, start=step)))[0]
    print_batch(batch, data.store, tokenizer, plan.budget)
    picture = draw_attention(batch, sliding_window(recipe.model), out)
    console.print(f"written: {picture}; peak memory {peak_memory(torch.device('cpu')) / 2**30:.2f} GiB")


def print_plan(plan: PackPlan) -> None:
    """Prints the packing quality of a training plan."""
    console.print(
        f"plan: {plan.n_steps:,} steps, {_packing(plan)}, fewest/most tokens in a step {plan.evenness.mean():.4f} on "
        f"average, {plan.evenness.min():.4f} at worst"
    )


def print_evaluation_plan(plan: PackPlan) -> None:
    """Prints the packing quality of a plan over a whole set."""
    console.print(f"all rows in one order, as evaluation packs them: {_packing(plan)}")


def _packing(plan: PackPlan) -> str:
    least, count = plan.least_micro_batches, plan.n_micro_batches
    return (
        f"{count:,} micro-batches ({count / least:.4f} x the least possible {least:,}), fill rate "
        f"{plan.fill_rate:.1%}, {plan.tokens.sum():,} of {plan.logical_tokens.sum():,} tokens computed "
        f"(unique/logical {plan.unique_share:.3f})"
    )


def print_batch(batch: PackedBatch, store: TokenStore, tokenizer: Any, budget: int) -> None:
    """Prints a micro-batch: its shared segments, then its examples one after another."""
    total, logical = batch.tokens, sum(batch.seq_lens)
    longest = batch.max_seq_len * batch.batch_size
    console.print(
        f"micro-batch: {batch.batch_size} examples of {logical:,} tokens as {len(batch.cu_seqlens_q) - 1} segments of "
        f"{total:,}; budget {budget:,}, fill rate {total / budget:.1%}; padded to the longest example it would take "
        f"{longest:,} ({logical / longest:.1%} useful)"
    )
    console.print(f"cu_seqlens_q {batch.cu_seqlens_q.tolist()}")
    ends_in = batch.segment.tolist()
    for at, (start, end) in enumerate(_segments(batch)):
        place = batch.position_ids[0, start]
        if at not in ends_in:
            ids = batch.input_ids[0, start:end]
            console.print(f"segment {at}, shared: {end - start:,} tokens from {place} on: {_ends(tokenizer, ids)}")
    for at, index in enumerate(batch.index.tolist()):
        start, end = _segments(batch)[ends_in[at]]
        cut = f"; {store.tokens_cut[index]:,} tokens cut" if store.tokens_cut[index] else ""
        dropped = f", {store.turns_dropped[index]} turns omitted" if store.turns_dropped[index] else ""
        console.print(
            f"{_name(index, store.orders)}: {batch.seq_lens[at]:,} tokens, the last {end - start:,} of them in segment "
            f"{ends_in[at]}{cut}{dropped}"
        )
        console.print(f"  {_ends(tokenizer, batch.input_ids[0, start:end])}")


def picture_endings() -> list[str]:
    """The file name endings that `draw_attention` can write, such as `.png`."""
    figure, _ = new_figure()
    return [f".{ending}" for ending in sorted(figure.canvas.get_supported_filetypes())]


def draw_attention(batch: PackedBatch, window: int | None, path: Path) -> Path:
    """Draws which keys the queries of each segment see: a triangle for its own, and blocks for shared segments.

    The darker band is what a sliding-window layer sees.
    """
    figure, axes = new_figure(figsize=(7, 7))
    for at, (start, end) in enumerate(_segments(batch)):
        keys = _keys(batch, at)
        for first in np.split(keys, np.flatnonzero(np.diff(keys) != 1) + 1):
            _draw_block(axes, (start, end), int(batch.position_ids[0, start]), batch, first, window, f"C{at % 10}")
    limits = (0, batch.tokens)
    axes.set(xlim=limits, ylim=limits[::-1], xlabel="key", ylabel="query", aspect="equal")
    note = "" if window is None else f"; dark: the sliding window of {window:,}"
    axes.set_title(
        f"visible keys: {batch.batch_size} examples in a row of {limits[1]:,} tokens{note}", fontsize="medium"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _draw_block(
    axes: Any,
    queries: tuple[int, int],
    place: int,
    batch: PackedBatch,
    keys: np.ndarray,
    window: int | None,
    colour: str,
) -> None:
    """Draws what a segment's queries, the first of which is token `place` of its example, see of contiguous keys."""
    from matplotlib.patches import PathPatch, Polygon
    from matplotlib.path import Path as Outline

    start, end = queries
    left, right = int(keys[0]), int(keys[-1]) + 1
    corners = [(left, start), (right, start), (right, end), (left, end)]
    if left >= start:  # the segment's own tokens: causal
        corners = [(start, start), (start, end), (end, end)]
    axes.add_patch(Polygon(corners, color=colour, alpha=0.35, lw=0))
    if window is None:
        return
    # a query at position p sees keys from position p - window on
    shift = left - int(batch.position_ids[0, left]) - (start - place) - window
    band = [(start + shift, start), (end + shift, end), (end + shift + window, end), (start + shift + window, start)]
    clip = PathPatch(Outline([*corners, corners[0]]), transform=axes.transData)
    axes.add_patch(Polygon(band, color=colour, alpha=0.45, lw=0, clip_path=clip))


def _segments(batch: PackedBatch) -> list[tuple[int, int]]:
    return list(pairwise(batch.cu_seqlens_q.tolist()))


def _keys(batch: PackedBatch, segment: int) -> np.ndarray:
    """The positions in the row of the keys that a segment sees."""
    first, last = batch.cu_seqlens_k[segment : segment + 2].tolist()
    return np.arange(first, last) if batch.kv_index is None else batch.kv_index[first:last].numpy()


def _ends(tokenizer: Any, ids: Any) -> str:
    """The beginning and the end of a text."""
    if len(ids) <= 2 * SHOWN:
        return _words(tokenizer, ids)
    return f"{_words(tokenizer, ids[:SHOWN])} ... {_words(tokenizer, ids[-SHOWN:])}"


def _name(index: int, orders: int) -> str:
    row, order = divmod(index, orders)
    return f"row {row}{' swapped' if order else ''}"


def _words(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids).replace("\n", "⏎"))
