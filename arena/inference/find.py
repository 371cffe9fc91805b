"""Finds judges by a folder, by the recipe of a run, or by the run's name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from arena.command_line import command
from arena.config import load_recipe, recipe_names
from arena.progress import console
from arena.storage.files import local_path

JUDGE_FILE = "judge.json"  # its presence makes a folder a judge


def find_models(name: str, runs: Path, overrides: Sequence[str] = (), fold: int | None = None) -> list[Path]:
    """The `model` folders that a name refers to; those of a run are in the order of its folds.

    Args:
        name: the folder of a judge, a fold or a run; the `recipe.yaml` in a fold's folder, which refers to that fold;
            another recipe, which refers to the run `runs/<the recipe's name>`; or the name of a run in `runs`.
        runs: the folder of all runs.
        overrides: only `name=x` has an effect, the run `runs/x`, as in training.
        fold: the only fold of a run to use.

    Raises:
        ValueError: there is nothing of that name, nothing is finished there, or the arguments contradict each other.
    """
    runs = local_path(runs, "--runs")
    renamed = [each for each in overrides if each.partition("=")[0].strip() == "name"]
    folder = None if name in recipe_names() else _named_folder(name)  # write ./name for a folder named like a recipe
    place = folder or _run_of(name, runs, renamed)
    if renamed and not _is_recipe(name):
        raise ValueError(f"{name} is a judge or a run, but {renamed[-1]} names another one: give only one of them")
    if (place / JUDGE_FILE).is_file():
        return [_only(place, place.resolve().parent, name, fold)]
    if _is_fold(place):
        return [_only(_finished(place), place.resolve(), name, fold)]
    return _of_run(place, fold)


def find_model(name: str, runs: Path, overrides: Sequence[str] = (), fold: int | None = None) -> Path:
    """The one model that a name refers to, as in `find_models`; a run with several finished folds needs `fold`."""
    models = find_models(name, runs, overrides, fold)
    if len(models) > 1:
        numbers = ", ".join(model.parent.name.removeprefix("fold") for model in models)
        raise ValueError(f"{models[0].parent.parent} has the finished folds {numbers}: name one with --fold")
    return models[0]


def recipe_of(name: str, runs: Path) -> str:
    """The recipe for training another fold: `name` itself, or the recipe saved by the run of that name or folder.

    Raises:
        ValueError: the run's folder was renamed.
    """
    if _is_recipe(name):
        return name
    if _is_fold(Path(name)) and (Path(name) / "recipe.yaml").is_file():
        return str(Path(name) / "recipe.yaml")
    for run in (Path(name), runs / name):
        saved = [path for fold in _folds(run).values() if (path := fold / "recipe.yaml").is_file()]
        if saved:
            if (own := load_recipe(str(saved[0])).name) != run.resolve().name:
                raise ValueError(f"{run} has a run called {own}: rename its folder to {own}, or give {saved[0]}")
            return str(saved[0])
    return name


def _is_recipe(name: str) -> bool:
    place = Path(name)
    return name in recipe_names() or (place.is_file() and not _of_fold(place))


def _of_fold(recipe: Path) -> bool:
    """Whether a path is the recipe in a fold's folder."""
    return recipe.name == "recipe.yaml" and _is_fold(recipe.parent)


def _named_folder(name: str) -> Path | None:
    """The folder of the judge, fold or run at a path, or of the fold whose recipe is at that path."""
    place = Path(name)
    if _of_fold(place):
        return place.parent
    return place if (place / JUDGE_FILE).is_file() or _is_fold(place) or _folds(place) else None


def _run_of(name: str, runs: Path, renamed: Sequence[str]) -> Path:
    """The run of a recipe, or the run of that name."""
    if _is_recipe(name):
        run = runs / load_recipe(name, renamed).name
        if not _folds(run):
            train = command("arena", "train", "--recipe", name, *_runs(runs), *renamed)
            raise ValueError(f"there is no finished fold under {run}: train one with `{train}`, or name another judge")
        return run
    if Path(name).name == name and (_folds(runs / name) or (runs / name / JUDGE_FILE).is_file()):
        return runs / name
    if Path(name).is_dir():
        raise ValueError(f"{name} is not a judge: name a run, a fold of it (fold0), or a fold's model folder")
    there = sorted(path.name for path in runs.glob("*/") if _folds(path))
    raise ValueError(
        f"there is no run, recipe or folder {name!r}: name a run in {runs} ({', '.join(there) or 'none yet'}), "
        f"a recipe ({', '.join(recipe_names())}, or the path of a YAML file), or the folder of a judge"
    )


def _of_run(run: Path, fold: int | None) -> list[Path]:
    """The models of a run's finished folds, or of one of them."""
    folds = _folds(run)
    if fold is not None:
        if fold not in folds:
            raise ValueError(f"{run} has no fold {fold}: it has {', '.join(map(str, folds))}")
        return [_finished(folds[fold])]
    done = [path for path in folds.values() if _is_finished(path)]
    if not done:
        raise ValueError(f"there is no finished fold under {run}: {_how_to_finish(next(iter(folds.values())))}")
    for path in folds.values():
        if path not in done:
            console.print(f"{path} is not finished and is not used")
    return [path / "model" for path in done]


def _only(model: Path, folder: Path, name: str, fold: int | None) -> Path:
    """The one model that was named, in a fold's folder or elsewhere; `fold` must not ask for another one."""
    number = re.match(r"fold(\d+)", folder.name)
    if fold is not None and (number is None or int(number[1]) != fold):
        raise ValueError(f"{name} is one judge, but --fold {fold} asks for another: omit --fold, or name the run")
    return model


def _finished(fold: Path) -> Path:
    """The model of a fold."""
    if not _is_finished(fold):
        raise ValueError(f"{fold} is not finished: {_how_to_finish(fold)}")
    return fold / "model"


def _is_finished(fold: Path) -> bool:
    """Whether a fold was scored; its `model` alone, without the files of its training, was copied from one that was."""
    copied = (fold / "model" / JUDGE_FILE).is_file() and not (fold / "run.json").exists()
    return copied or (fold / "metrics.json").is_file()


def _how_to_finish(fold: Path) -> str:
    recipe, run = fold / "recipe.yaml", fold.resolve().parent
    number = re.fullmatch(r"fold(\d+)", fold.resolve().name)
    if not recipe.is_file():
        return "it has no recipe.yaml, so it cannot be resumed: name another fold"
    if number is None or load_recipe(str(recipe)).name != run.name:  # such as `earlier/fold0-...`
        return "it was moved and can only be resumed in its original place: move it back, or name another fold"
    runs = _runs(fold.parent.parent if fold.parent.name == run.name else run.parent)
    return f"resume it with `{command('arena', 'train', '--fold', number[1], '--recipe', str(recipe), *runs)}`"


def _runs(runs: Path) -> list[str]:
    return [] if runs.resolve() == Path("runs").resolve() else ["--runs", str(runs)]


def _is_fold(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("run.json", "metrics.json", f"model/{JUDGE_FILE}"))


def _folds(run: Path) -> dict[int, Path]:
    """The folders of a run's folds, finished or not, in ascending order of their numbers."""
    named = [(re.fullmatch(r"fold(\d+)", path.name), path) for path in run.glob("fold*/")]
    return dict(sorted((int(number[1]), path) for number, path in named if number))
