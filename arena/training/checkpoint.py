"""Checkpoints: everything that a run needs to resume exactly, as safetensors and JSON, each complete or absent.

`step-<n>` holds the run after step n: trained weights, optimizer (unless `train.save_optimizer` is false), schedule,
random states and the counts of `Done`.
`evaluation-<n>` holds the predictions of these weights for the held-out rows, and `base` those of a language model
before training. Each is written to a scratch folder, synced and renamed, with a manifest of the SHA-256 of every file;
a checkpoint that differs from its manifest is never loaded.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arena.model.sharding import part_of
from arena.progress import console
from arena.storage.files import atomic_write
from arena.storage.manifest import damage, read_manifest, write_manifest
from arena.training.optimizer import trainable

TENSOR = "@tensor"  # the key in JSON that refers to a tensor in the safetensors file beside it

Random = tuple[dict[str, Tensor], dict[str, Any]]  # the tensors of random states, and their plain values


@dataclass
class Done:
    """How far a run is; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    unique_tokens: int = 0
    micro_batches: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of these seconds, for data


def save_checkpoint(
    folder: Path,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any] | None,
    schedule: Any,
    state: dict[str, Any],
    *,
    random_of_ranks: Sequence[Random] = (),
) -> None:
    """Writes a checkpoint to `folder`.

    Args:
        weights: those that are trained.
        optimizer: its state; None: a resumed run starts the optimizer anew.
        state: what else the run needs to resume, as plain JSON values.
        random_of_ranks: the random states of all ranks; by default those of this process alone.
    """
    tensors: dict[str, Tensor] = {}
    plain = None if optimizer is None else _split(optimizer, "", tensors)
    (drawn, plain_random), *others = random_of_ranks or [random_states()]
    drawn = drawn | {f"{rank}/{name}": each for rank, (part, _) in enumerate(others, 1) for name, each in part.items()}
    with atomic_write(folder) as draft:
        draft.mkdir()
        save_file(_contiguous(weights), draft / "weights.safetensors")
        if optimizer is not None:
            save_file(_contiguous(tensors), draft / "optimizer.safetensors")
        save_file(drawn, draft / "random.safetensors")
        facts = {"optimizer": plain, "schedule": _plain(schedule.state_dict()), "random": plain_random}
        facts["random_of_others"] = [each for _, each in others]
        write_manifest(draft, {**state, **facts})


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, *, rank: int = 0, ranks: int = 1
) -> dict[str, Any]:  # fmt: skip
    """Restores weights, optimizer, schedule and random states, and returns the saved `state`.

    A checkpoint without the optimizer's state leaves the optimizer as it is, at the schedule's learning rates. If as
    many ranks saved it as load it, each gets its own random states, or else that of the first.

    Raises:
        ValueError: the checkpoint is incomplete or damaged; nothing is changed.
    """
    why = damage(folder)
    if why is not None:
        raise ValueError(f"{folder} cannot be loaded: {why}")
    state = read_manifest(folder)
    load_weights(folder, model)
    schedule.load_state_dict({**schedule.state_dict(), **state["schedule"]})
    if state["optimizer"] is None:
        console.print(f"{folder} was saved without the optimizer's state: the optimizer starts anew")
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
    else:
        saved = _join(state["optimizer"], load_file(folder / "optimizer.safetensors"))
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        of_each = {int(index): values for index, values in saved["state"].items()}
        optimizer.load_state_dict({**saved, "state": {at: _parts(of_each[at], parameters[at]) for at in of_each}})
    drawn, plain_random, others = (
        load_file(folder / "random.safetensors"),
        state["random"],
        state.get("random_of_others", []),
    )
    if rank and len(others) + 1 == ranks:
        drawn = {name.removeprefix(f"{rank}/"): each for name, each in drawn.items() if name.startswith(f"{rank}/")}
        plain_random = others[rank - 1]
    set_random_states((drawn, plain_random))
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Loads the trained weights of a checkpoint into the model."""
    saved, parameters = load_file(folder / "weights.safetensors"), trainable(model)
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())
        raise ValueError(f"{folder} belongs to another model: {len(odd)} weights do not match, such as {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(part_of(saved[name], parameter))


def write_evaluation(folder: Path, facts: dict[str, Any], probabilities: np.ndarray) -> None:
    """Writes the float64 (n, C) probabilities of the held-out rows, and facts such as the log-loss."""
    with atomic_write(folder) as draft:
        draft.mkdir()
        save_file({"probabilities": torch.from_numpy(probabilities)}, draft / "probabilities.safetensors")
        write_manifest(draft, facts)


def read_evaluation(folder: Path) -> np.ndarray:
    """The probabilities that `write_evaluation` wrote."""
    return np.asarray(load_file(folder / "probabilities.safetensors")["probabilities"].numpy())


def random_states() -> Random:
    """The random states of torch on the CPU and the GPU, of numpy and of Python."""
    version, python, gauss = random.getstate()
    _, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "cpu": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "python": torch.tensor(python, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"numpy": [int(place), int(has_gauss), float(cached)], "python": [version, gauss]}


def set_random_states(states: Random) -> None:
    """Restores what `random_states` returned."""
    tensors, plain = states
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *plain["numpy"]))
    version, gauss = plain["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))


def _parts(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """What the optimizer keeps of one parameter, of which this rank may have a part."""
    return {key: part_of(each, parameter) if isinstance(each, Tensor) else each for key, each in state.items()}


def _contiguous(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Copies, because safetensors refuses tensors that share memory, as those of 8-bit optimizers do."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """An optimizer's state as plain JSON in which each tensor is replaced by its name; the tensors go to `tensors`."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if isinstance(value, dict):
        return {str(key): _split(each, f"{path}/{key}", tensors) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(each, f"{path}/{index}", tensors) for index, each in enumerate(value)]
    return value


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undoes `_split`."""
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _join(each, tensors) for key, each in value.items()}
    if isinstance(value, list):
        return [_join(each, tensors) for each in value]
    return value


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a schedule's state that JSON can hold; its functions are rebuilt from the recipe."""
    return {key: value for key, value in values.items() if not isinstance(value, list) or not any(map(callable, value))}
