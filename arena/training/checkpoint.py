"""Checkpoints: all that a run needs to go on exactly, as safetensors and JSON, each whole or not there.

`step-<n>` holds the run after step n: trained weights, optimizer, schedule, random states, and what `Done` counts.
`judged-<n>` holds what these weights made of the held-out rows. Each is written aside, synced and renamed, with a
manifest of the SHA-256 of every file; one whose files are not what its manifest says is never loaded.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arena.files import written_whole
from arena.manifest import damage, read_manifest, write_manifest
from arena.training.optim import trainable

TENSOR = "@tensor"  # stands in plain JSON for a tensor that is kept beside it

Random = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and what of the states is plain


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    state: dict[str, Any],
) -> None:
    """Writes a checkpoint to `folder`.

    Args:
        state: what else the run must know to go on; plain JSON values.
    """
    tensors: dict[str, Tensor] = {}
    plain = _split(optimizer.state_dict(), "", tensors)
    drawn, plain_random = random_states()
    with written_whole(folder) as draft:
        draft.mkdir()
        save_file(_contiguous(trainable(model)), draft / "weights.safetensors")
        save_file(_contiguous(tensors), draft / "optimizer.safetensors")
        save_file(drawn, draft / "random.safetensors")
        facts = {"optimizer": plain, "schedule": _plain(schedule.state_dict()), "random": plain_random}
        write_manifest(draft, {**state, **facts})


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any
) -> dict[str, Any]:  # fmt: skip
    """Puts weights, optimizer, schedule and random states back as they were, and gives back `state`.

    Raises:
        ValueError: the checkpoint is not whole; nothing was changed then.
    """
    why = damage(folder)
    if why is not None:
        raise ValueError(f"{folder} is not whole: {why}")
    state = read_manifest(folder)
    load_weights(folder, model)
    saved = _join(state["optimizer"], load_file(folder / "optimizer.safetensors"))
    optimizer.load_state_dict({**saved, "state": {int(index): values for index, values in saved["state"].items()}})
    schedule.load_state_dict({**schedule.state_dict(), **state["schedule"]})
    set_random_states((load_file(folder / "random.safetensors"), state["random"]))
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Puts the trained weights of a checkpoint into the model."""
    saved, parameters = load_file(folder / "weights.safetensors"), trainable(model)
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())
        raise ValueError(f"{folder} is of another model: {len(odd)} weights do not match, such as {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def save_judged(folder: Path, facts: dict[str, Any], probabilities: np.ndarray) -> None:
    """Writes what weights made of the held-out rows: float64 (n, 3), and facts such as the log-loss."""
    with written_whole(folder) as draft:
        draft.mkdir()
        save_file({"probabilities": torch.from_numpy(probabilities)}, draft / "judged.safetensors")
        write_manifest(draft, facts)


def load_judged(folder: Path) -> np.ndarray:
    """The probabilities of `save_judged`."""
    return np.asarray(load_file(folder / "judged.safetensors")["probabilities"].numpy())


def random_states() -> Random:
    """Those of torch on the CPU and the GPU, of numpy and of Python."""
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
    """Puts them back."""
    tensors, plain = states
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *plain["numpy"]))
    version, gauss = plain["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))


def _contiguous(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Copies, because safetensors takes no tensors that share memory, as those of 8-bit optimizers do."""
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
    """The state that `_split` took apart."""
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _join(each, tensors) for key, each in value.items()}
    if isinstance(value, list):
        return [_join(each, tensors) for each in value]
    return value


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What of a schedule's state JSON can hold; its functions are rebuilt from the recipe."""
    return {key: value for key, value in values.items() if not isinstance(value, list) or not any(map(callable, value))}
