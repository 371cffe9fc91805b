"""`make torture`: shows with real processes that nothing is lost, in about ten minutes, and writes the table.

Exit status 1: a promise was not kept.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: there are two lanes, and forks must find no threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from arena.progress import console, quiet


def main() -> int:
    quiet()  # before the libraries are imported
    from tests.torture import report
    from tests.torture.run import PROMISES, torture

    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the trials; below 1 no file is written")
    parser.add_argument("--only", nargs="*", default=[], choices=PROMISES, help="these alone; then no file is written")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder, and say where it is")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where torture.md and torture.json go")
    options = parser.parse_args()
    begin, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        found = torture(folder, options.fraction, options.only)
    finally:
        if options.keep:
            console.print(f"left in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    report.show(found)
    if options.fraction >= 1 and not options.only:
        report.write(found, _about(time.monotonic() - begin), options.out)
        console.print(f"written: {options.out / 'torture.md'}, {options.out / 'torture.json'}")
    return int(any(each.failures for each in found))


def _about(seconds: float) -> dict[str, Any]:
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "make torture",
        "device": f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
