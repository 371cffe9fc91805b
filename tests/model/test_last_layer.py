"""The last layer for the last tokens alone: the whole layer's result and gradients, at a fraction of its work."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arena.model.backbone import backbone
from arena.model.classifier import PackedClassifier, loss_sum
from arena.model.last_layer import takes_last_token
from arena.packing.batch import PackedBatch
from arena.training.optimizer import trainable
from tests.helpers import CONFIGS, WINDOW, classifier, exact, make_base, pack
from tests.model.test_classifier import relative, shared_batch, swap_pairs

LENGTHS = [4 * WINDOW, 1, WINDOW, WINDOW + 1, 3, 5 * WINDOW]


def both_ways(
    model: PackedClassifier, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor, Tensor]]:
    """Logits and gradients with the whole last layer, and with the last tokens alone."""
    found = []
    for safe in (False, True):
        monkeypatch.setattr("arena.model.classifier.takes_last_token", lambda decoder, safe=safe: safe)
        logits = model(batch)
        parameters = list(trainable(model.model).values())
        grads = torch.autograd.grad(loss_sum(logits, batch.label), parameters, allow_unused=True)
        found.append((logits.detach(), torch.cat([grad.reshape(-1) for grad in grads if grad is not None])))
    return found


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("share", [False, True])
def test_equal_to_the_whole_layer(
    family: str, layers: int, share: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer has a sliding window in one of the two depths."""
    model = classifier(exact(make_base(tmp_path, family, num_hidden_layers=layers)))
    batch = shared_batch(swap_pairs(), 4) if share else pack(LENGTHS)
    assert takes_last_token(backbone(model.model))
    whole, last = both_ways(model, batch, monkeypatch)
    assert max(relative(a, b) for a, b in zip(last, whole, strict=True)) <= 1e-5


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_queries_and_mlp_see_one_token_a_segment(gemma2: Path, checkpointing: str) -> None:
    model = classifier(exact(gemma2, checkpointing=checkpointing)).train()
    rows: list[int] = []
    for layer in backbone(model.model).layers[-2:]:
        layer.mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    batch = pack(LENGTHS)
    loss_sum(model(batch), batch.label).backward()
    assert set(rows) == {sum(LENGTHS), len(LENGTHS)}
    assert rows.count(len(LENGTHS)) == 1


def test_a_call_without_last_token_gives_the_states_of_all(gemma2: Path) -> None:
    model, batch = classifier(exact(gemma2)), pack(LENGTHS)
    hidden = backbone(model.model)(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens, cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seq_len, max_length_k=batch.max_seq_len,
    ).last_hidden_state  # fmt: skip
    assert hidden.shape[1] == sum(LENGTHS)


def test_a_copy_runs_with_its_own_weights(gemma2: Path) -> None:
    model, batch = classifier(exact(gemma2)).eval(), pack(LENGTHS)
    with torch.no_grad():
        copied, before = copy.deepcopy(model), model(batch)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert torch.equal(copied(batch), before)
        assert relative(model(batch), before) > 1e-3
