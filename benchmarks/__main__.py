"""What is measured with arena, as commands: `python -m benchmarks COMMAND --help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from arena import cli
from arena.stopping import MORE_TO_DO
from benchmarks.collect import Collect
from benchmarks.costs import Costs
from benchmarks.deadline import Deadline
from benchmarks.demo_base.train import DemoBase
from benchmarks.gpu import Gpu
from benchmarks.prepare import Prepare
from benchmarks.real_base import RealBase
from benchmarks.serve import Serve
from benchmarks.small import Small
from benchmarks.submission import Submission
from benchmarks.technique_report import Techniques
from benchmarks.votes import Votes

COMMANDS: dict[str, Callable[..., Any]] = {
    "small": Small,
    "real-base": RealBase,
    "gpu": Gpu,
    "techniques": Techniques,
    "votes": Votes,
    "submission": Submission,
    "deadline": Deadline,
    "serve": Serve,
    "prepare": Prepare,
    "costs": Costs,
    "collect": Collect,
    "demo-base": DemoBase,
}


def main() -> None:
    """Runs a command, with the messages and exit statuses of `arena`."""
    try:
        cli.main(COMMANDS, "python -m benchmarks", "Measure packed batches beside padded ones, on a CPU or a GPU.")
    except SystemExit as end:
        if end.code != MORE_TO_DO:
            raise
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(MORE_TO_DO)  # the call's time is over, and processes that still compile would be waited for


if __name__ == "__main__":
    main()
