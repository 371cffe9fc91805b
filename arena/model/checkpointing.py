"""What each layer keeps of its forward pass for the backward, and what it computes again there."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from arena.model.backbone import backbone, underlying
from arena.model.fused import COSTS, POLICY
from arena.model.last_layer import MARK

POLICIES = ("none", *COSTS, "full")  # from the least to the most that is computed again


def policies_of(model: PreTrainedModel) -> list[str]:
    """The policy that each decoder layer has now."""
    return [getattr(layer, POLICY) for layer in backbone(model).layers]


def set_policies(model: PreTrainedModel, policies: Sequence[str]) -> None:
    """Gives each decoder layer its policy, one of `POLICIES`; it may be called again at any time.

    `none` keeps everything; `light` computes norms, the MLP's activation and gathered keys again, passes over memory
    that cost no matrix product; `mlp` also the two wide products of the MLP; `full` the whole layer from its input. A
    last layer that reads last tokens alone keeps little, and is never computed again as a whole.
    """
    layers = backbone(model).layers
    assert len(policies) == len(layers), f"{len(policies)} policies for {len(layers)} layers"
    underlying(model).gradient_checkpointing_enable({"use_reentrant": False})
    for layer, policy in zip(layers, policies, strict=True):
        assert policy in POLICIES, policy
        if policy == "full" and getattr(layer, MARK, False):
            policy = "light"
        layer.gradient_checkpointing = policy == "full"
        setattr(layer, POLICY, policy)
