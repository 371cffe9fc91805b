"""What is typed after `arena`: settings may stand on both sides of a flag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any


def settings_first(command: Any, words: Sequence[str]) -> list[str]:
    """The arguments of a command with its `key=value` words first, which argparse takes from one place alone.

    What follows a flag is its value, also with a `=` in it, and stays where it is.

    Args:
        command: the dataclass whose fields are the flags: a bool takes no value, a tuple all up to the next flag.
    """
    kinds = {field.name: type(field.default) for field in fields(command)}
    takes: dict[type, float] = {bool: 0, tuple: float("inf")}
    settings, rest, wanted = [], [], 0.0
    for word in words:
        if word.startswith("--") or (word.startswith("-") and not wanted):
            kind = kinds.get(word.removeprefix("--").removeprefix("no-").replace("-", "_"), bool)
            wanted = 0 if "=" in word else takes.get(kind, 1)
            rest.append(word)
        elif wanted:
            wanted -= 1
            rest.append(word)
        else:
            settings.append(word)
    return settings + rest
