"""Which cells are measured at real size, and the tables they stand in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from arena.model.card import Kind
from benchmarks.cells import Cell, Fuse
from benchmarks.parts import Result
from benchmarks.techniques import TECHNIQUES

SLOW = 1  # repeats of what takes several times as long as the rest
PADDED = ("flash_attention_2", "flex_attention", "eager")  # transformers' own; its sdpa refuses Gemma-2's soft cap
BACKENDS = {"cuda": ("flash", "flex"), "cpu": ("flash", "flex", "blockwise")}
LIKE = {"flash": "flash_attention_2", "flex": "flex_attention"}  # transformers' attention of the same kernels
RISKY = ("elementwise", "none")  # keep so much that 80 GB may not hold it; after that the model has to be made again
SMALLER = {"google/gemma-2-9b-it": "google/gemma-2-2b-it", "google/gemma-2-9b": "google/gemma-2-2b"}

SMALLER_ONE = " (2B)"  # is added to the name of what is measured on that one


@dataclass(frozen=True)
class Table:
    """Cells that are compared, by what each is called there; the first one is what the others are compared with."""

    title: str
    cells: dict[str, Cell]


def main_cells(best: str) -> dict[str, Cell]:
    """The cells that the aims are about, the most wanted first, but inference before another model has to be made.

    Args:
        best: the attention backend that `auto` takes on this machine.
    """
    train = Cell("train", attention=best)
    padded = Cell("train", "padded", LIKE.get(best, "eager"), "full", fuse="none", repeats=2)
    return {
        "train": train,
        "padded train": padded,
        "padded infer": replace(padded, task="infer"),
        "infer": replace(train, task="infer"),
        "peak": replace(train, task="peak", checkpointing="full"),
    }


def tables(best: str, base: str, kind: Kind) -> list[Table]:
    """All tables; a cell may stand in several.

    Args:
        base: the recipe's.
        kind: of the device.
    """
    main = main_cells(best)
    train, infer, whole = main["train"], main["infer"], replace(main["train"], checkpointing="full")
    return [
        Table("training", {"ours": train, **padded("train")}),
        Table("inference, one order", {"ours": infer, **padded("infer")}),
        Table("memory of one full micro-batch", {"whole layers recomputed": main["peak"]}),
        Table("training, by attention backend", backends(train, kind)),
        Table(
            "training, by what is recomputed",
            {
                each: replace(train, checkpointing=each)
                for each in ("auto", "full", "elementwise_and_mlp", "elementwise", "none")
            },
        ),
        Table(
            "training, what is shared",
            {
                "common beginnings shared": train,
                "nothing shared": replace(train, share=False),
                "both orders, shared": replace(train, orders=2),
            },
        ),
        Table("inference, by attention backend", backends(infer, kind)),
        Table(
            "inference, what is shared",
            {
                "one order, shared": infer,
                "one order, nothing shared": replace(infer, share=False),
                "both orders, shared": replace(infer, orders=2),
                "both orders, nothing shared": replace(infer, orders=2, share=False),
            },
        ),
        Table("training with whole layers recomputed, fused parts", fused(whole)),
        Table("techniques", techniques(train, base)),
    ]


def padded(task: Literal["train", "infer"]) -> dict[str, Cell]:
    """transformers' padded batches with each attention that it may be able to use, and in training, as memory may
    allow, without recomputing: ours recomputes what it must, so that padded batches may do the same."""
    own = Cell(task, "padded", checkpointing="full", fuse="none", repeats=2)
    cells = {f"transformers, padded, {name}": replace(own, attention=name) for name in PADDED}
    if task == "infer":
        return cells
    whole = {f"{name}, whole layers recomputed": cell for name, cell in cells.items()}
    return whole | {f"{name}, nothing recomputed": replace(cell, checkpointing="none") for name, cell in cells.items()}


def backends(cell: Cell, kind: Kind) -> dict[str, Cell]:
    """A cell with each of our backends that is meant for such a device, one that is many times slower only once."""
    return {
        name: replace(cell, attention=name, repeats=SLOW if name == "blockwise" else None) for name in BACKENDS[kind]
    }


def fused(cell: Cell) -> dict[str, Cell]:
    """A cell with each part fused alone, all that pay, and none."""
    return {f"fuse={each}": replace(cell, fuse=each) for each in get_args(Fuse)}


def techniques(cell: Cell, base: str) -> dict[str, Cell]:
    """A training cell with each way of fine-tuning; all weights of a 9B do not fit, so a 2B stands for that."""
    smaller, cells = SMALLER.get(base), {}
    for name, each in TECHNIQUES.items():
        changed = replace(cell, tune=each.tune, quantization=each.quantization, dora=each.dora)
        whole = each.tune == "full" and smaller is not None
        cells[name + SMALLER_ONE * whole] = replace(changed, base=smaller) if whole else changed
    return cells


def in_order(found: list[Table], best: str) -> dict[str, Cell]:
    """Every cell once, by its key, in the order of their worth.

    First the main cells; then flex, where that is not the best; then the rest, those that can share a model one after
    another; last what may run out of memory.
    """
    cells: dict[str, Cell] = {cell.key: cell for cell in main_cells(best).values()}
    for table in found:
        for cell in table.cells.values():
            cells.setdefault(cell.key, cell)
    models = list(dict.fromkeys(cell.model_key for cell in cells.values()))
    main = set(main_cells(best).values())

    def rank(cell: Cell) -> tuple[int, int]:
        if cell in main:
            return 0, 0  # in the order given
        risky = cell.task == "train" and cell.checkpointing in RISKY
        turn = 3 if risky else 1 if cell.attention == "flex" else 2
        return turn, models.index(cell.model_key)

    return {cell.key: cell for cell in sorted(cells.values(), key=rank)}


def rows_of(table: Table, results: Mapping[str, Result]) -> dict[str, Result | None]:
    """What was measured of a table, by what each row is called; None where a cell has not been measured yet."""
    return {name: results.get(cell.key) for name, cell in table.cells.items()}
