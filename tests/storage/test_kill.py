"""A process killed while it sends: what it sent by then is never taken for a checkpoint unless it is one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from arena.storage.manifest import damage
from tests.storage.faulty import PLACE, checkpoint, mirror, steps

ROOT = Path(__file__).parents[2]
# sends 1, then 2 in slices with pauses, and says when it begins each file of 2
SENDER = """
import sys, time
from pathlib import Path
import fsspec
from fsspec.implementations.local import LocalFileSystem
from arena.storage.mirror import Mirror

class Slow(LocalFileSystem):
    def put_file(self, source, target, **kwargs):
        data = Path(source).read_bytes()
        with open(target, "wb", buffering=0) as file:
            for at in range(0, len(data), 8):
                file.write(data[at : at + 8])
                if "step-00000002" in target:
                    time.sleep(0.01)

fsspec.register_implementation("file", Slow, clobber=True)
run, url, place = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
mirror = Mirror(url, place, run / ".mirror", report=print)
mirror.push(run / "checkpoints/step-00000001")
while not (Path(url) / place / "checkpoints/step-00000001/manifest.json").is_file() or mirror.busy:
    time.sleep(0.01)
print("ready", flush=True)
mirror.push(run / "checkpoints/step-00000002")
mirror.close(30)
print("sent", flush=True)
time.sleep(30)
"""


def test_killed_at_any_moment_of_an_upload(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (1, 2):
        checkpoint(run, number)
    size = sum(path.stat().st_size for path in (run / "checkpoints/step-00000002").rglob("*") if path.is_file())
    cut_short = 0
    for part in (0.05, 0.4, 0.8, 2.0):
        away = tmp_path / f"away-{part}"
        command = [sys.executable, "-c", SENDER, str(run), str(away), PLACE]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            target, deadline = away / PLACE / "checkpoints/step-00000002", time.monotonic() + 20
            if part > 1:
                assert process.stdout.readline() == "sent\n"
            while part < 1 and arrived(target) < part * size:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            os.kill(process.pid, signal.SIGKILL)
        whole = damage(target) is None
        cut_short += not whole
        receiver = mirror(tmp_path, str(away))
        assert steps(receiver.pull(tmp_path / f"fresh-{part}")) == [2 if whole else 1], part
        if not whole:
            again = mirror(tmp_path, str(away))
            again.push(run / "checkpoints/step-00000002")
            assert again.close(10) == [] and damage(target) is None, "what was cut short is sent again"
    assert whole, "the control: killed after the end"
    assert cut_short >= 2, "the kills came too late to show anything"


def arrived(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
