"""What a process holds at most while a base is loaded or created: never its weights in float32, nor all of them twice.

Each way is watched in a process of its own, in which loading has been tried before, so that libraries do not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers import Gemma2Config

from arena.tasks.preference import CLASSES
from benchmarks.random_base import create_base
from tests.helpers import exact

ROOT = Path(__file__).parents[2]
MIB = 2**20
QUANTISING = 18  # bytes for each weight of a matrix while a CPU quantises it: bitsandbytes goes through float32

CHILD = """
import gc, json, sys
import torch
from transformers import AutoConfig
from arena.model.backbone import load_base
from arena.tasks.preference import CLASSES
from benchmarks.random_base import create_base
from tests.helpers import exact
from tests.memory import Watch, held

def make(way, base):
    how, dtype, quantization = way.split()
    settings = exact(base, dtype=dtype, quantization=quantization)
    if how == "load":
        return load_base(settings, CLASSES)
    return create_base(AutoConfig.from_pretrained(base), settings, CLASSES, "cpu", 0)

torch.set_num_threads(2)
tiny, base, found = sys.argv[1], sys.argv[2], {}
for way in sys.argv[3:]:
    make(way, tiny)
    gc.collect()
    with Watch() as watch:
        model = make(way, base)
    found[way] = [watch.peak, sum(held(model).values())]
    del model
    gc.collect()
print(json.dumps(found))
"""


def config(layers: int) -> Gemma2Config:
    """Of 66 MB in bfloat16, and 31 MB for each layer."""
    return Gemma2Config(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=256, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip


def stored(folder: Path, layers: int) -> int:
    """Writes a base in bfloat16, in files of at most 200 MB as the hub has them; gives the bytes of its weights."""
    model = create_base(config(layers), exact(folder, dtype="bfloat16"), CLASSES, "cpu", 0)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(parameter.numel() * 2 for parameter in model.parameters())


def watched(tiny: Path, base: Path, *ways: str) -> dict[str, tuple[int, int]]:
    """For each way the peak, in bytes, and the bytes of the finished model."""
    # a large array that is freed goes back to the system at once: what is measured first does not hide the next
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    command = [sys.executable, "-c", CHILD, str(tiny), str(base), *ways]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    found: dict[str, tuple[int, int]] = json.loads(done.stdout.splitlines()[-1])
    for way, (peak, whole) in found.items():
        print(f"{way}: at most {peak / MIB:.0f} MiB, the model {whole / MIB:.0f} MiB")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layers", [6, 30])
def test_a_base_is_held_once_and_in_four_bits(gemma2: Path, tmp_path: Path, layers: int) -> None:
    """The finished model and what one matrix takes; the controls, weights in bfloat16 and in float32, take more.

    Weights that a loader leaves as they are in the file stay mapped, and are not even counted.
    """
    whole = stored(tmp_path, layers)
    largest = 4096 * 1024
    ours, controls = ["load bfloat16 nf4"], ["create bfloat16 none", "load float32 none"]
    if Version(transformers.__version__) >= Version("5.8"):  # before, its loader draws all weights, then quantises them
        ours.append("create bfloat16 nf4")
    found = watched(gemma2, tmp_path, *ours, *controls)
    for way in ours:
        peak, finished = found[way]
        limit = 1.02 * finished + QUANTISING * largest
        assert peak <= limit and limit < 0.95 * whole
    for way, times in zip(controls, (1, 2), strict=True):
        peak, finished = found[way]
        assert peak > limit and 0.98 * times * whole <= peak <= 1.02 * finished + QUANTISING * largest
