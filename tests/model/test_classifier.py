"""Packed examples against the same examples one by one through plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from arena.model.backbone import backbone
from arena.model.classifier import PackedClassifier, loss_sum
from arena.model.tuning import lora_config
from arena.packing.batch import PackedBatch, collate
from arena.packing.tree import find_prefixes, grow_tree
from arena.settings import LoraSettings
from arena.training.optimizer import trainable
from tests.helpers import CONFIGS, WINDOW, classifier, exact, examples_of, make_base, pack, random_family

LENGTHS = [4 * WINDOW, 1, WINDOW, WINDOW + 1, 3, WINDOW - 1, 2 * WINDOW + 5]


def plain_model(base: Path, packed: PackedClassifier, lora: bool) -> nn.Module:
    """The untouched transformers classifier with eager attention and the packed model's weights."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, attn_implementation="eager")
    if lora:
        model = get_peft_model(model, lora_config(LoraSettings(), backbone(model)))
    model.load_state_dict(packed.model.state_dict())
    return model


def one_by_one(model: nn.Module, batch: PackedBatch) -> Tensor:
    return torch.cat([model(input_ids=row[None], use_cache=False).logits.float() for row in examples_of(batch)])


def logits_and_gradients(model: nn.Module, logits: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    parameters = list(trainable(model).values())
    grads = torch.autograd.grad(loss_sum(logits, batch.label), parameters, allow_unused=True)
    return logits.detach(), torch.cat([grad.reshape(-1) for grad in grads if grad is not None])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def compare(
    base: Path,
    lengths: list[int],
    lora: bool,
    change: Callable[[nn.Module], None] | None = None,
    shared: PackedBatch | None = None,
) -> list[float]:
    """Relative differences of logits and of gradients between packed and one by one.

    Args:
        change: is done to the packed model alone.
        shared: what the packed model reads in place of examples that share nothing.
    """
    packed = classifier(exact(base, **({} if lora else {"tune": "full"})))
    batch = shared or pack(lengths)
    expected = plain_model(base, packed, lora)
    right = logits_and_gradients(expected, one_by_one(expected, batch), batch)
    if change is not None:
        change(packed.model)
    ours = logits_and_gradients(packed.model, packed(batch), batch)
    return [relative(mine, other) for mine, other in zip(ours, right, strict=True)]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lora", [True, False])
def test_packed_equals_one_by_one(family: str, lora: bool, tmp_path: Path) -> None:
    assert max(compare(make_base(tmp_path, family), LENGTHS, lora)) <= 1e-5


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [WINDOW + 1] * 3, [5 * WINDOW, 2], LENGTHS[::-1]])
def test_any_lengths_in_any_order(gemma2: Path, lengths: list[int]) -> None:
    assert max(compare(gemma2, lengths, True)) <= 1e-5


def shared_batch(examples: list[np.ndarray], least: int) -> PackedBatch:
    """Examples with every common beginning of `least` tokens or more laid out once."""
    prefixes = find_prefixes(examples)
    order = np.argsort(prefixes.rank)
    shared = prefixes.between(prefixes.rank[order])
    tree = grow_tree([len(examples[at]) for at in order], shared.tolist(), least)
    labels = np.random.default_rng(0).dirichlet([1, 1, 1], len(examples))
    return collate([{"input_ids": examples[at], "label": labels[at]} for at in order], tree=tree)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), least=st.sampled_from([1, 5]))
def test_shared_equals_one_by_one(gemma2: Path, seed: int, least: int) -> None:
    """Over random trees: common beginnings shorter and longer than the window, pairs, equal and nested examples.

    Of some of them, such as one short example, float32 itself knows the result less exactly.
    """
    batch = shared_batch(random_family(seed), least)
    found = compare(gemma2, [], True, shared=batch)
    if max(found) > 1e-5:
        unknown = unknown_in_float32(gemma2, batch)
        assert all(mine <= 4 * noise for mine, noise in zip(found, unknown, strict=True)), (found, unknown)


def unknown_in_float32(base: Path, batch: PackedBatch) -> list[float]:
    """Relative changes of logits and of gradients, one by one in transformers, if each weight is rounded otherwise."""
    expected = plain_model(base, classifier(exact(base)), True)
    right = logits_and_gradients(expected, one_by_one(expected, batch), batch)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in expected.parameters():
            steps = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.mul_(1 + torch.finfo(torch.float32).eps * steps)
    other = logits_and_gradients(expected, one_by_one(expected, batch), batch)
    return [relative(mine, was) for mine, was in zip(other, right, strict=True)]


def test_what_float32_does_not_know_is_no_excuse_for_a_wrong_layout(gemma2: Path) -> None:
    """The limit of badly conditioned examples stays far below what a wrong layout changes."""
    for seed in (17, 248):  # one short example each, whose logits and whose gradient nearly cancel
        unknown = unknown_in_float32(gemma2, shared_batch(random_family(seed), 1))
        assert 1e-6 < max(unknown) < 1e-5


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lora", [True, False])
def test_shared_equals_one_by_one_for_each_family(family: str, lora: bool, tmp_path: Path) -> None:
    batch = shared_batch(swap_pairs(), 4)
    assert batch.tokens < 0.6 * sum(batch.seq_lens)
    assert max(compare(make_base(tmp_path, family), [], lora, shared=batch)) <= 1e-5


