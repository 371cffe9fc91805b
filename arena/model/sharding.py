"""Weights, gradients and optimizer state shared out over the processes of a run, with torch's FSDP2.

Each process holds a part of every weight. A layer's weights are gathered when it is computed, in the forward and again
in the backward, and freed afterwards; gradients are summed while they are shared out again. So every process must
compute as many micro-batches as the others, which `in_turns` sees to.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from arena.model.backbone import backbone, classifies
from arena.model.language_model import PackedModel
from arena.ranks import TURNS
from arena.settings import Recipe


def check_sharding(recipe: Recipe) -> None:
    """Raises `ValueError` if `train.shard` is set together with what does not go with it.

    Args:
        recipe: with the dtype in which it runs.
    """
    if not recipe.train.shard:
        return
    model, train = recipe.model, recipe.train
    if model.quantization != "none":
        raise ValueError(
            f"train.shard=true, but quantised weights (model.quantization={model.quantization}) cannot be trusted to "
            "survive it: FSDP leaves 4-bit weights whole or trains nothing (accelerate #3987 and #3983), or changes "
            "their bits on the way (bitsandbytes #1945). Set model.quantization=none, or train.shard=false"
        )
    if model.dtype == "float16":
        raise ValueError(
            "train.shard=true, but an overflow in float16 would be noticed by some processes only: set "
            "model.dtype=bfloat16 or float32, or train.shard=false"
        )
    if train.optimizer != "adamw":
        raise ValueError(
            f"train.shard=true, but {train.optimizer} cannot work on a part of a weight: set train.optimizer=adamw"
        )
    if train.tracking.watch != "none":
        raise ValueError(
            f"train.shard=true, but train.tracking.watch={train.tracking.watch} needs whole weights: set it to none"
        )


def place(classifier: PackedModel, accelerator: Accelerator, recipe: Recipe) -> None:
    """Moves a model to the device; or with `train.shard` only this process's part of it, if there are several."""
    if not recipe.train.shard or accelerator.num_processes == 1:
        classifier.to(accelerator.device)
        return
    decoder: Any = backbone(classifier.model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # otherwise autocast's copies of a layer's weights would be kept from its forward to its backward
    halved = recipe.model.tune == "full" and recipe.model.dtype == "bfloat16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if halved else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if classifies(classifier.model):  # a language model's may also be its output layer
        fully_shard(decoder.embed_tokens, mesh=mesh)
    fully_shard(classifier, mesh=mesh)  # the rest: the last norm and the head
    for module in classifier.modules():
        if isinstance(module, FSDPModule):  # a sum, also with gloo, which cannot divide
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(classifier, TURNS, distributed.new_group(backend="gloo"))


def is_sharded(classifier: nn.Module) -> bool:
    """Whether `place` has shared a model out."""
    return hasattr(classifier, TURNS)


def whole(value: Any, keep: bool = True) -> Any:
    """A tensor, or a structure of dicts and lists, with whole tensors on the CPU in place of sharded ones.

    All ranks must call this alike.

    Args:
        keep: whether this rank needs the result; otherwise it only gives its part, and gets None for each.
    """
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.detach().cpu() if keep else None
    if isinstance(value, dict):
        return {key: whole(each, keep) for key, each in value.items()}
    if isinstance(value, list):
        return [whole(each, keep) for each in value]
    return value


def part_of(values: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of `values`, shared out as a parameter of the same shape is; all of them if it is not."""
    if not isinstance(parameter, DTensor) or values.shape != parameter.shape:
        return values
    mesh = parameter.device_mesh
    shared = distribute_tensor(values.to(parameter.device), mesh, parameter.placements, src_data_rank=None)
    return shared.clone()  # so that the memory of the whole is freed
