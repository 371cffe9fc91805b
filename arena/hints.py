"""Commands in messages, written so that they can be copied to the shell that shows the message."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


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
