"""Checkpoints: everything a run needs to go on, as safetensors and JSON, each checkpoint whole or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arena.files import write_json, written_whole
from arena.training.optim import trainable

FORMAT = 2
TENSOR = "@tensor"  # stands in plain JSON for a tensor that is kept beside it
KEPT = 2  # checkpoints that stay, the latest ones; the best weights stay besides


def save_weights(folder: Path, model: nn.Module, facts: dict[str, Any], judged: np.ndarray) -> None:
    """Writes the trainable weights, facts about them and the probabilities they gave into a folder of their own."""
    with written_whole(folder) as draft:
        draft.mkdir()
        save_file(_contiguous(trainable(model)), draft / "weights.safetensors")
        save_file({"judged": torch.from_numpy(judged)}, draft / "judged.safetensors")
        write_json(draft / "facts.json", facts)


def load_weights(folder: Path, model: nn.Module) -> np.ndarray:
    """Puts the weights of `save_weights` into the model and gives the probabilities back."""
    _restore(load_file(folder / "weights.safetensors"), trainable(model))
    return np.asarray(load_file(folder / "judged.safetensors")["judged"].numpy())


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, state: dict[str, Any]
) -> None:
    """Writes `folder/step-<step>` and removes the checkpoints before the last `KEPT`.

    Args:
        state: what else the run must know to go on; plain JSON values.
    """
    tensors: dict[str, Tensor] = {}
    plain = _split(optimizer.state_dict(), "", tensors)
    with written_whole(folder / f"step-{step:08d}") as draft:
        draft.mkdir()
        save_file(_contiguous(trainable(model)), draft / "weights.safetensors")
        save_file(_contiguous(tensors), draft / "optimizer.safetensors")
        save_file(_random_states(), draft / "random.safetensors")
        facts = {"format": FORMAT, "step": step, "optimizer": plain, "schedule": _plain(schedule.state_dict())}
        write_json(draft / "state.json", {**facts, **state})
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, the latest last."""
    return sorted(path.parent for path in folder.glob("step-*/state.json"))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`, with `step`.

    Raises:
        ValueError: the checkpoint is of another version of this package.
    """
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    if state.get("format") != FORMAT:
        raise ValueError(f"{checkpoint} has format {state.get('format')}, not {FORMAT}: train anew with --fresh")
    return state


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Puts weights, optimizer, schedule and random states back as they were."""
    state = read_state(checkpoint)
    _restore(load_file(checkpoint / "weights.safetensors"), trainable(model))
    saved = _join(state["optimizer"], load_file(checkpoint / "optimizer.safetensors"))
    optimizer.load_state_dict({**saved, "state": {int(index): values for index, values in saved["state"].items()}})
    schedule.load_state_dict({**schedule.state_dict(), **state["schedule"]})
    random = load_file(checkpoint / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available() and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])


def _restore(saved: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())
        raise ValueError(f"the checkpoint is of another model: {len(odd)} weights do not match, such as {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


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
