"""What is measured, at any size: one cell is one task, done one way by one model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from arena.settings import LoraSettings, ModelSettings, Recipe

Fuse = Literal["auto", "none", "norm", "mlp", "rotary", "lora"]

TASKS = ("train", "infer", "peak")


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        task: `train` times optimizer steps, `infer` passes over the same rows, `peak` one micro-batch that is full to
            the last token, trained on, for the memory it takes.
        way: `ours`; or transformers' classifier with peft's adapters, on batches that are `padded` in the given order,
            `sorted` by length beforehand and padded, or packed and told so by `restarted` positions.
        attention: a backend of ours (`model.attention`), or transformers' name of one.
        checkpointing: as `model.checkpointing`; transformers recomputes whole layers (`full`) or nothing (`none`).
        share: compute common beginnings once.
        orders: 1 reads each row as it stands, 2 both orders of A and B.
        fuse: as `model.fuse`, or one part of it.
        base: a base to take in place of the recipe's.
        repeats: how often it is timed; None is as often as the benchmark says.
        batch: examples in a padded batch.
    """

    task: Literal["train", "infer", "peak"] = "train"
    way: Literal["ours", "padded", "sorted", "restarted"] = "ours"
    attention: str = "auto"
    checkpointing: Literal["auto", "full", "elementwise_and_mlp", "elementwise", "none"] = "auto"
    share: bool = True
    orders: Literal[1, 2] = 1
    fuse: Fuse = "auto"
    tune: Literal["lora", "head", "full"] = "lora"
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    dora: bool = False
    base: str | None = None
    repeats: int | None = None
    batch: int = 4

    @property
    def key(self) -> str:
        """A name that no other cell has; it can name a file."""
        default = asdict(Cell())
        others = [
            f"{name}={value}".replace("/", "_").lower()
            for name, value in asdict(self).items()
            if value != default[name] and name not in ("task", "way", "repeats")
        ]
        return ",".join([self.task, self.way, *others])

    @property
    def kind(self) -> str:
        """The name of those cells that take about as long as this one."""
        return replace(self, checkpointing="auto", share=True, fuse="auto", base=None).key

    @property
    def model_key(self) -> tuple[object, ...]:
        """Cells with the same one can be measured on one model, without making another."""
        transformers_own = None if self.way == "ours" else self.attention
        return (self.way, transformers_own, self.fuse, self.tune, self.quantization, self.dora, self.base)

    def settings(self, recipe: Recipe) -> ModelSettings:
        """The recipe's model settings with what the cell changes."""
        ours = self.way == "ours"
        return ModelSettings.model_validate(
            {
                **recipe.model.model_dump(), "base": self.base or recipe.model.base, "revision": None,
                "attention": self.attention if ours else "auto",
                "checkpointing": self.checkpointing, "tune": self.tune, "quantization": self.quantization,
                "fuse": self.fuse if self.fuse in ("auto", "none") else (self.fuse,),
                "lora": LoraSettings.model_validate({**recipe.model.lora.model_dump(), "dora": self.dora}),
            }
        )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What all cells of a benchmark have in common.

    Attributes:
        rows: examples in a step, and in a pass of inference.
        padded_rows: of these, the ones that padded batches are timed with: they take several times as long.
        repeats: timed steps or passes of a cell, after one that is not counted.
    """

    recipe: Recipe
    rows: int
    padded_rows: int
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `ValueError` for what cannot be measured."""
        if self.repeats < 1 or self.rows < 1 or self.padded_rows < 1:
            raise ValueError("a benchmark needs a repeat and a row at least")
        if self.padded_rows > self.rows:
            raise ValueError(f"padded batches are timed with some of the {self.rows} rows, not with {self.padded_rows}")
