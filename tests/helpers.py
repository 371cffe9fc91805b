"""Small real things for tests: tokenizers, models of several families, conversations, commands and their processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from arena import cli
from arena.config import change, load_recipe
from arena.data.dataset import Rows
from arena.data.prepare import FoldData
from arena.model.backbone import load_base
from arena.model.base_files import base_digest
from arena.model.classifier import PackedClassifier
from arena.model.tuning import adapt
from arena.packing.batch import PackedBatch, collate
from arena.packing.tree import prefixes_for
from arena.prompt_settings import PromptSettings
from arena.settings import ModelSettings, Recipe
from arena.tasks import TASKS
from arena.tasks.preference import CLASSES
from arena.training.run_directory import run_identity
from arena.training.trainer import Trainer

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data and tokenizer are not at {SHARED}")

PREFERENCE = TASKS["preference"]()
WINDOW = 8
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
CONFIGS: dict[str, type[PretrainedConfig]] = {
    "gemma2": Gemma2Config,
    "gemma": GemmaConfig,
    "gemma3_text": Gemma3TextConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}

# Imports once, then forks a real `arena` for each line of its input.
SERVER = """
import json, os, sys
from arena import cli
{slowed}
print("ready", flush=True)
for line in sys.stdin:
    if line == "wait\\n":  # till then its id is not given to another process
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    shown, *words = json.loads(line)
    pid = os.fork()
    if pid == 0:
        opened = os.open(shown, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        sys.argv = ["arena", *words]
        cli.main()
        sys.exit()
    print(pid, flush=True)
"""


def make_tokenizer(folder: Path) -> Any:
    """A byte-fallback BPE tokenizer in Gemma's manner, with special, non-special and markup added tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*CONTROL, *every_byte], show_progress=False)
    words = (
        "the judge user assistant answer better tie hello world which is not very clear good bad verdict [[ ]]: ### \n"
    )
    tokenizer.train_from_iterator(
        [words * 3, "User Assistant A B abcdefghijklmnopqrstuvwxyz 0123456789 .,!?<>_"], trainer
    )
    # the byte tokens are ordinary vocabulary, not added tokens
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in CONTROL]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )  # fmt: skip
    fast.add_tokens(["<unused0>", "[@BOS@]", "<table>", "\n\n"])
    fast.save_pretrained(folder)
    return fast


def make_base(folder: Path, family: str = "gemma2", seed: int = 0, **changes: Any) -> Path:
    """A tiny random causal language model of a family, with a tokenizer beside it."""
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    if family == "gemma2":
        settings |= {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0}
    if family == "gemma3_text":
        settings |= {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "sliding_window_pattern": 2}
    if family == "mistral":
        settings |= {"sliding_window": WINDOW}
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**settings | changes))
    with torch.no_grad():  # weights large enough for the soft cap and the window to matter
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(6)
    model.save_pretrained(folder)
    return folder


def exact(base: Path, **changes: Any) -> ModelSettings:
    """Settings for parity tests: float32, unquantised."""
    return ModelSettings(
        **{"base": str(base), "dtype": "float32", "quantization": "none", "checkpointing": "none", **changes}
    )


def recipe_on(base: Path, name: str) -> Recipe:
    """A shipped recipe on a base of `make_base`, of whose 3 layers the last one at least gets adapters."""
    recipe = load_recipe(name, [f"model.base={base}"])
    return change(recipe, [f"model.lora.first_layer={min(recipe.model.lora.first_layer, 2)}"])


def classifier(settings: ModelSettings, seed: int = 0) -> PackedClassifier:
    """An adapted model whose adapters and head are not zero."""
    torch.manual_seed(seed)
    model = adapt(load_base(settings, CLASSES), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "score" in name else 0.05))
    return PackedClassifier(model)


def known_head(model: Any) -> PackedClassifier:
    """A loaded base with head weights that do not depend on the state of the random generator."""
    with torch.no_grad():
        model.score.weight.copy_(torch.linspace(0, 1, model.score.weight.numel()).view_as(model.score.weight))
    return PackedClassifier(model)


def pack(lengths: list[int], vocabulary: int = 300, seed: int = 0) -> PackedBatch:
    """A batch of random examples of the given lengths."""
    rng = np.random.default_rng(seed)
    labels = rng.dirichlet([1, 1, 1], len(lengths))
    items = [
        {"input_ids": rng.integers(10, vocabulary, n), "label": label, "index": at}
        for at, (n, label) in enumerate(zip(lengths, labels, strict=True))
    ]
    return collate(items)  # type: ignore[arg-type]


def random_family(seed: int, longest: int = 24) -> list[np.ndarray]:
    """Examples of at most 3 x `longest` tokens that branch off one another at random places.

    Some are equal, some end within others.
    """
    rng = np.random.default_rng(seed)
    examples = [rng.integers(10, 300, rng.integers(1, longest))]
    for _ in range(int(rng.integers(0, 16))):
        start = examples[rng.integers(0, len(examples))]
        kept = start[: rng.integers(0, len(start) + 1)]
        grown = np.concatenate([kept, rng.integers(10, 300, rng.integers(0, longest))])
        examples.append((grown if len(grown) else start)[: 3 * longest])
    return [each.astype(np.int32) for each in examples]


