"""What the benchmark of a small model found: JSON, a Markdown page and a picture in a folder."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from arena.storage.files import write_json, write_text
from benchmarks.machine import made_by
from benchmarks.tables import Bars, draw, gib, table
from benchmarks.variants import TASKS

TIMES = {
    "": "{variant}", "variant": "{title}", "seconds": "{median:.2f}", "least to most": "{least:.2f} to {most:.2f}",
    "times": "{times:.2f}", "tokens/s": "{rate:,.0f}", "computed": "{computed_tokens:,}", "useful": "{useful:.0%}",
    "batches": "{batches}", "peak GiB": "{peak:.2f}",
}  # fmt: skip
WHOLE = {
    "whole set": "{way}",
    "micro-batches": "{batches:,}",
    "over the least": "{over_least:.4f}",
    "fill": "{fill:.1%}",
}
STEPS = {
    "within steps": "{way}", "micro-batches": "{batches:,}", "over the least": "{over_least:.4f}",
    "fewest/most tokens": "{evenness:.3f}", "at worst": "{worst_evenness:.3f}",
}  # fmt: skip
COLOURS = {"a": "C2", "b": "C0", "c": "0.55", "d": "0.7", "e": "C1"}


def write_bench(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `bench-cpu.json`, `.md` and `.png` (`bench-gpu` on a GPU) and gives their paths."""
    name = "bench-cpu" if result["device"].startswith("CPU") else "bench-gpu"
    paths = [folder / f"{name}.{ending}" for ending in ("json", "md", "png")]
    write_json(paths[0], result)
    write_text(paths[1], as_markdown(result, paths[2].name))
    draw(
        [_bars(f"{workload}, {TASKS[task]}", found) for (workload, task), found in _panels(result).items()],
        len(TASKS), paths[2], sharey=True,
        title=f"{result['device']}, {result['date'][:10]}, {result['settings']['dtype']}, NF4 with LoRA",
        below=f"time over that of {result['measured'][0]['title']}; bars: median, lines: least to most",
    )  # fmt: skip
    return paths


def as_markdown(result: dict[str, Any], picture: str) -> str:
    """The result as a Markdown page that shows `picture`."""
    settings, agreement = result["settings"], result["agreement"]
    others = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "size")
    size = ", ".join(f"{key} {value}" for key, value in settings["size"].items())
    parts = [
        f"# Benchmark, {result['date'][:10]}",
        made_by(result["device"], result),
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
        as_text(result),
    ]
    return "\n\n".join(parts) + "\n"


def as_text(result: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    packing, parts = result["packing"], []
    for (workload, task), found in _panels(result).items():
        parts += [f"## {workload}, {TASKS[task]}", table(TIMES, figures(found))]
    lengths = (
        f"{packing['examples']:,} lognormal lengths (median {packing['median']:,.0f}, mean {packing['mean']:,.0f}), "
        f"budget {packing['budget']:,}."
    )
    parts += ["## Packing", lengths, table(WHOLE, packing["whole_set"])]
    parts += [f"In steps of {packing['step']} examples:", table(STEPS, packing["in_steps"])]
    return "\n\n".join(parts)


def figures(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What one task took each variant, with what comes of that; times are compared with the first one's."""
    first = median(found[0]["seconds"])
    rows = []
    for each in found:
        middle, logical = median(each["seconds"]), each["logical_tokens"]
        rows.append(
            {
                **each, "median": middle, "least": min(each["seconds"]), "most": max(each["seconds"]),
                "times": middle / first, "rate": logical / middle, "useful": logical / each["computed_tokens"],
                "peak": gib(each["peak_bytes"]),
            }
        )  # fmt: skip
    return rows


def _bars(title: str, found: list[dict[str, Any]]) -> Bars:
    """Each variant's time over the first one's."""
    rows = figures(found)
    first = rows[0]["median"]
    times = [each["times"] for each in rows]
    errors = [(each["times"] - each["least"] / first, each["most"] / first - each["times"]) for each in rows]
    names = [f"{each['variant']}  {each['title']}" for each in rows]
    return Bars(title, names, times, [f"{each:.2f}" for each in times], [COLOURS[name[0]] for name in names], errors)


def _panels(result: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What was measured, by workload and task."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in result["measured"]:
        found.setdefault((each["workload"], each["task"]), []).append(each)
    return found


def _largest(differences: dict[str, dict[str, float]]) -> float:
    return max(value for each in differences.values() for value in each.values())
