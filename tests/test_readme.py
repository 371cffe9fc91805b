"""What the README and the page about GPUs show works: Python runs, commands are understood."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arena import cli
from arena.config import load_recipe
from arena.data.synthetic import ensure_demo
from arena.judging.export import export_judge
from arena.judging.judge import save_judge
from arena.model.backbone import load_tokenizer
from arena.model.base_files import base_digest
from arena.packing.batch import collate
from benchmarks.__main__ import COMMANDS as MEASURING
from benchmarks.__main__ import main as measure
from tests.helpers import classifier

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE))
PAGES = README + (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```\n(.*?)^```$", PAGES, re.DOTALL | re.MULTILINE)
MEASURE, START = ".venv/bin/python -m benchmarks", "python3 benchmarks/start.py"
COMMAND = re.compile(rf"(make|\.venv/bin/arena|{re.escape(MEASURE)}|{re.escape(START)})( |$)")


def commands() -> list[str]:
    """The command lines of the pages, those in running text too."""
    lines = [line.split("#")[0].strip() for block in FENCED for line in block.splitlines()]
    quoted = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", PAGES, flags=re.DOTALL | re.MULTILINE))
    return sorted({" ".join(each.split()) for each in [*lines, *quoted] if COMMAND.match(each) and each != "make"})


def test_all_code_is_found() -> None:
    assert set(BLOCKS) == {"Batches", "A judge elsewhere"} and README.count("```python") == len(BLOCKS)
    assert len(commands()) >= 20
    assert {MEASURE, START} == {line for line in (MEASURE, START) for each in commands() if each.startswith(line)}
    assert {"make train FOLD=0", ".venv/bin/arena memory", ".venv/bin/arena export --fold 0 --out judge"} < {
        *commands()
    }


def test_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ensure_demo(load_recipe("demo", ["data.synthetic_rows=[60,10]"]))
    names: dict[str, Any] = {}
    exec(compile(BLOCKS["Batches"], "README.md", "exec"), names)
    micro_batch = names["micro_batch"]
    torch.testing.assert_close(micro_batch["label"].sum(dim=1), torch.ones(micro_batch["batch_size"]))


def test_a_judge_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed there is what the judge says of the same prompt."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("demo", ["model.quantization=none"])
    judge, tokenizer = classifier(recipe.model), load_tokenizer(recipe.model.base)
    digest = base_digest(recipe.model.base)
    save_judge(tmp_path / "trained", judge.model, tokenizer, recipe, np.full(3, 1 / 3), "rows", digest)
    export_judge(tmp_path / "trained", tmp_path / "judge", dtype="float32")
    names: dict[str, Any] = {}
    exec(compile(BLOCKS["A judge elsewhere"], "README.md", "exec"), names)
    with torch.no_grad():
        expected = judge.eval()(collate([{"input_ids": names["example"].input_ids}])).softmax(-1)
    shown = re.findall(r"[0-9.]{4,}", capsys.readouterr().out.splitlines()[-1])
    torch.testing.assert_close(torch.tensor([[float(each) for each in shown]]), expected, atol=1e-4, rtol=0)
    assert float(expected.max() - expected.min()) > 0.05  # a prompt or a head of its own shows


@pytest.mark.parametrize("line", commands())
def test_every_command_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """make knows the target and its variables; the command line of each is parsed, but not run."""
    if line.startswith(START):
        assert (ROOT / START.split()[1]).is_file() and "--wheels" in line
        return
    if line.startswith("make"):
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        words = ["--dry-run", "--no-print-directory", "--assume-old=.venv/ready", "--assume-old=.venv/dev"]
        told = subprocess.run(
            ["make", *words, *shlex.split(line)[1:]], cwd=ROOT, env=plain, capture_output=True, text=True, check=False
        )
        assert told.returncode == 0, told.stderr
        lines = [each for each in told.stdout.splitlines() if each.startswith((".venv/bin/arena", MEASURE))]
    else:
        lines = [line]
    ran: list[Any] = []
    for command in (*cli.COMMANDS.values(), *MEASURING.values()):
        monkeypatch.setattr(command, "run", lambda self: ran.append(self))
    for each in lines:
        program, *words = shlex.split(each)
        monkeypatch.setattr(sys, "argv", [program, *(words[2:] if each.startswith(MEASURE) else words)])
        (measure if each.startswith(MEASURE) else cli.main)()
    assert len(ran) == len(lines)
    for command in ran:
        settings = [each for each in getattr(command, "overrides", ()) if not each.endswith("=...")]
        load_recipe("demo", settings)  # they exist
