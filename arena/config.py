"""Recipes: every setting of a run as one validated tree, read from YAML, with overrides such as `train.epochs=2`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from arena.files import local_path, require_utf8
from arena.overrides import apply_override, explain
from arena.plain_yaml import read_yaml_file

Place = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]  # a path, or a name on a hub
Part = Literal["norm", "mlp", "rotary", "lora"]  # parts of a decoder that can be fused
FORMER_POLICIES = {"light": "elementwise", "mlp": "elementwise_and_mlp"}  # `model.checkpointing` in earlier versions

RECIPES = Path(__file__).parent / "recipes"

# of a row of data; the longest real one known has 66,000 characters
MAX_ROW_CHARACTERS = 1_000_000
MAX_TURNS = 1_000


class Settings(BaseModel):
    """Base of every settings group: unknown keys are refused, values do not change once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        require_utf8(*(value if isinstance(value, list | tuple) else [value]))
        return value


class Template(Settings):
    """The words of the judge prompt; all are taken as plain text. Chat markers come from `PromptSettings.chat`."""

    instruction: str = Field(description="heads the whole prompt, once")
    opening: str = Field("", description="stands between the instruction and the first turn")
    user: str = Field("### User:\n", description="heads each user prompt")
    answer_a: str = Field("### Assistant A:\n", description="heads each answer of A")
    answer_b: str = Field("### Assistant B:\n", description="heads each answer of B")
    separator: str = Field("\n\n", description="ends each prompt and answer")
    closing: str = Field("", description="stands after the last turn")
    verdict: str = Field("verdict is: [[", min_length=1, description="the last tokens of every example")
    missing: str = Field("[no text]", description="stands for a null prompt or answer")
    cut: str = Field(" [...] ", min_length=1, description="marks the place where a text was cut")
    cut_turns: str = Field("[earlier turns left out]\n\n", min_length=1, description="marks left-out turns")


class PromptSettings(Settings):
    template: Template = Field(description="a shipped template's name, the path of a YAML file, or fields as below")
    chat: Literal["auto", "gemma", "chatml", "llama3", "plain"] = Field(
        "auto",
        description="markers of a chat put around the prompt; auto: those of the base's tokenizer, if it has any",
    )
    max_length: int = Field(4096, ge=16, description="tokens an example may have")

    @model_validator(mode="before")
    @classmethod
    def _read_template(cls, values: Any) -> Any:
        """A template may be given by name (shipped with the package), by path, or written out."""
        if isinstance(values, dict) and isinstance(values.get("template"), str):
            return {**values, "template": read_yaml_file(_find(values["template"], RECIPES / "templates", "template"))}
        return values


class DataSettings(Settings):
    path: Place = Field(description="folder with train and test files, or one training file")
    extra: tuple[Place, ...] = Field((), description="files of labelled rows that are only ever trained on")
    folds: int = Field(5, ge=2, description="parts that the labelled rows are split into, one of them held out")
    fold_seed: int = Field(0, description="seed of the split into folds")
    cache: Place = Field("data/cache", description="where rows and tokens are kept between runs")
    max_row_characters: int = Field(
        MAX_ROW_CHARACTERS, ge=1, le=10**8, description="a row with more characters, all columns together, is an error"
    )
    max_turns: int = Field(MAX_TURNS, ge=1, description="a prompt or answer of more turns is an error")
    synthetic_rows: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="(train, test) rows of demo data to write to `path` when nothing stands there"
    )


class LoraSettings(Settings):
    r: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="the adapters' product is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapters' inputs that training sets to zero")
    targets: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="names of the layers that get adapters, such as [q_proj, v_proj]; or all-linear"
    )
    dora: bool = Field(False, description="learn each weight's length apart from its direction (DoRA)")


