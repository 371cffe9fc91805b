"""The language model of packed examples: the loss of each target, with the logits of few positions at a time.

A vocabulary of 256,000 makes logits the largest tensor of a step: at 16,384 positions they would take 16 GiB, and as
much again for each operation on them. So the product with the vocabulary is computed for the positions before targets
only, and in chunks. If the output layer is frozen, the gradient of each chunk's states is computed along with its
losses, because losses of different targets are independent; otherwise the backward computes the logits anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from arena.model.backbone import backbone, classifies, underlying
from arena.model.classifier import PackedClassifier, hidden_states
from arena.model.miniature import FIRST_TOKEN, ORIGINAL, miniature
from arena.packing.batch import PackedBatch

LOGITS_AT_ONCE = 2**25  # float32 numbers, 128 MiB; with the backward, about four times as much is held
TOLERANCE = 1e-5


class PackedLanguageModel(nn.Module):
    """Computes the loss of each target of a `PackedBatch` whose targets are tokens.

    Args:
        model: as returned by `load_base` without classes, `adapt` or `load_trained`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch) -> Tensor:
        """Float32 (m,), the negative log-likelihood of each target."""
        assert batch.targets is not None, "the batch has no targets"
        inner = underlying(self.model)
        cap = final_softcap(inner.config)
        return token_losses(hidden_states(self.model, batch), inner.get_output_embeddings(), batch.targets, cap)


PackedModel = PackedClassifier | PackedLanguageModel


def packed_model(model: PreTrainedModel) -> PackedModel:
    """A loaded model with the head that it has, for packed batches."""
    return PackedClassifier(model) if classifies(model) else PackedLanguageModel(model)


def token_losses(states: Tensor, head: Any, targets: Tensor, softcap: float | None) -> Tensor:
    """Float32 (m,), the cross entropy of each target.

    Args:
        states: (m, hidden).
        head: the linear layer from hidden states to the vocabulary.
        targets: int64 (m,).
        softcap: c in c tanh(logits / c), if the model has one.
    """
    if states.requires_grad and not any(each.requires_grad for each in head.parameters()):
        losses: Tensor = _FrozenHead.apply(states, targets, head, softcap)
        return losses
    chunks = _chunks(head, states, targets)
    parts: list[Tensor] = [checkpoint(_losses, *chunk, head, softcap, use_reentrant=False) for chunk in chunks]
    return torch.cat(parts)


class _FrozenHead(torch.autograd.Function):
    """`token_losses` with a frozen head: saves the gradient of each loss instead of computing the logits twice."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
        losses, grads = list[Tensor](), list[Tensor]()
        for chunk, wanted in _chunks(head, states, targets):
            leaf = chunk.detach().requires_grad_()
            with torch.enable_grad():
                own = _losses(leaf, wanted, head, softcap)
                grads += torch.autograd.grad(own.sum(), leaf)
            losses.append(own.detach())
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (of_losses,) = ctx.saved_tensors
        return (grad[:, None] * of_losses).to(of_losses.dtype), None, None, None


def _chunks(head: Any, states: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """States and targets, so many at once that their logits stay within `LOGITS_AT_ONCE`."""
    rows = rows_at_once(head.out_features)
    return zip(states.split(rows), targets.split(rows), strict=True)


def rows_at_once(vocabulary: int) -> int:
    """The positions whose logits are computed at once."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def bytes_of_losses(
    targets: int, hidden: int, vocabulary: int, *, width: int, softcap: bool, trained: bool = False
) -> int:
    """The most bytes that `token_losses` and its backward hold, beside its arguments and a weight's finished gradient.

    Args:
        width: bytes of a number in the compute dtype.
        softcap: whether the model has one.
        trained: whether the head is.
    """
    logits = min(targets, rows_at_once(vocabulary)) * vocabulary
    # at the backward of log-softmax, in float32: its output, its gradients, and with a soft cap that of tanh
    chunk = 4 * logits * (4 if softcap else 3)
    states = targets * hidden
    if trained:  # beside a chunk autocast's copy of the weight and its gradient so far; later that of the chunk too
        weight = width * vocabulary * hidden
        return max(chunk + 2 * weight, 3 * weight) + width * states
    # the gradient of each loss's state; in the backward also times the loss's own gradient, in float32 and as it leaves
    return max(chunk + width * states, (width + 4 + width) * states)


def _losses(states: Tensor, targets: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
    logits = head(states).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none")


def final_softcap(config: Any) -> float | None:
    """The soft cap of a model's logits."""
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    return cap


@torch.no_grad()
def check_head(config: PretrainedConfig, base: str) -> None:
    """Checks on a small model of the same kind that a base's logits are those of `token_losses`.

    Raises:
        ValueError: they are computed in another way, such as scaled by a factor.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = miniature(config)
        model: Any = AutoModelForCausalLM.from_config(small, attn_implementation="eager", dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)  # large enough for a soft cap to matter
        ids = torch.randint(FIRST_TOKEN, small.vocab_size, (1, ORIGINAL))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        states = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    ours = token_losses(states, model.get_output_embeddings(), ids[0, 1:], final_softcap(small))
    expected = F.cross_entropy(logits.float(), ids[0, 1:], reduction="none")
    if not (ours - expected).abs().max() <= TOLERANCE * expected.abs().max():
        raise ValueError(
            f"model.base: {base!r} computes its logits in a way that this package does not know, so it cannot be tuned "
            f"on instructions: {config.model_type} is not among the families whose output layer is linear; "
            "use another base"
        )
