"""Judges in memory, for Python: from rows to probabilities, rankings and explanations.

judge = arena.Judge.from_pretrained("runs/demo")
judge.predict_proba([{"prompt": "Name a fruit.", "response_a": "An apple.", "response_b": "A chair."}])  # A, B, tie
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from arena.data.dataset import Rows
from arena.data.files import read_files
from arena.data.limits import Limits
from arena.data.records import Records, cells_of, rows_of_records
from arena.data.task import Baseline
from arena.data.tokens import TokenStore
from arena.inference.blend import Blend, is_blend, read_blend
from arena.inference.find import find_models
from arena.inference.infer_blend import baseline_of, judges_of
from arena.inference.judge_model import Judged, JudgeModel
from arena.inference.kinds import names_of_kinds
from arena.inference.saved import SavedJudge, check_alike, read_judge
from arena.inference.verdicts import Explanation, Order, Ranking, Verdicts, ranking, tie_of
from arena.metrics import accuracy
from arena.progress import console


class Judge:
    """One trained judge, or the average of several: get one with `from_pretrained`.

    Rows are a dict or many with the columns of a file of rows, a data frame, a data set, or what `read` gives. Nothing
    is written, and nothing is printed. All methods may be called from several threads, which take turns on a base.

    Attributes:
        task: what rows mean.
        classes_: the names of the classes, in the order of all probabilities.
    """

    def __init__(self, parts: Sequence[Sequence[JudgeModel] | Baseline], blend: Blend | None = None) -> None:
        """Joins models that are loaded.

        Args:
            parts: models whose probabilities are averaged, or a simple model; the first has models.
            blend: how the parts become one; None: there is one part.
        """
        if isinstance(parts, str | Path):
            raise ValueError(f"a Judge is made of loaded models: write arena.Judge.from_pretrained({str(parts)!r})")
        assert blend is not None or len(parts) == 1, "several parts need a blend"
        self._parts, self._blend = list(parts), blend
        self.models = [model for part in parts if not callable(part) for model in part]
        self.task = self.models[0].task
        self.classes_ = np.array(self.task.classes)
        self._limits = Limits.of(self.models[0].recipe.data)

    @classmethod
    def from_pretrained(
        cls, *names: str | Path, settings: Sequence[str] = (), device: torch.device | str | None = None,
        runs: str | Path = "runs", beside: Sequence[Judge] = (),
    ) -> Judge:  # fmt: skip
        """Loads judges that were trained on the same data. A base that they share is loaded once.

        Args:
            names: runs, whose finished folds are averaged; folders of a run, a fold, or a fold's `model`; or the file
                of one blend.
            settings: to change, as in `load_recipe`, such as `judge.swap=false` to read rows in one order.
            device: where to run; by default the GPU if there is one.
            runs: the folder in which runs are found by name.
            beside: judges on the same device, whose bases are used too instead of loading them again.

        Raises:
            ValueError: there is no such judge, or it cannot be loaded; as `find_models` and `JudgeModel` say.
        """
        if not names:
            raise ValueError('name a judge, such as Judge.from_pretrained("runs/demo")')
        loaded = [model for judge in beside for model in judge.models]
        with console.quiet_here():
            if is_blend(str(names[0])):
                return cls._of_blend(names, settings, device, loaded)
            folders = [model for name in names for model in find_models(str(name), Path(runs))]
            saved = [read_judge(folder, settings) for folder in folders]
            check_alike(saved)
            return cls([load_models(saved, device, loaded)])

    @classmethod
    def _of_blend(
        cls, names: Sequence[str | Path], settings: Sequence[str], device: torch.device | str | None,
        loaded: Sequence[JudgeModel],
    ) -> Judge:  # fmt: skip
        if len(names) > 1:
            raise ValueError(f"{names[0]} is a blend, which is a whole judge: name it alone")
        saved = read_blend(Path(names[0]))
        used = [(each, weight) for each, weight in zip(saved.members, saved.blend.weights, strict=True) if weight > 0]
        members = [member for member, _ in used]
        if odd := [member.name for member in members if member.kind == "file"]:
            raise ValueError(f"{names[0]} needs a file of predictions, {odd[0]}: blend runs only, to judge other rows")
        judges = judges_of(members, settings)
        every = [each for folds in judges.values() for each in folds]
        if not every:
            raise ValueError(f"{names[0]} uses no run, only a baseline: it is not a judge")
        models = dict(zip(map(id, every), load_models(every, device, loaded), strict=True))
        parts: list[Sequence[JudgeModel] | Baseline] = [
            [models[id(each)] for each in judges[member.name]]
            if member.kind == "run"
            else baseline_of(member, every[0].task, every[0].recipe.data)
            for member in members
        ]
        return cls(parts, replace(saved.blend, weights=tuple(weight for _, weight in used)))

    def read(self, paths: str | Path | Sequence[str | Path], *, labelled: bool = False) -> Rows:
        """The rows of CSV, parquet, JSON or JSONL files, cached as in training; errors are as in `read_dataset`."""
        several = [paths] if isinstance(paths, str | Path) else paths
        return read_files(several, self.task, self.models[0].recipe.data, "required" if labelled else "ignored")

    def predict_proba(self, rows: Rows | Records) -> np.ndarray:
        """The probabilities of the classes: float64 (n, C), the mean over orders and models.

        A row without input, such as one without any response, gets the mean label of the training rows. Rows of a kind
        that the judge knows are drawn to that kind's mean label, unless `judge.kinds=false`.

        Raises:
            BadRecordsError: rows cannot be used; it is a ValueError that has all `problems`.
            FloatingPointError: a row's logits are not finite.
        """
        return self.verdicts(rows).mean

    def predict_orders(self, rows: Rows | Records) -> np.ndarray:
        """The probabilities in each order of the rows: float64 (orders, n, C), each as of the rows as given.

        Their mean over the orders is that of `predict_proba`, except of a blend, which is not linear.
        """
        return self.verdicts(rows).by_order

    def verdicts(self, rows: Rows | Records, parts: Path | None = None) -> Verdicts:
        """All of this at once, with the tokens that it took; errors are as in `predict_proba`.

        Args:
            parts: a folder that caches logits, as for `JudgeModel.in_memory`.
        """
        rows = self._checked(rows)
        by_part, judged = self._judged(rows, parts)
        by_order = np.stack([self._pooled(by_part[:, at], rows) for at in range(by_part.shape[1])])
        tokens, logical = (sum(int(getattr(each.plan, name).sum()) for each in judged) for name in PLANNED)
        return Verdicts(self._pooled(by_part.mean(axis=1), rows), by_order, tokens, logical)

    def predict(self, rows: Rows | Records) -> np.ndarray:
        """The name of each row's most probable class, (n,)."""
        return np.asarray(self.classes_[self.predict_proba(rows).argmax(axis=1)])

    def score(self, rows: Rows | Records) -> float:
        """The accuracy on labelled rows, as scikit-learn's classifiers give it; see `arena.metrics` for others.

        Raises:
            BadRecordsError: as in `predict_proba`, also for rows without a label.
        """
        checked = self._checked(rows, labelled=True)
        return accuracy(checked.labels, self.predict_proba(checked))

    def position_flip_rate(self, rows: Rows | Records) -> float:
        """How often the most probable class of a row depends on the order in which its answers are shown.

        Raises:
            ValueError: there are no rows, or the judge reads one order only.
        """
        checked = self._checked(rows)
        by_class = self.predict_orders(checked)[:, checked.has_input].argmax(axis=2)
        if len(by_class) == 1 or not by_class.size:
            why = "none has anything to read" if len(by_class) > 1 else ONE_ORDER
            raise ValueError(f"no row can flip: {why}")
        return float((by_class != by_class[0]).any(axis=0).mean())

    def rank(self, prompt: str | Sequence[str | None], answers: Sequence[str | Sequence[str | None]]) -> Ranking:
        """Compares each of some answers to a prompt with each other, and ranks them.

        Args:
            prompt: a text, or the user's turns of a conversation.
            answers: two or more, each a text or one text for each turn.

        Raises:
            ValueError: there are fewer than two answers, the task compares none, or the judge reads one order only.
            BadRecordsError: as in `predict_proba`.
        """
        if isinstance(answers, str | Mapping) or len(answers := list(answers)) < 2:
            raise ValueError("give a list of two or more answers to rank")
        rows = self._checked(self.task.pairs(prompt, answers))
        found = self.verdicts(rows)
        if len(found.by_order) == 1:
            raise ValueError(f"answers cannot be compared fairly: {ONE_ORDER}")
        return ranking(found.mean, rows.has_input, tie_of(self.task), found.tokens, found.logical_tokens)

    def explain(self, row: Records) -> Explanation:
        """What the judge makes of one row.

        Raises:
            ValueError: it is not one row; otherwise as in `predict_proba`.
        """
        rows = self._checked([row] if isinstance(row, Mapping) else row)
        if len(rows) != 1:
            raise ValueError(f"{len(rows):,} rows are given: explain one of them")
        return self.explain_all(rows)[0]

    def explain_all(self, rows: Rows | Records, *, prompts: bool = True) -> list[Explanation]:
        """What the judge makes of each of some rows, which it reads together; errors are as in `predict_proba`.

        Args:
            prompts: whether the prompts are wanted, which are "" otherwise.
        """
        rows = self._checked(rows)
        by_part, judged = self._judged(rows)
        mean, store = self._pooled(by_part.mean(axis=1), rows), judged[0].store
        by_order = np.stack([self._pooled(by_part[:, at], rows) for at in range(by_part.shape[1])])
        kinds = [None if kind < 0 else self.task.kinds[kind] for kind in rows.kinds.tolist()]
        tokens, logical = (int(getattr(judged[0].plan, name).sum()) for name in PLANNED)
        return [
            Explanation(
                self._named(mean[row]), self._orders(by_order[:, row], store, row * store.orders, prompts),
                len(set(by_order[:, row].argmax(axis=1).tolist())) > 1, bool(rows.has_input[row]), kind, tokens,
                logical,
            )
            for row, kind in enumerate(kinds)
        ]  # fmt: skip

    def _orders(self, by_order: np.ndarray, store: TokenStore, first: int, prompts: bool) -> tuple[Order, ...]:
        """A row in its orders, from their probabilities and its first example."""
        decode = self.models[0].tokenizer.decode
        return tuple(
            Order(
                self._named(each), decode(store[at]) if prompts else "", int(store.lengths[at]),
                int(store.turns_dropped[at]), int(store.tokens_cut[at]),
            )
            for at, each in enumerate(by_order, first)
        )  # fmt: skip

    def _checked(self, rows: Rows | Records, labelled: bool = False) -> Rows:
        if not isinstance(rows, Rows):
            return rows_of_records(cells_of(rows), self.task, "required" if labelled else "ignored", self._limits)
        if rows.task != self.task:
            raise ValueError(f"the rows are of the task {rows.task.name}: give what this judge's `read` returns")
        return rows

    def _named(self, probabilities: np.ndarray) -> dict[str, float]:
        return dict(zip(self.task.classes, probabilities.tolist(), strict=True))

    def _judged(self, rows: Rows, parts: Path | None = None) -> tuple[np.ndarray, list[Judged]]:
        """The probabilities of each part in each order, float64 (parts, orders, n, C), and what each model judged."""
        judged = {
            id(model): model.in_memory(rows, None if parts is None else parts / str(at))
            for at, model in enumerate(self.models)
        }
        by_part, orders = [], next(iter(judged.values())).store.orders
        for part in self._parts:
            if callable(part):
                by_part.append(np.stack([part(rows.table)] * orders))
            else:
                by_part.append(np.mean([judged[id(model)].by_order for model in part], axis=0))
        return np.stack(by_part), list(judged.values())

    def _pooled(self, by_part: np.ndarray, rows: Rows) -> np.ndarray:
        """The probabilities (n, C) of rows, of those of the parts, (parts, n, C)."""
        return by_part[0] if self._blend is None else self._blend(by_part, names_of_kinds(self.task.kinds, rows.kinds))


ONE_ORDER = "this judge reads one order: set judge.swap=true"
PLANNED = ("tokens", "logical_tokens")


def load_models(
    saved: Sequence[SavedJudge], device: torch.device | str | None = None, loaded: Sequence[JudgeModel] = ()
) -> list[JudgeModel]:
    """Loads judges, each base once, and none that a loaded judge has.

    Raises:
        ValueError: some of them read rows in both orders, and others in one.
    """
    if len({each.recipe.reads_all_orders for each in saved}) > 1:
        raise ValueError(
            "some of the judges read rows in both orders, and others in one: set judge.swap=true or judge.swap=false"
        )
    models: list[JudgeModel] = []
    for each in saved:
        beside = (other for model in (*loaded, *models) if (other := model.beside(each)) is not None)
        models.append(next(beside, None) or JudgeModel(each, device=device))
    return models
