"""What the report says of single rows: sections whose bars open their rows, and the rows themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from arena.html_report import charts
from arena.html_report.content import MOST_CLASSES, Section, interval, section, slices
from arena.html_report.rows import LONGEST, MOST_ROWS, HeldOut, texts
from arena.html_report.source import Source
from arena.metrics import BINS, accuracy, equal_mass, log_loss
from arena.training.scores import slice_scores


class OfRows:
    """The sections about single rows, whose bars open them.

    Attributes:
        columns: by name, an integer for each row, which filters ask for.
    """

    def __init__(self, source: Source, held_out: HeldOut) -> None:
        self.source, self.held_out, self.task = source, held_out, held_out.task
        frequent = np.argsort(-held_out.labels.sum(axis=0), kind="stable")[:MOST_CLASSES]
        self.classes = sorted(frequent.tolist())
        self.label, self.predicted = held_out.labels.argmax(axis=1), held_out.predicted.argmax(axis=1)
        self.columns = {"label": self.label, "predicted": self.predicted}

    def sections(self) -> list[Section]:
        found = [self._reliability(), self._confusion(), self._slices(), self._order()]
        return [each for each in found if each is not None]

    def _reliability(self) -> Section:
        found = [charts.reliability(self.task.classes[at], self._bins(at)) for at in self.classes]
        lead = "Bars show how often a class is the label, lines how probable the judge finds it: where they differ, it "
        return section("Reliability", f"{lead}is too sure or not sure enough.{self._omitted()}", charts=found)

    def _bins(self, at: int) -> list[dict[str, Any]]:
        """The bins of a class, those of the class-wise calibration error."""
        probabilities, labels = self.held_out.predicted[:, at], self.held_out.labels[:, at]
        places = self.columns[f"bin {at}"] = equal_mass(probabilities)
        bins = []
        for place in np.unique(places).tolist():
            rows = places == place
            mean, share, count = float(probabilities[rows].mean()), float(labels[rows].mean()), int(rows.sum())
            says = f"{self.task.classes[at]} in bin {place + 1} of {BINS}"
            bins.append({
                "bin": place + 1, "rows": count, "predicted": mean, "observed": share, "says": says,
                "tip": f"{says}: probability {mean:.3f}, label in {share:.3f} of {count:,} rows",
                "filter": [[f"bin {at}", place]],
            })  # fmt: skip
        return bins

    def _confusion(self) -> Section:
        cells, names = list[dict[str, Any]](), self.task.classes
        for label in self.classes:
            of_label = self.label == label
            for predicted in self.classes:
                rows = int((of_label & (self.predicted == predicted)).sum())
                cell = {"label": names[label], "predicted": names[predicted], "rows": rows}
                cell |= {"share": rows / max(1, int(of_label.sum()))}
                says = f"label {names[label]}, judge {names[predicted]}"
                cell |= {"says": says, "tip": f"{says}: {rows:,} rows, {cell['share']:.1%} of the label's"}
                cells.append(cell | {"filter": [["label", label], ["predicted", predicted]]})
        return section("Confusion", self._omitted().strip(), charts=[charts.confusion(cells)])

    def _omitted(self) -> str:
        left_out = len(self.task.classes) - len(self.classes)
        return f" The {len(self.classes)} most frequent classes are shown, {left_out} are not." if left_out else ""

    def _slices(self) -> Section:
        """Those of a fold are in its metrics; those of all folds are computed from their predictions."""
        held_out = self.held_out
        known = self.source.metrics.get("slices")
        if known is None and held_out.rows is not None:
            known = slice_scores(
                self.task, held_out.labels, held_out.predicted, ("prior", held_out.prior), held_out.slices,
                held_out.rows.groups(),
            )  # fmt: skip
        for kind, masks in held_out.slices.items():
            self.columns[kind] = sum(mask * (at + 1) for at, mask in enumerate(masks.values())) - 1
        return slices(known or {}, {kind: list(masks) for kind, masks in held_out.slices.items()})

    def _order(self) -> Section | None:
        """How much the order of A and B matters; None for a task with one order."""
        flips = self.source.metrics.get("scores", {}).get("flip_rate")
        if flips is None:
            return None
        facts = [["flip rate", f"{flips['value']:.3f}", interval(flips, 3)]]
        lead = "Each row is judged in both orders of its answers. It flips if its most probable class changes."
        if self.held_out.orders is None:
            return section("Position bias", lead + " What was predicted in each order was not kept.", facts=facts)
        scored = np.isfinite(self.held_out.orders[0]).all(axis=1)
        lead += f" The table is of the {int(scored.sum()):,} rows with a {self.task.missing}"
        lead += "." if scored.all() else f"; the log-loss above is of {len(scored):,}, with those that have none."
        names = ("as given", "exchanged", "mean of both")
        given = [*self.held_out.orders[:, scored], self.held_out.predicted[scored]]
        rows = [
            self._of_order(name, self.held_out.labels[scored], each) for name, each in zip(names, given, strict=True)
        ]
        columns = ["order", "log-loss", "accuracy", *(f"mean p({name})" for name in self.task.classes)]
        both, bars = np.where(scored, np.nan_to_num(self.held_out.orders).argmax(axis=2), -1), list[dict[str, Any]]()
        self.columns |= {"as given": both[0], "exchanged": both[1]}
        for one, first in enumerate(self.task.classes):
            for other, second in enumerate(self.task.classes):
                if rows_of := int(((both[0] == one) & (both[1] == other)).sum()) if one != other else 0:
                    bar = {"name": f"{first} → {second}", "value": rows_of, "rows": rows_of, "low": None, "high": None}
                    says = f"{first} as given, {second} when exchanged"
                    bar |= {"says": says, "tip": f"{says}: {rows_of:,} rows"}
                    bars.append(bar | {"filter": [["as given", one], ["exchanged", other]]})
        most = max((bar["value"] for bar in bars), default=0)
        title = "Rows that flip, as given → exchanged"
        found = [charts.bars(title, bars, "rows", (0, most), size="half")] if bars else []
        return section("Position bias", lead, facts=facts, charts=found, table={"columns": columns, "rows": rows})

    @staticmethod
    def _of_order(name: str, labels: np.ndarray, predicted: np.ndarray) -> list[Any]:
        return [name, log_loss(labels, predicted), accuracy(labels, predicted), *predicted.mean(axis=0).tolist()]

    def rows(self, most_texts: int) -> dict[str, Any]:
        """The rows for the page, the most confidently wrong first, as columns; texts for the first of them."""
        held_out, losses = self.held_out, self.held_out.losses
        order = np.argsort(-losses, kind="stable")[:MOST_ROWS].tolist()
        shown = texts(held_out, order, most_texts)
        probabilities = np.round(held_out.predicted[order][:, self.classes], 4)
        return {
            "total": len(losses), "names": self.task.classes, "classes": self.classes,
            "fields": self.task.texts, "whole": self.task.group_by,
            "ids": [held_out.ids[at] for at in order], "folds": held_out.folds[order].tolist(),
            "losses": np.round(losses[order], 4).tolist(), "probabilities": probabilities.tolist(),
            "of_label": np.round(held_out.predicted[order, self.label[order]], 4).tolist(),
            "columns": {name: values[order].tolist() for name, values in self.columns.items()}, "texts": shown,
            "note": _left_out(len(losses), len(order), len(shown), held_out.missing),
        }  # fmt: skip


def _left_out(total: int, listed: int, with_texts: int, missing: str | None) -> str:
    """What the page does not hold, in words."""
    said = [f"Only the {listed:,} most confidently wrong of {total:,} rows are listed."] if listed < total else []
    if missing:
        said.append(missing)
    if missing and not with_texts:
        return " ".join(said)
    if with_texts < listed:
        said.append(
            f"Only the {with_texts:,} most confidently wrong rows have their texts here, and are found by them."
        )
    return " ".join([*said, f"Texts of more than {LONGEST:,} characters are cut."])
