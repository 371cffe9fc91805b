"""An optimizer step: its gradient, micro-batch by micro-batch, its place in the log, and the report of a failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arena.data.task import Task
from arena.distributed import compute_in
from arena.model.classifier import loss_sum
from arena.packing.batch import PackedBatch
from arena.packing.loader import PackedLoader
from arena.packing.plan import PackPlan
from arena.stopping import Stop
from arena.storage.files import write_json
from arena.training.checkpoint import Done
from arena.training.optimizer import LossScaling

IGNORED = -100  # the token that torch's cross entropy ignores
IDS_SHOWN = 10  # in the message about a step that failed


def accumulate(
    classifier: nn.Module, batch: list[PackedBatch], size: int, device: torch.device, dtype: str,
    scaling: LossScaling | None = None, stop: Stop | None = None, joined: Task | None = None,
) -> float:  # fmt: skip
    """Accumulates the gradient of the step's mean loss over micro-batches, and returns this rank's share of the loss.

    Each micro-batch's summed loss is divided by `size`, the number of targets in the whole step over all micro-batches
    and ranks, so that the gradient does not depend on how the step was divided. With `scaling` the gradient is scaled
    up; the returned loss is not.

    Args:
        classifier: of either kind (`PackedModel`).
        joined: the task that joins the logits of a row's examples; None: examples are predicted one by one.

    Raises:
        Stopped: `stop` was requested between two micro-batches.
    """
    sums: list[Tensor] = []
    for micro_batch in batch:
        if stop is not None and sums and stop():
            raise stop.stopped()
        placed = micro_batch.to(device)
        with compute_in(device, dtype):
            outputs = classifier(placed)
        assert placed.targets is not None
        if joined is None:
            loss = loss_sum(outputs, placed.targets) / size
        else:
            loss = _joined_loss(outputs, placed, micro_batch.index, joined) / size
        (loss if scaling is None else scaling.scaled(loss)).backward()
        sums.append(loss.detach())
    return float(torch.stack(sums).sum()) if sums else 0.0


def without_loss(loader: PackedLoader) -> PackedBatch:
    """The shortest micro-batch of a plan, with targets of which each has the loss 0 and no gradient."""
    tokens = loader.plan.tokens
    batch = loader.micro_batch(int(np.where(tokens > 0, tokens, tokens.max()).argmin()))
    assert batch.targets is not None
    targets = torch.full_like(batch.targets, IGNORED if batch.targets_each is not None else 0)
    return replace(batch, targets=targets)


def _joined_loss(outputs: Tensor, batch: PackedBatch, index: Tensor, task: Task) -> Tensor:
    """The summed loss of a micro-batch of whole rows. Each example counts as much as its row, as a step counts them.

    Args:
        index: that of the batch, on the CPU.
    """
    assert batch.targets is not None
    k = task.orders
    # a row is there twice if the step has the end of one epoch and the beginning of the next
    order = torch.argsort(index, stable=True)
    places = torch.stack([order[index[order] % k == at] for at in range(k)], dim=1)
    assert (index[places] // k == index[places[:, :1]] // k).all(), "a micro-batch has whole rows"
    places = places.to(outputs.device)
    return k * loss_sum(task.join(outputs[places]), batch.targets[places[:, 0]])


def count_step(done: Done, plan: PackPlan, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Counts a completed step in `done`, and returns `facts` with its size and time, for the log."""
    first = int(plan.step_ends[done.step - 1]) if done.step else 0
    micro = slice(first, int(plan.step_ends[done.step]))
    unique, tokens, examples = plan.tokens[micro], int(plan.logical_tokens[micro].sum()), plan.step_size(done.step)
    used = int((unique > 0).sum())
    done.step += 1
    done.tokens += tokens
    done.unique_tokens += int(unique.sum())
    done.micro_batches += used
    done.seconds += seconds
    return {
        "step": done.step, **facts, "examples": examples,
        "micro_batches": used, "tokens": tokens, "unique_tokens": int(unique.sum()),
        "fill_rate": float(unique.sum() / (len(unique) * plan.budget)),
        "seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1),
    }  # fmt: skip


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
