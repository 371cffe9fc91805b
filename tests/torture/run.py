"""All promises, in two lanes, one for each core of a small machine."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from arena.progress import console
from tests.torture import disk, flips, kills, others, resume, seeds, signals
from tests.torture.ground import Found, Ground, prepare
from tests.torture.processes import Announce, Child

HOURS = 3600.0  # more than a lane takes

PROMISES: dict[str, Callable[[Ground], Found]] = {
    "resume": resume.same_resume,
    "kills": kills.survives_kills,
    "infers": kills.infers_on,
    "flips": flips.refuses_damage,
    "signals": signals.ends_well,
    "second": signals.ends_at_once,
    "seeds": seeds.same_twice,
    "two": signals.one_at_a_time,
    "disk": disk.survives_disks,
    "hostile": others.hostile_files,
    "mirror": others.mirror,
    "unsafe": others.unsafe_loads,
}
LANES = (
    ("kills", "resume", "flips", "infers"),
    ("signals", "second", "seeds", "two", "disk", "hostile", "mirror", "unsafe"),
)


def torture(folder: Path, fraction: float = 1.0, only: Sequence[str] = ()) -> list[Found]:
    """Tries every promise, or those named, and gives what was found, in the order of the table.

    Args:
        folder: scratch; what is left in it tells how a trial failed.
        fraction: of the trials.
    """
    ground = prepare(folder, fraction)
    lanes = [[name for name in lane if not only or name in only] for lane in LANES]
    found: dict[str, Found] = {}
    running = [
        Child(lambda announce, names=names: _lane(ground, names, announce), folder / f"lane{at}.txt")
        for at, names in enumerate(lanes)
    ]
    for child in running:
        for word in iter(lambda child=child: child.hear(HOURS), None):
            name, _, answer = word.partition(" ")
            found[name] = Found(**json.loads(answer))
            each = found[name]
            console.print(f"{each.promise}: {each.held:,} of {each.tried:,}, {each.seconds:.0f} s")
        assert child.wait() == 0, child.text()
    return [found[name] for name in PROMISES if name in found]


def _lane(ground: Ground, names: Sequence[str], announce: Announce) -> None:
    for name in names:
        begin = time.monotonic()
        try:
            found = PROMISES[name](ground)
        except Exception:  # of the trials themselves: the other promises are tried all the same
            found = Found(name, "", failures=[traceback.format_exc()])
        found.seconds = time.monotonic() - begin
        announce(f"{name} {json.dumps(vars(found))}")
