"""What is measured with arena, as commands: `python -m benchmarks COMMAND --help`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arena import cli
from benchmarks.collect import Collect
from benchmarks.gpu import Gpu
from benchmarks.small import Small
from benchmarks.technique_report import Techniques

COMMANDS: dict[str, Callable[..., Any]] = {
    "small": Small,
    "gpu": Gpu,
    "techniques": Techniques,
    "collect": Collect,
}


def main() -> None:
    """Runs a command, with the messages and exit statuses of `arena`."""
    cli.main(COMMANDS, "python -m benchmarks", "Measure packed batches beside padded ones, on a CPU or a GPU.")


if __name__ == "__main__":
    main()
