"""Options that several commands share, and the recipe that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from arena.config import load_recipe, recipe_names, refuse_both
from arena.settings import Recipe


def words_arg(metavar: str, text: str) -> Any:
    """The help of a command's words."""
    return arg(metavar=metavar, help=text, help_behavior_hint="")


Name = Annotated[
    str,
    arg(
        metavar="RECIPE",
        help=f"A built-in recipe ({', '.join(recipe_names())}), a YAML file, or a run whose settings to use.",
    ),
]
Judged = Annotated[
    str, arg(metavar="RUN", help="A run or its recipe, by name or path, or the folder of one fold or judge.")
]
Data = Annotated[
    str | None,
    arg(metavar="PATH", help="Folder with train and test files, or one file.", help_behavior_hint="(the recipe's)"),
]
Labels = Annotated[
    str | None, arg(metavar="PATH", help="The labelled rows.", help_behavior_hint="(those of the first run)")
]
Overrides = Positional[
    Annotated[tuple[str, ...], words_arg("[KEY=VALUE ...]", "Settings to change, such as train.batch_size=32.")]
]


def recipe_with_rows(name: str, runs: Path, data: str | None, overrides: tuple[str, ...]) -> Recipe:
    """The recipe of a name or a run, with the rows of `data`; otherwise the demo's rows are written on first use."""
    from arena.demo.synthetic import ensure_demo
    from arena.inference.find import recipe_of

    recipe = load_recipe(recipe_of(name, runs), overrides)
    if data is None:
        ensure_demo(recipe)
        return recipe
    refuse_both(f"--data {data}", overrides, "data", "data.path", "data.synthetic_rows")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": data, "synthetic_rows": None})})
