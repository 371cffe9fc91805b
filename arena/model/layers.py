"""Which decoder layers get adapters, and from which one on there is a backward."""

from __future__ import annotations

from arena.config import LoraSettings, ModelSettings


def adapted_layers(settings: LoraSettings, depth: int) -> list[int]:
    """The layers that get adapters.

    Args:
        depth: the number of the base's layers.

    Raises:
        ValueError: the base has no such layer.
    """
    key, named = "first_layer", [settings.first_layer]
    if settings.layers is not None:
        key, named = "layers", sorted(set(settings.layers))
    if named[-1] >= depth:
        raise ValueError(
            f"model.lora.{key} names layer {named[-1]}, but the base has {depth} layers, 0 to {depth - 1}: name one of "
            "these"
        )
    return named if settings.layers is not None else list(range(settings.first_layer, depth))


def first_trained_layer(settings: ModelSettings, depth: int) -> int:
    """The layer from which on there is a backward; `depth` if only the head is trained.

    Arguments and errors are those of `adapted_layers`.
    """
    if settings.tune == "lora":
        return adapted_layers(settings.lora, depth)[0]
    return depth if settings.tune == "head" else 0
