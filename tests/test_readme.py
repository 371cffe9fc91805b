"""What the pages show works: Python runs, commands are understood, links, paths and settings exist."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arena import cli
from arena.config import load_recipe
from arena.demo.synthetic import ensure_demo
from arena.inference.export import export_judge
from arena.inference.saved import SavedJudge, save_judge
from arena.model.backbone import load_tokenizer
from arena.model.base_files import base_digest
from arena.packing.batch import collate
from arena.reporting.settings import settings
from benchmarks.__main__ import COMMANDS as MEASURING
from benchmarks.__main__ import main as measure
from tests.helpers import classifier
from tests.test_architecture import ROOMS

ROOT = Path(__file__).parents[1]
GENERATED = re.compile(r"docs/(bases|bench-.*|techniques-.*|torture)\.md")  # their links are checked, and nothing else
EVERY_PAGE = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), ROOT / "data/README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
PAGES = {name: text for name, text in EVERY_PAGE.items() if not GENERATED.fullmatch(name)}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
QUOTED = re.compile(r"`([^`]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MEASURE = ".venv/bin/python -m benchmarks "
ARENA, PYTHON, START = ".venv/bin/arena ", ".venv/bin/python ", "python3 benchmarks/start.py"
IN_TEXT = (ARENA, PYTHON, START, "make ", "pytest ", ".venv/bin/pip ", ".venv/bin/hf ")  # how commands begin
OTHERS = {".venv/bin/hf auth login", ".venv/bin/jupyter lab"}  # of other programs, known to be right
SUBMITTED = {"templates/train.slurm": "train", "templates/judge-array.slurm": "judge"}  # and what they run
SETTING = re.compile(r"(data|prompt|model|packing|train|judge)\.(?!csv|parquet|json)[a-z_.]+(=\S*)?")
PATH = re.compile(
    r"[\w./-]+/[\w.-]+\.(py|ya?ml|md|csv|json|txt)|[a-z]+\.py|(arena|benchmarks|tests|notebooks|\.ci)/[\w/-]*"
)
NOT_THERE = re.compile(r"(runs|data|wheels|build|judge)/.*|.*/NAME\..*")  # made by commands, or by a reader


def prose(text: str) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", text)


def quoted(text: str) -> list[str]:
    """What stands between backticks in running text."""
    return [" ".join(each.split()) for each in QUOTED.findall(prose(text))]


def commands(text: str) -> list[str]:
    """The command lines of a page: all lines of its shell blocks, and what is quoted in its text."""
    blocks = [block.replace("\\\n", "") for kind, block in FENCE.findall(text) if kind in ("", "sh")]
    lines = [re.sub(r"\s+# .*$", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line] + [each for each in quoted(text) if each.startswith(IN_TEXT)]


def python(page: str) -> list[str]:
    return [block for kind, block in FENCE.findall(PAGES[page]) if kind == "python"]


def run_block(page: str, number: int = 0) -> dict[str, Any]:
    """The names that a page's Python block leaves behind."""
    names: dict[str, Any] = {}
    exec(compile(python(page)[number], page, "exec"), names)
    return names


