"""What messages tell people to type can be typed: it is parsed by the real command line, recipes and Makefile."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tyro

from arena.cli import COMMANDS
from arena.command_line import command
from arena.config import _group, load_recipe
from arena.inference.find import find_models
from arena.prompt_settings import RECIPES
from arena.settings import Recipe
from benchmarks.__main__ import COMMANDS as MEASURING

ROOT = Path(__file__).parents[1]
SETTING = re.compile(r"(?<![\w./-])((?:[a-z]+\.)+[a-z_]+)=([^\s,;:)`]*[^\s,;:)`.])?")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
VARIABLE = re.compile(r"\b(?!KEY=)([A-Z]{3,})=(\S*)")
QUOTED = re.compile(r"`([^`]+)`")
OTHERS = {"--local-dir", "--merge", "--path", "--dir-mode", "--message", "--hash"}  # flags of other programs
KNOWN_TO_HF = ["auth login", "download google/gemma-2-9b-it --local-dir FOLDER"]


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Texts of a module that are more than a word, docstrings left out; what f-strings fill in is written {name}."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in ast.walk(node) if part is not node}
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.JoinedStr | ast.Constant):
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{filled}" for part in parts)
        if " " in text and (isinstance(node, ast.JoinedStr) or isinstance(node.value, str)):
            yield node.lineno, text


EVERY = [
    (f"{path.relative_to(ROOT)}:{line}", text)
    for package in ("arena", "benchmarks")
    for path in sorted((ROOT / package).rglob("*.py"))
    for line, text in messages(path)
]


def parse(words: list[str]) -> Any:
    """A command line of `arena` as its parser reads it."""
    assert Path(words[0]).name == "arena"
    try:
        return tyro.extras.subcommand_cli_from_dict(COMMANDS, args=words[1:], prog="arena", console_outputs=False)
    except SystemExit:
        raise ValueError(f"{shlex.join(words)} cannot be parsed") from None


def check_setting(key: str, value: str) -> None:
    """Raises `ValueError` for a setting that no recipe has, or a value that does not fit it."""
    *groups, name = key.split(".")
    field = _group(Recipe, groups).model_fields.get(name)
    if field is None or (groups and _group(Recipe, groups) is Recipe):
        raise ValueError(f"there is no setting {key}")
    if value and not re.search(r"[{A-Z]", value):  # such as model.base=FOLDER
        load_recipe("demo", ["model.quantization=none", f"{key}={value}"])


def check_variable(name: str, value: str) -> None:
    """Raises `ValueError` for a variable that the Makefile does not read."""
    if not re.search(rf"^{name}\s*\?=", (ROOT / "Makefile").read_text(), re.MULTILINE):
        raise ValueError(f"the Makefile reads no {name}")


def flags() -> set[str]:
    commands = [*COMMANDS.values(), *MEASURING.values()]
    names = {field.name for command in commands for field in fields(command)}  # type: ignore[arg-type]
    return {f"--{name.replace('_', '-')}" for name in names} | {"--wheels"}  # of benchmarks/start.py


def test_every_setting_that_is_named_exists() -> None:
    found = [(where, *setting) for where, text in EVERY for setting in SETTING.findall(text)]
    assert len(found) > 20
    for where, key, value in found:
        try:
            check_setting(key, value)
        except ValueError as error:
            raise AssertionError(f"{where} names {key}={value}: {error}") from error


def test_every_flag_and_variable_that_is_named_exists() -> None:
    found = {(where, flag) for where, text in EVERY for flag in FLAG.findall(text)}
    assert len(found) > 10
    assert {(where, flag) for where, flag in found if flag not in flags() | OTHERS} == set()
    variables = [(where, *variable) for where, text in EVERY for variable in VARIABLE.findall(text)]
    assert len(variables) >= 2
    for _, name, value in variables:
        check_variable(name, value)


def test_every_command_that_is_written_out_can_be_typed() -> None:
    """Those that are put together when they are shown are parsed below. None needs the Makefile: not all have it."""
    found = []
    for where, text in EVERY:
        assert not re.search(r"\bmake [a-z-]+ [A-Z]+=|`make\b", text), f"{where} wants make: name the arena command"
        for quoted in QUOTED.findall(text):
            words = shlex.split(quoted.replace("{filled}", "demo"))
            if words[0] == "arena":
                found.append(quoted)
                assert words[1] in COMMANDS, f"{where}: {quoted}"
                if len(words) > 2:
                    parse(words)
            if words[0] == "hf":
                found.append(quoted)
                assert " ".join(words[1:]).replace("demo", "google/gemma-2-9b-it") in KNOWN_TO_HF, f"{where}: {quoted}"
    assert len(found) >= 2


@pytest.mark.parametrize(
    "words", [["arena", "trian"], ["arena", "train", "--folds", "0"], ["arena", "train", "--fold", "first"]]
)
def test_the_parser_refuses_what_is_wrong(words: list[str]) -> None:
    with pytest.raises(ValueError, match="cannot be parsed"):
        parse(words)


@pytest.mark.parametrize(("key", "value"), [("model.bass", "x"), ("model.attention", "fast"), ("trian.lr", "1")])
def test_a_setting_that_is_wrong_is_found(key: str, value: str) -> None:
    with pytest.raises(ValueError):
        check_setting(key, value)
    with pytest.raises(ValueError, match="reads no FOLDS"):
        check_variable("FOLDS", "0")


def test_hints_of_runs_that_are_not_finished_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fold = Path("my runs/demo/fold3")
    fold.mkdir(parents=True)
    (fold / "run.json").write_text("{}")
    shutil.copy(RECIPES / "demo.yaml", fold / "recipe.yaml")
    for name, overrides, expected in (
        ("demo", [], {"fold": 3, "recipe": str(fold / "recipe.yaml"), "overrides": ()}),
        ("gemma-2-9b", ["name=new"], {"fold": 0, "recipe": "gemma-2-9b", "overrides": ("name=new",)}),
    ):
        with pytest.raises(ValueError, match="no finished fold") as caught:
            find_models(name, Path("my runs"), overrides)
        [hint] = QUOTED.findall(str(caught.value))
        parsed = parse(shlex.split(hint))
        assert {key: getattr(parsed, key) for key in expected} == expected and parsed.runs == Path("my runs")


def test_a_command_runs_the_program_of_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_folder, other = tmp_path / "env/bin", tmp_path / "other"
    for folder in (bin_folder, other):
        folder.mkdir(parents=True)
        for name in ("python", "arena"):
            (folder / name).write_text(f"#!/bin/sh\necho {folder.name}\n")
            (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bin_folder / "python"))
    monkeypatch.chdir(tmp_path)
    for path, expected in ((bin_folder, "arena train"), (other, "env/bin/arena train"), ("", "env/bin/arena train")):
        monkeypatch.setenv("PATH", f"{path}:/bin:/usr/bin")
        assert command("arena", "train") == expected
        assert subprocess.run(expected, shell=True, capture_output=True, text=True).stdout == "bin\n"
    monkeypatch.chdir(other)
    assert command("arena", "train") == f"{bin_folder}/arena train"
    assert command("pip", "install", "x y") == "pip install 'x y'"  # it has none of its own


def test_make_takes_the_variables_that_are_named() -> None:
    for target in ("train", "infer", "inspect"):
        fold = [] if target == "infer" else ["FOLD=1"]  # which infer does not read
        words = ["make", "-n", target, *fold, "RECIPE=mine", "DATA=rows", "ARGS=--fresh name=mine"]
        shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        line = next(line for line in shown.splitlines() if f"arena {target}" in line)
        if target != "train":
            line = line.replace(" --fresh", "")
        parsed = parse(shlex.split(line))
        assert parsed.recipe == "mine" and parsed.data == "rows" and parsed.overrides == ("name=mine",)