class ModelSettings(Settings):
    base: Place = Field(description="folder or hub name of the base model; `demo_base` ships with the package")
    revision: str | None = Field(None, description="branch, tag or commit of a base on the hub; null: the newest")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="compute and frozen weights; auto: bfloat16 where the device has it, else float16"
    )
    quantization: Literal["nf4", "int8", "none"] = Field(
        "nf4", description="how frozen weights are stored: in 4 bits (NF4), in 8 bits (LLM.int8), or in `dtype`"
    )
    tune: Literal["lora", "head", "full"] = Field("lora", description="what is trained besides the head")
    lora: LoraSettings = LoraSettings()
    attention: Literal["auto", "flash", "flex", "blockwise", "reference"] = Field(
        "auto", description="attention backend; auto: the fastest that the device, dtype and head size allow"
    )
    checkpointing: Literal["auto", "full", "elementwise_and_mlp", "elementwise", "none"] = Field(
        "auto",
        description="recomputed in the backward: whole layers, elementwise operations with or without the wide MLP "
        "products, or nothing; auto: as little as the memory allows",
    )
    fuse: Literal["auto", "none"] | tuple[Part, ...] = Field(
        "auto", description="parts computed in fewer passes over memory; auto: those that pay on the device"
    )

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _no_former_name(cls, value: Any) -> Any:
        if isinstance(value, str) and value in FORMER_POLICIES:
            raise ValueError(f"{value} was renamed: set it to {FORMER_POLICIES[value]}")
        return value

    @field_validator("fuse", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        if value in ("auto", "none"):
            return value
        parts = [value] if isinstance(value, str) else value
        if isinstance(parts, (list, tuple)) and set(map(str, parts)) <= set(get_args(Part)):
            return tuple(parts)
        raise ValueError(f"{value!r}: write auto, none, or some of [{', '.join(get_args(Part))}]")


class PackingSettings(Settings):
    budget: int = Field(16384, ge=16, description="tokens in a micro-batch at most")
    share: bool = Field(True, description="compute what prompts of a micro-batch have in common once")


class TrainSettings(Settings):
    batch_size: int = Field(80, ge=1, description="examples in an optimizer step")
    epochs: float = Field(1.0, gt=0, description="passes over the training rows; fractions are allowed")
    lr: float = Field(1e-4, gt=0, description="peak learning rate of the adapters")
    head_lr: float = Field(1e-4, gt=0, description="peak learning rate of `score`")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="course of the learning rate after the warmup"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients of a larger norm are scaled down to it")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit keeps the optimizer's state in 8 bits: 2 bytes a trained weight in place of 8"
    )
    swap: Literal["never", "random", "both"] = Field(
        "random", description="exchange of A and B: never; random, drawn anew each epoch; or both orders of each row"
    )
    evaluate_every: int = Field(0, ge=0, description="steps between evaluations; 0: at the end only")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="checkpoints kept, the latest")
    keep_best: int = Field(1, ge=1, description="checkpoints kept besides, those with the least held-out log-loss")
    resume: str = Field(
        "auto", description="resume from: auto, the latest checkpoint; best; the path of one; or never, train anew"
    )
    max_seconds: float | None = Field(
        None, gt=0, description="save and end after so many seconds; the same command resumes"
    )
    mirror: str | None = Field(
        None, description="also store checkpoints in this folder, or at this URL that fsspec can write to"
    )
    track: Literal["none", "trackio", "wandb", "tensorboard"] = Field(
        "none", description="experiment tracker that steps and evaluations are also sent to"
    )

    @field_validator("mirror")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        user = (url or "").partition("://")[2].partition("/")[0].rpartition("@")[0]
        if ":" in user or url == "":
            raise ValueError("give a folder or a URL without a password: recipes are kept and shown")
        return url


class JudgeSettings(Settings):
    swap: bool = Field(True, description="average the probabilities of both orders")


class Recipe(Settings):
    """Everything that decides what a run computes. `name` is also the run's folder."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="names the run: its folder is runs/NAME"
    )
    seed: int = Field(0, description="seed of the adapters, the order of the rows and the exchange of A and B")
    data: DataSettings
    prompt: PromptSettings
    model: ModelSettings
    packing: PackingSettings = PackingSettings()
    train: TrainSettings = TrainSettings()
    judge: JudgeSettings = JudgeSettings()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.prompt.max_length > self.packing.budget:
            raise ValueError(
                f"prompt.max_length ({self.prompt.max_length}) is larger than packing.budget ({self.packing.budget}): "
                "an example could not be placed in any micro-batch; raise the budget or lower max_length"
            )
        if self.model.tune == "full" and self.model.quantization != "none":
            raise ValueError("model.tune=full, but quantised weights cannot be trained: set model.quantization=none")
        return self


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the recipe called `name` (shipped with the package) or standing at the path `name`.

    Args:
        overrides: `key=value` texts, the key dotted (`train.batch_size=32`), the value YAML.

    Raises:
        ValueError: no such recipe, unknown key, or a value that does not fit; says which and what would.
    """
    return _validated(name, read_yaml_file(_find(name, RECIPES, "recipe")), overrides)


def change(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with some settings changed; `overrides` and errors as in `load_recipe`."""
    return _validated(recipe.name, recipe.model_dump(mode="json"), overrides)


def save_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text, every default written out; `load_recipe` reads it back equal."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def run_place(runs: Path, name: str) -> Path:
    """The folder `runs/name` of a recipe called `name`, or of a fold of it.

    Raises:
        ValueError: `runs` is a URL, or a link there leads out of it.
    """
    require_utf8(runs)
    place = local_path(runs, "--runs") / name
    if runs.resolve() not in place.resolve().parents:
        raise ValueError(f"{place} is a link that leads out of {runs}, to {place.resolve()}: remove it, or name --runs")
    return place


def recipe_names() -> list[str]:
    """The recipes shipped with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _validated(name: str, tree: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    for override in overrides:
        apply_override(tree, override)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"recipe {name}: " + "; ".join(explain(each, Recipe) for each in error.errors())) from None
    local_path(recipe.data.cache, "data.cache")
    return recipe


def _find(name: str, folder: Path, kind: str) -> Path:
    """A shipped file by its name, or any file by its path."""
    shipped = folder / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name)
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(f"there is no {kind} {name!r}: name one of {names}, or give the path of a YAML file")
