"""LoRA in some of the layers: the same gradients as with all, and nothing saved or run again below the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from arena.distributed import compute_in
from arena.model.backbone import backbone, load_base
from arena.model.classifier import PackedClassifier, loss_sum
from arena.model.memory.estimate import FROZEN, POLICIES
from arena.model.memory.fused import PARTS, policies_of
from arena.model.tuning import adapt, load_trained, save_model
from arena.packing.batch import PackedBatch
from arena.settings import LoraSettings, ModelSettings
from arena.tasks.preference import CLASSES
from arena.training.optimizer import trainable
from tests.helpers import CONFIGS, WINDOW, classifier, exact, make_base, pack
from tests.model.test_classifier import relative, shared_batch, swap_pairs
from tests.model.test_last_layer import both_ways

LENGTHS = [4 * WINDOW, 1, WINDOW, WINDOW + 1, 3, 5 * WINDOW]
KINDS: tuple[dict[str, Any], ...] = (
    {}, {"fuse": "none"}, {"fuse": PARTS}, {"quantization": "nf4", "dtype": "bfloat16"},
)  # fmt: skip


def gradients(model: PackedClassifier, batch: PackedBatch, dtype: str = "float32") -> dict[str, Tensor]:
    model.train().zero_grad()
    with compute_in(torch.device("cpu"), dtype):
        logits = model(batch)
    loss_sum(logits, batch.label).backward()
    return {name: each.grad for name, each in trainable(model).items() if each.grad is not None}


def with_all_adapters(upper: PackedClassifier, settings: ModelSettings, below: float) -> PackedClassifier:
    """A model with adapters in all layers: those of `upper`, and in the others ones with `below` in all of `lora_B`."""
    whole = classifier(settings.model_copy(update={"lora": LoraSettings(r=settings.lora.r)}), seed=1)
    given = trainable(upper)
    with torch.no_grad():
        for name, parameter in trainable(whole).items():
            if name in given:
                parameter.copy_(given[name])
            elif "lora_B" in name:
                parameter.fill_(below)
    return whole


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_are_those_with_the_lower_adapters_at_zero(policy: str, kind: dict[str, Any], gemma2: Path) -> None:
    """To the bit, although the lower layers there have a backward. With adapters that are not zero they differ."""
    settings = exact(gemma2, **{**kind, "checkpointing": policy, "lora": {"r": 4, "first_layer": 1}})
    upper, batch = classifier(settings), shared_batch(swap_pairs(), 4)
    found = gradients(upper, batch, settings.dtype)
    zero, other = (gradients(with_all_adapters(upper, settings, below), batch, settings.dtype) for below in (0.0, 0.1))
    assert found.keys() < zero.keys() and not any(".layers.0." in name for name in found)
    assert all(torch.equal(each, zero[name]) for name, each in found.items())
    assert not any(torch.equal(each, other[name]) for name, each in found.items() if ".layers." in name)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("first", [1, 2])
def test_every_family_with_the_last_layer_for_last_tokens(
    family: str, first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last layer is the only one with adapters."""
    model = classifier(exact(make_base(tmp_path, family), lora={"first_layer": first}))
    whole, last = both_ways(model, pack(LENGTHS), monkeypatch)
    assert max(relative(a, b) for a, b in zip(last, whole, strict=True)) <= 1e-5


@pytest.mark.parametrize("layers", [(2,), (0, 2), (1, 2)])
def test_a_list_of_layers(layers: tuple[int, ...], gemma2: Path) -> None:
    model = classifier(exact(gemma2, checkpointing="full", lora={"layers": layers}))
    names = trainable(model)
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names if ".layers." in name} == {*layers}
    assert len(names) == 1 + 2 * 7 * len(layers)
    expected = ["full", "full", "elementwise"]  # the last one is computed for last tokens
    assert policies_of(model.model) == [FROZEN] * layers[0] + expected[layers[0] :]
    assert gradients(model, pack(LENGTHS)).keys() == names.keys()


