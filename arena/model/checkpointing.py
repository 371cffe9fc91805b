"""What each layer keeps of its forward pass for the backward, and what it computes again there."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from arena.model.backbone import backbone, underlying

POLICIES = ("none", "full")  # from the least to the most that is computed again


def set_policies(model: PreTrainedModel, policies: Sequence[str]) -> None:
    """Gives each decoder layer its policy, one of `POLICIES`; it may be called again at any time."""
    layers = backbone(model).layers
    assert len(policies) == len(layers), f"{len(policies)} policies for {len(layers)} layers"
    underlying(model).gradient_checkpointing_enable({"use_reentrant": False})
    for layer, policy in zip(layers, policies, strict=True):
        assert policy in POLICIES, policy
        layer.gradient_checkpointing = policy == "full"
