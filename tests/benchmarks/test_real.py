"""The benchmark at real size, all of it, with a tiny architecture on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config

from arena.config import change, load_recipe
from arena.distributed import compute_in
from arena.model.classifier import PackedClassifier
from arena.packing.batch import collate
from arena.settings import Recipe
from benchmarks import models, real_run
from benchmarks.cells import Cell, Settings
from benchmarks.clock import Clock
from benchmarks.gpu import Gpu
from benchmarks.machine import slug
from benchmarks.matrix import PADDED, SMALLER_ONE, in_order, main_cells, padded, tables
from benchmarks.models import PaddedClassifier, make_model, set_checkpointing
from benchmarks.parts import BrokenDevice, Parts, run_jobs
from benchmarks.passes import pad, work_of
from benchmarks.plan import in_calls
from benchmarks.real_report import aim_rows, as_page, over_padded, with_shares, write_real
from benchmarks.real_run import CEILING, RealBench
from benchmarks.techniques import TECHNIQUES
from benchmarks.workload import make_workload

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
BUDGET, LONGEST, SEED = 900, 400, 10  # of this seed's rows one is shorter than the others, which are cut


def tiny_base(folder: Path) -> Path:
    """A folder with nothing but the config of a tiny Gemma-2."""
    Gemma2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32, sliding_window=64, pad_token_id=0,
        attn_logit_softcapping=1.0, initializer_range=0.2,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def overrides(base: Path) -> list[str]:
    return [
        f"model.base={base}", "model.dtype=bfloat16", f"prompt.max_length={LONGEST}", f"packing.budget={BUDGET}",
        "train.batch_size=4", "name=tiny",
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_collecting() -> Iterator[None]:
    """Collecting garbage around each cell would take longer here than the cells."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (models, real_run):
            patch.setattr(module, "release", lambda device: None)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe("demo", overrides(tiny_base(tmp_path_factory.mktemp("tiny"))))


def bench_of(recipe: Recipe) -> RealBench:
    """All cells but FlexAttention's inference, which takes seconds to compile here."""
    bench = RealBench(Settings(recipe, rows=4, padded_rows=4, repeats=1, seed=SEED), CPU)
    bench.cells = {
        key: cell
        for key, cell in bench.cells.items()
        if cell.attention != "flex_attention" and key != "infer,ours,attention=flex"
    }
    return bench


