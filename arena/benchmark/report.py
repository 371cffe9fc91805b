"""What a benchmark found, for people: tables on the terminal, JSON, Markdown and a picture in a folder."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from arena.benchmark.settings import TASKS
from arena.files import atomic_write, write_json, write_text
from arena.progress import console
from arena.reporting.figure import new_figure

Rows = list[list[str]]

HEADER = ["", "variant", "seconds", "least to most", "times", "tokens/s", "computed", "useful", "batches", "peak GiB"]
PRINTED = (0, 2, 3, 4, 5, 6, 7, 9)  # the columns that a terminal has room for
WHOLE_HEADER = ["whole set", "micro-batches", "over the least", "fill"]
STEPS_HEADER = ["within steps", "micro-batches", "over the least", "fewest/most tokens", "at worst"]
COLOURS = {"a": "C2", "b": "C0", "c": "0.55", "d": "0.7", "e": "C1"}


def print_bench(result: dict[str, Any]) -> None:
    """Prints a table for each workload and task, then the packing tables."""
    panels = _panels(result)
    for each in next(iter(panels.values())):
        console.print(f"{each['variant']}: {each['title']}")
    for (workload, task), found in panels.items():
        narrow = [[row[at] for at in PRINTED] for row in time_rows(found)]
        _print(f"{workload}, {TASKS[task]}", [HEADER[at] for at in PRINTED], narrow)
    packing = result["packing"]
    _print(_packing_title(packing), WHOLE_HEADER, whole_rows(packing))
    _print(f"the same in steps of {packing['step']}", STEPS_HEADER, step_rows(packing))


def write_bench(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `bench-cpu.json`, `.md` and `.png` (`bench-gpu` on a GPU) and gives their paths."""
    name = "bench-cpu" if result["device"].startswith("CPU") else "bench-gpu"
    paths = [folder / f"{name}.{ending}" for ending in ("json", "md", "png")]
    write_json(paths[0], result)
    write_text(paths[1], as_markdown(result, paths[2].name))
    with atomic_write(paths[2]) as draft:
        draw_bench(result, draft)
    return paths


def as_markdown(result: dict[str, Any], picture: str) -> str:
    """The result as a Markdown page that shows `picture`."""
    settings, packing, agreement = result["settings"], result["packing"], result["agreement"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    others = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "size")
    size = ", ".join(f"{key} {value}" for key, value in settings["size"].items())
    parts = [
        f"# Benchmark, {result['date'][:10]}",
        f"{result['device']}; {versions}. Made by `{result['command']}` at {result['date']}.",
        f"Settings: {others}. A random Gemma-2 in NF4 with LoRA on all linear layers: {size}.",
        f"![time of each variant over ours]({picture})",
        "`times` is the median over that of the first variant; `tokens/s` counts the examples' tokens, `computed` "
        "those the model was given, padding included, and `useful` is the one over the other: above 100% where what "
        "examples share is computed once. `peak GiB` is held above the models.",
        "## The same numbers",
        "Largest relative difference of probabilities and of gradients from transformers one example at a time in "
        f"float32: unquantised, float32 {_largest(agreement['exact']):.1e}; in 4 bits and {settings['dtype']} "
        f"{_largest(agreement['quantised']):.1e}, padded batches among them "
        f"{max(agreement['quantised']['c'].values()):.1e}. bitsandbytes' evaluation forward, with "
        f"which transformers' variants are timed, differs by {agreement['repacked']:.1e} here: on CPUs with bfloat16 "
        "products it computes 4-bit layers in bfloat16, whatever the precision.",
    ]
    for (workload, task), found in _panels(result).items():
        parts += [f"## {workload}, {TASKS[task]}", markdown_table(HEADER, time_rows(found))]
    parts += ["## Packing", f"{_packing_title(packing)}.", markdown_table(WHOLE_HEADER, whole_rows(packing))]
    parts += [f"In steps of {packing['step']} examples:", markdown_table(STEPS_HEADER, step_rows(packing))]
    return "\n\n".join(parts) + "\n"


