"""The order of command-line arguments: settings may come before or after flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any


def settings_first(command: Any, words: Sequence[str]) -> list[str]:
    """Moves the `key=value` words of a command to the front, because argparse accepts them in one place only.

    A word after a flag is the flag's value, even if it contains `=`, and is not moved.

    Args:
        command: the dataclass whose fields are the flags. A bool takes no value, a tuple all words up to the next flag.
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
