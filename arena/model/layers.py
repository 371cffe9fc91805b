"""Which decoder layers get adapters, and from which one on there is a backward."""

from __future__ import annotations

from arena.settings import LoraSettings, ModelSettings


def adapted_layers(settings: LoraSettings, depth: int) -> list[int]:
    """The layers that get adapters.

    Args:
        depth: the number of the base's layers.

    Raises:
        ValueError: the base has no such layer.
    """
    chosen = sorted(set(settings.layers or ())) or range(settings.first_layer, max(depth, settings.first_layer + 1))
    if chosen[-1] >= depth:
        key = "layers" if settings.layers else "first_layer"
        raise ValueError(
            f"model.lora.{key} names layer {chosen[-1]}, but the base has {depth} layers, 0 to {depth - 1}: name "
            "one of these"
        )
    return list(chosen)


def first_trained_layer(settings: ModelSettings, depth: int) -> int:
    """The layer from which on there is a backward; `depth` if only the head is trained.

    Arguments and errors are those of `adapted_layers`.
    """
    if settings.tune == "lora":
        return adapted_layers(settings.lora, depth)[0]
    return depth if settings.tune == "head" else 0
