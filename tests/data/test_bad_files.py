"""Hostile and broken data files: a named error or finite rows; nothing half-written, no traceback, no hanging."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arena.config import change, load_recipe
from arena.data.dataset import read_dataset
from arena.inference.judge_model import JudgeModel
from arena.inference.saved import SavedJudge, save_judge
from arena.model.backbone import load_base, load_tokenizer
from arena.model.base_files import base_digest
from arena.model.tuning import adapt
from arena.tasks.preference import CLASSES
from tests.data import bad_files
from tests.data.bad_files import KINDS, Kind
from tests.helpers import PREFERENCE, done_within

SECONDS = 20  # in which each kind must be done with
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_hanging() -> Iterator[None]:
    with done_within(SECONDS):
        yield


@pytest.fixture(scope="module")
def judge(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> JudgeModel:
    """An untrained judge on a tiny base."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    settings = ["prompt.max_length=128", "packing.budget=512", f"data.cache={folder.parent / 'cache'}"]
    recipe = load_recipe("demo", [f"model.base={gemma2}", *settings])
    model, tokenizer = adapt(load_base(recipe.model, CLASSES), recipe.model), load_tokenizer(str(gemma2))
    save_judge(model, tokenizer, SavedJudge(folder, recipe, np.full(3, 1 / 3), "rows", base_digest(str(gemma2))))
    return JudgeModel(folder)


def complaint(path: Path, cache: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_dataset([path], cache, PREFERENCE, labels="required")
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_file(kind: Kind, judge: JudgeModel, tmp_path: Path) -> None:
    path, cache = kind.write(tmp_path), tmp_path / "cache"
    if kind.outcome == "error":
        message = complaint(path, cache)
        for part in kind.says:
            assert part.format(file=path) in message
        assert len(message) < 3_000 and message.replace("\n", "").isprintable()
        assert not cache.exists() or list(cache.iterdir()) == []
        return
    rows = read_dataset([path], cache, PREFERENCE, labels="required")
    probabilities = judge.probabilities(rows)
    assert len(rows) > 0 and probabilities.shape == (len(rows), 3)
    assert np.isfinite(probabilities).all() and np.abs(probabilities.sum(axis=1) - 1).max() < 1e-6
    assert [each.name for each in cache.iterdir() if each.name.startswith(".")] == []


def test_a_good_file_is_none_of_them(judge: JudgeModel, tmp_path: Path) -> None:
    """The control: what every kind was made from gives rows, and no complaint."""
    path = bad_files.file(bad_files.CSV)(tmp_path)
    assert len(read_dataset([path], tmp_path / "cache", PREFERENCE, labels="required")) == len(bad_files.GOOD)


def test_the_corpus_is_large_and_its_names_are_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    names = [kind.name for kind in KINDS]
    assert len(names) == len(set(names)) >= 60
    assert {kind.outcome for kind in KINDS} == {"rows", "error"}
    print(bad_files.summary(KINDS))
    assert f"| all | {len(KINDS)} |" in capsys.readouterr().out


def test_control_tokens_never_come_out_of_text(judge: JudgeModel, tmp_path: Path) -> None:
    from arena.data.text_encoder import control_ids
    from arena.tasks.preference import PromptEncoder

    encoder = PromptEncoder(judge.tokenizer, judge.recipe.prompt)
    known = control_ids(judge.tokenizer)
    ours = [index for index in [*encoder.prefix, *encoder.suffix] if index in known]
    kind = next(kind for kind in KINDS if kind.name == "control tokens in every field")
    rows = read_dataset([kind.write(tmp_path)], tmp_path / "cache", PREFERENCE, labels="required")
    for example in encoder.encode(rows.table[:], orders=2):
        assert [index for index in example.input_ids.tolist() if index in known] == ours


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_bombs_take_little_memory(tmp_path: Path) -> None:
    """Files that would fill any memory, read by a process of their own; and a plain one, to compare with."""
    script = """
import re, sys
from pathlib import Path
from arena.data.dataset import read_dataset
from arena.tasks import TASKS
for name in sys.argv[2:]:
    try:
        read_dataset([Path(name)], Path(sys.argv[1]), TASKS["preference"](), labels="required")
    except ValueError as error:
        assert "max_row_characters" in str(error), error
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""

    def peak(*paths: Path) -> int:
        words = [sys.executable, "-c", script, str(tmp_path / "cache"), *map(str, paths)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1]) // 1024

    line = tmp_path / "line.csv"
    with line.open("w") as handle:
        handle.write(bad_files.CSV)
        for _ in range(300):
            handle.write("x" * 10**6)
    quote = tmp_path / "quote.csv"
    quote.write_text(bad_files.CSV + '9,x,y,"' + "a line\n" * 10**7)
    bombs = [bad_files.bomb(tmp_path), line, quote]
    plain = peak(bad_files.file(bad_files.CSV, "plain.csv")(tmp_path))
    assert peak(*bombs) < plain + 700  # of 300 GB


@pytest.mark.parametrize("found", ["tokens", "conversations", "prefixes"])
def test_a_damaged_cache_is_named(
    found: str, judge: JudgeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = bad_files.file(bad_files.CSV)(tmp_path), tmp_path / "cache"
    monkeypatch.setattr(judge, "recipe", change(judge.recipe, [f"data.cache={cache}"]))

    def run() -> Any:
        monkeypatch.setattr(judge, "_planned", None)
        return judge.probabilities(read_dataset([path], cache, PREFERENCE, labels="required"))

    run()
    [kept] = cache.glob(f"{found}-*")
    whole = kept.read_bytes()
    for broken in (b"", b"garbage" * 100, whole[: len(whole) // 2], whole[:-9]):
        kept.unlink()  # another file: the old one is mapped into memory
        kept.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged") as caught:
            run()
        assert str(kept) in str(caught.value)
    kept.unlink()
    with tempfile.TemporaryDirectory():
        assert np.isfinite(run()).all()
