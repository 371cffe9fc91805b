"""What a judge is on disk: the folder with its trained weights, its tokenizer, and `judge.json`, its card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from arena.config import FORMER_POLICIES, ModelSettings, Recipe, change
from arena.data.task import Task
from arena.inference.find import CARD
from arena.model.base_files import base_digest
from arena.model.tuning import is_whole, save_model
from arena.progress import console
from arena.storage.files import atomic_write, write_json
from arena.tasks import task_of

FORMAT = 2  # 2: `base` is the digest of everything that is loaded of a base


@dataclass(frozen=True)
class JudgeCard:
    """The settings of a saved judge.

    Attributes:
        recipe: the recipe that it was trained with, perhaps with some settings changed.
        prior: (C,), the mean label of the training rows.
        trained_on: fingerprint of the training data without the fold, equal for folds that may be averaged.
        base: `base_digest` of the base that the weights were trained on.
    """

    folder: Path
    recipe: Recipe
    prior: np.ndarray
    trained_on: str
    base: str

    @property
    def task(self) -> Task:
        return task_of(self.recipe)

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


def save_judge(model: PreTrainedModel, tokenizer: Any, card: JudgeCard) -> None:
    """Writes trained weights, tokenizer and card to the card's folder, atomically."""
    with atomic_write(card.folder) as draft:
        save_model(model, draft)
        tokenizer.save_pretrained(str(draft))
        write_json(draft / CARD, as_json(card))


def as_json(card: JudgeCard) -> dict[str, Any]:
    """The content of `judge.json`."""
    return {
        "format": FORMAT,
        "recipe": card.recipe.model_dump(mode="json"),
        "prior": card.prior.tolist(),
        "trained_on": card.trained_on,
        "base": card.base,
    }


def read_card(folder: Path, overrides: Sequence[str] = ()) -> JudgeCard:
    """The card of a saved judge.

    Args:
        overrides: settings to change, as in `load_recipe`.

    Raises:
        ValueError: the folder is not a judge, or is damaged, of another version, or exported; or a setting is invalid.
    """
    path = folder / CARD
    if not path.is_file():
        raise ValueError(f"{folder} is not a judge (it has no {CARD}): train one first")
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, card = facts.get("format"), None
        if version == FORMAT:
            _rename_policy(facts["recipe"]["model"])
            recipe = Recipe.model_validate(facts["recipe"])
            prior = np.asarray(facts["prior"], dtype=np.float64)
            card = JudgeCard(folder, recipe, prior, facts["trained_on"], facts["base"])
            _check_prior(prior, len(card.task.classes))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): train the fold again") from None
    if card is None:
        raise ValueError(
            f"{path} was written by another version of arena (format {version}, this one reads {FORMAT}): "
            "train the fold again, or judge with that version"
        )
    if facts.get("exported"):
        raise ValueError(
            f"{folder} was written by `arena export` for transformers: load it with "
            "AutoModelForSequenceClassification.from_pretrained, or name the fold that was exported"
        )
    return replace(card, recipe=change(card.recipe, overrides))


def check_alike(cards: Sequence[JudgeCard]) -> None:
    """Checks that judges can be averaged.

    Raises:
        ValueError: they were trained on different data.
    """
    first = cards[0]
    if odd := [card for card in cards if card.trained_on != first.trained_on]:
        raise ValueError(
            f"{first.folder.parent} and {odd[0].folder.parent} were trained on different data or splits: train them on "
            "the same, or name only one of these folders"
        )
    if any(card.recipe.model_copy(update={"data": first.recipe.data}) != first.recipe for card in cards):
        console.print(
            f"the folds of {first.folder.parent.parent} were not all trained with the same settings; they are averaged "
            "nevertheless"
        )


def _rename_policy(model: dict[str, Any]) -> None:
    """Gives a recompute policy of an earlier version its present name; it does not apply to inference."""
    if (policy := model.get("checkpointing")) in FORMER_POLICIES:
        model["checkpointing"] = FORMER_POLICIES[policy]


def _check_prior(prior: np.ndarray, classes: int) -> None:
    """Raises `ValueError` unless the prior is a probability for each class."""
    good = prior.shape == (classes,) and np.isfinite(prior).all() and (prior >= 0).all()
    if not good or abs(prior.sum() - 1) > 1e-6:
        raise ValueError(f"the prior is {str(prior)[:100]}")
