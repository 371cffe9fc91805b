"""`arena serve`: which judges its words name, and what it refuses before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from arena import Judge
from arena.serving.command import check_token, load, named, report_files
from arena.serving.limits import Limits
from arena.serving.server import bind
from tests.helpers import status_of_arena


def test_words_name_judges_and_settings() -> None:
    assert named(("runs/demo/", "old=runs/demo/fold1", "judge.swap=false")) == (
        {"demo": "runs/demo/", "old": "runs/demo/fold1"},
        ["judge.swap=false"],
    )
    assert named(("a b=c",))[0] == {"a-b-c": "a b=c"}  # a folder
    for words, what in (
        (("runs/a", "other/a"), "two judges are called a: name one"),
        (("judge.swap=false",), "arena serve demo"),
    ):
        with pytest.raises(ValueError, match=what):
            named(words)


def test_judges_share_their_base(run: Path) -> None:
    judges = load({"a": str(run / "fold0"), "b": str(run)}, ["judge.swap=false"], Path("runs"))
    models = [model for judge in judges.values() for model in judge.models]
    assert len(models) == 3 and all(each.shares_base(models[0]) for each in models)
    assert judges["b"].models[0].recipe.judge.swap is False
    with pytest.raises(ValueError, match=r"train\.epochs does not apply to a trained judge"):
        load({"a": str(run)}, ["train.epochs=2"], Path("runs"))


def test_a_report_is_looked_for_in_the_fold_and_in_its_run(judges: dict[str, Judge], run: Path) -> None:
    assert report_files(judges["first"]) == [run.resolve() / "fold0/report.html", run.resolve() / "report.html"]


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bound = bind("127.0.0.1", 0)
    bound.listen()
    for host, port in (("127.0.0.1", bound.getsockname()[1]), ("127.0.0.1", 70_000), ("no host", 0)):
        with pytest.raises(ValueError, match=r"cannot be listened to .*arena serve demo --port 8001`"):
            bind(host, port)
    bound.close()
    check_token("a" * 16, "0.0.0.0")
    check_token(None, "::1")
    for token, host, what in ((None, "0.0.0.0", "set a token"), ("", "127.0.0.1", "ASCII"), ("é" * 20, "::1", "ASCII")):
        with pytest.raises(ValueError, match=what):
            check_token(token, host)
    with pytest.raises(ValueError, match="rows is 0: give a number above 0"):
        Limits(rows=0)
    monkeypatch.delenv("ARENA_TOKEN", raising=False)
    assert status_of_arena(monkeypatch, "serve", "demo", "--host", "0.0.0.0") == 2
    assert "ARENA_TOKEN" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "arena.serving.server")
    monkeypatch.delitem(sys.modules, "arena.serving.service")
    monkeypatch.delitem(sys.modules, "arena.serving.metrics")
    assert status_of_arena(monkeypatch, "serve", "demo") == 2
    assert "pip install fastapi uvicorn prometheus-client" in capsys.readouterr().out
