"""A trained judge: saved with all it needs, loaded from its folder, asked about rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from arena.config import Recipe, change
from arena.data.conversations import judgeable_rows
from arena.data.prepare import source
from arena.data.tokens import tokenise
from arena.files import write_json, written_whole
from arena.judging.inference import predict_or_prior
from arena.model.backbone import attention_choice, base_digest, load_tokenizer
from arena.model.card import card_of
from arena.model.classifier import PackedClassifier
from arena.model.precision import with_dtype
from arena.model.tuning import load_trained, save_model
from arena.packing.tree import prefixes_for

FORMAT = 1


class Judge:
    """Probabilities that A is preferred, that B is, and of a tie.

    Args:
        folder: what `save_judge` wrote.
        overrides: settings to change, as in `load_recipe`, such as `packing.budget=8192` on a smaller GPU.
        device: where to run; the GPU if there is one.

    Raises:
        ValueError: the folder holds no judge, or one of another version; or the recipe names an attention backend or a
            dtype that cannot run here.
    """

    def __init__(self, folder: Path, overrides: Sequence[str] = (), device: torch.device | str | None = None) -> None:
        card = read_card(folder)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.recipe = with_dtype(change(Recipe.model_validate(card["recipe"]), overrides), card_of(self.device))
        moved = any(override.startswith("model.base=") for override in overrides)
        if base_digest(self.recipe.model.base) != card["base"] and not moved:
            raise ValueError(
                f"{folder} was trained on another base than {self.recipe.model.base} is now: bring that base back, "
                "train anew, or say with model.base= where it is"
            )
        self.prior = np.asarray(card["prior"])
        self.tokenizer = load_tokenizer(str(folder))
        self.classifier = PackedClassifier(load_trained(folder, self.recipe.model)).to(self.device).eval()
        attention_choice(self.classifier.model, self.recipe.model.dtype, training=False)

    def probabilities(self, rows: Dataset, cache: Path) -> np.ndarray:
        """Judges conversations from `read_conversations`.

        Args:
            cache: where tokens are kept between calls.

        Returns:
            float64 (len(rows), 3) in the order of the rows: A, B, tie. A row with nothing to judge gets the prior, the
            mean label of the training rows.
        """
        swap = self.recipe.judge.swap
        store = tokenise(rows, source(rows), self.tokenizer, self.recipe.prompt, cache, both_orders=swap)
        everything, judgeable = np.arange(len(rows)), judgeable_rows(rows)
        prefixes = prefixes_for(store, self.recipe.packing, cache)
        return predict_or_prior(self.classifier, store, everything, judgeable, self.prior, self.recipe, prefixes)


def save_judge(
    folder: Path, model: PreTrainedModel, tokenizer: Any, recipe: Recipe, prior: np.ndarray, trained_on: str, base: str
) -> None:
    """Writes adapter, head, tokenizer and settings into `folder`, all or nothing.

    Args:
        trained_on: fingerprint of the training data without the fold, by which folds that belong together are known.
        base: `base_digest` of the base that the adapter was trained on.
    """
    card = {
        "format": FORMAT,
        "recipe": recipe.model_dump(mode="json"),
        "prior": prior.tolist(),
        "trained_on": trained_on,
        "base": base,
    }
    with written_whole(folder) as draft:
        save_model(model, draft)
        tokenizer.save_pretrained(str(draft))
        write_json(draft / "judge.json", card)


def read_card(folder: Path) -> dict[str, Any]:
    """The settings of a saved judge.

    Raises:
        ValueError: the folder holds no judge, or one of another version.
    """
    path = folder / "judge.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no judge (no judge.json): train one first")
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if card.get("format") != FORMAT:
        raise ValueError(f"{path} has format {card.get('format')}, this version reads {FORMAT}: train the fold again")
    return card
