"""Judges of pairwise preference, trained and run on packed, padding-free batches."""

import os

__version__ = "0.1.0"

# Threads that wait must sleep, not spin: where another process holds a core, spinning costs ten times the time. OpenMP
# reads this when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
