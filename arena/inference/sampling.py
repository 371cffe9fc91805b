"""How the tokens of an answer are chosen: the most probable ones, or drawn by random numbers that belong to a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampling:
    """The length of answers, and how their tokens are chosen.

    What is drawn for a row depends on the seed and on its position among those answered, and not on the rows beside it
    in a batch.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        temperature: of the probabilities that tokens are drawn with; 0: the most probable token is taken (greedy).
        top_p: draws from the fewest tokens that have this much of the probability together.
        top_k: draws from this many most probable tokens; None: from all.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0, for the most probable tokens, or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {allowed}")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k is not None):
            raise ValueError("top_p and top_k apply to sampling only: set temperature too, such as 0.7")

    def processors(self, rows: Sequence[int], width: int, device: torch.device) -> tuple[LogitsProcessorList, Choice]:
        """What chooses the tokens of these rows after `width` tokens, and the last part of it."""
        if self.temperature == 0:
            choice = Choice(None, width)
            return LogitsProcessorList([choice]), choice
        drawn = [np.random.default_rng([self.seed, row]).random(self.max_new_tokens, np.float32) for row in rows]
        choice = Choice(torch.from_numpy(np.stack(drawn)).to(device), width)
        limits = [TopKLogitsWarper(self.top_k)] if self.top_k is not None else []
        limits += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        return LogitsProcessorList([TemperatureLogitsWarper(self.temperature), *limits, choice]), choice


class Choice(LogitsProcessor):
    """Leaves each row the one token that is drawn, which is then the most probable one.

    Args:
        uniform: float32 (rows, steps) in [0, 1), by which tokens are drawn; None leaves all tokens as they are.
        width: the tokens before the first step.

    Attributes:
        broken: bool (rows,): a logit was not a number, or +inf, as where float16 overflows.
    """

    def __init__(self, uniform: Tensor | None, width: int) -> None:
        self.uniform, self.width = uniform, width
        self.broken: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        broken = (scores.isnan() | (scores == math.inf)).any(dim=-1)
        self.broken = broken if self.broken is None else self.broken | broken
        if self.uniform is None:
            return scores
        mass = scores.float().softmax(dim=-1).double().cumsum(dim=-1)
        point = self.uniform[:, input_ids.shape[1] - self.width, None] * mass[:, -1:]  # less than the last one
        drawn = torch.searchsorted(mass, point, right=True)
        return torch.full_like(scores, -math.inf).scatter(1, drawn, 0.0)