def anchors(text: str) -> set[str]:
    """The places in a page that a link may name, as GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: str, text: str) -> list[str]:
    """The links of a page to files and headings that are not there; addresses elsewhere are not looked at."""
    dead = []
    for link in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = ROOT / page if not name else (ROOT / page).parent / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            dead.append(link)
    return dead


def check_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails for a command that would be refused. Nothing is run: make says what it would do, `arena` parses."""
    line = re.sub(r"^cd \S+ && |^[A-Z_]+=\S+ ", "", line)
    line = re.sub(r"^[A-Z_]+=\S+ ", "", line)
    words = shlex.split(line, comments=False)
    if line.startswith("make "):
        check_arena([each for each in would_run(words[1:]) if each.startswith((ARENA, MEASURE))], monkeypatch)
    elif line.startswith(ARENA):
        check_arena([line], monkeypatch)
    elif "-m" in words and words[words.index("-m") + 1] == "arena.cli":  # by python, or by torchrun
        check_arena([ARENA + shlex.join(words[words.index("-m") + 2 :])], monkeypatch)
    elif words[0] == "sbatch":
        assert words[1] in SUBMITTED and (ROOT / words[1]).is_file()
        check_arena([ARENA + shlex.join([SUBMITTED[words[1]], *words[2:]])], monkeypatch)
    elif words[:3] == ["sky", "jobs", "launch"]:
        assert (ROOT / words[3]).is_file()
    elif line.startswith("pytest ") or line.startswith(PYTHON + "-m pytest"):
        paths = [ROOT / each for each in words if each.startswith("tests/")]
        assert all(path.is_file() for path in paths), line
        assert paths or "-m" in words[words.index("pytest") :]
    elif line.startswith(MEASURE):
        check_arena([line], monkeypatch)
    elif line.startswith(PYTHON + "-m "):
        assert importlib.util.find_spec(words[2]) is not None
    elif line.startswith(START):
        assert (ROOT / words[1]).is_file() and "--wheels" in words
    elif line.startswith("python3 -c "):
        ast.parse(words[2])
    elif words[0].endswith("pip") and words[1] == "install":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"].values()
        known = {re.split(r"[<>=\[]", each)[0] for extra in extras for each in extra}
        asked = {re.split(r"[[<>=]", each)[0] for each in words[2:] if not each.startswith("--")}
        assert "--no-index" in words or asked - {"constraints.txt"} <= known, line
    else:
        assert line in OTHERS, f"an unknown command: {line}"


def would_run(words: list[str]) -> list[str]:
    """The lines that make would run, as if everything were set up; not as a part of the make that runs the tests."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    options = ["--dry-run", "--no-print-directory", "--assume-old=.venv/ready", "--assume-old=.venv/dev"]
    told = subprocess.run(["make", *options, *words], cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return told.stdout.splitlines()


def check_arena(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command line takes these lines, and the settings in them exist."""
    ran: list[Any] = []
    for command in (*cli.COMMANDS.values(), *MEASURING.values()):
        monkeypatch.setattr(command, "run", lambda self: ran.append(self))
    for each in lines:
        measures = each.startswith(MEASURE)
        monkeypatch.setattr(sys, "argv", shlex.split(each)[2 if measures else 0 :])
        measure() if measures else cli.main()
    assert len(ran) == len(lines)
    for command in ran:
        load_recipe("demo", [each for each in getattr(command, "overrides", ()) if not each.endswith("=...")])


@pytest.mark.parametrize(("page", "line"), sorted({(page, line) for page in PAGES for line in commands(PAGES[page])}))
def test_every_command_is_understood(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if line.endswith(" --help"):
        assert shlex.split(line)[1] in cli.COMMANDS
        return
    check_command(line, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "make trian FOLD=0", "make train fold=0", 'make train ARGS="--new"', 'make train ARGS="train.batch_siez=8"',
        ".venv/bin/arena exprot", ".venv/bin/arena memory model.tune=none", ".venv/bin/torchrun -m arena.cli trian",
        "pytest tests/test_nothing.py", ".venv/bin/pip install nothing", ".venv/bin/python -m arena.nothing",
        ".venv/bin/python -m benchmarks collect --out x", "rm -rf runs", "sbatch templates/none.slurm",
        "sbatch templates/train.slurm --folds 0", "sky jobs launch templates/none.yaml",
    ],
)  # fmt: skip
def test_a_wrong_command_is_noticed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError, ModuleNotFoundError)):
        check_command(line, monkeypatch)


def test_commands_are_found() -> None:
    found = {line for page in PAGES for line in commands(PAGES[page])}
    assert len(found) >= 50
    assert {
        "make train FOLD=0", "make infer", ".venv/bin/arena memory", ".venv/bin/arena export --fold 0 --out judge",
        "make bench", "make gpu",
    } < found  # fmt: skip
    assert sum(line.startswith(START) for line in found) >= 2


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_links_lead_to_pages_and_headings_that_exist(page: str) -> None:
    assert dead_links(page, EVERY_PAGE[page]) == []


