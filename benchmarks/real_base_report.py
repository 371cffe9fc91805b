"""What the benchmark of a real base found: JSON and a Markdown page in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arena.storage.files import write_json, write_text
from benchmarks.machine import made_by
from benchmarks.tables import table

TIMES = {
    "": "{variant}", "variant": "{title}", "seconds": "{least:.1f}", "to": "{most:.1f}", "times": "{times:.2f}",
    "tokens/s": "{rate:,.0f}", "computed": "{computed_tokens:,}", "batches": "{batches}",
    "products alone": "{products:.1f}", "share": "{share:.0%}",
}  # fmt: skip
TITLES = {"train": "Training step", "infer": "Inference, one order"}


def write_real_base(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `bench-real-base.json` and `.md` and gives their paths."""
    paths = [folder / f"bench-real-base.{ending}" for ending in ("json", "md")]
    write_json(paths[0], result)
    write_text(paths[1], as_markdown(result))
    return paths


def as_markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown page."""
    settings, speeds = result["settings"], result["product_gflops"]
    others = ", ".join(f"{key} {value}" for key, value in settings.items())
    ours, padded = (max(result["agreement"][key].values()) for key in "ac")
    parts = [
        f"# A real base, {result['date'][:10]}",
        made_by(result["device"], result),
        f"Settings: {others}. NF4 with LoRA on all linear layers; nothing is recomputed in the backward; transformers "
        "attends with `sdpa`.",
        "`seconds` is the least of all rounds (of ours the second pass in each, since a run reuses memory from its "
        "second step on), `to` the most, and `times` compares the least with ours. `tokens/s` counts the examples' "
        "tokens, `computed` those the model was given. `products alone` are the seconds that the products of the "
        "linear layers take for the computed tokens at the speed that this machine reaches with nothing else to do, "
        "and `share` is their share of the time; attention, adapters and all else are the rest.",
        f"A small product runs at {speeds['float32']:.0f} GFLOP/s in float32 and at {speeds['bfloat16']:.1f} in "
        f"bfloat16. Relative difference of probabilities and gradients from transformers one by one in float32, on the "
        f"same 4-bit weights: ours at most {ours:.1e}, padded batches {padded:.1e}.",
        as_text(result),
    ]
    return "\n\n".join(parts) + "\n"


def as_text(result: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    parts = []
    for task in result["settings"]["tasks"]:
        found = [each for each in result["measured"] if each["task"] == task]
        parts += [f"## {TITLES[task]}", f"Products at {found[0]['gflops']:.0f} GFLOP/s.", table(TIMES, figures(found))]
        if kinds := found[0].get("kinds"):
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items())
            parts.append(f"Arena's time by torch's profiler: {shares}.")
    return "\n\n".join(parts)


def figures(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What one task took each variant, with what comes of that; times are compared with the first one's."""
    first = min(found[0]["seconds"])
    rows = []
    for each in found:
        least = min(each["seconds"])
        rows.append(
            {
                **each, "least": least, "most": max(each["seconds"]), "times": least / first,
                "rate": each["logical_tokens"] / least, "share": each["products"] / least,
            }
        )  # fmt: skip
    return rows
