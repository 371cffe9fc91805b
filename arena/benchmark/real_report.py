"""What the benchmark at real size found: JSON, and a Markdown page that reads as well while cells are missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from arena.benchmark.machine import slug
from arena.benchmark.matrix import SMALLER_ONE, Table, main_cells, rows_of
from arena.benchmark.parts import Result
from arena.benchmark.real_plot import draw
from arena.benchmark.report import markdown_table
from arena.files import atomic_write, write_json, write_text

Results = Mapping[str, Result]
Rows = list[list[str]]

HEADER = [
    "what", "logical tokens/s", "times", "unique tokens/s", "of the ceiling", "recomputing too", "peak GiB", "reserved",
    "fill", "waits for data", "seconds", "least to most", "backend, layers recomputed",
]  # fmt: skip
TECHNIQUES_HEADER = ["technique", "trainable", "peak GiB", "tokens/s", "log-loss", "seconds"]
NOT_YET = "not measured yet"
AIMED_AT = 8 * 10**9  # weights in the linear layers


def write_real(result: dict[str, Any], tables: list[Table], folder: Path, *, picture: bool = True) -> list[Path]:
    """Writes `bench-<device>-<size>.json`, `.md` and `.png` and gives the paths of those that are there."""
    name = f"bench-{slug(result['device'])}-{result['recipe']['name'].rpartition('-')[2]}"
    paths = [folder / f"{name}.{ending}" for ending in ("json", "md", "png")]
    write_json(paths[0], result)
    write_text(paths[1], as_page(result, tables, paths[2].name))
    if picture:
        with atomic_write(paths[2]) as draft:
            draw(tables, result, draft)
    return [path for path in paths if path.is_file()]


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
        _aim(
            "GiB at most for a full micro-batch, all recomputed", 20.0, _gib(_of(peak, "peak_allocated")), ".1f", True
        ),
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


def cell_rows(table: Table, cells: Results) -> Rows:
    """One row a cell; `times` is its logical tokens a second over the first one's."""
    found = rows_of(table, cells)
    first = _done(next(iter(found.values())))
    rows = []
    for name, each in found.items():
        done = _done(each)
        if done is None:
            rows.append([name, _why(each), *[""] * (len(HEADER) - 2)])
            continue
        rows.append([name, *_figures(done, None if first is None else first["logical_per_second"])])
    return rows


def technique_rows(table: Table, result: dict[str, Any]) -> Rows:
    """Speed and memory of each technique here, beside its log-loss on the demo task."""
    rows = []
    for name, each in rows_of(table, result["cells"]).items():
        loss = result["losses"].get(name.removesuffix(SMALLER_ONE), {}).get("log_loss")
        shown = "" if loss is None else f"{loss:.4f}"
        done = _done(each)
        if done is None:
            rows.append([name, "", "", _why(each), shown, ""])
            continue
        rows.append(
            [
                name, f"{done['trainable_parameters']:,}", _as_gib(done["peak_allocated"]),
                f"{done['logical_per_second']:,.0f}", shown, f"{done['median']:.2f}",
            ]
        )  # fmt: skip
    return rows


def _table(table: Table, result: dict[str, Any]) -> str:
    if table.title == "techniques":
        text = markdown_table(TECHNIQUES_HEADER, technique_rows(table, result))
        steps = next((f"{each['steps']}" for each in result["losses"].values() if "steps" in each), "equally many")
        return f"{text}\n\nLog-loss: of the demo's held-out rows after {steps} steps of the demo recipe, its tiny base."
    return markdown_table(HEADER, cell_rows(table, result["cells"]))


def _figures(each: Result, first: float | None) -> list[str]:
    rate = each["logical_per_second"]
    counted = ", ".join(f"{policy} {count}" for policy, count in (each["policies"] or {}).items())
    return [
        f"{rate:,.0f}",
        "" if first is None else f"{rate / first:.2f}",
        f"{each['unique_per_second']:,.0f}",
        _percent(each["share_of_ceiling"]),
        _percent(each["share_with_recomputed"]) if each["policies"] else "",
        _as_gib(each["peak_allocated"]),
        _as_gib(each["peak_reserved"]),
        f"{each['fill_rate']:.1%}" if each["cell"]["way"] == "ours" else f"{each['useful']:.0%} useful",
        f"{each['data_wait']:.2%}",
        f"{median(each['seconds']):.2f}",
        f"{each['least']:.2f} to {each['most']:.2f}",
        "; ".join(part for part in (each["backend"], counted) if part),
    ]


def _made(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    budget = result["recipe"]["packing"]["budget"]
    sizes = f"{result['rows']} rows a step with lengths like the competition's, budget {budget:,}"
    return (
        f"{result['device']}; {versions}. Made by `{result['command']}`, the last part at {result['date']}. "
        f"Random weights of the real architecture ({result['linear_weights'] / 1e9:.3g} billion in the linear layers); "
        f"{sizes}; median of {result['repeats']} steps or passes after one that is not counted."
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


def _gib(number: float | None) -> float | None:
    return None if number is None else number / 2**30


def _as_gib(number: float | None) -> str:
    return "" if number is None else f"{number / 2**30:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
