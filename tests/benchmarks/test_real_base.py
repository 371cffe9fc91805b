"""The benchmark of a real base, here a tiny one: it measures, tells and refuses what it should."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import real_base, real_base_report
from benchmarks.ceiling import product_speed
from benchmarks.models import PaddedClassifier
from benchmarks.real_base import CPU, RealBase, run_real_base
from benchmarks.real_base_report import as_text, write_real_base
from tests.gguf_files import write_gguf
from tests.helpers import make_base, write_rows


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealBase]:
    folder = tmp_path_factory.mktemp("real")
    base = folder / "base.gguf"  # as the real one is; its sixth layer sees beyond the window, to where rows differ
    write_gguf(make_base(folder, "gemma3_text", max_position_embeddings=4096, num_hidden_layers=6), base)
    file = write_rows(folder / "rows") / "train.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "user"))
        yield RealBase(file, base=str(base), rows=9, repeats=2, dtype="float32", longest=3000, budget=6000, out=folder)


@pytest.fixture(scope="module")
def result(real: RealBase) -> dict[str, Any]:
    return run_real_base(real)


@pytest.mark.slow
def test_every_variant_is_timed_on_the_same_rows(result: dict[str, Any]) -> None:
    assert [(each["task"], each["variant"]) for each in result["measured"]] == [
        (task, key) for task in ("train", "infer") for key in "acd"
    ]
    assert len({each["logical_tokens"] for each in result["measured"]}) == 1
    assert all(len(each["seconds"]) == 2 and min(each["seconds"]) > 0 for each in result["measured"])


@pytest.mark.slow
def test_a_profile_says_where_the_time_goes(result: dict[str, Any]) -> None:
    """At a tiny size nearly nothing is products; each kind occurs, and they are all of the time."""
    for task in ("train", "infer"):
        (kinds,) = [each["kinds"] for each in result["measured"] if each["task"] == task and each["kinds"]]
        assert tuple(kinds) == real_base.KINDS
        assert min(kinds.values()) > 0 and sum(kinds.values()) == pytest.approx(1)


@pytest.mark.slow
def test_products_are_those_of_the_computed_tokens(result: dict[str, Any]) -> None:
    training, judging = ([each for each in result["measured"] if each["task"] == task] for task in ("train", "infer"))
    a_token = {each["products"] * each["gflops"] / each["computed_tokens"] for each in training}
    assert max(a_token) == pytest.approx(min(a_token))
    half = judging[0]["products"] * judging[0]["gflops"] / judging[0]["computed_tokens"]
    assert max(a_token) == pytest.approx(2 * half)  # forward, and the gradient of the layers' inputs
    assert training[0]["computed_tokens"] < training[0]["logical_tokens"] < training[1]["computed_tokens"]


@pytest.mark.slow
def test_what_is_written_has_the_figures(result: dict[str, Any], tmp_path: Path) -> None:
    data, page = write_real_base(result, tmp_path)
    assert json.loads(data.read_text()) == result
    text = page.read_text()
    assert as_text(result) in text and result["device"] in text
    assert all(f"{each['computed_tokens']:,}" in text for each in result["measured"])


def test_times_and_shares_are_of_the_least_time() -> None:
    common = {"products": 1.0, "logical_tokens": 8}
    found = [{"seconds": [4.0, 2.0], **common}, {"seconds": [6.0, 9.0], **common}]
    ours, theirs = real_base_report.figures(found)
    assert (ours["times"], ours["share"], ours["rate"]) == (1.0, 0.5, 4.0)
    assert (theirs["times"], theirs["most"]) == (3.0, 9.0)


@pytest.mark.slow
def test_other_numbers_are_refused(real: RealBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours must not be timed if it computes something else: here a row of logits that belongs to another example."""

    class Exchanged(PaddedClassifier):
        def forward(self, batch: Any) -> Tensor:
            return torch.as_tensor(ours(self.model)(batch)).roll(1, 0)

    ours = real_base.CLASSIFIERS["ours"]
    monkeypatch.setitem(real_base.CLASSIFIERS, "ours", Exchanged)
    with pytest.raises(ValueError, match="do not agree"):
        run_real_base(real)


def test_settings_that_cannot_be_measured_are_refused(real: RealBase) -> None:
    wrong = {"--rows": replace(real, rows=1), "--budget": replace(real, budget=10), "--tasks": replace(real, tasks=())}
    for name, settings in wrong.items():
        with pytest.raises(ValueError, match=name):
            settings.check()
    with pytest.raises(ValueError, match="only 60 rows"):
        run_real_base(replace(real, rows=61))


def test_a_product_has_a_speed() -> None:
    assert product_speed(torch.float32, CPU) > 0
