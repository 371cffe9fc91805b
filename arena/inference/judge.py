"""A trained judge, loaded from its folder and applied to rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from arena import __version__
from arena.config import change
from arena.data.dataset import Rows
from arena.data.files import read_files
from arena.data.tokens import TokenStore, tokenise
from arena.distributed import device_name, let_segments_grow
from arena.inference.evaluate import Evaluation
from arena.inference.kinds import print_kinds, with_kinds
from arena.inference.logits import LogitsCache
from arena.inference.saved import SavedJudge, check_classes, read_judge
from arena.model.adapters import activate, active_judge, add_trained, incompatible_setting, unload
from arena.model.backbone import attention_choice, base_config, load_tokenizer, underlying
from arena.model.base_files import check_ids
from arena.model.card import card_of, with_dtype
from arena.model.classifier import PackedClassifier
from arena.model.exactness import check_exact
from arena.model.tuning import is_whole, load_trained
from arena.packing.tree import prefixes_for
from arena.settings import Recipe
from arena.stopping import stopping
from arena.storage.files import file_digest, fingerprint


class Judge:
    """A trained model's probabilities: for preference, that A is preferred, that B is, and of a tie.

    Args:
        folder: the `model` folder of a fold, or what `read_judge` read of it.
        overrides: settings to change, as in `load_recipe`, such as `packing.budget=8192` on a smaller GPU.
        device: where to run; by default the GPU if there is one.

    Raises:
        ValueError: the folder is not a judge, or one of another version, or a language model; its base differs from the
            one that it was trained on, or mixes the rows of a packed batch; or the recipe's attention backend or dtype
            is not available here.
    """

    def __init__(
        self, folder: str | Path | SavedJudge, overrides: Sequence[str] = (), device: torch.device | str | None = None
    ) -> None:
        if isinstance(folder, SavedJudge):
            saved = replace(folder, recipe=change(folder.recipe, overrides))
        else:
            saved = read_judge(Path(folder), overrides)
        check_classes(saved)
        let_segments_grow()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._planned: tuple[Any, Evaluation] | None = None
        self._switched = 0
        recipe = with_dtype(saved.recipe, card_of(self.device))
        saved.check_base(recipe.model)
        own = {"base": str(saved.folder), "revision": None} if is_whole(saved.folder) else {}
        self._config = base_config(recipe.model.model_copy(update=own))
        check_exact(self._config, recipe.model, recipe.prompt.max_length, trained=True)
        self._become(saved, recipe, load_trained(saved.folder, recipe.model, saved.task.classes))
        attention_choice(self.classifier.model, recipe.model.dtype, training=False)

    def _become(self, saved: SavedJudge, recipe: Recipe, model: PreTrainedModel) -> None:
        self.saved, self.recipe, self.task, self.folder = saved, recipe, saved.task, saved.folder
        self.tokenizer = load_tokenizer(str(saved.folder))
        self.classifier = PackedClassifier(model).to(self.device).eval()

    def switch(self, saved: SavedJudge) -> bool:
        """Turns this into another judge on the same base, which stays loaded; adapters and head are replaced.

        Returns:
            False if that judge needs another base; this judge is then unchanged.

        Raises:
            ValueError: its weights are damaged, or do not fit the base; this judge can then no longer be used.
        """
        recipe, model = with_dtype(saved.recipe, card_of(self.device)), self.classifier.model
        if is_whole(saved.folder) or is_whole(self.folder) or saved.base != self.saved.base:
            return False
        if saved.task != self.task or incompatible_setting(recipe.model, self.recipe.model) is not None:
            return False
        check_exact(self._config, recipe.model, recipe.prompt.max_length, trained=True)
        former, name = active_judge(model), f"judge{self._switched}"
        self._switched += 1
        model = add_trained(model, saved.folder, recipe.model, name)
        activate(model, name)
        self._become(saved, recipe, unload(model, former))
        return True

    def read(self, paths: str | Path | Sequence[str | Path]) -> Rows:
        """The rows of CSV, parquet or JSONL files, whose labels are ignored; errors are as in `read_dataset`."""
        several = [paths] if isinstance(paths, str | Path) else paths
        return read_files(several, self.task, self.recipe.data, "ignored")

    def probabilities(self, rows: Rows, *, parts: Path | None = None) -> np.ndarray:
        """Judges rows.

        Args:
            rows: as from `read`.
            parts: a folder that caches logits, from which the same call resumes with the same probabilities. SIGTERM,
                SIGINT and SIGHUP then stop after the current micro-batch. None caches no logits.

        Returns:
            float64 (len(rows), C) in the order of the rows; for preference the classes are A, B, tie. A row without
            input, such as one without any response, gets the prior, the mean label of the training rows. Rows of a
            kind that the judge knows are drawn to that kind's mean label, unless `judge.kinds=false`; how many is
            printed.

        Raises:
            FloatingPointError: a row's logits are not finite; the message names its id.
            ValueError: a token of the rows is not in the base's embedding.
            Stopped: a signal arrived; the logits computed so far are in `parts`.
        """
        if not isinstance(rows, Rows) or rows.task != self.task:
            raise ValueError(f"rows is a {type(rows).__name__}: give what this judge's `read` returns for your files")
        own = self._own(rows, parts)
        print_kinds(self.saved.used_kinds, rows)
        return with_kinds(self.saved.used_kinds, rows, own)

    def _own(self, rows: Rows, parts: Path | None) -> np.ndarray:
        """The model's own probabilities of rows."""
        evaluation = self.evaluation(rows)
        known: dict[str, Any] = {"dtype": self.recipe.model.dtype, "prior": self.saved.prior}
        if parts is None:
            return evaluation.probabilities(self.classifier, **known)
        logits_cache = self.logits_cache(parts)
        with stopping() as stop:
            probabilities = evaluation.probabilities(self.classifier, **known, logits_cache=logits_cache, stop=stop)
        if stop():  # the signal arrived after the last micro-batch
            raise stop.stopped()
        return probabilities

    def evaluation(self, rows: Rows) -> Evaluation:
        """The plan by which this judge evaluates rows; that of the last rows is kept for other judges on its base."""
        store = self.tokens(rows)
        key = store.fingerprint, self.recipe.packing
        if self._planned is None or self._planned[0] != key:
            prefixes = prefixes_for(store, self.recipe.packing, Path(self.recipe.data.cache))
            evaluation = Evaluation(
                self.task, store, np.arange(len(rows)), orders=range(store.orders), budget=self.recipe.packing.budget,
                prefixes=prefixes, has_input=rows.has_input, ids=rows.ids,
            )  # fmt: skip
            self._planned = key, evaluation
        return self._planned[1]

    def tokens(self, rows: Rows) -> TokenStore:
        """The token ids of rows, in all orders in which this judge is shown them; errors are as in `probabilities`."""
        store = tokens_of(self.recipe, rows, self.tokenizer)
        check_ids(underlying(self.classifier.model).config, store, self.tokenizer, self.recipe.model.base)
        return store

    def logits_cache(self, parts: Path) -> LogitsCache:
        """A cache of this judge's logits in a folder."""
        return LogitsCache(parts, self._identity(), f"{device_name(self.device)}, torch {torch.__version__}")

    def _identity(self) -> dict[str, Any]:
        """What determines this judge's logits besides tokens and plan: its files, its base, and the model settings."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        settings = self.recipe.model.model_dump(mode="json", exclude={"base"})  # the base counts by its content
        return {
            "judge": fingerprint([[path.name, file_digest(path)] for path in files]),
            "base": self.saved.base,
            "settings": settings,
            "package": __version__,
        }


def tokens_of(recipe: Recipe, rows: Rows, tokenizer: Any) -> TokenStore:
    """The token ids of rows in all orders in which a judge of this recipe, which need not be loaded, is shown them."""
    orders = rows.task.orders if recipe.judge.swap else 1
    return tokenise(rows, tokenizer, recipe.prompt, Path(recipe.data.cache), orders=orders)