def time_rows(found: list[dict[str, Any]]) -> Rows:
    """One row a variant of one task; times are compared with the first."""
    first = median(found[0]["seconds"])
    rows = []
    for each in found:
        seconds, logical, computed = each["seconds"], each["logical_tokens"], each["computed_tokens"]
        peak = "" if each["peak_bytes"] is None else f"{each['peak_bytes'] / 2**30:.2f}"
        rows.append(
            [
                each["variant"], each["title"], f"{median(seconds):.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}",
                f"{median(seconds) / first:.2f}", f"{logical / median(seconds):,.0f}", f"{computed:,}",
                f"{logical / computed:.0%}", f"{each['batches']}", peak,
            ]
        )  # fmt: skip
    return rows


def whole_rows(packing: dict[str, Any]) -> Rows:
    """One row a way to pack the whole set."""
    return [
        [
            each["way"],
            f"{each['batches']:,}",
            "" if each["over_least"] is None else f"{each['over_least']:.4f}",
            f"{each['fill']:.1%}",
        ]
        for each in packing["whole_set"]
    ]


def step_rows(packing: dict[str, Any]) -> Rows:
    """One row a way to pack steps."""
    return [
        [
            each["way"],
            f"{each['batches']:,}",
            f"{each['over_least']:.4f}",
            f"{each['evenness']:.3f}",
            f"{each['worst_evenness']:.3f}",
        ]
        for each in packing["in_steps"]
    ]


def draw_bench(result: dict[str, Any], path: Path) -> None:
    """Bars of each variant's time over the first one's: a row of panels a workload, a panel a task."""
    panels = _panels(result)
    workloads = list(dict.fromkeys(workload for workload, _ in panels))
    size = (13, 2.6 * len(workloads) + 0.6)
    figure, axes = new_figure(len(workloads), len(TASKS), figsize=size, sharey=True)
    for (workload, task), found in panels.items():
        axis = axes[workloads.index(workload)][list(TASKS).index(task)]
        first = median(found[0]["seconds"])
        times = [median(each["seconds"]) / first for each in found]
        below = [time - min(each["seconds"]) / first for time, each in zip(times, found, strict=True)]
        above = [max(each["seconds"]) / first - time for time, each in zip(times, found, strict=True)]
        names = [f"{each['variant']}  {each['title']}" for each in found]
        axis.barh(names, times, xerr=[below, above], color=[COLOURS[each["variant"]] for each in found], ecolor="0.3")
        for at, time in enumerate(times):
            axis.text(time + above[at] + 0.02 * max(times), at, f"{time:.2f}", va="center", fontsize="small")
        axis.set_title(f"{workload}, {TASKS[task]}", fontsize="medium")
        axis.set_xlim(0, 1.15 * max(times))
    axes[0][0].invert_yaxis()  # for all panels, which share it
    figure.supxlabel(f"time over that of {result['measured'][0]['title']}; bars: median, lines: least to most")
    figure.suptitle(f"{result['device']}, {result['date'][:10]}, {result['settings']['dtype']}, NF4 with LoRA")
    figure.savefig(path, dpi=120, format="png")


def _panels(result: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What was measured, by workload and task."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in result["measured"]:
        found.setdefault((each["workload"], each["task"]), []).append(each)
    return found


def _packing_title(packing: dict[str, Any]) -> str:
    return (
        f"{packing['examples']:,} lognormal lengths (median {packing['median']:,.0f}, mean {packing['mean']:,.0f}), "
        f"budget {packing['budget']:,}"
    )


def _largest(differences: dict[str, dict[str, float]]) -> float:
    return max(value for each in differences.values() for value in each.values())


def _print(title: str, header: list[str], rows: Rows) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in header:
        table.add_column(name, justify="left" if name in ("", "variant", header[0]) else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown_table(header: list[str], rows: Rows) -> str:
    """Cells as a Markdown table; columns of numbers stand to the right."""
    left = ("", "variant", header[0])
    rule = ["---" if name in left else "---:" for name in header]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
