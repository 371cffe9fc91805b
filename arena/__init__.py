"""Judges of pairwise preference, trained and run on packed, padding-free batches."""

import logging
import os

__version__ = "0.1.0"

# Threads that wait must sleep, not spin: where another process holds a core, spinning costs ten times the time. OpenMP
# reads this when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# On CPUs with bf16 products bitsandbytes asks for the package `kernels` when it is imported. Judges never use those:
# they would repack weights in place.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
