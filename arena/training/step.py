"""The gradient of an optimizer step, micro-batch by micro-batch, and the report of a step that failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from arena.distributed import compute_in
from arena.model.classifier import loss_sum
from arena.packing.batch import PackedBatch
from arena.stopping import Stop
from arena.storage.files import write_json
from arena.training.scaling import LossScaling

IDS_SHOWN = 10  # in the message about a step that failed


def accumulate(
    classifier: nn.Module, batch: list[PackedBatch], size: int, device: torch.device, dtype: str,
    scaling: LossScaling | None = None, stop: Stop | None = None,
) -> float:  # fmt: skip
    """Accumulates the gradient of the step's mean loss over micro-batches, and returns this rank's share of the loss.

    Each micro-batch's summed loss is divided by `size`, the number of examples in the whole step over all micro-batches
    and ranks, so that the gradient does not depend on how the step was divided. With `scaling` the gradient is scaled
    up; the returned loss is not.

    Raises:
        Stopped: `stop` was requested between two micro-batches.
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


def write_failure(folder: Path, step: int, loss: float, norm: float, ids: Sequence[str]) -> None:
    """Writes `failure.json` into a run's folder: the step, its loss and gradient norm, and the ids of its rows."""
    facts = {"step": step, "loss": str(loss), "grad_norm": str(norm), "ids": list(ids)}
    write_json(folder / "failure.json", facts)


def describe_failure(folder: Path, step: int, loss: float, norm: float, ids: Sequence[str]) -> str:
    """The message about a step that failed."""
    more = f" and {len(ids) - IDS_SHOWN} more" if len(ids) > IDS_SHOWN else ""
    return (
        f"step {step}: loss {loss}, gradient norm {norm}; the step was not taken, and the run is saved as it was "
        f"before it. Rows of the step: {', '.join(ids[:IDS_SHOWN])}{more} ({folder / 'failure.json'}); check these "
        "rows, or start again with a lower learning rate (--fresh)"
    )
