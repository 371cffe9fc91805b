"""What the benchmark at real size found: JSON, and a Markdown page that reads as well while cells are missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arena.storage.files import write_json, write_text
from benchmarks.machine import made_by, slug
from benchmarks.matrix import SMALLER_ONE, Table, main_cells, rows_of
from benchmarks.parts import Result
from benchmarks.tables import Bars, Rows, draw, gib, markdown_table
from benchmarks.tables import table as as_table

Results = Mapping[str, Result]

COLUMNS = {
    "what": "{name}", "logical tokens/s": "{logical_per_second:,.0f}", "times": "{times:.2f}",
    "unique tokens/s": "{unique_per_second:,.0f}", "of the ceiling": "{share_of_ceiling:.1%}",
    "recomputing too": "{share_with_recomputed:.1%}", "peak GiB": "{peak:.2f}", "reserved": "{reserved:.2f}",
    "fill": "{fill}", "waits for data": "{data_wait:.2%}", "seconds": "{median:.2f}",
    "least to most": "{least:.2f} to {most:.2f}", "backend, layers recomputed": "{how}",
}  # fmt: skip
TECHNIQUES = {
    "technique": "{name}", "trainable": "{trainable_parameters:,}", "peak GiB": "{peak:.2f}",
    "tokens/s": "{logical_per_second:,.0f}", "log-loss": "{log_loss:.4f}", "seconds": "{median:.2f}",
}  # fmt: skip
NOT_YET = "not measured yet"
AIMED_AT = 8 * 10**9  # weights in the linear layers


def write_real(result: dict[str, Any], tables: list[Table], folder: Path, *, picture: bool = True) -> list[Path]:
    """Writes `bench-<device>-<size>.json`, `.md` and `.png` and gives the paths of those that are there."""
    name = f"bench-{slug(result['device'])}-{result['recipe']['name'].rpartition('-')[2]}"
    paths = [folder / f"{name}.{ending}" for ending in ("json", "md", "png")]
    write_json(paths[0], result)
    write_text(paths[1], as_page(result, tables, paths[2].name))
    panels = [bars(table, result["cells"]) for table in tables if len(table.cells) > 1]
    panels = [panel for panel in panels if panel.names]
    if picture and panels:
        draw(
            panels, 2, paths[2],
            title=f"{result['recipe']['name']}, {result['device']}, {result['date'][:10]}",
            below="logical tokens a second",
        )  # fmt: skip
    return [path for path in paths if path.is_file()]


def bars(table: Table, cells: Results) -> Bars:
    """Logical tokens a second of the cells that were measured, with the peak memory written beside them."""
    rows = rows_of(table, cells)
    measured = {name: done for name in table.cells if (done := _done(rows[name]))}
    texts = []
    for done in measured.values():
        peak = "" if done["peak_allocated"] is None else f", {done['peak_allocated'] / 2**30:.1f} GiB"
        texts.append(f"{done['logical_per_second']:,.0f}{peak}")
    colours = ["0.6" if table.cells[name].way == "padded" else "C0" for name in measured]
    return Bars(table.title, list(measured), [done["logical_per_second"] for done in measured.values()], texts, colours)


def with_shares(cell: Result, ceiling: Result | None) -> Result:
    """A measured cell with how much of what the machine can multiply it makes use of, recomputation counted apart."""
    if cell["status"] != "done":
        return cell
    per_second = cell["unique_per_second"] / 1e12
    needed, again = cell["flops_a_token"], cell["flops_recomputed_a_token"]
    most = None if ceiling is None or ceiling["status"] != "done" else ceiling["tflops"]
    return {
        **cell, "tflops": needed * per_second,
        "share_of_ceiling": None if most is None else needed * per_second / most,
        "share_with_recomputed": None if most is None else (needed + again) * per_second / most,
    }  # fmt: skip


def as_page(result: dict[str, Any], tables: list[Table], picture: str) -> str:
    """The Markdown page that shows `picture`."""
    parts = [
        f"# {result['recipe']['name']} on {result['device']}, {result['date'][:10]}",
        _made(result),
        _ceiling(result.get("ceiling")),
        f"![tokens a second]({picture})",
        *_aims(result),
        _legend(result),
    ]
    for table in tables:
        parts += [f"## {table.title.capitalize()}", _table(table, result)]
    parts += _tests(result.get("tests") or {})
    return "\n\n".join(part for part in parts if part) + "\n"


def aim_rows(result: dict[str, Any]) -> Rows:
    """What was hoped for of a 9B on one H100, and what was measured here; empty where it was not."""
    cells: Results = result["cells"]
    main = {name: _done(cells.get(cell.key)) for name, cell in main_cells(result["best_backend"]).items()}
    train, infer, peak = main["train"], main["infer"], main["peak"]
    return [
        _aim("training, logical tokens/s", 15_000, _of(train, "logical_per_second"), ",.0f"),
        _aim("training, share of the ceiling, nothing counted twice", 0.5, _of(train, "share_of_ceiling"), ".1%"),
        _aim("training, times the padded way", 5.0, over_padded(cells, train, "train"), ".1f"),
        _aim("inference, logical tokens/s", 35_000, _of(infer, "logical_per_second"), ",.0f"),
        _aim("inference, times the padded way", 3.0, over_padded(cells, infer, "infer"), ".1f"),
        _aim("GiB at most for a full micro-batch, all recomputed", 20.0, gib(_of(peak, "peak_allocated")), ".1f", True),
        _aim("share of training that waits for data, at most", 0.01, _of(train, "data_wait"), ".2%", True),
    ]


def over_padded(cells: Results, ours: Result | None, task: str) -> float | None:
    """Our logical tokens a second over those of the fastest padded way that ran; None where either is missing."""
    rates = [
        each["logical_per_second"]
        for each in cells.values()
        if _done(each) and each["cell"]["way"] == "padded" and each["cell"]["task"] == task
    ]
    return None if ours is None or not rates else float(ours["logical_per_second"] / max(rates))


def shown(table: Table, result: dict[str, Any]) -> list[dict[str, Any]]:
    """What a table shows of each cell; `times` is its logical tokens a second over the first one's."""
    found = rows_of(table, result["cells"])
    first = _done(next(iter(found.values())))
    rows: list[dict[str, Any]] = []
    for name, each in found.items():
        loss = result["losses"].get(name.removesuffix(SMALLER_ONE), {}).get("log_loss")
        if _done(each) is None or each is None:
            rows.append({"name": name, "why": _why(each), "log_loss": loss})
            continue
        layers = ", ".join(f"{policy} {count}" for policy, count in (each["policies"] or {}).items())
        rows.append(
            {
                **each, "name": name, "peak": gib(each["peak_allocated"]), "reserved": gib(each["peak_reserved"]),
                "times": None if first is None else each["logical_per_second"] / first["logical_per_second"],
                "share_with_recomputed": each["share_with_recomputed"] if each["policies"] else None,
                "fill": f"{each['fill_rate']:.1%}" if each["cell"]["way"] == "ours" else f"{each['useful']:.0%} useful",
                "how": "; ".join(part for part in (each["backend"], layers) if part),
                "log_loss": loss,
            }
        )  # fmt: skip
    return rows


