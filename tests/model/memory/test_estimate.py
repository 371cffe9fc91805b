"""The arithmetic of memory: against hand counts, against what autograd really keeps, and as a rule for cards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from arena.config import load_recipe
from arena.model import language_model
from arena.model.backbone import backbone, load_base
from arena.model.card import Card
from arena.model.classifier import loss_sum
from arena.model.families import ARCHITECTURES
from arena.model.language_model import PackedLanguageModel, bytes_of_losses, token_losses
from arena.model.memory.estimate import FROZEN, GIB, POLICIES, describe, fit, mix_policies, need, room, shape_of
from arena.model.memory.fused import PARTS, set_policies
from arena.model.memory.recompute import _SavedTensor, _Scope
from arena.model.tuning import adapt
from arena.packing.batch import collate
from arena.settings import LoraSettings
from tests.helpers import classifier, exact, make_base, pack
from tests.memory import LiveTensors

NINE, TWO = ARCHITECTURES["google/gemma-2-9b-it"], ARCHITECTURES["google/gemma-2-2b-it"]


def card(gib: float, capability: tuple[int, int] = (9, 0)) -> Card:
    return Card("cuda", f"a card of {gib} GiB", capability, int(gib * GIB))


def test_gemma_2_9b_by_hand() -> None:
    shape = shape_of(NINE)
    per_layer = 3584 * (4096 + 2048 + 2048 + 4096) + 3 * 3584 * 14336
    assert shape.linear_weights == 42 * per_layer == 8_323_596_288
    assert shape.lora_weights(LoraSettings(r=16)) == 54_018_048
    assert shape.saved_per_token("none") == 6 * 3584 + 2 * 4096 + 2 * 2048 + 3 * 14336
    assert shape.saved_per_token("elementwise") - shape.saved_per_token("elementwise_and_mlp") == 2 * 14336
    found = need(shape, load_recipe("gemma-2-9b").model, 16384)
    assert found.weights == pytest.approx(8_323_596_288 * 0.51587 + 2 * 256000 * 3584, rel=1e-3)
    assert found.trained == 16 * 54_018_048
    assert found.layer_inputs == 42 * 3584 * 16384 * 2
    assert found.total < 20 * GIB
    eight = need(shape, load_recipe("gemma-2-9b", ["model.quantization=int8"]).model, 16384)
    assert eight.working - found.working == 7 * 14336 * 16384


def test_the_adapters_of_the_public_notebook_by_hand() -> None:
    """On q, k and v of layers 16 to 41; with the head it prints 7,891,456 trainable parameters."""
    lora = load_recipe("gemma-2-9b-notebook").model.lora
    assert shape_of(NINE).lora_weights(lora) == 26 * 16 * (3 * 3584 + 4096 + 2 * 2048) == 7_891_456 - 3 * 3584
    unknown = lora.model_copy(update={"targets": ("query_key_value",)})
    assert shape_of(NINE).lora_weights(unknown) == 54_018_048 * 26 // 42


def kept_by_a_layer(
    base: Path, policy: str, monkeypatch: pytest.MonkeyPatch, lengths: list[int], first_layer: int = 0
) -> int:
    """Bytes that autograd holds of the middle layer's forward, each memory once, parameters and positions aside."""
    model = classifier(exact(base, fuse=PARTS, lora={"r": 1, "first_layer": first_layer})).train()
    layer: Any = backbone(model.model).layers[1]
    set_policies(model.model, ["full", policy, "none"])
    found: dict[int, int] = {}
    angles: set[int] = set()  # of all layers together

    def count(tensor: Tensor) -> None:
        if isinstance(tensor, Tensor) and tensor.numel() > 20 * sum(lengths):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    held: list[Tensor] = []  # so that no memory is used twice
    whole_pack, whole_layer = _Scope.pack, layer.forward

    def pack_(self: Any, tensor: Tensor) -> Any:
        saved = whole_pack(self, tensor)
        if isinstance(saved, _SavedTensor):
            count(saved.tensor)
        held.append(tensor)
        return saved

    def saved(tensor: Tensor) -> Tensor:
        count(tensor)
        held.append(tensor)
        return tensor

    def forward(*args: Any, **kwargs: Any) -> Any:
        angles.update(each.untyped_storage().data_ptr() for each in kwargs["position_embeddings"])
        with saved_tensors_hooks(saved, lambda tensor: tensor):
            return whole_layer(*args, **kwargs)

    monkeypatch.setattr(_Scope, "pack", pack_)
    layer.forward = forward
    model(pack(lengths))
    return sum(size for place, size in found.items() if place not in angles)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "llama", "qwen3"])
