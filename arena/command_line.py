"""Command lines: the arguments that were typed, and commands in messages that work when they are typed."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any


def command(program: str, *words: str) -> str:
    """A command line of a program that is installed beside this interpreter: `arena`, `pip` or `hf`.

    The program is called by its path if the shell would not find it or would find another one, as in a virtual
    environment that is not active.
    """
    here = Path(sys.executable).with_name(program)
    found = shutil.which(program)
    if here.is_file() and not (found and here.samefile(found)):
        program = str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)
    return shlex.join([program, *words])


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
