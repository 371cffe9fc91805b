"""The benchmark of a small model, here a tiny one: it measures, tells and refuses what it should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arena.config import change
from arena.model.backbone import backbone
from arena.model.classifier import PackedClassifier
from arena.packing.batch import PackedBatch
from benchmarks import models
from benchmarks.agreement import check_agreement
from benchmarks.cells import Settings
from benchmarks.models import make_model
from benchmarks.passes import PaddedBatch, train, work_of
from benchmarks.small import WORKLOADS, Small, run_small, settings_of
from benchmarks.small_report import TIMES, as_markdown, as_text, figures, write_bench
from benchmarks.tables import cells
from benchmarks.timing import peak, reset_peak
from benchmarks.variants import ONCE, TASKS, VARIANTS
from benchmarks.workload import AROUND, Workload, make_workload

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = {
    "hidden": 64, "intermediate": 128, "heads": 2, "kv_heads": 1, "head_dim": 32, "window": 64, "softcap": 1.0,
    "vocabulary": 512,
}  # fmt: skip
SMALL = Small(rows=8, repeats=2, budget=700, longest=340, dtype="float32", layers=2, size=TINY)


def small_workload(folder: Path) -> Workload:
    fields = np.array([[20, 30, 15], [1, 5, 9], [30, 11, 300]])
    return make_workload("small", fields, folder, vocabulary=512, longest=SMALL.longest, seed=0)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_of(SMALL, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run_small(SMALL, packing_examples=400)


def test_every_variant_is_timed_on_every_task(result: dict[str, Any]) -> None:
    places = [(each["workload"], each["task"], each["variant"]) for each in result["measured"]]
    assert places == [
        (workload, task, key)
        for workload in WORKLOADS
        for task in TASKS
        for key in (VARIANTS if task != "both" else "ab")
    ]
    for each in result["measured"]:
        assert len(each["seconds"]) == (1 if each["variant"] in ONCE else SMALL.repeats) and min(each["seconds"]) > 0
    logical = {(each["workload"], each["task"]): set[int]() for each in result["measured"]}
    for each in result["measured"]:
        logical[each["workload"], each["task"]].add(each["logical_tokens"])
    assert all(len(counts) == 1 for counts in logical.values())  # all variants read the same rows


def test_computed_tokens_tell_padding_and_sharing(result: dict[str, Any]) -> None:
    for workload in WORKLOADS:
        computed = {
            each["variant"]: each["computed_tokens"]
            for each in result["measured"]
            if each["workload"] == workload and each["task"] == "both"
        }
        assert computed["a"] < computed["b"]


def test_variants_agree(result: dict[str, Any]) -> None:
    exact = result["agreement"]["exact"]
    assert set(exact) == set(VARIANTS)
    assert all(0 <= value <= 1e-5 for each in exact.values() for value in each.values())
    assert exact["b"]["probabilities"] > 0  # it did compare two ways


def test_what_is_written_has_the_figures(result: dict[str, Any], tmp_path: Path) -> None:
    paths = write_bench(result, tmp_path)
    assert [path.name for path in paths] == ["bench-cpu.json", "bench-cpu.md", "bench-cpu.png"]
    assert json.loads(paths[0].read_text()) == result
    text = paths[1].read_text()
    for each in result["measured"]:
        assert f"{each['computed_tokens']:,}" in text and each["title"] in text
    assert result["device"] in text and result["date"] in text and "bench-cpu.png" in text
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert as_text(result) in text


def test_times_are_compared_with_the_first() -> None:
    common = {"title": "t", "batches": 2, "logical_tokens": 300, "computed_tokens": 200, "peak_bytes": 2**30}
    found = [{"variant": "a", "seconds": [2.0, 1.0, 3.0], **common}, {"variant": "c", "seconds": [5.0, 9.0], **common}]
    ours, theirs = cells(TIMES, figures(found))
    assert ours == ["a", "t", "2.00", "1.00 to 3.00", "1.00", "150", "200", "150%", "2", "1.00"]
    assert theirs[4] == "3.50"


def test_bfloat16_is_held_to_the_rounding_of_padded_batches(tmp_path: Path) -> None:
    settings = settings_of(replace(SMALL, dtype="bfloat16"), tmp_path)
    found = check_agreement("abe", small_workload(tmp_path), settings, CPU)
    assert set(found.exact) == {"a", "b", "e"} and set(found.quantised) == {"a", "b", "c", "e"}
    assert all(1e-4 < value < 0.1 for each in found.quantised.values() for value in each.values())


def test_no_peak_is_an_empty_cell(result: dict[str, Any]) -> None:
    without = {**result, "measured": [{**each, "peak_bytes": None} for each in result["measured"]]}
    assert "|  |" in as_markdown(without, "picture.png")


def test_the_peak_is_of_the_call_alone() -> None:
    torch.ones(2**26)
    before = reset_peak(CPU)
    if before is None:
        pytest.skip("this machine does not tell")
    torch.ones(2**24)
    assert 2**25 < peak(CPU) - before < 2**27  # 64 MiB


def wrong_window(model: nn.Module) -> None:
    for layer in backbone(model).layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window += 1


def no_softcap(model: nn.Module) -> None:
    for layer in backbone(model).layers:
        layer.self_attn.attn_logit_softcapping = None


@pytest.mark.parametrize("spoil", [wrong_window, no_softcap])
def test_a_variant_that_computes_something_else_is_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    class Spoilt(PackedClassifier):
        def forward(self, batch: PackedBatch) -> Tensor:
            spoil(self.model)
            return super().forward(batch)

    monkeypatch.setitem(models.CLASSIFIERS, "ours", Spoilt)
    with pytest.raises(ValueError, match=r"do not agree \(unquantised.*b \(ours.*probabilities differ by"):
        check_agreement("bc", small_workload(tmp_path), settings, CPU)


def test_a_variant_that_errs_in_four_bits_only_is_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoilt(PackedClassifier):
        def forward(self, batch: PackedBatch) -> Tensor:
            quantised = any(parameter.dtype == torch.uint8 for parameter in self.model.parameters())
            return super().forward(batch) * (1.001 if quantised else 1.0)

    monkeypatch.setitem(models.CLASSIFIERS, "ours", Spoilt)
    with pytest.raises(ValueError, match=r"\(4-bit weights.*b \(ours"):
        check_agreement("bc", small_workload(tmp_path), settings, CPU)


@pytest.mark.parametrize("key", VARIANTS)
def test_a_second_step_does_not_add_to_the_first(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    cell, workload = replace(VARIANTS[key][1], quantization="none"), small_workload(tmp_path)
    still = replace(settings, recipe=change(settings.recipe, ["train.lr=1e-30", "train.head_lr=1e-30"]))
    classifier = models.CLASSIFIERS[cell.way](make_model(cell, settings.recipe, CPU, 0, stored=True))
    real, norms = torch.nn.utils.clip_grad_norm_, []

    def clip(*given: Any) -> Tensor:
        norms.append(float(real(*given)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    assert len(list(train(classifier, work_of(cell, workload, still), still, 2, CPU))) == 2
    assert norms[0] > 0 and norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert all(each.grad is None for each in classifier.parameters())


def test_padded_batches_by_hand(settings: Settings, tmp_path: Path) -> None:
    workload = small_workload(tmp_path)
    lengths = workload.store.lengths[::2]
    assert lengths.tolist() == [AROUND + 65, AROUND + 15, 340]
    cells = {key: replace(VARIANTS[key][1], task="infer", batch=2) for key in "cd"}
    given, by_length = (work_of(cell, workload, settings) for cell in cells.values())
    assert (given.micro_batches, given.computed, given.logical) == (2, 2 * lengths[0] + 340, lengths.sum())
    assert by_length.computed == 2 * lengths[0] + 340
    ((batch, _),), ((short, _),) = given.steps(1), by_length.steps(1)
    assert isinstance(batch, PaddedBatch)
    assert batch.attention_mask.sum(1).tolist() == lengths[:2].tolist()
    assert batch.index.tolist() == [0, 2] and short.index.tolist() == [2, 0]


@pytest.mark.parametrize(
    "changes", [{"rows": 3}, {"longest": 800}, {"variants": "x"}, {"variants": ""}, {"repeats": 0}]
)
def test_settings_that_cannot_be_measured(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        replace(SMALL, **changes).check()
