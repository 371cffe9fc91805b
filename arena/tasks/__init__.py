"""Tasks: what a row means, one file each."""

from __future__ import annotations

from arena.data.task import Task
from arena.settings import Recipe
from arena.tasks.classification import Classification
from arena.tasks.instruction import Instruction
from arena.tasks.preference import Preference

TASKS: dict[str, type[Task]] = {
    "preference": Preference,
    "classification": Classification,
    "instruction": Instruction,
}


def task_of(recipe: Recipe) -> Task:
    """The task that a recipe names.

    Raises:
        ValueError: there is no task of that name.
    """
    if recipe.task not in TASKS:
        raise ValueError(f"task is {recipe.task!r}: name one of {', '.join(TASKS)}")
    return TASKS[recipe.task].of(recipe)
