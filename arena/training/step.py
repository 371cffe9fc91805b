"""The gradient of an optimizer step, micro-batch by micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arena.distributed import compute_in
from arena.model.classifier import loss_sum
from arena.packing.batch import PackedBatch
from arena.stopping import Stop
from arena.training.scaling import LossScaling


def accumulate(
    classifier: nn.Module, batch: list[PackedBatch], size: int, device: torch.device, dtype: str,
    scaling: LossScaling | None = None, stop: Stop | None = None,
) -> float:  # fmt: skip
    """Adds the gradient of the step's mean loss, a micro-batch at a time, and gives this rank's share of that loss.

    Each micro-batch's summed loss is divided by `size`, the examples of the whole step over all its micro-batches and
    ranks, so that the gradient does not depend on how the step was cut. With `scaling` it is scaled up,
    the loss that is given is not.

    Raises:
        Stopped: `stop` asks for it between two micro-batches.
    """
    sums: list[Tensor] = []
    for micro_batch in batch:
        if stop is not None and sums and stop():
            raise stop.stopped()
        placed = micro_batch.to(device)
        with compute_in(device, dtype):
            logits = classifier(placed)
        loss = loss_sum(logits, placed.label) / size
        (loss if scaling is None else scaling.scaled(loss)).backward()
        sums.append(loss.detach())
    return float(torch.stack(sums).sum()) if sums else 0.0
