"""Nothing that can run code is loaded: files that would are planted everywhere, and the source is searched."""

from __future__ import annotations

import ast
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from arena import cli
from arena.model.backbone import load_base
from arena.model.tuning import adapt, load_trained, save_model
from arena.settings import ModelSettings
from arena.tasks.preference import COLUMNS as CLASSES
from tests.helpers import exact, write_rows

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for package in ("arena", "benchmarks") for path in (ROOT / package).rglob("*.py"))
WORDS = ("pickle", "torch.load")  # stand nowhere, not even in a comment
MODULES_THAT_RUN_WHAT_THEY_READ = {"dill", "joblib", "shelve", "marshal", "runpy", "code"}
CALLS_THAT_RUN_WHAT_THEY_READ = {
    "torch.hub.load", "torch.jit.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "eval", "exec",
}  # fmt: skip
OWN_LOADER = "_Loader"  # of arena/prompt_settings.py, a SafeLoader that takes even less


class Payload:
    """What leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The file that a payload would make; at the end of the test it must not be there."""
    path = tmp_path / "RAN"
    yield path
    assert not path.exists(), "a planted file was unpickled"


def plant(path: Path, mark: Path) -> Path:
    """Writes a payload in the manner that the file's name calls for."""
    if path.suffix in {".npy", ".npz"}:
        objects = np.array([Payload(mark)], dtype=object)
        with path.open("wb") as file:
            np.savez(file, rank=objects, shared=objects) if path.suffix == ".npz" else np.save(file, objects)
    elif path.suffix in {".bin", ".pt"}:
        torch.save({"weight": Payload(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(mark)))
    return path


def test_the_payload_works(tmp_path: Path) -> None:
    """The control: loaded carelessly, each of these files runs."""
    for name, load in (
        ("a.pkl", lambda path: pickle.loads(path.read_bytes())),
        ("a.pt", lambda path: torch.load(path, weights_only=False)),
        ("a.npy", lambda path: np.load(path, allow_pickle=True)),
        ("a.npz", lambda path: np.load(path, allow_pickle=True)["rank"]),
    ):
        ran = tmp_path / f"ran-{name}"
        load(plant(tmp_path / name, ran))
        assert ran.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"])
def test_planted_in_a_base(name: str, gemma2: Path, tmp_path: Path, mark: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(gemma2, base)
    plant(base / name, mark)
    load_base(exact(base), CLASSES)  # beside safetensors it is passed over
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load_base(exact(base), CLASSES)


@pytest.mark.parametrize("tune", ["lora", "head"])
def test_planted_in_a_judge(tune: str, gemma2: Path, tmp_path: Path, mark: Path) -> None:
    settings: ModelSettings = exact(gemma2, tune=tune)
    folder = tmp_path / "model"
    save_model(adapt(load_base(settings, CLASSES), settings), folder)
    for name in ("adapter_model.bin", "pytorch_model.bin", "optimizer.pt"):
        plant(folder / name, mark)
    load_trained(folder, settings, CLASSES)
    [weights] = folder.glob("*.safetensors")
    whole = weights.read_bytes()
    for broken in (whole[:100], plant(folder / "x.pkl", mark).read_bytes()):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged"):
            load_trained(folder, settings, CLASSES)
    weights.unlink()
    with pytest.raises(ValueError, match=r"safetensors"):
        load_trained(folder, settings, CLASSES)


def test_planted_in_a_run_and_in_the_cache(
    gemma2: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def arena(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["arena", *words])
        cli.main()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "load", refuse)
    write_rows(tmp_path / "rows", n=30)
    train = [
        "train", "--data", "rows", f"model.base={gemma2}", "prompt.max_length=128", "packing.budget=512",
        "train.batch_size=8", "data.folds=3", "train.checkpoint_every=1",
    ]  # fmt: skip
    arena(*train)
    run = tmp_path / "runs/demo/fold0"
    folders = [run, *(path for path in run.rglob("*") if path.is_dir())]
    for folder in folders:
        for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "adapter_model.bin", "random_states_0.pkl"):
            plant(folder / name, mark)
    arena(*train)  # as a finished run
    (run / "metrics.json").unlink()
    with pytest.raises(SystemExit):  # as an interrupted one, that goes on or not, but without what was planted
        arena(*train)
        sys.exit()
    arena(*train, "--fresh")
    arena("infer", "--data", "rows")
    assert np.isfinite(pd.read_csv("submission.csv")[list(CLASSES)].to_numpy()).all()
    found = sorted((tmp_path / "data/cache").iterdir())
    assert {path.name.split("-")[0] for path in found} == {"conversations", "tokens", "folds", "prefixes"}
    for path in found:
        whole = path.read_bytes()
        path.unlink()
        plant(path, mark)
        failed = []
        for command in (["train", *train[1:], "--fresh"], ["infer", "--data", "rows"]):
            try:
                arena(*command)
            except SystemExit as stop:
                failed.append(stop.code)
        assert failed == [2]  # training reads its own files, inference the test file's
        assert str(path.relative_to(tmp_path)) in capsys.readouterr().out
        path.unlink()
        path.write_bytes(whole)


# The source


def unsafe(text: str) -> list[str]:
    """What in a module's source could run what it reads, as `line: what`."""
    lines = enumerate(text.splitlines(), 1)
    found = [f"{number}: {word}" for number, line in lines for word in WORDS if word in line]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            names += [each.name for each in node.names] if isinstance(node, ast.ImportFrom) else []
            found += [
                f"{node.lineno}: {name}" for name in names if set(name.split(".")) & MODULES_THAT_RUN_WHAT_THEY_READ
            ]
        if isinstance(node, ast.Call) and (why := unsafe_call(node)):
            found.append(f"{node.lineno}: {why}")
    return found


def unsafe_call(node: ast.Call) -> str | None:
    name = ast.unparse(node.func)
    keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
    spread = {ast.unparse(each.value) for each in node.keywords if each.arg is None}
    if name in CALLS_THAT_RUN_WHAT_THEY_READ or name.split(".")[-1] == "load_state":
        return name
    if name == "yaml.load" and OWN_LOADER not in {ast.unparse(each) for each in node.args}:
        return "yaml.load with another loader"
    if keywords.get("trust_remote_code", "False") != "False" or keywords.get("weights_only", "True") != "True":
        return name
    if name.endswith(".from_pretrained") and not name.startswith(("PeftModel.", "type(empty).", "Judge.")):
        wanted = {"SAFE", "SAFE_WEIGHTS"} if name.split(".")[0] in {"AutoConfig", "AutoTokenizer"} else {"SAFE_WEIGHTS"}
        return None if spread & wanted else f"{name} without {' or '.join(sorted(wanted))}"
    return None


def test_no_module_loads_what_can_run() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{each}" for path in MODULES for each in unsafe(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import cloudpickle", "load = torch.load",
        "import joblib", "from sklearn.externals import joblib",
        "torch.load('x')", "np.load('x', allow_pickle=True)", "pd.read_pickle('x')", "yaml.load(text)",
        "yaml.load(text, yaml.Loader)", "yaml.unsafe_load(text)", "eval(text)", "exec(text)",
        "AutoModelForCausalLM.from_pretrained(base)", "AutoTokenizer.from_pretrained(base)",
        "AutoModel.from_pretrained(base, **SAFE)", "f(base, trust_remote_code=True)", "g(weights_only=False)",
        "accelerator.load_state('x')",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_should(text: str) -> None:
    assert len(unsafe(text)) == 1


def test_the_settings_that_are_spread_are_what_they_seem() -> None:
    from arena.model.safety import SAFE, SAFE_WEIGHTS

    assert SAFE == {"trust_remote_code": False}
    assert SAFE_WEIGHTS == {"trust_remote_code": False, "use_safetensors": True, "weights_only": True}
