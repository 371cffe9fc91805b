"""The loss of packed examples against transformers' language model, one example at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig

from arena.model import language_model
from arena.model.backbone import backbone, load_base
from arena.model.classifier import by_example, loss_sum
from arena.model.language_model import PackedLanguageModel, check_head, token_losses
from arena.model.tuning import adapt, lora_config
from arena.packing.batch import PackedBatch, collate
from arena.packing.tree import find_prefixes, grow_tree
from arena.settings import LoraSettings
from arena.training.optimizer import trainable
from tests.helpers import WINDOW, exact, examples_of, make_base, random_family

ROOT = Path(__file__).parents[2]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {"final_logit_softcapping": 0.2}),
    "gemma3_text": ("gemma3_text", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
}


def labels_of(examples: list[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """About half of the tokens of each example are targets; of the second example none is."""
    rng = np.random.default_rng(seed)
    chosen = [np.where(rng.random(len(each)) < 0.5, each, -100) for each in examples]
    chosen[1][:] = -100
    return chosen


def batch_of(examples: list[np.ndarray], *, share: bool) -> PackedBatch:
    labels = labels_of(examples)
    items: Any = [{"input_ids": each, "labels": own} for each, own in zip(examples, labels, strict=True)]
    if not share:
        return collate(items)
    prefixes = find_prefixes(examples)
    order = np.argsort(prefixes.rank)
    shared = prefixes.between(prefixes.rank[order])
    tree = grow_tree([len(examples[at]) for at in order], shared.tolist(), 4)
    return collate([items[at] | {"index": int(at)} for at in order], tree=tree)


def family() -> list[np.ndarray]:
    """Examples with common beginnings, longer and shorter than the window."""
    return [*random_family(3), *random_family(4), np.arange(10, 11 + 3 * WINDOW, dtype=np.int32)]


def packed_model(base: Path, **changes: Any) -> PackedLanguageModel:
    """A model with adapters that are not zero."""
    torch.manual_seed(0)
    settings = exact(base, **changes)
    model = adapt(load_base(settings, ()), settings)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return PackedLanguageModel(model)


def plain_model(base: Path, packed: PackedLanguageModel, lora: bool) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    if lora:
        model = get_peft_model(model, lora_config(LoraSettings(), backbone(model), with_head=False))
    model.load_state_dict(packed.model.state_dict())
    return model


def plain_losses(model: nn.Module, batch: PackedBatch, *, prompts_too: bool = False, shift: int = 1) -> list[Tensor]:
    """The losses of each example's targets, with transformers' own logits."""
    assert batch.targets_each is not None
    labels, found = labels_of(family()), []
    for ids, index in zip(examples_of(batch), batch.index.tolist(), strict=True):
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        places = torch.arange(len(ids) - 1) if prompts_too else torch.from_numpy(np.flatnonzero(labels[index][1:] >= 0))
        places = places[places + shift < len(ids)]
        found.append(F.cross_entropy(logits[places], ids[places + shift], reduction="none"))
    return found


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss, list(trainable(model).values()), allow_unused=True, retain_graph=True)
    return torch.cat([grad.reshape(-1) for grad in grads if grad is not None])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("share", [False, True])
def test_losses_and_gradients_equal_those_one_by_one(
    kind: str, lora: bool, share: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one chunk of positions and in many; the second example has no targets."""
    name, changes = KINDS[kind]
    base = make_base(tmp_path, name, **changes)
    packed = packed_model(base, **({} if lora else {"tune": "full"}))
    batch = batch_of(family(), share=share)
    assert share == (batch.tokens < 0.9 * sum(batch.seq_lens))
    plain = plain_model(base, packed, lora)
    each = plain_losses(plain, batch)
    expected = torch.cat(each)
    grads = gradient(plain, expected.sum())
    for rows in (1000, 7):
        monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", rows * packed.model.config.vocab_size)
        losses = packed(batch)
        assert losses.dtype == torch.float32 and losses.shape == batch.targets.shape
        assert relative(losses.detach(), expected.detach()) <= 1e-5
        assert relative(gradient(packed.model, loss_sum(losses, batch.targets)), grads) <= 1e-5
        summed = torch.tensor([[float(own.detach().sum()), len(own)] for own in each])
        torch.testing.assert_close(by_example(losses.detach(), batch), summed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", ["prompts too", "shifted", "mean of means", "no softcap"])
def test_controls_fail_the_comparison(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake changes the mean loss and its gradient far more than the tolerance."""
    name, changes = KINDS["gemma2" if wrong == "no softcap" else "llama untied"]
    base = make_base(tmp_path, name, **changes)
    packed, batch = packed_model(base), batch_of(family(), share=True)
    plain = plain_model(base, packed, True)
    losses = packed(batch)
    mean = loss_sum(losses, batch.targets) / len(losses)
    if wrong == "no softcap":
        monkeypatch.setattr(language_model, "final_softcap", lambda config: None)
        other = packed(batch).mean()
    else:
        each = plain_losses(plain, batch, prompts_too=wrong == "prompts too", shift=2 if wrong == "shifted" else 1)
        means = torch.stack([own.mean() for own in each if len(own)])
        other = means.mean() if wrong == "mean of means" else torch.cat(each).mean()
    right = torch.cat(plain_losses(plain, batch)).mean()
    assert float(abs(mean - right)) <= 1e-5 * float(right) and float(abs(other - right)) > 1e-4 * float(right)
    model = packed.model if wrong == "no softcap" else plain
    assert relative(gradient(packed.model, mean), gradient(plain, right)) <= 1e-5
    assert relative(gradient(model, other), gradient(plain, right)) > 1e-2


def test_a_base_with_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one would be whose soft cap has another name in its config."""
    config = Gemma2Config(final_logit_softcapping=1.0)
    for known in (config, Gemma3TextConfig(), LlamaConfig()):
        check_head(known, "some/base")
    monkeypatch.setattr(language_model, "final_softcap", lambda config: None)
    with pytest.raises(ValueError, match="'some/base' computes its logits in a way that this package does not know"):
        check_head(config, "some/base")


def test_a_head_alone_is_not_trained(gemma2: Path) -> None:
    settings = exact(gemma2, tune="head")
    with pytest.raises(ValueError, match=r"model\.tune=head trains the head of classes"):
        adapt(load_base(settings, ()), settings)


PEAK = """
import sys, torch
from arena.model import language_model
from tests.memory import GIB, Watch
language_model.LOGITS_AT_ONCE *= int(sys.argv[2])
torch.manual_seed(0)
head = torch.nn.Linear(8, 256_000, bias=False).requires_grad_(sys.argv[3] == "trained")
states, targets = torch.randn(int(sys.argv[1]), 8, requires_grad=True), torch.arange(int(sys.argv[1]))
with Watch() as watch:
    language_model.token_losses(states, head, targets, 30.0).sum().backward()
print(watch.peak / GIB)
"""


def peak(*words: object) -> float:
    """GiB that the losses of so many targets and their gradient take, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, words)], cwd=ROOT, capture_output=True, check=True)
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("targets", "head"), [(16_384, "frozen"), (1_024, "trained")])
def test_many_targets_of_256000_tokens_take_less_than_a_gibibyte(targets: int, head: str) -> None:
    """The control: chunks of four times the size take more, of few targets too."""
    assert peak(targets, 1, head) < 1
    assert peak(512, 4, head) > 1.5


def test_no_targets_have_no_losses() -> None:
    head = nn.Linear(4, 9, bias=False)
    assert token_losses(torch.zeros(0, 4), head, torch.zeros(0, dtype=torch.int64), None).shape == (0,)
