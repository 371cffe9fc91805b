"""The Makefile: what it is given reaches the command whole, and what nothing reads is refused."""

from __future__ import annotations

import os
import shlex
import subprocess
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def make(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `make` would run, with nothing set up; not as a part of the make that may be running the tests."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--assume-old=.venv/ready", *words],
        cwd=ROOT, env=plain | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        (["train", "fold=1"], ["fold=1 is not read: write FOLD=1;"]),
        (
            ["train", "fold=1", "train.epochs=2", "data=my data"],
            ["write FOLD=1;", 'write ARGS="train.epochs=2"', 'write DATA="my data";'],
        ),
        (["train", "infer", "Recipe=x"], ["Recipe=x is not read: write RECIPE=x;"]),
        (["help", "V=1"], ['V=1 is not read: write ARGS="V=1" if it is a setting']),
        (["train", "FOLD=1", "fold=2"], ["fold=2 is not read"]),
    ],
)
def test_what_nothing_reads_is_refused(words: list[str], hints: list[str]) -> None:
    done = make(*words)
    assert done.returncode == 2 and done.stdout == ""
    for hint in [*hints, 'as in: make train FOLD=1 ARGS="train.epochs=2"']:
        assert hint in done.stderr


def test_a_fold_that_no_target_reads_is_refused_with_what_judges_with_one_fold() -> None:
    done = make("infer", "FOLD=1", "RECIPE=mine")
    assert done.returncode == 2 and "make infer RECIPE=runs/mine/fold1" in done.stderr
    assert make("train", "infer", "FOLD=1").returncode == 0


@pytest.mark.parametrize(
    "value", ["my data", "it's", "a;b", "a  b", "a&b", "a#b", "a\\b", "(a)", "*", 'a"b', "~x", "plain-1_2.csv"]
)
def test_paths_reach_the_command_as_they_are(value: str) -> None:
    done = make("train", "infer", f"DATA={value}", f"RECIPE={value}", "FOLD=1", "ARGS=--fresh train.batch_size=80")
    assert done.returncode == 0, done.stderr
    train, infer = map(shlex.split, done.stdout.splitlines())
    rest = ["--recipe", value, "--data", value, "--fresh", "train.batch_size=80"]
    assert train == [".venv/bin/arena", "train", "--fold", "1", *rest]
    assert infer == [".venv/bin/arena", "infer", *rest]


def test_the_base_that_comes_as_packages_is_installed_for_its_recipe_alone() -> None:
    for target, recipe in product(("train", "infer", "inspect"), ("gemma-3-270m", "gemma-3-270m-sst2")):
        lines = make(target, f"RECIPE={recipe}", "--assume-new=pyproject.toml").stdout.splitlines()
        installs = [at for at, line in enumerate(lines) if "--editable '.[gemma3]'" in line]
        runs = [at for at, line in enumerate(lines) if f".venv/bin/arena {target} " in line]
        assert len(installs) == len(runs) == 1 and installs < runs
        for other in ("demo", "runs/gemma-3-270m/fold0"):
            assert "gemma3" not in make(target, f"RECIPE={other}", "--assume-new=pyproject.toml").stdout


def test_a_report_installs_its_extra_and_may_compare() -> None:
    lines = make("report", "RECIPE=it's", "DATA=my data", "ARGS=other --texts 5", "--assume-new=.venv/ready").stdout
    last = shlex.split(lines.splitlines()[-1])
    assert "--editable '.[report]'" in lines
    assert last == [".venv/bin/arena", "report", "it's", "--data", "my data", "other", "--texts", "5"]


def test_variables_of_the_environment_and_of_an_outer_make(tmp_path: Path) -> None:
    assert "--fold 3 " in make("train", FOLD="3", fold="4").stdout  # the environment is full of other names
    outer = tmp_path / "Makefile"
    outer.write_text(f"all:\n\t$(MAKE) -C {ROOT} --assume-old=.venv/ready train\n")
    assert "--fold 2 --recipe demo --data 'a b'" in make("-f", str(outer), "FOLD=2", "DATA=a b").stdout
    assert "fold=2 is not read" in make("-f", str(outer), "fold=2").stderr
