"""Makes the demo's base: a tiny Gemma-2 and its tokenizer, trained to extract the features of a judge prompt.

The base is trained on conversations like the demo data's, from other seeds, to predict the notes of `lessons`. This is
next-token prediction, but against the distribution of all possible notes instead of one sample, which takes a fraction
of the time. All layers are trained together. The preference itself is left to fine-tuning, as with a large base, which
can read but does not judge.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface, Gemma2Config, Gemma2ForCausalLM
from tyro.conf import arg

from arena.config import load_recipe
from arena.demo import synthetic
from arena.progress import progress
from arena.storage.files import atomic_write, local_path
from arena.tasks.preference import PromptEncoder
from benchmarks.demo_base.lessons import FACTS, FACTS_SHARE, Lesson, Reader, brief_row
from benchmarks.demo_base.tokenizer import make_tokenizer

TOKENS_A_STEP, POOL = 3000, 256  # tokens of a step; rows from which steps are formed
PEAK_LR, WARMUP = 3e-3, 50  # warm-up in steps
BRIEF, EARLY = 0.35, 3  # share of the time in which brief rows are phased out; layers after which facts must be known
WEIGHTS, TEXT_SHARE = (1.0, 1.0, 2.0, 0.1), 0.1  # of the losses of `batch_losses`; share of the text to predict


def make_demo_base(folder: Path, seconds: float, seed: int, threads: int) -> None:
    """Trains the tokenizer, and the base for `seconds` on `threads` threads, and writes both to `folder` atomically."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = Random(f"demo base {seed}")  # the demo data's seeds are plain numbers, so the streams differ
    tokenizer = make_tokenizer(rng)
    reader = Reader(PromptEncoder(tokenizer, load_recipe("demo").prompt))
    model = make_model(len(tokenizer))
    pretrain(model, reader, rng, seconds)
    with atomic_write(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / "generation_config.json").unlink(missing_ok=True)
        for readme in folder.glob("*.md"):
            shutil.copy(readme, draft)


def make_model(vocabulary: int) -> Gemma2ForCausalLM:
    """A Gemma-2 with about 0.9 M parameters: four layers, every other one with a sliding window."""
    config = Gemma2Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=64, max_position_embeddings=2048,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, tie_word_embeddings=True,
        initializer_range=128**-0.5, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "demo_pretraining"
    return Gemma2ForCausalLM(config)


def _attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
    scaling: float | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Fused causal attention without the softcap, which such small logits do not reach; padding is on the right."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = None
    if sliding_window and sliding_window < length:
        age = torch.arange(length)[:, None] - torch.arange(length)
        mask = (age >= 0) & (age < sliding_window)
    attend = functional.scaled_dot_product_attention
    return attend(query, key, value, mask, is_causal=mask is None, scale=scaling).transpose(1, 2), None


AttentionInterface.register("demo_pretraining", _attend)


def pretrain(model: Gemma2ForCausalLM, reader: Reader, rng: Random, seconds: float) -> None:
    """Trains all layers for `seconds`; the share of brief rows falls to a tenth, and the learning rate to nearly 0."""
    if seconds <= 0:  # random weights, to compare with
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98))
    seen: list[list[float]] = []
    with progress("demo base", None, "steps") as advance:
        for step, (share, batch) in enumerate(_batches(reader, rng, seconds)):
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * min(1.0, (step + 1) / WARMUP, max(1.0 - share, 0.01) / 0.6)
            losses = batch_losses(model, reader, batch)
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen = [*seen[-49:], [loss.item() for loss in losses]]
            note, early, suffix, plain = np.mean(seen, axis=0)
            advance(1, f"excess loss: notes {note:.3f}, early {early:.3f}, verdict {suffix:.3f}, text {plain:.3f}")


def _batches(reader: Reader, rng: Random, seconds: float) -> Iterator[tuple[float, list[Lesson]]]:
    """For `seconds`, the elapsed share of the time and a batch of lessons of similar length, up to `TOKENS_A_STEP`."""
    start, share = time.monotonic(), 0.0
    while share < 1:
        brief = max(0.1, 1 - share / BRIEF)
        rows = [brief_row(rng) if rng.random() < brief else synthetic.make_row(rng) for _ in range(POOL)]
        batches: list[list[Lesson]] = [[]]
        for lesson in sorted(reader.lessons(rows), key=lambda lesson: len(lesson.ids)):
            if batches[-1] and len(lesson.ids) * (len(batches[-1]) + 1) > TOKENS_A_STEP:
                batches.append([])
            batches[-1].append(lesson)
        rng.shuffle(batches)
        for batch in batches:
            share = (time.monotonic() - start) / seconds
            if share < 1:
                yield share, batch


def batch_losses(model: Gemma2ForCausalLM, reader: Reader, batch: Sequence[Lesson]) -> list[torch.Tensor]:
    """The losses of the notes, of their facts at an early layer, of the note at the suffix, and of plain text."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(lesson.ids) for lesson in batch], batch_first=True)
    out = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    last, early = out.last_hidden_state, model.model.norm(out.hidden_states[EARLY])
    rows = torch.tensor([row for row, lesson in enumerate(batch) for _ in lesson.places])
    places = torch.tensor([place for lesson in batch for place in lesson.places])
    notes = torch.from_numpy(np.concatenate([lesson.notes for lesson in batch]))
    facts = notes[:, : len(FACTS)] / FACTS_SHARE
    claims = facts.sum(-1) > 0
    count = max(int(claims.sum()), 1)
    words = torch.tensor(reader.words)
    note = _excess(_logits(model, last[rows, places]), words, notes)
    fact = _excess(_logits(model, early[rows, places][claims]), words[: len(FACTS)], facts[claims])
    plain = (torch.rand(ids.shape) < TEXT_SHARE) & (ids > 0)
    plain[:, -1] = plain[rows, places] = False
    following = ids.roll(-1, 1)[plain]
    spoken = functional.cross_entropy(_logits(model, last[plain]), following)
    losses = note[claims].sum() / count, fact.sum() / count, note[~claims].mean(), spoken
    return [weight * loss for weight, loss in zip(WEIGHTS, losses, strict=True)]


def _logits(model: Gemma2ForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.lm_head(hidden)
    return torch.tanh(logits / 30.0) * 30.0


def _excess(logits: torch.Tensor, words: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy minus its least possible value, per row; `target` is a distribution over `words`."""
    surprise: torch.Tensor = torch.special.xlogy(target, target) - target * logits.log_softmax(-1)[:, words]
    return surprise.sum(-1)


@dataclass
class DemoBase:
    """Make the tiny Gemma-2 that the demo recipe fine-tunes: tokenizer and weights, trained from scratch."""

    out: Annotated[Path, arg(help="The folder to write.")]
    minutes: Annotated[float, arg(help="How long to train; 0 leaves the weights random.")] = 20.0
    seed: int = 0
    threads: Annotated[int, arg(help="Cores to use.")] = 1

    def run(self) -> None:
        make_demo_base(local_path(self.out, "--out"), self.minutes * 60, self.seed, self.threads)
