"""Choosing what layers keep: by a card that is made up, and on this machine by an estimate."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from arena.data.prepare import prepare_fold
from arena.model.backbone import backbone, load_base, load_tokenizer
from arena.model.memory.estimate import POLICIES, shape_of
from arena.model.memory.fused import POLICY
from arena.model.tuning import adapt
from arena.tasks import task_of
from arena.tasks.preference import CLASSES
from arena.training import probe
from arena.training.optimizer import trainable
from arena.training.probe import search_policies
from arena.training.trainer import Trainer
from tests.helpers import tiny_recipe, trainer_for

SAVED = {"full": 1.0, "elementwise_and_mlp": 8.0, "elementwise": 16.0, "none": 22.0}
RECOMPUTED = {"full": 1.0, "elementwise_and_mlp": 0.55, "elementwise": 0.05, "none": 0.0}


class MadeUpCard:
    """Peaks of made-up runs: a fixed part, and what each layer keeps; out of memory above `size`."""

    def __init__(self, size: float, fixed: float = 50.0, late: float = 1.0) -> None:
        self.size, self.fixed, self.late = size, fixed, late
        self.runs: list[list[str]] = []

    def peak(self, policies: list[str]) -> float | None:
        self.runs.append(policies)
        later = sum(SAVED[each] * (1.0 if at < 2 else self.late) for at, each in enumerate(policies))
        total = self.fixed + later
        return None if total > self.size else total


@pytest.mark.parametrize("limit", [60.0, 61.0, 80.0, 120.0, 200.0, 500.0])
def test_what_is_chosen_fits_and_no_layer_more_would(limit: float) -> None:
    card = MadeUpCard(size=limit)
    policies, peak = search_policies(card.peak, RECOMPUTED, 10, limit)
    assert peak is not None and peak <= limit
    assert peak == card.fixed + sum(SAVED[each] for each in policies)
    steps = [SAVED[after] - SAVED[before] for before, after in pairwise(reversed(POLICIES)) if before in policies]
    assert not steps or limit - peak < max(steps)


def test_if_later_layers_save_more_more_is_recomputed() -> None:
    card = MadeUpCard(size=200.0, late=1.15)
    policies, peak = search_policies(card.peak, RECOMPUTED, 10, 200.0)
    assert peak is not None and peak <= 200.0 and set(policies) != {"full"}
    assert len(card.runs) > 5, "the first mix did not fit, so another was run"


def test_nothing_fits() -> None:
    assert search_policies(MadeUpCard(size=55.0).peak, RECOMPUTED, 10, 55.0)[1] is None


def test_a_policy_that_cannot_be_measured_is_not_used() -> None:
    policies, peak = search_policies(MadeUpCard(size=75.0).peak, RECOMPUTED, 10, 75.0)
    assert set(policies) <= {"full", "elementwise_and_mlp"} and peak is not None


def trainer_of(tmp_path: Path, base: Path, *overrides: str) -> Trainer:
    recipe = tiny_recipe(tmp_path, base, "model.checkpointing=auto", *overrides)
    data = prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(recipe.model.base))
    model = adapt(load_base(recipe.model, CLASSES), recipe.model)
    return trainer_for(recipe, data, model, tmp_path / "run", Accelerator(cpu=True))


def policies_of(trainer: Trainer) -> list[str]:
    return [getattr(layer, POLICY) for layer in backbone(trainer.model).layers]


def test_on_a_cpu_the_arithmetic_decides(tmp_path: Path, gemma2: Path) -> None:
    trainer = trainer_of(tmp_path, gemma2)
    plan = trainer.recompute_plan
    assert plan is not None and plan.policies == policies_of(trainer) == ["none"] * 3
    assert "3 none (estimated" in str(plan)


def test_layers_below_the_first_with_adapters_are_left_out(
    tmp_path: Path, gemma2: Path, made_up_gpu: dict[str, float]
) -> None:
    trainer = trainer_of(tmp_path, gemma2, "model.lora.first_layer=2")
    assert trainer.recompute_plan is not None
    assert trainer.recompute_plan.policies == policies_of(trainer) == ["frozen", "frozen", "none"]
    assert "2 frozen, 1 none (estimated" in str(trainer.recompute_plan)
    plan = probe._measured(trainer.classifier, trainer._loader(), trainer.recipe)
    assert plan.policies[:2] == ["frozen", "frozen"] and plan.policies[2] in POLICIES


def test_a_policy_that_the_recipe_names_is_used(tmp_path: Path, gemma2: Path) -> None:
    recipe = tiny_recipe(tmp_path, gemma2, "model.checkpointing=elementwise")
    data = prepare_fold(recipe, task_of(recipe), 0, load_tokenizer(recipe.model.base))
    model = adapt(load_base(recipe.model, CLASSES), recipe.model)
    trainer = trainer_for(recipe, data, model, tmp_path / "run", Accelerator(cpu=True))
    assert trainer.recompute_plan is None and policies_of(trainer) == ["elementwise"] * 3


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Runs the steps of the probe on the CPU, with the figures of a card that is made up."""
    card = {"size": 1e9, "runs": 0.0}

    def reserved(device: torch.device) -> float:
        card["runs"] += 1
        return 100.0 + card["runs"]

    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", reserved)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (card["size"], card["size"]))
    fork_rng = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=(), **more: fork_rng([], **more))
    return card


