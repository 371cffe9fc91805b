"""A trained judge: saved with everything it needs, loaded from its folder, and applied to rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from arena import __version__
from arena.config import FORMER_POLICIES, ModelSettings, Recipe, change
from arena.data.conversations import rows_with_responses
from arena.data.prepare import source
from arena.data.tokens import tokenise
from arena.distributed import device_name, let_segments_grow
from arena.inference.evaluate import predict_or_prior
from arena.inference.find import CARD
from arena.inference.logits_cache import LogitsCache
from arena.model.backbone import attention_choice, base_config, load_tokenizer, underlying
from arena.model.base_files import base_digest
from arena.model.card import card_of, with_dtype
from arena.model.classifier import PackedClassifier
from arena.model.exactness import check_exact
from arena.model.input_limits import check_ids
from arena.model.tuning import is_whole, load_trained, save_model
from arena.packing.tree import prefixes_for
from arena.stopping import stopping
from arena.storage.files import atomic_write, file_digest, fingerprint, write_json

FORMAT = 2  # 2: `base` is the digest of everything that is loaded of a base


class Judge:
    """Probabilities that A is preferred, that B is, and of a tie.

    Args:
        folder: as written by `save_judge`.
        overrides: settings to change, as in `load_recipe`, such as `packing.budget=8192` on a smaller GPU.
        device: where to run; by default the GPU if there is one.

    Raises:
        ValueError: the folder is not a judge, or one of another version; its base differs from the one that it was
            trained on, or mixes the rows of a packed batch; or the recipe's attention backend or dtype is not available
            here.
    """

    def __init__(self, folder: Path, overrides: Sequence[str] = (), device: torch.device | str | None = None) -> None:
        card = read_card(folder)
        let_segments_grow()
        self.folder = folder
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.recipe = with_dtype(change(Recipe.model_validate(card["recipe"]), overrides), card_of(self.device))
        check_same_base(folder, self.recipe.model)
        own = {"base": str(folder), "revision": None} if is_whole(folder) else {}
        config = base_config(self.recipe.model.model_copy(update=own))
        check_exact(config, self.recipe.model, self.recipe.prompt.max_length, trained=True)
        self._base = card["base"]
        self.prior = np.asarray(card["prior"])
        self.tokenizer = load_tokenizer(str(folder))
        self.classifier = PackedClassifier(load_trained(folder, self.recipe.model)).to(self.device).eval()
        attention_choice(self.classifier.model, self.recipe.model.dtype, training=False)

    def probabilities(self, rows: Dataset, cache: Path, parts: Path | None = None) -> np.ndarray:
        """Judges conversations from `read_conversations`.

        Args:
            cache: folder that caches tokens between calls.
            parts: a folder that caches logits, from which the same call resumes with the same probabilities. SIGTERM,
                SIGINT and SIGHUP then stop after the current micro-batch. None caches no logits.

        Returns:
            float64 (len(rows), 3) in the order of the rows: A, B, tie. A row without any response gets the prior, the
            mean label of the training rows.

        Raises:
            FloatingPointError: a row's logits are not finite; the message names its id.
            ValueError: a token of the rows is not in the base's embedding.
            Stopped: a signal arrived; the logits computed so far are in `parts`.
        """
        swap = self.recipe.judge.swap
        store = tokenise(rows, source(rows), self.tokenizer, self.recipe.prompt, cache, both_orders=swap)
        check_ids(underlying(self.classifier.model).config, store, self.tokenizer, self.recipe.model.base)
        everything, has_responses = np.arange(len(rows)), rows_with_responses(rows)
        prefixes = prefixes_for(store, self.recipe.packing, cache)
        known = (self.classifier, store, everything, has_responses, self.prior, self.recipe, prefixes)
        if parts is None:
            return predict_or_prior(*known, ids=rows["id"])
        logits_cache = LogitsCache(parts, self._identity(), f"{device_name(self.device)}, torch {torch.__version__}")
        with stopping() as stop:
            probabilities = predict_or_prior(*known, ids=rows["id"], logits_cache=logits_cache, stop=stop)
        if stop():  # the signal arrived after the last micro-batch
            raise stop.stopped()
        return probabilities

    def _identity(self) -> dict[str, Any]:
        """What determines this judge's logits besides tokens and plan: its files, its base, and the model settings."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        settings = self.recipe.model.model_dump(mode="json", exclude={"base"})  # the base counts by its content
        return {
            "judge": fingerprint([[path.name, file_digest(path)] for path in files]),
            "base": self._base,
            "settings": settings,
            "package": __version__,
        }


def save_judge(
    folder: Path, model: PreTrainedModel, tokenizer: Any, recipe: Recipe, prior: np.ndarray, trained_on: str, base: str
) -> None:
    """Writes adapter, head, tokenizer and settings to `folder` atomically.

    Args:
        trained_on: fingerprint of the training data without the fold, equal for folds that may be averaged.
        base: `base_digest` of the base that the adapter was trained on.
    """
    card = {
        "format": FORMAT,
        "recipe": recipe.model_dump(mode="json"),
        "prior": prior.tolist(),
        "trained_on": trained_on,
        "base": base,
    }
    with atomic_write(folder) as draft:
        save_model(model, draft)
        tokenizer.save_pretrained(str(draft))
        write_json(draft / CARD, card)


def check_same_base(folder: Path, settings: ModelSettings) -> None:
    """Checks by content that a base is the one that a judge was trained on.

    A judge with all weights trained contains them and needs no base.

    Raises:
        ValueError: the base has other content, regardless of its place and name.
    """
    if is_whole(folder):
        return
    if base_digest(settings.base, settings.revision) != read_card(folder)["base"]:
        raise ValueError(
            f"{folder} was not trained on the base that {settings.base} now holds: restore that base, or give its "
            "folder with model.base=FOLDER"
        )


def read_card(folder: Path) -> dict[str, Any]:
    """The settings of a saved judge.

    Raises:
        ValueError: the folder is not a judge, or is damaged, of another version, or exported.
    """
    path = folder / CARD
    if not path.is_file():
        raise ValueError(f"{folder} is not a judge (it has no {CARD}): train one first")
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = card.get("format")
        if version == FORMAT:
            _rename_policy(card["recipe"]["model"])
            Recipe.model_validate(card["recipe"])
            _check_prior(card["prior"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): train the fold again") from None
    if version != FORMAT:
        raise ValueError(
            f"{path} was written by another version of arena (format {version}, this one reads {FORMAT}): "
            "train the fold again, or judge with that version"
        )
    if card.get("exported"):
        raise ValueError(
            f"{folder} was written by `arena export` for transformers: load it with "
            "AutoModelForSequenceClassification.from_pretrained, or name the fold that was exported"
        )
    return card


def _rename_policy(model: dict[str, Any]) -> None:
    """Gives a recompute policy of an earlier version its present name; it does not apply to inference."""
    if (policy := model.get("checkpointing")) in FORMER_POLICIES:
        model["checkpointing"] = FORMER_POLICIES[policy]


def _check_prior(prior: Any) -> None:
    """Raises `ValueError` unless the prior is three probabilities."""
    values = np.asarray(prior, dtype=np.float64)
    if values.shape != (3,) or not np.isfinite(values).all() or (values < 0).any() or abs(values.sum() - 1) > 1e-6:
        raise ValueError(f"the prior is {str(prior)[:100]}")
