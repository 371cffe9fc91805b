"""The command line: `arena SUBCOMMAND --help`."""

from __future__ import annotations

import difflib
import os
import sys

import tyro

from arena import __version__
from arena.command_line import settings_first
from arena.commands import COMMANDS, Commands
from arena.progress import console, escape_unprintable, guard_output, quiet
from arena.stopping import Stopped, ending_at_once
from arena.storage.files import require_utf8

ABOUT = "Train and run judges of pairwise preference on packed, padding-free batches."


def _check_command(words: list[str], commands: Commands) -> None:
    """Answers `--version`, and suggests the nearest command if the first word is not a command."""
    first = words[0] if words else "--help"
    if first == "--version":
        print(f"arena {__version__}")
        sys.exit(0)
    if not first.startswith("-") and first not in commands:
        near = difflib.get_close_matches(first, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}"
        console.print(f"arena: there is no command {escape_unprintable(first)!r}: {hint}", style="red")
        sys.exit(2)


@ending_at_once()
def main(commands: Commands = COMMANDS, prog: str = "arena", about: str = ABOUT) -> None:
    """Runs a command. A user's error gives one message and status 2; ARENA_DEBUG=1 shows the traceback."""
    guard_output()
    words = sys.argv[1:]
    _check_command(words, commands)
    if words and words[0] in commands:
        words[1:] = settings_first(commands[words[0]], words[1:])
    command = tyro.extras.subcommand_cli_from_dict(commands, description=about, prog=prog, args=words)
    quiet()
    try:
        require_utf8(*words)
        command.run()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("ARENA_DEBUG"):
            raise
        console.print(f"arena: {escape_unprintable(str(error))}", style="red")
        sys.exit(2)
    except KeyboardInterrupt:  # the second Ctrl-C
        console.print("ended at once")
        sys.exit(130)
    except Stopped as stopped:
        console.print(f"arena: {stopped}", style="yellow")
        sys.exit(stopped.status)


if __name__ == "__main__":
    main()
