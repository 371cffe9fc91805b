"""Judges of pairwise preference, trained and run on packed, padding-free batches."""

import logging
import os

__version__ = "0.1.0"

# Waiting threads must sleep instead of spinning: when another process occupies a core, spinning makes everything ten
# times slower. OpenMP reads this when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# On CPUs with bf16 products bitsandbytes recommends the package `kernels` when it is imported. Judges never use those
# kernels, because they repack weights in place.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
