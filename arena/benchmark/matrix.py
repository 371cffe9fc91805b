"""Which cells are measured at real size, and the tables they stand in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

from arena.benchmark.cells import Cell, Fuse
from arena.benchmark.parts import Result

SLOW = 1  # repeats of what takes several times as long as the rest
PADDED = ("flash_attention_2", "flex_attention", "eager")  # transformers' own; its sdpa refuses Gemma-2's soft cap
BACKENDS = {"flash": None, "flex": None, "blockwise": SLOW}
SMALLER = {"google/gemma-2-9b-it": "google/gemma-2-2b-it", "google/gemma-2-9b": "google/gemma-2-2b"}

SMALLER_ONE = " (2B)"  # is added to the name of what is measured on that one


@dataclass(frozen=True)
class Table:
    """Cells that are compared, by what each is called there; the first one is what the others are compared with."""

    title: str
    cells: dict[str, Cell]


def main_cells(best: str) -> dict[str, Cell]:
    """The cells that the aims are about.

    Args:
        best: the attention backend that `auto` takes on this machine.
    """
    train = Cell("train", attention=best)
    return {
        "train": train,
        "infer": replace(train, task="infer"),
        "peak": replace(train, task="peak", checkpointing="full"),
    }


def tables(best: str, base: str) -> list[Table]:
    """All tables, the most wanted first; a cell may stand in several.

    Args:
        base: the recipe's.
    """
    main = main_cells(best)
    train, infer, whole = main["train"], main["infer"], replace(main["train"], checkpointing="full")
    return [
        Table("training", {"ours": train, **padded("train")}),
        Table("inference, one order", {"ours": infer, **padded("infer")}),
        Table("memory of one full micro-batch", {"whole layers recomputed": main["peak"]}),
        Table("training, by attention backend", backends(train)),
        Table(
            "training, by what is recomputed",
            {each: replace(train, checkpointing=each) for each in ("auto", "full", "mlp", "light", "none")},
        ),
        Table(
            "training, what is shared",
            {
                "common beginnings shared": train,
                "nothing shared": replace(train, share=False),
                "both orders, shared": replace(train, orders=2),
            },
        ),
        Table("inference, by attention backend", backends(infer)),
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


def padded(task: str) -> dict[str, Cell]:
    """transformers' padded batches with each attention that it may be able to use."""
    own = Cell("train", "padded", checkpointing="full", fuse="none", repeats=2)
    if task == "infer":
        own = replace(own, task="infer")
    return {f"transformers, padded, {name}": replace(own, attention=name) for name in PADDED}


def backends(cell: Cell) -> dict[str, Cell]:
    """A cell with each of our backends."""
    return {name: replace(cell, attention=name, repeats=repeats) for name, repeats in BACKENDS.items()}


def fused(cell: Cell) -> dict[str, Cell]:
    """A cell with each part fused alone, all that pay, and none."""
    return {f"fuse={each}": replace(cell, fuse=each) for each in get_args(Fuse)}


def techniques(cell: Cell, base: str) -> dict[str, Cell]:
    """A training cell with each way of fine-tuning; all weights of a 9B do not fit, so a 2B stands for that."""
    smaller = SMALLER.get(base)
    size = SMALLER_ONE if smaller else ""
    return {
        "QLoRA, NF4": cell,
        "LoRA, unquantised": replace(cell, quantization="none"),
        "LoRA, int8": replace(cell, quantization="int8"),
        "DoRA, NF4": replace(cell, dora=True),
        "head only, NF4": replace(cell, tune="head"),
        f"full fine-tuning{size}": replace(cell, tune="full", quantization="none", base=smaller),
    }


def in_order(found: list[Table]) -> dict[str, Cell]:
    """Every cell once, by its key; those that can share a model come one after another."""
    cells: dict[str, Cell] = {}
    for table in found:
        for cell in table.cells.values():
            cells.setdefault(cell.key, cell)
    models = list(dict.fromkeys(cell.model_key for cell in cells.values()))
    ordered = sorted(cells.values(), key=lambda cell: models.index(cell.model_key))
    return {cell.key: cell for cell in ordered}


def rows_of(table: Table, results: Mapping[str, Result]) -> dict[str, Result | None]:
    """What was measured of a table, by what each row is called; None where a cell has not been measured yet."""
    return {name: results.get(cell.key) for name, cell in table.cells.items()}