def test_the_probe_leaves_no_trace(tmp_path: Path, gemma2: Path, made_up_gpu: dict[str, float]) -> None:
    trainer = trainer_of(tmp_path, gemma2)
    before = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    trainer.classifier.eval()
    plan = probe._measured(trainer.classifier, trainer._loader(), trainer.recipe)
    assert made_up_gpu["runs"] >= 4 and plan.peak is not None and set(plan.policies) <= set(POLICIES)
    assert "measured" in str(plan)
    assert not trainer.classifier.training
    assert all(each.grad is None for each in trainable(trainer.model).values())
    assert all(torch.equal(each, before[name]) for name, each in trainer.model.state_dict().items())


def test_a_card_that_is_too_small_is_refused(tmp_path: Path, gemma2: Path, made_up_gpu: dict[str, float]) -> None:
    trainer = trainer_of(tmp_path, gemma2)
    made_up_gpu["size"] = 50.0
    with pytest.raises(ValueError, match=r"lower packing\.budget \(now 512\)"):
        probe._measured(trainer.classifier, trainer._loader(), trainer.recipe)


def test_the_fullest_micro_batch_is_found(tmp_path: Path, gemma2: Path) -> None:
    trainer = trainer_of(tmp_path, gemma2)
    loader = trainer._loader()
    assert probe.fullest(loader, shape_of(trainer.model.config)).tokens == loader.plan.tokens.max()


def test_what_an_error_held_is_collected_before_the_cache_is_emptied(
    tmp_path: Path, gemma2: Path, made_up_gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors in the frames of an out-of-memory error can lie in cycles, which only the collector finds."""
    trainer, held = trainer_of(tmp_path, gemma2), []
    batch = probe.fullest(trainer._loader(), shape_of(trainer.model.config))
    alive: list[bool] = []

    def out_of_memory(*_: object) -> None:
        cycle: dict[str, object] = {"tensor": torch.zeros(1)}
        cycle["self"] = cycle
        held.append(weakref.ref(cycle["tensor"]))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(bool(held and held[-1]() is not None)))
    gc.disable()
    try:
        with monkeypatch.context() as here:
            here.setattr(probe, "loss_sum", out_of_memory)
            assert probe._peak(trainer.classifier, batch, "float32") is None
        assert held[0]() is not None
        assert probe._peak(trainer.classifier, batch, "float32") is not None
    finally:
        gc.enable()
    assert alive == [False, False] and len(held) == 1


def test_a_kernel_that_cannot_run_is_no_lack_of_memory(
    tmp_path: Path, gemma2: Path, made_up_gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, gemma2)

    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("out of resource: triton_tem_fused_0 Required: 151552 Hardware limit:101376")

    monkeypatch.setattr(probe, "loss_sum", too_large)
    with pytest.raises(torch.OutOfMemoryError, match="Hardware limit"):
        probe._measured(trainer.classifier, trainer._loader(), trainer.recipe)
