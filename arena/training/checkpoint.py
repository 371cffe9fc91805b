"""Checkpoints: everything a run needs to go on, as safetensors and JSON, each checkpoint whole or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arena.files import write_json, written_whole
from arena.training.optim import trainable

FORMAT = 1
KEPT = 2  # checkpoints that stay, the latest ones; the best weights stay besides


def save_weights(folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Writes the trainable weights and some facts about them into a folder of their own."""
    with written_whole(folder) as draft:
        draft.mkdir()
        save_file(_contiguous(trainable(model)), draft / "weights.safetensors")
        write_json(draft / "facts.json", facts)


def load_weights(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Puts the weights of `save_weights` into the model and gives the facts back."""
    _restore(load_file(folder / "weights.safetensors"), trainable(model))
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return facts


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, state: dict[str, Any]
) -> None:
    """Writes `folder/step-<step>` and removes the checkpoints before the last `KEPT`.

    Args:
        state: what else the run must know to go on; plain JSON values.
    """
    tensors, plain = _split(optimizer.state_dict())
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
    optimizer.load_state_dict(_join(load_file(checkpoint / "optimizer.safetensors"), state["optimizer"]))
    schedule.load_state_dict(state["schedule"])
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
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _split(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by `parameter/key` and the rest as plain JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        plain[str(index)] = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        tensors |= {f"{index}/{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    return tensors, {"state": plain, "groups": [_plain(group) for group in state["param_groups"]]}


def _join(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in plain["state"].items()}
    for name, tensor in tensors.items():
        index, key = name.split("/", 1)
        state[int(index)][key] = tensor
    return {"state": state, "param_groups": plain["groups"]}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values that JSON can hold; functions and the like are rebuilt from the recipe."""
    return json.loads(json.dumps({key: value for key, value in values.items() if _is_plain(value)}))  # type: ignore[no-any-return]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
