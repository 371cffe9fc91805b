"""From what a judge says to what a request is answered with."""

from __future__ import annotations

from typing import Any

import numpy as np

from arena.inference.verdicts import Explanation, ranking, tie_of
from arena.serving import schema
from arena.serving.limits import RefusedError
from arena.serving.packer import Batch, Job, Verdict


def judged(job: Job, verdicts: list[Verdict], batch: Batch) -> schema.Judged:
    """The verdicts on rows. Raises `RefusedError` if there is none."""
    if all(isinstance(each, Exception) for each in verdicts):
        raise _failed(verdicts)
    rows = [
        schema.Failure(error=_why(each)) if isinstance(each, Exception) else _verdict(each, job.prompts)
        for each in verdicts
    ]
    return schema.Judged(judge=job.name, rows=rows, batch=_batch(batch))


def ranked(job: Job, verdicts: list[Verdict], batch: Batch) -> schema.Ranked:
    """The ranking by the verdicts on all pairs. Raises `RefusedError` if one is missing."""
    if any(isinstance(each, Exception) for each in verdicts):
        raise _failed(verdicts)
    found = [each for each in verdicts if isinstance(each, Explanation)]
    pairs, read = np.array([list(each.probabilities.values()) for each in found]), [each.is_read for each in found]
    result = ranking(pairs, np.array(read), tie_of(job.judge.task), batch.tokens, batch.logical_tokens)
    return schema.Ranked(
        judge=job.name, order=result.order.tolist(), strengths=result.strengths.tolist(), wins=result.wins.tolist(),
        batch=_batch(batch),
    )  # fmt: skip


def _verdict(found: Explanation, prompts: bool) -> schema.Verdict:
    orders = [
        schema.Order(
            probabilities=each.probabilities, tokens=each.tokens, tokens_cut=each.tokens_cut,
            turns_dropped=each.turns_dropped, prompt=each.prompt if prompts else None,
        )
        for each in found.orders
    ]  # fmt: skip
    return schema.Verdict(
        probabilities=found.probabilities, orders=orders, flips=found.flips, is_read=found.is_read, kind=found.kind,
        tokens=sum(each.tokens for each in orders), tokens_cut=max(each.tokens_cut for each in orders),
        turns_dropped=max(each.turns_dropped for each in orders),
    )  # fmt: skip


def _batch(batch: Batch) -> schema.Batch:
    return schema.Batch(
        requests=batch.requests, rows=batch.rows, tokens=batch.tokens, logical_tokens=batch.logical_tokens,
        shared_tokens=batch.logical_tokens - batch.tokens,
    )  # fmt: skip


def _why(error: Exception) -> str:
    if isinstance(error, FloatingPointError):
        return "its logits are not finite"
    return f"it could not be judged ({type(error).__name__})"


def _failed(verdicts: list[Verdict]) -> RefusedError:
    wrong: list[dict[str, Any]] = [
        {"row": row, "field": "the row", "what": _why(each)}
        for row, each in enumerate(verdicts)
        if isinstance(each, Exception)
    ]
    return RefusedError(500, f"row {wrong[0]['row']}: {wrong[0]['what']}", wrong[:20])
