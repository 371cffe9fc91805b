"""What large runs would cost, by arithmetic from measured tokens a second: `python -m benchmarks costs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from arena.progress import console
from benchmarks.tables import table
from benchmarks.workload import COMPETITION_MEAN

COLUMNS = {
    "work": "{work}", "GPUs": "{gpus}", "logical tokens": "{tokens:.3g}", "GPU hours": "{gpu_hours:,.1f}",
    "hours": "{hours:,.2f}", "price": "{price:,.0f}",
}  # fmt: skip


@dataclass
class Costs:
    """Estimate GPU hours and price of training and judging with a 9B, from rates that were measured on one GPU."""

    train_rate: Annotated[float, arg(help="Logical tokens a second of a GPU in training.")] = 12_257.0
    judge_rate: Annotated[float, arg(help="The same in inference.")] = 33_586.0
    mean_tokens: Annotated[float, arg(help="Of an example.")] = COMPETITION_MEAN
    price: Annotated[float, arg(help="Of a GPU for an hour, in any currency.")] = 2.5
    efficiency: Annotated[float, arg(help="Share of the rate left among many GPUs, an assumption.")] = 0.9

    def run(self) -> None:
        console.print(table(COLUMNS, self.lines()))

    def lines(self) -> list[dict[str, Any]]:
        """One for each piece of work. An epoch reads each row in one order, judging reads it in both."""
        return [
            self.line("an epoch of 88,000 rows", 8, 88_000, self.train_rate),
            self.line("an epoch of 1 million rows", 64, 1_000_000, self.train_rate),
            self.line("judging 100 million rows in both orders", 64, 200_000_000, self.judge_rate),
        ]

    def line(self, work: str, gpus: int, examples: int, rate: float) -> dict[str, Any]:
        tokens = examples * self.mean_tokens
        gpu_hours = tokens / (rate * self.efficiency) / 3600
        costs = {"gpu_hours": gpu_hours, "hours": gpu_hours / gpus, "price": gpu_hours * self.price}
        return {"work": work, "gpus": gpus, "tokens": tokens, **costs}
