"""What the report says of a run: sections of sentences, figures and charts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import BaseModel

from arena.html_report import charts
from arena.html_report.rows import HeldOut
from arena.html_report.source import Source
from arena.progress import duration
from arena.reporting.report import COMPARISONS, NAMES, remark
from arena.training.comparing import Comparison

MOST_POINTS = 400  # of a curve
MOST_CLASSES = 12  # with figures of their own, the most frequent ones
SHOWN = ("accuracy", "brier", "ece", "classwise_ece", "agreement_without_ties", "flip_rate", "perplexity", "macro_f1")
SHORT = {
    "bayes_log_loss": "best possible", "recalibrated_log_loss": "recalibrated", "baseline_log_loss": "baseline",
    "blend_log_loss": "blend with baseline", "prior_log_loss": "prior", "base_log_loss": "base before training",
}  # fmt: skip

Section = dict[str, Any]


def section(title: str, lead: str = "", **parts: Any) -> Section:
    """A section of the page. Parts: `facts` (name, value, note), `charts`, `table` (columns and rows)."""
    return {"title": title, "lead": lead, **parts}


def subtitle(source: Source) -> list[str]:
    """What was trained on what, in a few words."""
    recipe, metrics = source.recipe, source.metrics
    folds = (
        f"all {len(source.folds)} folds" if len(source.folds) > 1 else f"fold {metrics['fold']} of {recipe.data.folds}"
    )
    where = folds if recipe.data.validation is None else f"held out: {recipe.data.validation}"
    return [recipe.task, recipe.model.base, f"{metrics['n_eval']:,} held-out rows", where]


def headline(source: Source) -> Section:
    """The log-loss with its interval, beside what it is compared with, and the other metrics."""
    metrics, scores = source.metrics, source.metrics.get("scores", {})
    own = scores.get("log_loss", {"value": metrics["log_loss"], "low": None, "high": None})
    others = [(key, words) for key, words in COMPARISONS if metrics.get(key) is not None]
    rows = [
        {"name": "this run", "own": True, "tip": _value("this run", own), **own},
        *({"name": SHORT[key], "value": metrics[key], "tip": f"{words}: {metrics[key]:.4f}"} for key, words in others),
    ]
    facts = [
        [NAMES.get(key, key), f"{score['value']:.3f}", interval(score, 3)]
        for key in SHOWN
        if (score := scores.get(key) or ({"value": metrics[key]} if metrics.get(key) is not None else None))
    ]
    big = {"value": f"{own['value']:.4f}", "note": interval(own, 4)}
    notes = [note] if (note := remark(metrics)) else []
    ordered = sorted(rows, key=lambda row: float(row["value"]))
    return section("Log-loss", big=big, facts=facts, notes=notes, charts=[charts.references(ordered)])


def training(sources: Mapping[str, Source]) -> Section:
    """The curves of each fold's training, those of two runs over one another."""
    names = list(sources)
    points, held_out = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, source in sources.items():
        for fold in source.folds:
            own = {"run": name, "fold": fold.metrics["fold"]}
            points += [own | point for point in _curve([line for line in fold.log if "loss" in line])]
            for line in (line for line in fold.log if "eval_log_loss" in line):
                tip = f"{name}, step {line['step']}: held-out log-loss {line['eval_log_loss']:.4f}, in one order"
                held_out.append(own | {"step": line["step"], "loss": line["eval_log_loss"], "tip": tip})
    small = [
        charts.step_curve(points, field, title, names)
        for field, title in (("lr", "Learning rate"), ("grad_norm", "Gradient norm"))
    ]
    lines = "The line is the training loss, smoothed, and single steps are faint"
    if not charts.is_single(points):
        lines = "The lines are the training losses of each fold, smoothed"
    lead = f"{lines}. Points are the held-out log-loss during training, in one order of each row."
    return section("Training", lead, charts=[charts.loss_curve(points, held_out, names), *small])