def examples_of(batch: PackedBatch) -> list[torch.Tensor]:
    """The token ids of each example, read back along its segments."""
    found = []
    for segment in batch.segment.tolist():
        first, last = batch.cu_seqlens_k[segment : segment + 2].tolist()
        keys = torch.arange(first, last) if batch.kv_index is None else batch.kv_index[first:last]
        found.append(batch.input_ids[0, keys])
    return found


def prompt_settings(template: str = "compact", **changes: Any) -> PromptSettings:
    return PromptSettings.model_validate({"template": template, "max_length": 256, **changes})


def rows_of(table: Dataset, fingerprint: str = "x") -> Rows:
    """Rows that are in memory only."""
    return Rows(PREFERENCE, table, fingerprint)


def write_rows(folder: Path, n: int = 60, n_test: int = 12, seed: int = 0) -> Path:
    """Competition files whose label is told by a word, in a folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)

    def rows(count: int, first: int) -> pd.DataFrame:
        kinds = rng.integers(0, 3, count)
        texts = [("good answer", "bad"), ("bad", "good answer"), ("hello", "hello")]
        return pd.DataFrame(
            {
                "id": [str(first + at) for at in range(count)],
                "prompt": [json.dumps([f"which is better {at}?"]) for at in range(count)],
                "response_a": [json.dumps([texts[kind][0] * int(rng.integers(1, 8))]) for kind in kinds],
                "response_b": [json.dumps([texts[kind][1] * int(rng.integers(1, 8))]) for kind in kinds],
                "winner_model_a": (kinds == 0).astype(int),
                "winner_model_b": (kinds == 1).astype(int),
                "winner_tie": (kinds == 2).astype(int),
            }
        )

    rows(n, 0).to_csv(folder / "train.csv", index=False)
    test = rows(n_test, 10_000).drop(columns=["winner_model_a", "winner_model_b", "winner_tie"])
    test.to_csv(folder / "test.csv", index=False)
    sample = test[["id"]].assign(winner_model_a=1 / 3, winner_model_b=1 / 3, winner_tie=1 / 3)
    sample.to_csv(folder / "sample_submission.csv", index=False)
    return folder


def trainer_for(
    recipe: Recipe, data: FoldData, model: Any, folder: Path, accelerator: Accelerator | None = None
) -> Trainer:
    """A trainer as `run_fold` makes it."""
    identity = run_identity(recipe, data.fingerprint, base_digest(recipe.model.base))
    prefixes = prefixes_for(data.store, recipe.packing, Path(recipe.data.cache))
    return Trainer(recipe, data, model, folder, accelerator or Accelerator(), prefixes=prefixes, identity=identity)


def tiny_recipe(folder: Path, base: Path, *overrides: str) -> Recipe:
    """The demo recipe on a tiny base and the rows of `write_rows`, with everything under `folder`."""
    return load_recipe(
        "demo",
        [
            f"model.base={base}", f"data.path={write_rows(folder / 'rows')}", f"data.cache={folder / 'cache'}",
            "data.synthetic_rows=null", "prompt.max_length=128", "packing.budget=512", "train.batch_size=8",
            "data.folds=3", "train.evaluate_every=3", "train.checkpoint_every=2", *overrides,
        ],
    )  # fmt: skip


def tiny(base: Path) -> list[str]:
    """Settings of a command that trains the demo's recipe on a tiny base and the rows of `write_rows`."""
    return [
        f"model.base={base}", "prompt.max_length=128", "packing.budget=512", "train.batch_size=8", "data.folds=3",
    ]  # fmt: skip


def arena(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    """`arena` in this process."""
    monkeypatch.setattr(sys, "argv", ["arena", *map(str, words)])
    cli.main()


def status_of_arena(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """The exit status of `arena` in this process."""
    try:
        arena(monkeypatch, *words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@contextmanager
def done_within(seconds: int) -> Iterator[None]:
    """Fails if the block takes longer."""

    def late(*_: object) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Processes:
    """Real processes of `arena` in a folder.

    Args:
        slowed: code that makes the work slow enough for a signal to come amid it.
    """

    def __init__(self, folder: Path, slowed: str) -> None:
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER.replace("{slowed}", slowed)], cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def _ask(self, line: str) -> int:
        assert self.server.stdin is not None
        self.server.stdin.write(line + "\n")
        self.server.stdin.flush()
        return int(self._line())

    def start(self, shown: str | Path, *words: str | Path) -> int:
        """Starts one that prints to a file or a terminal; its process id."""
        return self._ask(json.dumps([str(shown), *map(str, words)]))

    def status(self) -> int:
        """The exit status of the process started last, once it has ended; minus the signal that killed it."""
        return self._ask("wait")

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(60)