@pytest.fixture(scope="module")
def measured(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[RealBench, Parts]:
    """The whole matrix, once."""
    bench = bench_of(recipe)
    parts = Parts(tmp_path_factory.mktemp("parts"), bench.about())
    assert run_jobs(bench.jobs(), parts, Clock(None)) == []
    return bench, parts


def result_of(bench: RealBench, parts: Parts) -> dict[str, Any]:
    return {**Gpu(tests="")._result(bench, parts), "date": "2026-01-02T00:00:00+00:00"}


def test_every_cell_is_measured_or_says_why_not(measured: tuple[RealBench, Parts]) -> None:
    bench, parts = measured
    assert len(bench.cells) > 25
    for key, cell in bench.cells.items():
        found = parts.get(key)
        assert found is not None
        if found["status"] != "done":
            assert found["status"] == "cannot run", (key, found)
            assert cell.attention in ("flash", "flex", "flash_attention_2"), (key, found["reason"])
            continue
        assert found["median"] > 0 and 0 <= found["data_wait"] < 1
        assert found["seconds"] and found["trainable_parameters"] > 0
    ceiling = parts.get(CEILING)
    assert ceiling is not None and ceiling["tflops"] > 0


def test_figures_by_hand(measured: tuple[RealBench, Parts]) -> None:
    bench, parts = measured
    found = parts.get(replace(main_cells(bench.best)["train"], checkpointing="full").key)
    ceiling = parts.get(CEILING)
    assert found is not None and ceiling is not None
    n = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    assert found["flops_a_token"] == 4 * n and found["flops_recomputed_a_token"] == n  # of one layer of two
    assert found["unique_tokens"] < found["logical_tokens"]  # the instruction is shared
    rate = found["unique_tokens"] / found["median"]
    assert found["unique_per_second"] == pytest.approx(rate)
    found = with_shares(found, ceiling)
    assert found["share_of_ceiling"] == pytest.approx(4 * n * rate / 1e12 / ceiling["tflops"])
    assert found["share_with_recomputed"] == pytest.approx(5 * n * rate / 1e12 / ceiling["tflops"])
    assert found["policies"] == {"full": 1, "elementwise": 1} and found["backend"] == "blockwise"


def test_what_is_shared_is_counted(measured: tuple[RealBench, Parts]) -> None:
    bench, parts = measured
    train = main_cells(bench.best)["train"]
    plain, both = parts.get(replace(train, share=False).key), parts.get(replace(train, orders=2).key)
    assert plain is not None and both is not None
    assert plain["unique_tokens"] == plain["logical_tokens"]
    assert both["logical_tokens"] == 2 * plain["logical_tokens"]
    padded = parts.get(Cell("train", "padded", "eager", "full", fuse="none").key)
    assert padded is not None
    assert padded["logical_tokens"] == plain["logical_tokens"] and padded["computed_tokens"] > padded["logical_tokens"]


def test_the_full_micro_batch_is_full(recipe: Recipe, measured: tuple[RealBench, Parts]) -> None:
    bench, _ = measured
    work = work_of(main_cells(bench.best)["peak"], bench._workload(Cell()), bench.settings, pin=False)
    ((batch,),) = work.steps(1)
    assert batch.tokens == BUDGET and batch.kv_index is None


def test_a_second_run_measures_only_what_was_deleted(
    recipe: Recipe, measured: tuple[RealBench, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, parts = measured
    calls: list[str] = []
    real = RealBench.cell

    def counted(self: RealBench, cell: Cell) -> dict[str, Any]:
        calls.append(cell.key)
        return real(self, cell)

    monkeypatch.setattr(RealBench, "cell", counted)
    assert run_jobs(bench_of(recipe).jobs(), parts, Clock(None)) == [] and calls == []
    key = main_cells(bench.best)["infer"].key
    assert parts.forget(key) == [key]
    assert run_jobs(bench_of(recipe).jobs(), parts, Clock(None)) == []
    assert calls == [key]


def fail_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The first training of a cell raises."""
    real, calls = real_run.train, []

    def train(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return real(*given)

    monkeypatch.setattr(real_run, "train", train)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("shapes do not fit"), "failed"),
    ],
)
def test_an_error_is_a_result_and_the_next_cell_runs(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    bench = bench_of(recipe)
    parts = Parts(tmp_path, bench.about())
    fail_once(monkeypatch, error)
    train = main_cells(bench.best)["train"]
    bench.cells = {cell.key: cell for cell in (train, replace(train, share=False))}
    assert run_jobs(bench.jobs(), parts, Clock(None)) == []
    first, second = (parts.get(key) for key in bench.cells)
    assert first is not None and second is not None
    assert first["status"] == status and str(error).split(":")[0] in first["reason"]
    assert second["status"] == "done"


def no_memory_back() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_broken_device_ends_the_process_and_is_not_tried_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(recipe)
    parts = Parts(tmp_path, bench.about())
    fail_once(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    train = main_cells(bench.best)["train"]
    bench.cells = {cell.key: cell for cell in (train, replace(train, share=False))}
    bench.holder.take(train)
    monkeypatch.setattr(bench.holder, "drop", no_memory_back)
    with pytest.raises(BrokenDevice, match="illegal memory access"):
        run_jobs(bench.jobs(), parts, Clock(None))
    bench = bench_of(recipe)
    bench.cells = {cell.key: cell for cell in (train, replace(train, share=False))}
    assert run_jobs(bench.jobs(), parts, Clock(None)) == []
    assert [parts.get(key)["status"] for key in bench.cells] == ["failed", "done"]  # type: ignore[index]


def test_padded_and_ours_are_one_model(recipe: Recipe, tmp_path: Path) -> None:
    recipe = change(recipe, ["model.dtype=float32"])
    fields = np.array([[20, 30, 15], [1, 5, 9]])
    workload = make_workload("small", fields, tmp_path, vocabulary=512, longest=LONGEST, seed=0)
    batch = pad(workload, np.arange(4))
    packed = collate([{"input_ids": workload.store[at]} for at in range(4)])

    def difference(seed: int) -> float:
        plain = make_model(Cell(way="padded", attention="eager", quantization="none"), recipe, CPU, seed).eval()
        assert "arena" not in plain.config._attn_implementation
        with torch.inference_mode():
            mine = PackedClassifier(make_model(Cell(quantization="none"), recipe, CPU, 0).eval())(packed)
            theirs = PaddedClassifier(plain)(batch)
        return float((mine - theirs).norm() / mine.norm())

    assert difference(0) < 1e-5
    assert difference(1) > 1e-2


@pytest.mark.parametrize("best", ["flash", "flex", "blockwise"])
def test_the_matrix_has_every_cell_once_in_order_of_worth(best: str) -> None:
    found = tables(best, "google/gemma-2-9b-it", "cuda")
    cells = in_order(found, best)
    assert set(cells) == {cell.key for table in found for cell in table.cells.values()}
    assert list(cells)[:5] == [cell.key for cell in main_cells(best).values()]
    assert [(cell.way, cell.task) for cell in main_cells(best).values()] == [
        ("ours", "train"), ("padded", "train"), ("padded", "infer"), ("ours", "infer"), ("ours", "peak"),
    ]  # fmt: skip
    rest = list(cells.values())[5:]
    if best == "flash":  # at once after them, ours by flex
        assert [(cell.attention, cell.task) for cell in rest[:2]] == [("flex", "train"), ("flex", "infer")]
        assert not any(cell.attention == "blockwise" for cell in cells.values())  # far slower on a GPU than both
    risky = [cell.task == "train" and cell.checkpointing in ("elementwise", "none") for cell in rest]
    assert risky == sorted(risky) and any(risky)
    safe = [cell.model_key for cell, may_fail in zip(rest, risky, strict=True) if not may_fail]
    changes = 1 + sum(before != after for before, after in pairwise(safe))
    assert changes <= len(set(safe)) + 1  # flex and the rest have one in common
    assert any(cell.base == "google/gemma-2-2b-it" and cell.tune == "full" for cell in cells.values())


def test_padded_batches_are_measured_with_and_without_recomputing(measured: tuple[RealBench, Parts]) -> None:
    bench, parts = measured
    cells = padded("train")
    assert {(cell.attention, cell.checkpointing) for cell in cells.values()} == {
        (name, checkpointing) for name in PADDED for checkpointing in ("full", "none")
    }
    assert all(
        ("recomputed" in name) and (cell.checkpointing == "none") == ("nothing" in name) for name, cell in cells.items()
    )
    held = {}
    for cell in (each for each in cells.values() if each.attention == "eager"):
        classifier = bench.holder.take(cell)
        work = work_of(cell, bench._workload(cell), bench.settings, pin=False)
        assert set_checkpointing(classifier, cell, bench.settings.recipe, None) == [cell.checkpointing] * 2
        ((batch, *_),) = work.steps(1)
        held[cell.checkpointing] = kept_for_the_backward(classifier.train(), batch)
        found = parts.get(cell.key)
        assert found is not None and found["policies"] == {cell.checkpointing: 2}
    assert held["none"] > 2 * held["full"]


def kept_for_the_backward(classifier: torch.nn.Module, batch: Any) -> int:
    sizes: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), compute_in(CPU, "bfloat16"):
        classifier(batch)
    return sum(sizes)


def test_what_a_gpu_shows_in_the_first_nine_minutes() -> None:
    settings = Settings(load_recipe("gemma-2-9b"), rows=80, padded_rows=24)
    bench = RealBench(settings, CPU, plan=True)
    assert bench.best == "flash"
    (first, *_) = in_calls(bench.jobs(), 9.0)
    ends = {job.name: end for job, end in first}
    assert {*bench.main, CEILING} <= set(ends) and max(ends[name] for name in (*bench.main, CEILING)) < 8 * 60
    calls = in_calls(bench.jobs(), 9.0)
    assert sorted(job.name for call in calls for job, _ in call) == sorted([*bench.cells, CEILING])
    assert all(len(call) == 1 or call[-1][1] <= 9 * 60 for call in calls)


def test_pages_with_and_without_figures(measured: tuple[RealBench, Parts], tmp_path: Path) -> None:
    bench, parts = measured
    result = result_of(bench, parts)
    page = as_page(result, bench.tables, "p.png")
    for table in bench.tables:
        assert f"## {table.title.capitalize()}" in page
        for name in table.cells:
            assert f"| {name} |" in page
    assert "cannot run" in page and result["device"] in page and "2026-01-02" in page
    assert "What was to be seen" not in page  # that is of a 9B
    assert "What was to be seen" in as_page({**result, "linear_weights": 8.3e9}, bench.tables, "p.png")
    rows = {row[0]: row for row in aim_rows(result)}
    assert rows["training, logical tokens/s"][3] in ("met", "missed")
    empty = {**result, "cells": {}, "ceiling": None}
    page = as_page(empty, bench.tables, "p.png")
    assert "has not been measured yet" in page and page.count("not measured yet") > len(bench.cells)
    assert {row[3] for row in aim_rows(empty)} == {"not measured yet"}
    name = f"bench-{slug(result['device'])}-tiny"
    written = write_real(result, bench.tables, tmp_path)
    assert [path.name for path in written] == [f"{name}.{ending}" for ending in ("json", "md", "png")]
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(result, allow_nan=False))
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_techniques_have_the_names_that_their_losses_have() -> None:
    for base in ("google/gemma-2-9b-it", "demo_base"):
        named = tables("flash", base, "cuda")[-1].cells
        assert {name.removesuffix(SMALLER_ONE) for name in named} == set(TECHNIQUES)


def test_ratios_are_over_the_fastest_padded_way() -> None:
    def cell(way: str, task: str, rate: float, status: str = "done") -> dict[str, Any]:
        return {"status": status, "logical_per_second": rate, "cell": {"way": way, "task": task}}

    cells = {
        "a": cell("padded", "train", 10.0), "b": cell("padded", "train", 25.0), "c": cell("padded", "infer", 99.0),
        "d": cell("padded", "train", 1e9, "failed"), "e": cell("ours", "train", 1e9),
    }  # fmt: skip
    assert over_padded(cells, cell("ours", "train", 100.0), "train") == 4.0
    assert over_padded({}, cell("ours", "train", 100.0), "train") is None
    assert over_padded(cells, None, "train") is None


def test_a_large_model_needs_a_gpu() -> None:
    settings = Settings(load_recipe("gemma-2-9b"), rows=4, padded_rows=4)
    with pytest.raises(ValueError, match=r"8\.3 billion weights.*no CUDA device.*--anyway"):
        RealBench(settings, CPU)
    assert RealBench(settings, CPU, anyway=True).best == "blockwise"
    unknown = load_recipe("gemma-2-9b", ["model.base=some/other"])
    with pytest.raises(ValueError, match="architecture of some/other is not known"):
        RealBench(replace(settings, recipe=unknown), CPU)
