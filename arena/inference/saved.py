"""A judge on disk: its folder with trained weights, tokenizer and settings, and its export as a plain model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from arena.config import change
from arena.data.task import Task
from arena.inference.find import JUDGE_FILE
from arena.inference.kinds import Kind
from arena.model.base_files import base_digest
from arena.model.tuning import is_whole, save_model
from arena.progress import console
from arena.settings import FORMER_POLICIES, ModelSettings, Recipe
from arena.storage.files import atomic_write, file_digest, fingerprint, write_json
from arena.tasks import task_of

FORMAT = 2  # 2: `base` is the digest of everything that is loaded of a base


@dataclass(frozen=True)
class SavedJudge:
    """The settings of a saved judge.

    Attributes:
        recipe: the recipe that it was trained with, perhaps with some settings changed.
        prior: (C,), what is predicted for rows without input, as in `FoldData`.
        trained_on: fingerprint of the training data without the fold, equal for folds that may be averaged.
        base: `base_digest` of the base that the weights were trained on.
        kinds: of special rows, by which predictions change; none: all are the model's own.
    """

    folder: Path
    recipe: Recipe
    prior: np.ndarray
    trained_on: str
    base: str
    kinds: tuple[Kind, ...] = ()

    @property
    def task(self) -> Task:
        return task_of(self.recipe)

    @property
    def digest(self) -> str:
        """A fingerprint of its files."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return fingerprint([[path.name, file_digest(path)] for path in files])

    @property
    def used_kinds(self) -> tuple[Kind, ...]:
        """The kinds, unless `judge.kinds=false`."""
        return self.kinds if self.recipe.judge.kinds else ()

    def check_base(self, settings: ModelSettings) -> None:
        """Checks by content that a base is the one that the judge was trained on.

        A judge with all weights trained contains them and needs no base.

        Raises:
            ValueError: the base has other content, regardless of its place and name.
        """
        if not is_whole(self.folder) and base_digest(settings.base, settings.revision) != self.base:
            raise ValueError(
                f"{self.folder} was not trained on the base that {settings.base} now holds: restore that base, or give "
                "its folder with model.base=FOLDER"
            )


def save_judge(model: PreTrainedModel, tokenizer: Any, saved: SavedJudge) -> None:
    """Writes trained weights, tokenizer and settings to the judge's folder, atomically."""
    with atomic_write(saved.folder) as draft:
        save_model(model, draft)
        tokenizer.save_pretrained(str(draft))
        write_json(draft / JUDGE_FILE, as_json(saved))


def as_json(saved: SavedJudge) -> dict[str, Any]:
    """The content of `judge.json`."""
    return {
        "format": FORMAT,
        "recipe": saved.recipe.model_dump(mode="json"),
        "prior": saved.prior.tolist(),
        "trained_on": saved.trained_on,
        "base": saved.base,
        "kinds": [asdict(kind) for kind in saved.kinds],
    }


def read_judge(folder: Path, overrides: Sequence[str] = (), *, exported: bool = False) -> SavedJudge:
    """The settings of a saved judge.

    Args:
        overrides: settings to change, as in `load_recipe`.
        exported: whether the folder may be one that `arena export` wrote.

    Raises:
        ValueError: the folder is not a judge, or is damaged, of another version, or exported; or a setting is invalid.
    """
    path = folder / JUDGE_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not a judge (it has no {JUDGE_FILE}): train one first")
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, saved = facts.get("format"), None
        if version == FORMAT:
            _rename_policy(facts["recipe"]["model"])
            recipe = Recipe.model_validate(facts["recipe"])
            prior = np.asarray(facts["prior"], dtype=np.float64)
            kinds = TypeAdapter(tuple[Kind, ...]).validate_python(facts.get("kinds", []))  # absent from earlier judges
            saved = SavedJudge(folder, recipe, prior, facts["trained_on"], facts["base"], kinds)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): train the fold again") from None
    if saved is None:
        raise ValueError(
            f"{path} was written by another version of arena (format {version}, this one reads {FORMAT}): "
            "train the fold again, or judge with that version"
        )
    try:
        task = saved.task
    except ValueError as error:
        raise ValueError(f"{path}: {error}, or use the version of arena that wrote it") from None
    _check_mean(path, "prior", saved.prior, task)
    for kind in saved.kinds:
        _check_mean(path, f"mean label of {kind.name!r}", np.array(kind.mean), task)
        if kind.name not in task.kinds:
            raise ValueError(f"{path} is damaged (rows are of no kind {kind.name!r}): train the fold again")
    if facts.get("exported") and not exported:
        raise ValueError(
            f"{folder} was written by `arena export` for transformers: load it with "
            f"{auto_class(task)}.from_pretrained, or name the fold that was exported"
        )
    return replace(saved, recipe=change(saved.recipe, overrides))


def auto_class(task: Task) -> str:
    """The class of transformers with which an exported model is loaded."""
    return "AutoModelForSequenceClassification" if task.classes else "AutoModelForCausalLM"


def check_classes(saved: SavedJudge) -> None:
    """Raises `ValueError` for a language model, which has no classes whose probabilities it could give."""
    if not saved.task.classes:
        raise ValueError(
            f"{saved.folder} is a language model, tuned on the task {saved.task.name}, and not a judge: let it answer "
            "prompts with `arena generate`"
        )


def check_alike(judges: Sequence[SavedJudge]) -> None:
    """Checks that judges can be averaged.

    Raises:
        ValueError: they were trained on different data, or are language models.
    """
    first = judges[0]
    check_classes(first)
    if odd := [saved for saved in judges if saved.trained_on != first.trained_on]:
        raise ValueError(
            f"{first.folder.parent} and {odd[0].folder.parent} were trained on different data or splits: train them on "
            "the same, or name only one of these folders"
        )
    if any(saved.recipe.model_copy(update={"data": first.recipe.data}) != first.recipe for saved in judges):
        console.print(
            f"the folds of {first.folder.parent.parent} were not all trained with the same settings; they are averaged "
            "nevertheless"
        )


def _rename_policy(model: dict[str, Any]) -> None:
    """Gives a recompute policy of an earlier version its present name; it does not apply to inference."""
    if (policy := model.get("checkpointing")) in FORMER_POLICIES:
        model["checkpointing"] = FORMER_POLICIES[policy]


def _check_mean(path: Path, what: str, mean: np.ndarray, task: Task) -> None:
    """Raises `ValueError` unless a mean label is a probability for each class, or 0 without classes."""
    good = mean.shape == (len(task.columns),) and np.isfinite(mean).all() and (mean >= 0).all()
    if not good or abs(mean.sum() - bool(task.classes)) > 1e-6:
        raise ValueError(f"{path} is damaged (the {what} is {str(mean)[:100]}): train the fold again")
