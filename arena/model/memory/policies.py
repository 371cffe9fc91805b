"""What each layer saves of its forward pass for the backward, and what it recomputes there."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from arena.model.backbone import backbone, underlying
from arena.model.last_layer import MARK
from arena.model.memory.estimate import POLICIES
from arena.model.memory.fused import POLICY


def policies_of(model: PreTrainedModel) -> list[str]:
    """The current policy of each decoder layer."""
    return [getattr(layer, POLICY) for layer in backbone(model).layers]


def set_policies(model: PreTrainedModel, policies: Sequence[str]) -> None:
    """Sets the policy of each decoder layer, one of `POLICIES`; policies can be changed at any time.

    `none` saves everything. `elementwise` recomputes norms, the MLP's activation and gathered keys, which takes no
    matrix product. `elementwise_and_mlp` also recomputes the two wide products of the MLP, and `full` the whole layer
    from its input. A last layer that is computed for last tokens only saves little and is never recomputed as a whole.
    """
    layers = backbone(model).layers
    assert len(policies) == len(layers), f"{len(policies)} policies for {len(layers)} layers"
    underlying(model).gradient_checkpointing_enable({"use_reentrant": False})
    for layer, policy in zip(layers, policies, strict=True):
        assert policy in POLICIES, policy
        if policy == "full" and getattr(layer, MARK, False):
            policy = "elementwise"
        layer.gradient_checkpointing = policy == "full"
        setattr(layer, POLICY, policy)