def _curve(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means of neighbouring steps, so that there are not too many, and the loss smoothed over them."""
    if not lines:
        return []
    parts = np.array_split(np.arange(len(lines)), min(len(lines), MOST_POINTS))
    keys = ("step", "loss", "lr", "grad_norm")
    every = {key: np.array([line.get(key, math.nan) for line in lines], dtype=np.float64) for key in keys}
    means = {key: np.array([values[part].mean() for part in parts]) for key, values in every.items()}
    window = np.ones(max(1, len(parts) // 12) | 1)
    means["smooth"] = np.convolve(means["loss"], window, "same") / np.convolve(np.ones(len(parts)), window, "same")
    return [{key: float(values[at]) for key, values in means.items()} for at in range(len(parts))]


def slices(known: Mapping[str, Mapping[str, Mapping[str, Any]]], values: Mapping[str, Sequence[str]]) -> Section:
    """Log-losses of slices. Those that are among `values` open their rows."""
    found, every = dict[str, list[dict[str, Any]]](), list[float]()
    for kind, scored in known.items():
        for value, scores in scored.items():
            other = "base" if "base_log_loss" in scores else "prior"
            own = scores["log_loss"]
            row = {"name": value, **own, "reference": scores[f"{other}_log_loss"]["value"]}
            row["says"] = f"{kind}: {value}"
            row["tip"] = f"{_value(row['says'], own)}, {other} {row['reference']:.4f}, {own['rows']:,} rows"
            if value in values.get(kind, ()):
                row["filter"] = [[kind, list(values[kind]).index(value)]]
            found.setdefault(kind, []).append(row)
            every += [each for each in (own["value"], own["high"], row["reference"]) if each is not None]
    compared = f"log-loss of the {other}" if found else ""
    lead = "Bars are the log-loss of rows with a property, with 95% intervals; the coloured line is the "
    shown = [charts.bars(kind, rows, "log-loss", (0, max(every)), compared) for kind, rows in found.items()]
    return section("Slices", f"{lead}{compared}." if found else "Slices need the run's data.", charts=shown)


def comparison(found: Comparison, held_out: HeldOut | None) -> Section:
    """The paired differences of two runs."""
    one, other = found.names
    lead = f"{one} minus {other} on the {found.rows:,} labelled rows of both, with paired 95% intervals."
    columns, rows = ["metric", one, other, "difference", "interval"], list[list[Any]]()
    for name, (first, second) in found.scores.items():
        own = asdict(found.differences[name])
        rows.append([NAMES.get(name, name), first.value, second.value, f"{own['value']:+.4f}", interval(own, 4, "+")])
    shown, ends = dict[str, list[dict[str, Any]]](), [0.0]
    for (kind, value), score in found.slices.items():
        row = {"name": value, **asdict(score), "says": f"{kind}: {value}"}
        row["tip"] = f"{_value(row['says'], row)}, {score.rows:,} rows"
        if held_out is not None and value in held_out.slices.get(kind, ()):
            row["filter"] = [[kind, list(held_out.slices[kind]).index(value)]]
        shown.setdefault(kind, []).append(row)
        ends += [each for each in (score.value, score.low, score.high) if each is not None]
    axis = min(ends), max(ends)
    bars = [charts.bars(kind, rows_of, "difference in log-loss", axis) for kind, rows_of in shown.items()]
    notes = [f"Settings that differ ({one} there, {other} here): {'; '.join(found.settings)}"] if found.settings else []
    return section(f"Compared with {other}", lead, notes=notes, charts=bars, table={"columns": columns, "rows": rows})


def data_section(source: Source, held_out: HeldOut | None) -> Section:
    """Packing, speed, rows and lengths."""
    metrics = source.metrics
    shared = 1 - metrics["unique_tokens"] / metrics["tokens"]
    facts = [
        ["fill rate", f"{metrics['fill_rate']:.1%}", f"{metrics['micro_batches']:,} micro-batches"],
        ["shared tokens", f"{shared:.1%}", f"of {metrics['tokens']:,}: computed once"],
        ["tokens a second", f"{metrics['tokens_per_second']:,.0f}", duration(metrics["train_seconds"])],
        ["peak memory", f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB", metrics["device"]],
        ["trainable parameters", f"{metrics['trainable_parameters']:,}", f"attention: {metrics['attention_backend']}"],
    ]
    trained = "" if metrics["n_train"] is None else f"{metrics['n_train']:,} to train on"
    facts.append(["held-out rows", f"{metrics['n_eval']:,}", trained])
    if held_out is not None and len(held_out.task.classes) <= MOST_CLASSES:
        for name, prior, share in zip(
            held_out.task.classes, held_out.prior.mean(axis=0), held_out.labels.mean(axis=0), strict=True
        ):
            facts.append([f"prior of {name}", f"{prior:.1%}", f"{share:.1%} of held-out labels"])
    if held_out is not None and held_out.tokens is not None:
        median, high, most = np.quantile(held_out.tokens, [0.5, 0.95, 1]).astype(int).tolist()
        facts.append(["median length", f"{median:,}", f"tokens; 95% up to {high:,}, longest {most:,}"])
    return section("Data and packing", facts=facts)


def settings(source: Source) -> Section:
    """The settings that are not the defaults."""
    rows = [
        [key, _shown(value), "" if default is None else _shown(default)] for key, value, default in _set(source.recipe)
    ]
    table = {"columns": ["setting", "value", "default"], "rows": rows}
    return section("Settings", "Those that differ from the defaults.", table=table)


def _set(group: BaseModel, above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys of a recipe whose values are not their defaults, or that have none."""
    for name, field in type(group).model_fields.items():
        value = getattr(group, name)
        if isinstance(value, BaseModel):
            yield from _set(value, f"{above}{name}.")
        elif value != (default := None if field.is_required() else field.get_default(call_default_factory=True)):
            yield f"{above}{name}", value, default


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _value(name: str, score: Mapping[str, Any]) -> str:
    return f"{name}: {score['value']:.4f}" + (f" ({interval(score, 4)})" if score.get("low") is not None else "")


def interval(score: Mapping[str, Any], digits: int, sign: str = "") -> str:
    if score.get("low") is None:
        return ""
    return f"{score['low']:{sign}.{digits}f} to {score['high']:{sign}.{digits}f}"
