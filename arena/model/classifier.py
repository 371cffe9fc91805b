"""The classifier of packed examples, and its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from arena.model.backbone import backbone, underlying
from arena.model.last_layer import takes_last_token
from arena.packing.batch import PackedBatch


class PackedClassifier(nn.Module):
    """Computes one row of logits for each example of a `PackedBatch`.

    Args:
        model: as returned by `load_base`, `adapt` or `load_trained`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch) -> Tensor:
        """Float32 (m, C), from the hidden states at the batch's positions: the last token of each example."""
        read = hidden_states(self.model, batch)
        with torch.autocast(read.device.type, enabled=False):
            logits: Tensor = underlying(self.model).score(read.float())
        return logits


def hidden_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """(m, hidden), the decoder's last hidden states at the positions that the head reads."""
    decoder = backbone(model)
    last_token = batch.cu_seqlens_q[1:].long() - 1
    only_last = batch.reads_last and takes_last_token(decoder)
    with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(decoder)):
        hidden: Tensor = decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens_q,
            cu_seq_lens_k=batch.cu_seqlens_k,
            max_length_q=batch.max_segment_len,
            max_length_k=batch.max_seq_len,
            kv_index=batch.kv_index,
            **({"last_token": last_token} if only_last else {}),
        ).last_hidden_state[0]
    assert not only_last or len(hidden) == len(last_token), "the last layer must return one state per segment"
    return hidden[batch.segment] if only_last else hidden[batch.positions]


def _trains(decoder: nn.Module) -> bool:
    """Whether anything below the head is trained; if not, nothing of the decoder's forward needs to be saved."""
    return any(parameter.requires_grad for parameter in decoder.parameters())


def loss_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss, summed over targets; divide it by the number of targets in the whole step.

    Args:
        outputs: float32 (m, C), logits; or (m,), the losses of the targets, as from `PackedLanguageModel`.
        targets: (m, C), probabilities that sum to 1 in each row; or int64 (m,), indices of the C outputs.
    """
    return outputs.sum() if outputs.ndim == 1 else F.cross_entropy(outputs, targets, reduction="sum")


def by_example(outputs: Tensor, batch: PackedBatch) -> Tensor:
    """Float32 (n, width), what evaluation needs of each example: its logits, or its summed loss and number of targets.

    Args:
        outputs: of either head, as for `loss_sum`.
    """
    if batch.targets_each is None:
        return outputs
    sums = torch.segment_reduce(outputs, "sum", lengths=batch.targets_each, initial=0.0)
    return torch.stack([sums, batch.targets_each.to(sums.dtype)], dim=1)
