"""Judges of pairwise preference, trained and run on packed, padding-free batches.

    import arena

    for batch in arena.open_fold(arena.load_recipe("demo")):  # one optimizer step
        for micro_batch in batch:  # an arena.PackedBatch
            micro_batch["input_ids"], micro_batch["seq_lens"], micro_batch["label"]

    arena.Judge.from_pretrained("runs/demo").predict_proba(rows)  # what `make train` leaves
    rows.map_batches(arena.JudgeBatches, fn_constructor_args=["runs/demo"], batch_format="pyarrow")  # in Ray Data
    arena.Generator("google/gemma-3-1b-it").generate(["What is 2 + 2?"])  # any language model
    torch.utils.data.DataLoader(examples, batch_size=80, collate_fn=arena.VarlenCollator(tokenizer))

These names are what may be relied on; everything below may move.
"""

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arena.config import load_recipe
    from arena.inference.generate import Generator
    from arena.inference.judge import Judge
    from arena.inference.judge_batches import JudgeBatches
    from arena.inference.sampling import Sampling
    from arena.packing.batch import PackedBatch, VarlenCollator
    from arena.training.batches import open_fold

__version__ = "0.1.0"
__all__ = [
    "Generator",
    "Judge",
    "JudgeBatches",
    "PackedBatch",
    "Sampling",
    "VarlenCollator",
    "load_recipe",
    "open_fold",
]

# A thread that waits for others must soon sleep: where another process occupies a core, threads that spin for long make
# everything ten times slower. But to be woken between any two operations makes a small model half as fast, so it spins
# for about as long as one takes: 2,000 rounds, some 50 µs. OpenMP reads this when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# On CPUs with bf16 products bitsandbytes recommends the package `kernels` when it is imported. Judges never use those
# kernels, because they repack weights in place.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_PLACES = {
    "Generator": "arena.inference.generate",
    "Judge": "arena.inference.judge",
    "JudgeBatches": "arena.inference.judge_batches",
    "PackedBatch": "arena.packing.batch",
    "Sampling": "arena.inference.sampling",
    "VarlenCollator": "arena.packing.batch",
    "load_recipe": "arena.config",
    "open_fold": "arena.training.batches",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: torch and transformers take seconds, and most commands need less."""
    if name not in _PLACES:
        raise AttributeError(f"module 'arena' has no attribute {name!r}: it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
