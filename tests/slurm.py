"""A project folder with stand-ins for SLURM's programs, in which the templates run as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TEMPLATES = Path(__file__).parents[1] / "templates"
# Starts the tasks of a step, passes SIGTERM on to all of them as --signal does, and ends all if one has failed.
SRUN = """
import os, signal, subprocess, sys, time
words = sys.argv[1:]
options = [words.pop(0) for each in list(words) if words[0].startswith("--")]
count, on_each = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
tasks, killed = [], []
for task in range(count):
    own = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % on_each), "SRUN_OPTIONS": " ".join(options)}
    tasks.append(subprocess.Popen(words, env={**os.environ, **own}))
signal.signal(signal.SIGTERM, lambda *_: [each.send_signal(signal.SIGTERM) for each in tasks])
while None in (ends := [each.poll() for each in tasks]):
    if "--kill-on-bad-exit=1" in options and any(ends):
        killed += [each for each in tasks if each.poll() is None and each not in killed]
        for each in killed:
            each.kill()
    time.sleep(0.02)
own = [end for each, end in zip(tasks, ends) if each not in killed]
sys.exit(max(end if end >= 0 else 128 - end for end in own))
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    name, _, numbers = sys.argv[3].removesuffix("]").partition("[")
    first, _, last = numbers.partition("-")
    hosts = [f"{name}{each}" for each in range(int(first), int(last) + 1)] if numbers else [name]
    print(*hosts, sep="\\n")
else:
    assert sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]]
    open("requeued", "w").close()
"""


def write_program(path: Path, code: str) -> None:
    """A program in Python."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
    path.chmod(0o755)


def make_project(folder: Path) -> Path:
    """A folder with `templates`, and SLURM's programs in `slurm`; the caller adds `.venv`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "templates").symlink_to(TEMPLATES)
    write_program(folder / "slurm/srun", SRUN)
    write_program(folder / "slurm/scontrol", SCONTROL)
    return folder


def job(project: Path, tasks: int, on_each: int, **more: str) -> dict[str, str]:
    """The environment of a batch script in SLURM; the first machine is called `node1`."""
    nodes = tasks // on_each
    return {
        **os.environ, "PATH": f"{project / 'slurm'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4123456",
        "SLURM_JOB_NODELIST": f"node[1-{nodes}]", "SLURM_NNODES": str(nodes), "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": str(on_each), "SLURM_CPUS_PER_TASK": "8", **more,
    }  # fmt: skip


def bash(project: Path, words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs bash in the project's folder."""
    return subprocess.run(["bash", *words], cwd=project, env=environment, capture_output=True, text=True, check=False)
