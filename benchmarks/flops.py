"""Floating-point operations of a token, by arithmetic: what a measured time is compared with.

A product with a weight costs 2 operations a token. Reading a token forward passes every linear layer once: 2N for N
weights. Training with frozen weights adds the gradient of the layers' inputs, 4N in all; where the weights themselves
learn, their gradients make it 6N. Attention, norms and the adapters are left out, as is usual: a few per cent here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

Shapes = Counter[tuple[int, int]]  # (inputs, outputs) of the linear layers, and how many there are of each


def linear_shapes(config: Any) -> Shapes:
    """The shapes of a decoder's linear layers; embeddings and head are no part of it.

    Args:
        config: of the base model, as transformers has it. No weight is made.
    """
    with torch.device("meta"):
        decoder = AutoModel.from_config(config)
    layers = (each for each in decoder.layers.modules() if isinstance(each, nn.Linear))
    return Counter((each.in_features, each.out_features) for each in layers)


def weights(shapes: Shapes) -> int:
    """N: how many weights the linear layers have."""
    return sum(inputs * outputs * count for (inputs, outputs), count in shapes.items())


def flops_a_token(n: int, task: str, tune: str = "lora", frozen: float = 0.0) -> int:
    """Operations that a unique token needs, nothing computed twice.

    Args:
        n: weights of the linear layers.
        task: `train` or `infer`.
        tune: what is trained: `lora` leaves the base's weights frozen, `full` trains them, and `head` needs no
            backward through the base at all.
        frozen: the share of the layers that are below the first one with adapters, and so have no backward.
    """
    assert task in ("train", "infer") and tune in ("lora", "full", "head"), (task, tune)
    backward = {"lora": 2, "full": 4, "head": 0}[tune] * n if task == "train" else 0
    return 2 * n + round((1 - frozen) * backward)


def flops_recomputed(shapes: Shapes, policy: str, tune: str = "lora") -> int:
    """Operations a token that recomputing its activations adds, counted apart from those that are needed.

    Args:
        policy: `full` recomputes whole layers, `elementwise_and_mlp` the products gate and up, and `elementwise`
            and `none` no product; `frozen` layers have no backward.
    """
    if tune == "head" or policy in ("elementwise", "none", "frozen"):
        return 0
    if policy == "full":
        return 2 * weights(shapes)
    assert policy == "elementwise_and_mlp", policy
    widest = max(outputs for _, outputs in shapes)
    return 2 * sum(inputs * outputs * count for (inputs, outputs), count in shapes.items() if outputs == widest)