def test_a_dead_link_is_noticed() -> None:
    dead = ["docs/none.md", "docs/data.md#none", "#a-heading", "no.png"]
    good = ["docs/data.md#the-demo-data", "#why-arena", "LICENSE", "https://example.org/none"]
    text = "".join(f"[words]({link})\n![words]({link})" for link in [*dead, *good])
    assert set(dead_links("README.md", "# A heading\n" + text)) == set(dead)
    assert anchors("# A heading, with `code`\n```sh\n# none\n```") == {"a-heading-with-code"}


@pytest.mark.parametrize("page", [*PAGES])
def test_settings_and_paths_in_the_text_exist(page: str) -> None:
    for each in quoted(PAGES[page]):
        words = each.split()
        if all(SETTING.fullmatch(word) for word in words):
            load_recipe("demo", [word for word in words if "=" in word])
            missing = {word.partition("=")[0] for word in words} - {setting.key for setting in settings()}
            assert not missing, f"{page}: there is no setting {missing}"
        elif PATH.fullmatch(each) and not NOT_THERE.fullmatch(each) and not each.startswith("docs/bench-"):
            places = (ROOT / each, ROOT / "arena" / each)
            assert any(place.exists() for place in places), f"{page}: there is no {each}"


def test_each_parameter_of_the_published_experiment_has_a_setting() -> None:
    """With its default; what has no setting says why."""
    lines = [line.split(" | ") for line in PAGES["docs/sst2-experiment.md"].splitlines() if line.startswith("| `")]
    known = {setting.key for setting in settings()} | {"--runs"}
    assert len(lines) == len({line[0] for line in lines}) == 42 and all(len(line) == 3 for line in lines)
    without = []
    for parameter, _, here in lines:
        named = [each.partition("=")[0] for each in QUOTED.findall(here)]
        if here.startswith("none: "):
            without.append(parameter)
        else:
            assert named[0] in known, parameter
    assert without == ["| `framework`", "| `use_tt`"]


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].split()) <= 1000


def test_the_readme_links_to_every_page() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall(PAGES["README.md"])}
    assert {page for page in PAGES if page.startswith("docs/")} <= linked
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"} <= linked


def test_the_order_of_imports_is_the_one_that_is_tested() -> None:
    (listed,) = [block for kind, block in FENCE.findall(PAGES["CONTRIBUTING.md"]) if kind == "text"]
    assert re.findall(r"\w+", listed) == ROOMS


def walks(text: str) -> list[list[str]]:
    """The lines of each numbered walk through the code, a module first, then names in it."""
    section = text.partition("\n## Two walks")[2].partition("\n## ")[0]
    return [re.split(r"^\d+\. ", part, flags=re.MULTILINE)[1:] for part in section.split("\n### ")[1:]]


def check_walk(lines: list[str]) -> None:
    """Fails unless at most 15 modules are named, each once, and each with names that it defines."""
    modules = []
    for line in lines:
        module, *names = QUOTED.findall(line.partition(":")[0])
        modules.append(module)
        tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
        assert names, f"{module}: name a function or class"
        for name in names:
            places: list[Any] = [tree]
            for part in name.split("."):
                places = [each for place in places for each in place.body if getattr(each, "name", None) == part]
            assert places, f"{module} has no {name}"
    assert 5 < len(modules) <= 15 and len(set(modules)) == len(modules)


def test_the_walks_name_modules_that_exist_and_at_most_15_each() -> None:
    both = walks(PAGES["CONTRIBUTING.md"])
    assert len(both) == 2
    for lines in both:
        check_walk(lines)


