"""Answers of a language model, by transformers' own `generate` with its cache of keys and values.

Prompts of similar length are padded on the left to a batch. The longest come first: if memory suffices for the first
batch, it does for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

from arena import __version__
from arena.data.cells import FieldError
from arena.distributed import compute_in, device_name, is_out_of_memory, let_segments_grow
from arena.inference.causal import find_source, load_causal
from arena.inference.prompts import PROMPT, PromptEncoder
from arena.inference.sampling import Sampling
from arena.model.backbone import base_config, load_tokenizer
from arena.model.base_files import base_digest, positions
from arena.model.card import card_of, with_dtype
from arena.progress import progress
from arena.stopping import Stop, stopping
from arena.storage.files import file_digest, fingerprint
from arena.storage.parts import InvalidPartError, Parts, open_parts

BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class Answer:
    """An answer, and why it ends: `stop` at the end of the model's turn, or `length` at the most tokens allowed."""

    text: str
    finish: str


class Generator:
    """A language model that answers prompts.

    Args:
        model: a base (a folder, a GGUF file or a hub name), or a run, a fold or an exported folder of instruction
            tuning, by name or path.
        overrides: settings to change, such as `model.quantization=nf4`; `prompt.chat=plain` continues prompts as texts.
        runs: the folder of all runs.
        fold: the fold of a run, if several are finished.
        device: where to run; by default the GPU if there is one.

    Raises:
        ValueError: there is no such model, it is no language model, or its tokenizer has no token that ends an answer.
    """

    def __init__(
        self, model: str | Path, overrides: Sequence[str] = (), *, runs: Path = Path("runs"), fold: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        let_segments_grow()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = "auto" if self.device.type == "cuda" else "float32"
        source = find_source(str(model), runs, fold, overrides, dtype)
        self.recipe, self._trained = with_dtype(source.recipe, card_of(self.device)), source.trained
        settings = self.recipe.model
        self.tokenizer = load_tokenizer(str(self._trained or settings.base), settings.revision)
        self.encoder = PromptEncoder(source, self.tokenizer)
        self._positions = positions(base_config(settings))

    @cached_property
    def model(self) -> PreTrainedModel:
        """The language model, loaded when it is first used."""
        return load_causal(self.recipe.model, self._trained).to(self.device)

    def generate(
        self,
        prompts: Sequence[str | Mapping[str, Any]],
        sampling: Sampling | None = None,
        *,
        tokens: int = BATCH_TOKENS,
    ) -> list[Answer]:
        """Answers texts, or rows with the columns of a file, in their order; see `answers`."""
        sampling = sampling or Sampling()
        ids = []
        for number, prompt in enumerate(prompts, 1):
            try:
                ids.append(self.encode({PROMPT: prompt} if isinstance(prompt, str) else prompt, sampling))
            except FieldError as problem:
                raise ValueError(f"prompt {number}, {problem}") from None
        return self.answers(ids, sampling, tokens=tokens)

    def encode(self, cells: Mapping[str, Any], sampling: Sampling) -> np.ndarray:
        """The int32 token ids of a row's prompt. Raises `FieldError` for one that cannot be used."""
        ids = self.encoder.encode(cells)
        if self._positions is not None and len(ids) + sampling.max_new_tokens > self._positions:
            raise FieldError(
                PROMPT,
                f"has {len(ids):,} tokens, and {sampling.max_new_tokens:,} may follow, but the model has positions for "
                f"{self._positions:,}; shorten it, or allow a shorter answer",
            )
        return ids

    def answers(
        self,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        *,
        tokens: int = BATCH_TOKENS,
        parts: Path | None = None,
    ) -> list[Answer]:
        """Answers encoded prompts, in their order.

        Args:
            tokens: in a batch at most, with padding and the longest answers; a longer prompt is alone in its batch.
            parts: a folder that keeps the batches, from which the same call resumes with the same answers. SIGTERM,
                SIGINT and SIGHUP then stop after the present batch. None keeps nothing.

        Raises:
            FloatingPointError: a row's logits are not numbers.
            ValueError: a batch is too large for the memory, or another process answers the same prompts.
            Stopped: a signal arrived; the batches answered so far are in `parts`.
        """
        batches = plan_batches([len(ids) for ids in prompts], sampling.max_new_tokens, tokens)
        if parts is None:
            done = self._answer(prompts, batches, sampling, {}, None, None)
        else:
            with self._open_parts(parts, prompts, sampling, tokens) as saved, stopping() as stop:
                known = _read_parts(saved, batches, sampling.max_new_tokens)
                done = self._answer(prompts, batches, sampling, known, saved, stop)
        by_row = {row: ids for at, rows in enumerate(batches) for row, ids in zip(rows, done[at], strict=True)}
        return [self.read(by_row[row]) for row in range(len(prompts))]

    def _answer(
        self, prompts: Sequence[np.ndarray], batches: list[list[int]], sampling: Sampling, done: dict[int, np.ndarray],
        parts: Parts | None, stop: Stop | None,
    ) -> dict[int, np.ndarray]:  # fmt: skip
        """The token ids of each batch's answers, of which those in `done` are known."""
        todo = [at for at in range(len(batches)) if at not in done]
        with progress("answering", len(prompts), "rows", sum(map(len, done.values()))) as advance:
            for at in todo:
                done[at] = self.batch([prompts[row] for row in batches[at]], batches[at], sampling)
                if parts is not None:
                    parts.write(at, at + 1, done[at].tobytes())
                advance(len(batches[at]))
                if stop is not None and stop():
                    raise stop.stopped()
        return done

    @torch.inference_mode()
    def batch(
        self,
        prompts: Sequence[np.ndarray],
        rows: Sequence[int],
        sampling: Sampling,
        streamer: TextStreamer | None = None,
    ) -> np.ndarray:
        """The int32 token ids (rows, steps) that follow prompts, with those that ended an answer, and what is after."""
        width, pad = max(map(len, prompts)), self.encoder.stop[0]
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        for at, prompt in enumerate(prompts):
            ids[at, width - len(prompt) :] = torch.from_numpy(prompt)
            mask[at, width - len(prompt) :] = 1
        processors, choice = sampling.processors(rows, width, self.device)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=self.encoder.stop, pad_token_id=pad
        )
        model: Any = self.model
        try:
            with compute_in(self.device, self.recipe.model.dtype):
                whole = model.generate(
                    ids.to(self.device), attention_mask=mask.to(self.device), generation_config=config,
                    logits_processor=processors, streamer=streamer,
                )  # fmt: skip
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"{len(rows)} prompts of up to {width:,} tokens are too many for the memory: lower --batch"
            ) from error
        if choice.broken is not None and choice.broken.any():
            row = rows[int(choice.broken.nonzero()[0])]
            raise FloatingPointError(f"the logits of row {row + 1} are not numbers: use model.dtype=float32")
        return np.ascontiguousarray(whole[:, width:].cpu().numpy(), dtype="<i4")

    def read(self, ids: np.ndarray) -> Answer:
        """The answer in a row of `batch`."""
        ends = np.flatnonzero(np.isin(ids, self.encoder.stop))
        own = ids[: ends[0]] if len(ends) else ids
        text = self.tokenizer.decode(own.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text, "stop" if len(ends) else "length")

    def _open_parts(
        self, folder: Path, prompts: Sequence[np.ndarray], sampling: Sampling, tokens: int
    ) -> AbstractContextManager[Parts]:
        """The parts of these answers, by everything that determines them."""
        settings, trained = self.recipe.model, self._trained
        files = sorted(path for path in trained.rglob("*") if path.is_file()) if trained else []
        made_from = {
            "trained": [[path.name, file_digest(path)] for path in files],
            "base": base_digest(settings.base, settings.revision),
            "settings": settings.model_dump(mode="json", exclude={"base"}),  # the base counts by its content
            "prompts": fingerprint(*(ids.tobytes() for ids in prompts)),
            "sampling": asdict(sampling),
            "stop": self.encoder.stop,
            "tokens": tokens,
            "package": __version__,
        }
        return open_parts(folder, made_from, f"{device_name(self.device)}, torch {torch.__version__}")


def plan_batches(lengths: Sequence[int], new: int, tokens: int) -> list[list[int]]:
    """Which rows are in each batch, the longest first.

    Args:
        lengths: the tokens of each row's prompt.
        new: the tokens that may follow each.
        tokens: in a batch at most, unless it has one row only.
    """
    batches: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if room == 0:
            batches.append([])
            room = max(1, tokens // (lengths[row] + new))
        batches[-1].append(row)
        room -= 1
    return batches


def _read_parts(parts: Parts, batches: list[list[int]], most: int) -> dict[int, np.ndarray]:
    """The token ids of answers that an earlier process has saved, by batch."""
    known: dict[int, np.ndarray] = {}

    def check(first: int, end: int, results: bytes) -> tuple[int, np.ndarray]:
        if end != first + 1 or end > len(batches) or first in known:
            raise InvalidPartError("it belongs to other batches")
        if not results or len(results) % (4 * len(batches[first])):
            raise InvalidPartError("it does not hold a batch's answers")
        return first, np.frombuffer(results, dtype="<i4").reshape(len(batches[first]), -1)

    def largest(first: int, end: int) -> int:
        return 4 * most * sum(map(len, batches[first:end]))

    known.update(parts.read(check, largest))
    return known
