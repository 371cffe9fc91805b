"""The templates for clusters are read by their programs' grammars, and what they run is understood by `arena`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from arena.config import load_recipe
from tests.slurm import TEMPLATES, bash, job, make_project, write_program
from tests.test_readme import ARENA, check_arena, check_command

USAGE = re.compile(r"^#   (\S.*)$", re.MULTILINE)  # commands in the comment at the top
# Notes how it was called, and what the launchers tell it.
TOLD = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SRUN_OPTIONS")
told = {name: os.environ.get(name) for name in names} | {"words": sys.argv[1:]}
with open(f"told-{os.environ.get('RANK', 0)}", "w") as file:
    json.dump(told, file)
sys.exit(int(os.environ.get("ENDS", 0)))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project's folder whose programs only note how they were called."""
    folder = make_project(tmp_path / "project")
    for name in ("arena", "torchrun"):
        write_program(folder / ".venv/bin" / name, TOLD)
    return folder


def told(project: Path) -> list[dict[str, Any]]:
    """What each task noted, in the order of ranks."""
    return [json.loads(path.read_text()) for path in sorted(project.glob("told-*"))]


def usage(template: str) -> list[list[str]]:
    """The words of each command in the comment at a template's top."""
    found = USAGE.findall((TEMPLATES / template).read_text(encoding="utf-8"))
    return [shlex.split(each, comments=True) for each in found]


def sky() -> dict[str, Any]:
    return dict(yaml.safe_load((TEMPLATES / "train.skypilot.yaml").read_text(encoding="utf-8")))


def test_all_templates_are_tested() -> None:
    assert {path.name for path in TEMPLATES.iterdir()} == {"train.slurm", "judge-array.slurm", "train.skypilot.yaml"}


@pytest.mark.parametrize("script", [*TEMPLATES.glob("*.slurm"), "setup", "run"])
def test_bash_reads_them(script: Path | str) -> None:
    text = script.read_text(encoding="utf-8") if isinstance(script, Path) else sky()[script]
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert subprocess.run(["bash", "-n"], input=text + "if", text=True, check=False, capture_output=True).returncode


@pytest.mark.parametrize("template", TEMPLATES.glob("*.slurm"))
def test_options_of_slurm_come_before_any_command(template: Path) -> None:
    """SLURM ignores those that come later."""
    lines = template.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/bash"
    first = next(at for at, line in enumerate(lines) if line and not line.startswith("#"))
    places = [at for at, line in enumerate(lines) if line.startswith("#SBATCH --")]
    assert len(places) > 5 and max(places) < first


def test_each_task_of_a_training_is_told_its_rank(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, template, *words),) = usage("train.slurm")
    done = bash(project, [template, *words, "name=two words"], job(project, 8, 4))
    assert done.returncode == 0, done.stderr
    seen = told(project)
    assert [each["RANK"] for each in seen] == list("01234567") and {each["WORLD_SIZE"] for each in seen} == {"8"}
    assert [each["LOCAL_RANK"] for each in seen] == list("01230123")
    assert {(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in seen} == {("node1", "23456")}
    assert {each["SRUN_OPTIONS"] for each in seen} == {"--cpus-per-task=8 --kill-on-bad-exit=1"}
    assert all(each["words"] == ["train", *words, "name=two words"] for each in seen)
    check_arena([ARENA + shlex.join(seen[0]["words"][:-1])], monkeypatch)


@pytest.mark.parametrize(("status", "again"), [(0, False), (2, False), (143, True)])
def test_a_training_that_was_asked_to_end_is_queued_again(project: Path, status: int, again: bool) -> None:
    done = bash(project, ["templates/train.slurm"], job(project, 2, 2, ENDS=str(status)))
    assert done.returncode == status
    assert (project / "requeued").exists() == again


def test_each_job_of_an_array_judges_its_share(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, template, *words), join = usage("judge-array.slurm")
    (array,) = re.findall(r"^#SBATCH --array=1-(\d+)$", (project / template).read_text(), re.MULTILINE)
    done = bash(project, [template, *words], job(project, 1, 1, SLURM_ARRAY_TASK_ID="3"))
    assert done.returncode == 0, done.stderr
    (seen,) = told(project)
    assert seen["words"] == ["judge", *words, "--shard", f"3/{array}"]
    assert join == [".venv/bin/arena", "judge", *words, "--join", array]
    check_arena([ARENA + shlex.join(seen["words"]), shlex.join(join)], monkeypatch)


def test_a_task_of_skypilot(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = sky()
    assert task["resources"]["use_spot"] and task["num_nodes"] == 1 and task["workdir"] == "."
    environment = {**job(project, 1, 1), **task["envs"], "SKYPILOT_NUM_GPUS_PER_NODE": "4", "HOME": str(project)}
    done = bash(project, ["-c", task["run"]], environment)
    assert done.returncode == 0, done.stderr
    words = told(project)[0]["words"]
    data = str(project / "arena-data")
    assert words[:4] == ["--nproc_per_node", "4", "-m", "arena.cli"]
    assert words[words.index("--data") + 1] == data and task["file_mounts"] == {"~/arena-data": "${DATA}"}
    check_arena([ARENA + shlex.join(words[4:])], monkeypatch)
    assert load_recipe("demo", words[-1:]).train.mirror == task["envs"]["MIRROR"]
    for line in task["setup"].splitlines()[2:]:
        check_command(line, monkeypatch)
    assert [each[:4] for each in usage("train.skypilot.yaml")] == [
        ["sky", "jobs", "launch", "templates/train.skypilot.yaml"]
    ]


@pytest.mark.parametrize("words", ["train --folds 0", "train train.mirrors=x", "judge demo a b --shards 1/2"])
def test_what_arena_would_refuse_is_noticed(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, ValueError)):
        check_arena([ARENA + words], monkeypatch)
