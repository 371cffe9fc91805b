"""The batches of a fold, as training or evaluation reads them: one call from a recipe to the loop."""

from __future__ import annotations

from pathlib import Path

from arena.config import Recipe
from arena.data.prepare import prepare_fold
from arena.demo.synthetic import ensure_demo
from arena.model.backbone import load_tokenizer
from arena.packing.loader import PackedLoader
from arena.packing.plan import plan_evaluation
from arena.packing.tree import prefixes_for
from arena.tasks import task_of
from arena.training.order import plan_fold


def open_fold(recipe: Recipe, fold: int = 0, *, held_out: bool = False) -> PackedLoader:
    """The batches of one fold, for notebooks and training loops of your own; each batch has `input_text` too.

    Rows are read and tokenised, or taken from the cache, and the demo's rows are written where they are missing. Of the
    base, only the tokenizer is loaded.

    Args:
        fold: the fold that is held out.
        held_out: gives the held-out rows as evaluation reads them, in place of the rows to train on.

    Returns:
        A loader that yields, for each optimizer step, the list of its micro-batches (`arena.PackedBatch`), each of at
        most `packing.budget` tokens. Held-out rows are one step, in the order that packs best; a micro-batch's `index`
        says which examples it holds. The tokens are `loader.store`, the plan is `loader.plan`.

    Raises:
        ValueError: the recipe's data or base cannot be used, or there is no such fold.
    """
    ensure_demo(recipe)
    tokenizer = load_tokenizer(recipe.model.base, recipe.model.revision)
    data = prepare_fold(recipe, task_of(recipe), fold, tokenizer)
    prefixes = prefixes_for(data.store, recipe.packing, Path(recipe.data.cache))
    if held_out:
        examples = data.eval_rows * data.store.orders
        plan = plan_evaluation(data.store.lengths, examples, budget=recipe.packing.budget, prefixes=prefixes)
    else:
        plan = plan_fold(recipe, data, prefixes=prefixes)
    return PackedLoader(data.store, data.targets, plan, tokenizer)