def test_layers_save_what_the_estimate_says(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    base, lengths = make_base(tmp_path, family, **sizes), [150, 90, 60]
    for policy in ("none", "elementwise", "elementwise_and_mlp"):
        with monkeypatch.context() as patch:
            bytes_ = kept_by_a_layer(base, policy, patch, lengths)
        shape = shape_of(classifier(exact(base)).model.config)
        assert bytes_ / (4 * sum(lengths)) == shape.saved_per_token(policy), policy


@pytest.mark.parametrize("policy", ["none", "elementwise", "elementwise_and_mlp"])
def test_a_frozen_layer_saves_nothing(policy: str, gemma2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shape_of(NINE).saved_per_token(FROZEN) == 0
    kept = [kept_by_a_layer(gemma2, policy, monkeypatch, [150, 90, 60], first) for first in (2, 1, 0)]
    assert kept[0] == 0 < kept[1] <= kept[2]  # the first with adapters needs no gradient of its input


def test_the_output_layer_by_hand() -> None:
    """Of Gemma-2-2B, whose logits have a soft cap: 131 positions at once, and the gradient of 16,384 states."""
    chunk, states = 131 * 256_000, 16_384 * 2304
    found = bytes_of_losses(16_384, 2304, 256_000, width=2, softcap=True)
    assert found == 4 * 4 * chunk + 2 * states == pytest.approx(0.57 * GIB, rel=0.01)
    assert bytes_of_losses(16_384, 2304, 256_000, width=2, softcap=False) == found - 4 * chunk
    assert bytes_of_losses(10, 2304, 256_000, width=2, softcap=True) == 4 * 4 * 10 * 256_000 + 2 * 10 * 2304
    assert bytes_of_losses(10**6, 2304, 256_000, width=2, softcap=True) == 8 * 10**6 * 2304  # long batches
    settings = load_recipe("gemma-2-2b").model
    two, untied = shape_of(TWO), replace(shape_of(TWO), tied=False)
    least = [need(two, settings, 512, classes=classes) for classes in (True, False)]
    assert least[1].total - least[0].total == least[1].working - least[0].working > 0.3 * GIB
    assert need(two, settings, 16_384) == need(two, settings, 16_384, classes=False)  # a layer's work is more
    assert need(untied, settings, 512, classes=False).weights - least[1].weights == 2 * 256_000 * 2304
    assert need(untied, settings, 512) == least[0]  # a classifier has no output layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [30.0, None])
@pytest.mark.parametrize("trained", [False, True])
def test_losses_take_what_the_estimate_says(
    dtype: torch.dtype, softcap: float | None, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained head's weight is smaller than a chunk's logits, or larger. Larger chunks are the control."""
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 2**16)
    width, (least, most) = 4 if dtype == torch.float32 else 2, (0.94, 1.25) if trained else (0.98, 1.02)
    for hidden in (16, 128):
        head = torch.nn.Linear(hidden, 4096, bias=False).requires_grad_(trained)
        head = head if trained else head.to(dtype)
        states = torch.randn(100, hidden, dtype=torch.float32 if trained else dtype, requires_grad=True)
        with LiveTensors() as live:
            with torch.autocast("cpu", dtype, enabled=width == 2):
                losses = token_losses(states, head, torch.arange(100), softcap)
            losses.sum().backward()
        sizes = {"width": width, "softcap": softcap is not None, "trained": trained}
        assert least <= bytes_of_losses(100, hidden, 4096, **sizes) / live.peak <= most
        with monkeypatch.context() as patch:
            patch.setattr(language_model, "LOGITS_AT_ONCE", 2**18)
            assert trained or bytes_of_losses(100, hidden, 4096, **sizes) > 2 * live.peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_a_language_model_takes_what_the_estimate_says(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small layers under a large vocabulary, every layer recomputed; the control leaves the output layer out."""
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 2**19)
    base = make_base(tmp_path, vocab_size=8192, final_logit_softcapping=30.0)
    settings = exact(base, dtype=dtype, checkpointing="full")
    model = PackedLanguageModel(adapt(load_base(settings, ()), settings)).train()
    ids = [torch.arange(10, 74).numpy() + at for at in range(4)]
    batch = collate([{"input_ids": each, "labels": each} for each in ids])
    for parameter in model.parameters():  # as from a step's second micro-batch on
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with LiveTensors() as live:
        with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
            losses = model(batch)
        loss_sum(losses, batch.targets).backward()
    shape = shape_of(model.model.config)
    found, without = (need(shape, settings, 256, classes=classes) for classes in (False, True))
    assert live.peak == pytest.approx(found.layer_inputs + found.working, rel=0.01)
    assert without.layer_inputs + without.working < 0.5 * live.peak


def test_more_memory_means_less_recomputed() -> None:
    shape = shape_of(NINE)
    saved = {policy: shape.saved_per_token(policy) * 2.0 * 16384 for policy in POLICIES}
    fractions = {policy: shape.recompute_fraction(policy) for policy in POLICIES}
    before = 43.0
    for free in (-1, 0, 4, 10, 30, 60, 90, 200):
        policies = mix_policies(saved, fractions, shape.layers, free * GIB)
        extra = sum(saved[policy] - saved["full"] for policy in policies)
        assert len(policies) == 42 and extra <= max(free, 0) * GIB
        cost = sum(fractions[policy] for policy in policies)
        assert cost <= before
        before = cost
    for free, name in ((0, "full"), (200 * GIB, "none")):
        assert describe(mix_policies(saved, fractions, 42, free)) == f"42 {name}"
    assert set(mix_policies({"full": 0.0, "none": 5.0}, fractions, 3, 11.0)) == {"full", "none"}


def test_the_mix_is_the_best_of_all() -> None:
    saved = {"full": 0.0, "elementwise_and_mlp": 3.0, "elementwise": 7.0, "none": 10.0}
    fractions = {policy: shape_of(NINE).recompute_fraction(policy) for policy in POLICIES}
    from itertools import product

    for free in (0.0, 3.0, 6.0, 7.0, 9.0, 12.0, 30.0):
        best = min(
            sum(fractions[each] for each in every)
            for every in product(POLICIES, repeat=3)
            if sum(saved[each] for each in every) <= free
        )
        found = sum(fractions[each] for each in mix_policies(saved, fractions, 3, free))
        assert found <= best + 0.16  # whole layers: one step may be taken where another would have fitted better


def test_the_budget_of_instructions_is_halved_earlier() -> None:
    """At short micro-batches of a model whose layers are small beside its vocabulary."""
    budgets = [
        fit(load_recipe("gemma-2-2b", [f"task={task}", "prompt.max_length=512"]), TWO, card(4.2)).packing.budget
        for task in ("preference", "instruction")
    ]
    assert budgets == [2048, 1024]


@pytest.mark.parametrize(("gib", "budget"), [(79, 16384), (22.5, 16384), (15, 8192), (11, 4096)])
def test_the_budget_is_halved_until_it_fits(gib: float, budget: int) -> None:
    recipe = load_recipe("gemma-2-9b")
    fitted = fit(recipe, NINE, card(gib))
    assert fitted.packing.budget == budget
    assert need(shape_of(NINE), recipe.model, budget).total <= room(card(gib))
    assert fitted.model_copy(update={"packing": recipe.packing}) == recipe


def test_a_card_that_is_too_small_is_refused_with_what_would_help() -> None:
    with pytest.raises(ValueError, match=r"9.0 GiB with micro-batches of 4,096 tokens.*prompt\.max_length.*base$"):
        fit(load_recipe("gemma-2-9b"), NINE, card(9))
    with pytest.raises(ValueError, match=r"smaller base, or set model\.tune=lora model\.quantization=nf4"):
        fit(load_recipe("gemma-2-9b", ["model.tune=full", "model.quantization=none"]), NINE, card(80))


def test_ranks_that_share_a_model_out_need_less_each() -> None:
    """All weights of a 9B base fit eight cards of 80 GB, of which none holds them alone; adapters two of 24 GB."""
    full = load_recipe("gemma-2-9b", ["model.tune=full", "model.quantization=none"])
    adapters = load_recipe("gemma-2-9b", ["model.quantization=none"])
    for recipe, gib, ranks in ((full, 79, 8), (adapters, 22.5, 2)):
        with pytest.raises(ValueError, match="takes about"):
            fit(recipe, NINE, card(gib))
        assert fit(recipe, NINE, card(gib), ranks).packing.budget >= 1024


def test_a_cpu_keeps_the_recipe() -> None:
    recipe = load_recipe("gemma-2-9b")
    assert fit(recipe, NINE, Card("cpu", "a CPU", (0, 0), GIB)) == recipe


def test_what_autograd_holds_is_freed(gemma2: Path) -> None:
    """No cycle keeps a layer's tensors after the backward."""
    import gc
    import weakref

    model = classifier(exact(gemma2, checkpointing="elementwise_and_mlp")).train()
    seen: list[Any] = []
    layer: Any = backbone(model.model).layers[0]
    handle = layer.mlp.up_proj.register_forward_hook(lambda _m, _a, out: seen.append(weakref.ref(out)))
    gc.disable()
    try:
        logits = model(pack([30, 20]))
        logits.sum().backward()
        del logits
        assert seen and all(each() is None for each in seen)
    finally:
        gc.enable()
        handle.remove()
    assert torch.is_grad_enabled()