@pytest.mark.parametrize(
    ("number", "wrong"),
    [
        (0, "`arena/data/row.py`, `read_rows`: "), (0, "`arena/data/rows.py`, `read_row`: "),
        (1, "`arena/data/rows.py`, `read_rows`: "), (2, "`arena/packing/loader.py`, `PackedLoader.batch`: "),
        (3, "`arena/data/rows.py`: "),
    ],
)  # fmt: skip
def test_a_wrong_line_of_a_walk_is_noticed(number: int, wrong: str) -> None:
    lines = walks(PAGES["CONTRIBUTING.md"])[0]
    with pytest.raises((AssertionError, FileNotFoundError)):
        check_walk([*lines[:number], wrong, *lines[number + 1 :]])
    with pytest.raises(AssertionError):
        check_walk([*lines, "`arena/cli.py`, `main`: one too many"])


def test_all_python_is_run() -> None:
    assert {page: len(python(page)) for page in PAGES if python(page)} == {
        "README.md": 1, "docs/packing.md": 2, "docs/judging.md": 2, "docs/models.md": 1, "docs/commands.md": 1,
    }  # fmt: skip
    assert sum(text.count("```python") for text in EVERY_PAGE.values()) == 7


def test_answers_from_python() -> None:
    answers = run_block("docs/commands.md")["answers"]
    assert len(answers) == 2 and all(answer.finish in ("stop", "length") for answer in answers)


def test_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ensure_demo(load_recipe("demo", ["data.synthetic_rows=[60,10]"]))
    monkeypatch.setattr("arena.training.batches.ensure_demo", lambda recipe: None)  # it would ask for all rows
    micro_batch = run_block("docs/packing.md")["micro_batch"]
    torch.testing.assert_close(micro_batch["label"].sum(dim=1), torch.ones(micro_batch["batch_size"]))


def test_examples_of_your_own() -> None:
    (micro_batch,) = run_block("docs/packing.md", 1)["batch"]
    assert micro_batch["cu_seqlens"].tolist() == [0, 4, 7]


def test_a_model_by_hand() -> None:
    model = run_block("docs/models.md")["model"]
    assert 0 < sum(each.requires_grad for each in model.parameters()) < len(list(model.parameters()))


def test_a_judge_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ensure_demo(load_recipe("demo", ["data.synthetic_rows=[60,10]"]))
    save_untrained(tmp_path / "runs/demo/fold0/model", quantization="nf4")
    probabilities = run_block("README.md")["probabilities"]
    assert probabilities.shape == (1, 3) and probabilities.sum() == pytest.approx(1)
    block = run_block("docs/judging.md")
    judge, (row,) = block["judge"], block["rows"]
    np.testing.assert_allclose(judge.predict_proba(row), probabilities, atol=1e-6)
    assert np.abs(judge.predict_proba({**row, "response_a": "No."}) - probabilities).max() > 1e-6  # no constant


def save_untrained(folder: Path, quantization: str) -> Any:
    """Saves a judge that was not trained, with a head of random weights, and gives its classifier back."""
    recipe = load_recipe("demo", [f"model.quantization={quantization}"])
    judge, tokenizer = classifier(recipe.model), load_tokenizer(recipe.model.base)
    digest = base_digest(recipe.model.base)
    save_judge(judge.model, tokenizer, SavedJudge(folder, recipe, np.full(3, 1 / 3), "rows", digest))
    return judge


def test_a_judge_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed there is what the judge says of the same prompt."""
    monkeypatch.chdir(tmp_path)
    judge = save_untrained(tmp_path / "trained", quantization="none")
    export_judge(tmp_path / "trained", tmp_path / "judge", dtype="float32")
    names = run_block("docs/judging.md", 1)
    with torch.no_grad():
        expected = judge.eval()(collate([{"input_ids": np.array(names["ids"], dtype=np.int32)}])).softmax(-1)
    shown = re.findall(r"[0-9.]{4,}", capsys.readouterr().out.splitlines()[-1])
    torch.testing.assert_close(torch.tensor([[float(each) for each in shown]]), expected, atol=1e-4, rtol=0)
    assert float(expected.max() - expected.min()) > 0.05  # a prompt or a head of its own shows