def swap_pairs() -> list[np.ndarray]:
    """Both orders of three conversations under an instruction longer than the window; two have the same prompt."""
    rng = np.random.default_rng(1)
    instruction, *prompts = (rng.integers(10, 300, n) for n in (3 * WINDOW, WINDOW - 2, WINDOW + 3))
    answers = [(rng.integers(10, 300, 5), rng.integers(10, 300, WINDOW + 1)) for _ in range(3)]
    pieces = [
        (instruction, prompts[row % 2], *order) for row, (a, b) in enumerate(answers) for order in ((a, b), (b, a))
    ]
    return [np.concatenate(each).astype(np.int32) for each in pieces]


@pytest.mark.parametrize("field", ["position_ids", "kv_index", "segment"])
def test_a_wrong_layout_fails_the_comparison(gemma2: Path, field: str) -> None:
    """Positions that start anew in each segment, keys of other ancestors, the state of another example."""
    batch = shared_batch(swap_pairs(), 4)
    wrong = {
        "position_ids": torch.cat([torch.arange(n) for n in batch.cu_seqlens_q.diff()])[None],
        "kv_index": (batch.kv_index + 1) % batch.tokens,
        "segment": batch.segment.roll(1),
    }
    packed = classifier(exact(gemma2))
    expected = plain_model(gemma2, packed, True)
    right = one_by_one(expected, batch)
    assert relative(packed(batch), right) <= 1e-5
    assert relative(packed(replace(batch, **{field: wrong[field]})), right) > 1e-3


def set_window(window: int) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for layer in backbone(model).layers:
            if layer.self_attn.sliding_window is not None:
                layer.self_attn.sliding_window = window

    return change


def no_softcap(model: nn.Module) -> None:
    for layer in backbone(model).layers:
        layer.self_attn.attn_logit_softcapping = None


def one_document(model: nn.Module) -> None:
    def join(module: nn.Module, args: object, kwargs: dict[str, Tensor]) -> tuple[object, dict[str, object]]:
        ends = kwargs["cu_seq_lens_q"][[0, -1]]
        return args, {**kwargs, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}

    for layer in backbone(model).layers[:-1]:  # the last one has a query an example, not a row
        layer.register_forward_pre_hook(join, with_kwargs=True)


def one_rope(model: nn.Module) -> None:
    """Gives every layer the angles of the first, as if all had one rope base."""
    first: list[object] = []

    def note(module: nn.Module, args: object, kwargs: dict[str, object]) -> None:
        first[:] = [kwargs["position_embeddings"]]

    def reuse(module: nn.Module, args: object, kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        return args, {**kwargs, "position_embeddings": first[0]}

    layers = backbone(model).layers
    layers[0].register_forward_pre_hook(note, with_kwargs=True)
    for layer in layers[1:]:
        layer.register_forward_pre_hook(reuse, with_kwargs=True)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        *(
            pytest.param(family, change, id=f"{family} {name}")
            for family in ("gemma2", "gemma3_text")
            for name, change in (
                ("W+1", set_window(WINDOW + 1)), ("W-1", set_window(WINDOW - 1)), ("one", one_document),
            )
        ),
        pytest.param("gemma2", no_softcap, id="gemma2 cap"),
        pytest.param("gemma3_text", one_rope, id="gemma3_text rope"),
    ],
)  # fmt: skip
def test_controls_fail_the_comparison(family: str, change: Callable[[nn.Module], None], tmp_path: Path) -> None:
    """Each mistake must be seen, in the logits and in the gradients: otherwise the comparison proves nothing."""
    assert min(compare(make_base(tmp_path, family), LENGTHS, True, change)) > 1e-3


def test_one_row_of_logits_per_example_in_its_place(gemma2: Path) -> None:
    model = classifier(exact(gemma2)).eval()
    batch = pack(LENGTHS)
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(1)).tolist()
    rows = batch.input_ids[0].split(batch.seq_lens)
    shuffled = collate([{"input_ids": rows[at].numpy()} for at in order])
    with torch.no_grad():
        straight, permuted = model(batch), model(shuffled)
    assert straight.shape == (len(LENGTHS), 3)
    assert straight.dtype == torch.float32
    torch.testing.assert_close(permuted, straight[order], atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing(gemma2: Path) -> None:
    batch = pack(LENGTHS)
    results = []
    for checkpointing in ("none", "full"):
        model = classifier(exact(gemma2, checkpointing=checkpointing)).train()
        results.append(logits_and_gradients(model.model, model(batch), batch))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


def test_loss_is_a_sum_of_soft_label_cross_entropies() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    labels = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    expected = torch.tensor(3.0).log() + (torch.tensor(1.0).exp() + 2).log()
    torch.testing.assert_close(loss_sum(logits, labels), expected)
