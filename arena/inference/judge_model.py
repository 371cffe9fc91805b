"""One trained judge's model, loaded from its folder and applied to rows."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch

from arena import __version__
from arena.config import change
from arena.data.dataset import Rows
from arena.data.encoder import Encoder
from arena.data.files import read_files
from arena.data.tokens import TokenStore, encode_in_memory, tokenise
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
from arena.packing.plan import PackPlan
from arena.packing.tree import Prefixes, find_prefixes, prefixes_for
from arena.progress import console
from arena.settings import Recipe
from arena.stopping import stopping


@dataclass(frozen=True)
class Judged:
    """What a model says of rows.

    Attributes:
        by_order: float64 (orders, n, C), the probabilities of the rows as given, by the order in which it read them.
        store: what it read.
        plan: how that was packed.
    """

    by_order: np.ndarray
    store: TokenStore
    plan: PackPlan


@dataclass
class _Loaded:
    """A base in memory under the judges that share it, of which one is active at a time.

    Attributes:
        classifier: of the active judge.
        lock: held while a judge is active.
        judges: how many were loaded so far, which names the next one.
    """

    classifier: PackedClassifier
    lock: RLock = field(default_factory=RLock)
    judges: int = 1


class JudgeModel:
    """One trained model's probabilities: for preference, that A is preferred, that B is, and of a tie.

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
        recipe = with_dtype(saved.recipe, card_of(self.device))
        saved.check_base(recipe.model)
        own = {"base": str(saved.folder), "revision": None} if is_whole(saved.folder) else {}
        self._config = base_config(recipe.model.model_copy(update=own))
        check_exact(self._config, recipe.model, recipe.prompt.max_length, trained=True)
        model = load_trained(saved.folder, recipe.model, saved.task.classes)
        self._loaded = _Loaded(PackedClassifier(model).to(self.device).eval())
        self._become(saved, recipe, active_judge(model))
        attention_choice(model, recipe.model.dtype, training=False)

    def _become(self, saved: SavedJudge, recipe: Recipe, name: str) -> None:
        self.saved, self.recipe, self.task, self.folder, self._name = saved, recipe, saved.task, saved.folder, name
        self.tokenizer = load_tokenizer(str(saved.folder))
        self._encoder: Encoder | None = None
        self._planned: tuple[Any, Evaluation] | None = None

    @property
    def classifier(self) -> PackedClassifier:
        """The model with this judge's weights active, until another judge on its base is."""
        if active_judge(self._loaded.classifier.model) != self._name:
            activate(self._loaded.classifier.model, self._name)
        return self._loaded.classifier

    def beside(self, saved: SavedJudge) -> JudgeModel | None:
        """Another judge on the same base, which is loaded once; None if that judge needs another base.

        Raises:
            ValueError: its weights are damaged, or do not fit the base; this judge can then no longer be used.
        """
        recipe, loaded = with_dtype(saved.recipe, card_of(self.device)), self._loaded
        if is_whole(saved.folder) or is_whole(self.folder) or saved.base != self.saved.base:
            return None
        if saved.task != self.task or incompatible_setting(recipe.model, self.recipe.model) is not None:
            return None
        check_exact(self._config, recipe.model, recipe.prompt.max_length, trained=True)
        other, name = copy(self), f"judge{loaded.judges}"
        loaded.judges += 1
        with loaded.lock:
            model = add_trained(loaded.classifier.model, saved.folder, recipe.model, name)
            loaded.classifier = PackedClassifier(model).to(self.device).eval()
        other._become(saved, recipe, name)
        other._planned = self._planned
        return other

    def shares_base(self, other: JudgeModel) -> bool:
        """Whether another judge is on the same base in memory, so that the two take turns."""
        return self._loaded is other._loaded

    def drop(self, former: JudgeModel) -> None:
        """Makes this judge active, and frees the weights of another one on its base, which can then not be used."""
        with self._loaded.lock:
            self._loaded.classifier = PackedClassifier(unload(self.classifier.model, former._name)).eval()

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
        own = self._by_order(self.evaluation(rows), parts).mean(axis=0)
        print_kinds(self.saved.used_kinds, rows)
        return with_kinds(self.saved.used_kinds, rows, own)

    def in_memory(self, rows: Rows, parts: Path | None = None) -> Judged:
        """Judges rows as `probabilities` does, in any thread, with no other files than `parts`; see there for errors.

        Args:
            parts: as in `probabilities`; the fingerprint of `rows` must then change when they do.
        """
        with self._loaded.lock, console.quiet_here():
            if self._encoder is None:
                self._encoder = self.task.encoder(self.tokenizer, self.recipe.prompt)
            orders = self.task.orders if self.recipe.reads_all_orders else 1
            store = encode_in_memory(rows, self._encoder, orders=orders)
            self._check_ids(store)
            evaluation = self._evaluation(rows, store, find_prefixes(store) if self.recipe.packing.share else None)
            own = self._by_order(evaluation, parts)
        return Judged(np.stack([with_kinds(self.saved.used_kinds, rows, each) for each in own]), store, evaluation.plan)

    def _by_order(self, evaluation: Evaluation, parts: Path | None) -> np.ndarray:
        """The model's own probabilities of rows in each order."""
        known: dict[str, Any] = {"dtype": self.recipe.model.dtype, "prior": self.saved.prior}
        if parts is None:
            return evaluation.by_order(self.classifier, **known)
        with stopping() as stop:
            found = evaluation.by_order(self.classifier, **known, logits_cache=self.logits_cache(parts), stop=stop)
        if stop():  # the signal arrived after the last micro-batch
            raise stop.stopped()
        return found

    def evaluation(self, rows: Rows) -> Evaluation:
        """The plan by which this judge evaluates rows; that of the last rows is kept for other judges on its base."""
        store = self.tokens(rows)
        key = store.fingerprint, self.recipe.packing
        if self._planned is None or self._planned[0] != key:
            prefixes = prefixes_for(store, self.recipe.packing, Path(self.recipe.data.cache))
            self._planned = key, self._evaluation(rows, store, prefixes)
        return self._planned[1]

    def _evaluation(self, rows: Rows, store: TokenStore, prefixes: Prefixes | None) -> Evaluation:
        return Evaluation(
            self.task, store, np.arange(len(rows)), orders=range(store.orders), budget=self.recipe.packing.budget,
            prefixes=prefixes, has_input=rows.has_input, ids=rows.ids, joins=self.task.joins(self.recipe.prompt),
        )  # fmt: skip

    def tokens(self, rows: Rows) -> TokenStore:
        """The token ids of rows, in all orders in which this judge is shown them; errors are as in `probabilities`."""
        store = tokens_of(self.recipe, rows, self.tokenizer)
        self._check_ids(store)
        return store

    def _check_ids(self, store: TokenStore) -> None:
        check_ids(underlying(self._loaded.classifier.model).config, store, self.tokenizer, self.recipe.model.base)

    def logits_cache(self, parts: Path) -> LogitsCache:
        """A cache of this judge's logits in a folder."""
        return LogitsCache(parts, self._identity(), f"{device_name(self.device)}, torch {torch.__version__}")

    def _identity(self) -> dict[str, Any]:
        """What determines this judge's logits besides tokens and plan: its files, its base, and the model settings."""
        settings = self.recipe.model.model_dump(mode="json", exclude={"base"})  # the base counts by its content
        return {
            "judge": self.saved.digest,
            "base": self.saved.base,
            "settings": settings,
            "package": __version__,
        }


def tokens_of(recipe: Recipe, rows: Rows, tokenizer: Any) -> TokenStore:
    """The token ids of rows in all orders in which a judge of this recipe, which need not be loaded, is shown them."""
    orders = rows.task.orders if recipe.reads_all_orders else 1
    return tokenise(rows, tokenizer, recipe.prompt, Path(recipe.data.cache), orders=orders)