def _table(table: Table, result: dict[str, Any]) -> str:
    if table.title != "techniques":
        return as_table(COLUMNS, shown(table, result))
    steps = next((f"{each['steps']}" for each in result["losses"].values() if "steps" in each), "equally many")
    return (
        f"{as_table(TECHNIQUES, shown(table, result))}\n\nLog-loss: of the demo's held-out rows after {steps} steps of "
        "the demo recipe, its tiny base."
    )


def _made(result: dict[str, Any]) -> str:
    budget, weights = result["recipe"]["packing"]["budget"], result["linear_weights"] / 1e9
    return (
        f"{made_by(result['device'], result)} Random weights of the real architecture ({weights:.3g} billion in the "
        f"linear layers); {result['rows']} rows a step with lengths like the competition's, budget {budget:,}; median "
        f"of {result['repeats']} steps or passes after one that is not counted."
    )


def _ceiling(ceiling: Result | None) -> str:
    if ceiling is None or ceiling["status"] != "done":
        return "The ceiling of matrix products has not been measured yet."
    shapes = "; ".join(f"{each['inputs']} x {each['outputs']}: {each['tflops']:.4g}" for each in ceiling["products"])
    return (
        f"**Ceiling: {ceiling['tflops']:.4g} TFLOP/s**, {ceiling['dtype']} products of {ceiling['tokens']:,} tokens "
        f"with weights of the model's shapes, sustained for {ceiling['seconds']:.1f} s. Short bursts, which flatter, "
        f"have {ceiling['burst_tflops']:.4g}; by shape {shapes}."
    )


def _legend(result: dict[str, Any]) -> str:
    return (
        "`of the ceiling` counts 4 operations a weight and unique token in training with frozen weights (6 where all "
        "weights learn, 2 for the head alone), 2 in inference, and `recomputing too` what is computed again; attention "
        "and the last layer, which ours computes for last tokens only, are not told apart. `peak GiB` holds the model "
        "and the optimizer's state. `waits for data` is the time in which the loop has no batch. Padded batches hold 4 "
        f"examples in the given order, {result['padded_rows']} of the rows: rates are per logical token, and each row "
        "says whether layers are recomputed. "
        "`times` compares with the first row of a table."
    )


def _aims(result: dict[str, Any]) -> list[str]:
    """The aims, where the model is as large as that which they are of."""
    if result["linear_weights"] < AIMED_AT:
        return []
    table = markdown_table(["of Gemma-2-9B on one H100", "wanted", "measured", ""], aim_rows(result))
    return ["## What was to be seen", table]


def _tests(tests: dict[str, Any]) -> list[str]:
    rows = [[name, each["closing"], each.get("reason", "")] for name, each in tests.items()]
    return ["## Tests marked `gpu`", markdown_table(["tests of", "outcomes", "failed"], rows)] if rows else []


def _aim(name: str, wanted: float, found: float | None, form: str, at_most: bool = False) -> list[str]:
    if found is None:
        return [name, f"{wanted:{form}}", "", NOT_YET]
    met = found <= wanted if at_most else found >= wanted
    return [name, f"{wanted:{form}}", f"{found:{form}}", "met" if met else "missed"]


def _done(each: Any) -> Result | None:
    return each if each is not None and each["status"] == "done" else None


def _why(each: Any) -> str:
    return NOT_YET if each is None else f"{each['status']}: {each['reason'].replace('|', '/')[:200]}"


def _of(each: Result | None, name: str) -> float | None:
    return None if each is None or each[name] is None else float(each[name])
