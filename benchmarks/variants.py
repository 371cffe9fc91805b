"""What is compared at the small size: the ways to read the same examples, and the rows they read."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cells import Cell

BATCH = 8  # examples in a padded batch
_OURS = Cell(checkpointing="full")
_PADDED = replace(_OURS, way="padded", attention="eager", fuse="none", share=False, batch=BATCH)
VARIANTS: dict[str, tuple[str, Cell]] = {
    "a": ("ours: packed, shared prefixes", _OURS),
    "b": ("ours: packed, nothing shared", replace(_OURS, share=False)),
    "c": ("transformers: padded, given order", _PADDED),
    "d": ("transformers: padded, sorted by length", replace(_PADDED, way="sorted")),
    "e": ("transformers: packed by position_ids", replace(_PADDED, way="restarted")),
}
ONCE = "e"  # variants that are timed once: they take longest and are compared with least
TASKS = {
    "train": "training step",
    "infer": "inference, one order",
    "both": "inference, both orders",
}


def cells_of(keys: str, task: str) -> dict[str, Cell]:
    """The cells of some variants; both orders are read by ours alone, for others that takes twice as long as one."""
    cells = {key: VARIANTS[key][1] for key in keys}
    if task == "train":
        return cells
    if task == "infer":
        return {key: replace(cell, task="infer") for key, cell in cells.items()}
    return {key: replace(cell, task="infer", orders=2) for key, cell in cells.items() if cell.way == "ours"}
