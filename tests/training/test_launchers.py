"""Launchers other than torchrun, and the templates for clusters: they train as torchrun does, to the bit."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from arena.config import save_recipe
from tests.helpers import tiny_recipe
from tests.slurm import TEMPLATES, job, make_project
from tests.training.test_together import steps, weights
from tests.training.test_trainer import free_port, log_lines

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SOON = 300  # seconds until processes have started and done something, on a busy machine


@dataclass(frozen=True)
class Ground:
    """A project's folder with a recipe, its rows in `arena-data`, and what two processes of torchrun made of them."""

    folder: Path
    straight: Path

    def environment(self, **more: str) -> dict[str, str]:
        """Of two tasks on this machine, on CPUs."""
        own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": str(self.folder)}
        return job(self.folder, 2, 2) | own | more

    def start(self, words: list[str], **more: str) -> subprocess.Popen[str]:
        """Starts a command in the project's folder; what it prints is in `shown`."""
        with (self.folder / "shown").open("w") as shown:
            return subprocess.Popen(
                words, cwd=self.folder, env=self.environment(**more), stdout=shown, stderr=shown, text=True
            )

    def shown(self) -> str:
        return (self.folder / "shown").read_text(encoding="utf-8")

    def done(self, words: list[str], **more: str) -> None:
        """Runs a command to its end."""
        assert self.start(words, **more).wait() == 0, self.shown()[-5000:]
        assert "; 2 processes" in self.shown()

    def alike(self, run: Path) -> bool:
        """Whether a run has the same weights and log as torchrun's."""
        assert len(steps(self.straight)) > 40
        return torch.equal(weights(run), weights(self.straight)) and kept(run) == kept(self.straight)


def kept(run: Path) -> list[dict[str, Any]]:
    """A run's log without times; with the numbers of micro-batches, which differ with the number of processes."""
    lines = log_lines(run / "log.jsonl")
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def settings(runs: str) -> list[str]:
    return ["--fold", "0", "--recipe", "recipe.yaml", "--runs", runs]


@pytest.fixture(scope="module")
def ground(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = make_project(tmp_path_factory.mktemp("launchers") / "project")
    more = ("train.epochs=8", "train.checkpoint_every=1", "model.lora.dropout=0.1")
    recipe = tiny_recipe(folder, gemma2, "model.quantization=none", "model.dtype=float32", *more)
    (folder / "recipe.yaml").write_text(save_recipe(recipe), encoding="utf-8")
    (folder / ".venv").mkdir()
    (folder / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (folder / "arena-data").symlink_to(folder / "rows")
    made = Ground(folder, folder / "straight/demo/fold0")
    torchrun = [".venv/bin/torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    made.done([*torchrun, "-m", "arena.cli", "train", *settings("straight")])
    return made


def until(happened: Callable[[], bool], process: subprocess.Popen[str], shown: Callable[[], str]) -> None:
    """Waits for something that a process does."""
    deadline = time.monotonic() + SOON
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, shown()[-5000:]
        time.sleep(0.01)


def test_accelerate_launch_trains_as_torchrun(ground: Ground) -> None:
    """By the command of the documentation, with another recipe."""
    page = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ACCELERATE_USE_CPU=true (\.venv/bin/accelerate .* train) .*$", page, re.MULTILINE)
    words = shlex.split(line)
    port = ["--main_process_port", str(free_port())]
    ground.done([*words[:2], *port, *words[2:], *settings("accelerate")])
    assert ground.alike(ground.folder / "accelerate/demo/fold0")


def test_accelerate_launch_with_cpu_starts_one_process(ground: Ground) -> None:
    """The control, which the documentation warns of: the option is accepted, and the log is another."""
    words = [".venv/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "arena.cli", "train"]
    assert ground.start([*words, *settings("one")]).wait() == 0, ground.shown()[-5000:]
    assert "; 2 processes" not in ground.shown()
    assert not ground.alike(ground.folder / "one/demo/fold0")


def test_the_template_of_slurm_trains_as_torchrun(ground: Ground) -> None:
    """Asked to end amid the work, as before the end of a job's time, it saves, is queued again, and goes on."""
    words = ["bash", "templates/train.slurm", *settings("slurm")]
    here = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost"}  # of which the port is made
    run = ground.folder / "slurm/demo/fold0"
    first = ground.start(words, **here)
    log = run / "log.jsonl"
    until(lambda: log.exists() and len(log.read_text().splitlines()) > 3, first, ground.shown)
    (srun,) = (each for each in psutil.Process(first.pid).children() if "srun" in " ".join(each.cmdline()))
    srun.send_signal(signal.SIGTERM)
    assert first.wait() == 143, ground.shown()[-5000:]
    assert (ground.folder / "requeued").exists() and not (run / "metrics.json").exists()
    ground.done(words, **here)
    assert ground.alike(run)


def test_a_task_of_skypilot_goes_on_after_its_machine_is_gone(ground: Ground) -> None:
    """All processes are killed and all that they wrote is lost, except for the mirror: the same task goes on."""
    task = yaml.safe_load((TEMPLATES / "train.skypilot.yaml").read_text(encoding="utf-8"))
    mirror, run = ground.folder / "mirror", ground.folder / "runs/demo/fold0"
    mirror.mkdir()
    own = task["envs"] | {"RECIPE": "recipe.yaml", "MIRROR": str(mirror), "SKYPILOT_NUM_GPUS_PER_NODE": "2"}
    words = ["bash", "-c", task["run"]]
    first = ground.start(words, **own)
    until(lambda: len(list(mirror.rglob("step-*/manifest.json"))) > 1, first, ground.shown)
    for each in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
        os.kill(each.pid, signal.SIGKILL)
    first.wait()
    assert not (run / "metrics.json").exists(), "the control: it was not finished"
    lost = len(log_lines(run / "log.jsonl"))
    shutil.rmtree(ground.folder / "runs")
    ground.done(words, **own)
    assert "fetched from" in ground.shown() and lost > 1
    assert ground.alike(run)