def test_a_list_of_the_same_layers_is_the_same(gemma2: Path) -> None:
    choices: tuple[dict[str, Any], ...] = ({"first_layer": 1}, {"layers": (2, 1, 1)})
    expected, found = (gradients(classifier(exact(gemma2, lora=each)), pack(LENGTHS)) for each in choices)
    assert found.keys() == expected.keys()
    assert all(torch.equal(each, expected[name]) for name, each in found.items())


@pytest.mark.parametrize("lora", [{"first_layer": 3}, {"layers": (0, 7)}], ids=str)
def test_a_layer_that_the_base_lacks_is_refused(lora: dict[str, Any], gemma2: Path, tmp_path: Path) -> None:
    said = r"model\.lora\.(first_layer names layer 3|layers names layer 7), but the base has 3 layers, 0 to 2"
    settings = exact(gemma2, lora=lora)
    with pytest.raises(ValueError, match=said):
        adapt(load_base(settings, CLASSES), settings)
    save_model(classifier(exact(gemma2)).model, tmp_path)
    with pytest.raises(ValueError, match=said):
        load_trained(tmp_path, settings, CLASSES)


class Watched:
    """What the first layer of a model does in a step with a policy.

    Attributes:
        saved: tensors that autograd saves of it, unless the policy itself decides what is saved.
        runs: calls of its wide product.
        has_backward: whether its result has a gradient.
    """

    def __init__(self, base: Path, policy: str, first_layer: int) -> None:
        self.saved, self.runs, self.has_backward = 0, 0, False
        model, batch = classifier(exact(base, checkpointing=policy, lora={"first_layer": first_layer})), pack(LENGTHS)
        layers: Any = backbone(model.model).layers
        whole = layers[0].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(self._save, lambda tensor: tensor):
                out = whole(*args, **kwargs)
            self.has_backward = out.requires_grad
            return out

        layers[0].forward = forward
        layers[0].mlp.up_proj.register_forward_pre_hook(self._run)
        gradients(model, batch)

    def _save(self, tensor: Tensor) -> Tensor:
        self.saved += 1
        return tensor

    def _run(self, *_: Any) -> None:
        self.runs += 1


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_saved_or_run_again_below(policy: str, gemma2: Path) -> None:
    frozen, control = (Watched(gemma2, policy, first) for first in (1, 0))
    assert (frozen.saved, frozen.runs, frozen.has_backward) == (0, 1, False)
    assert control.runs == (2 if policy in ("full", "elementwise_and_mlp") else 1) and control.has_backward
    assert control.saved > 0 or policy != "none"


@pytest.mark.parametrize(("policy", "most"), [("none", 0.80), ("full", 0.72)])
def test_half_of_the_layers_save_a_fifth_of_the_operations(policy: str, most: float, tmp_path: Path) -> None:
    """A quarter with what they save anyway, a third with recomputation, less what the heads and tails take."""
    base, operations = make_base(tmp_path, num_hidden_layers=8), []
    for first in (4, 0):
        model, batch = classifier(exact(base, checkpointing=policy, lora={"r": 1, "first_layer": first})), pack([200])
        with FlopCounterMode(display=False) as counter:
            gradients(model, batch)
        operations.append(counter.get_total_flops())
    assert 0.5 < operations[0] / operations[1] <= most


def test_a_model_made_by_hand_recomputes_what_its_memory_needs(gemma2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine's memory; the least without any, and nothing with plenty."""
    settings = exact(gemma2, checkpointing="auto", lora={"first_layer": 1})
    available = psutil.virtual_memory()
    found = {}
    for gib in (0.0, 0.004, 64.0):
        monkeypatch.setattr(psutil, "virtual_memory", lambda gib=gib: available._replace(available=int(gib * 2**30)))
        found[gib] = policies_of(adapt(load_base(settings, CLASSES), settings, 1024))
    assert found[0.0] == [FROZEN, "full", "elementwise"] and found[64.0] == [FROZEN, "none", "none"]
    smaller = policies_of(adapt(load_base(settings, CLASSES), settings, 16))
    assert smaller == [FROZEN, "none", "none"] != found[0.004]
