"""Answers of a language model, by transformers' own `generate` with its cache of keys and values.

Prompts of similar length are padded on the left to a batch. The longest come first: if memory suffices for the first
batch, it does for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

from arena import __version__
from arena.data.cells import FieldError
from arena.distributed import compute_in, device_name, is_out_of_memory, let_segments_grow
from arena.inference.causal import find_source, load_causal
from arena.inference.prompts import PROMPT, PromptEncoder, plan_batches
from arena.inference.sampling import Sampling
from arena.model.backbone import base_config, load_tokenizer
from arena.model.base_files import base_digest, positions
from arena.model.card import card_of, with_dtype
from arena.progress import progress
from arena.stopping import Stop, stopping
from arena.storage.files import file_digest, fingerprint
from arena.storage.parts import InvalidPartError, Parts, open_parts

BATCH_TOKENS = 16_384
LOGITS_AT_ONCE = 2**26  # logits of a phrase's tokens, which take 256 MiB in float32
PROBABILITY = 2  # 32-bit words of a phrase's probability, a float64, before the token ids of an answer


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        finish: why it ends: `stop` at the end of the model's turn, or `length` at the most tokens allowed.
        no_answer: the probability of the phrase that says that there is none; None if it was not asked for.
    """

    text: str
    finish: str
    no_answer: float | None = None


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
        self.encoder, self.folder = PromptEncoder(source, self.tokenizer), source.folder
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
        phrase: str | None = None,
    ) -> list[Answer]:
        """Answers encoded prompts, in their order.

        Args:
            tokens: in a batch at most, with padding and the longest answers; a longer prompt is alone in its batch.
            parts: a folder that keeps the batches, from which the same call resumes with the same answers. SIGTERM,
                SIGINT and SIGHUP then stop after the present batch. None keeps nothing.
            phrase: what a model says that has no answer, whose probability each `Answer` gets.

        Raises:
            FloatingPointError: a prompt's logits are not numbers, or infinite.
            ValueError: a batch is too large for the memory, or another process answers the same prompts.
            Stopped: a signal arrived; the batches answered so far are in `parts`.
        """
        batches = plan_batches([len(ids) for ids in prompts], sampling.max_new_tokens, tokens)
        if parts is None:
            done = self._answer(prompts, batches, sampling, phrase, {}, None, None)
        else:
            with self._open_parts(parts, prompts, sampling, tokens, phrase) as saved, stopping() as stop:
                known = _read_parts(saved, batches, sampling.max_new_tokens + PROBABILITY)
                done = self._answer(prompts, batches, sampling, phrase, known, saved, stop)
        by_row = {row: ids for at, rows in enumerate(batches) for row, ids in zip(rows, done[at], strict=True)}
        before = 0 if phrase is None else PROBABILITY
        return [self.read(by_row[row], before) for row in range(len(prompts))]

    def _answer(
        self, prompts: Sequence[np.ndarray], batches: list[list[int]], sampling: Sampling, phrase: str | None,
        done: dict[int, np.ndarray], parts: Parts | None, stop: Stop | None,
    ) -> dict[int, np.ndarray]:  # fmt: skip
        """The token ids of each batch's answers, of which those in `done` are known, after the phrase's probability."""
        todo = [at for at in range(len(batches)) if at not in done]
        with progress("answering", len(prompts), "rows", sum(map(len, done.values()))) as advance:
            for at in todo:
                own = [prompts[row] for row in batches[at]]
                done[at] = self.batch(own, batches[at], sampling)
                if phrase is not None:
                    done[at] = np.hstack([self.probabilities(own, phrase)[:, None].view("<i4"), done[at]])
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
        ids, mask = self._padded(prompts)
        width = ids.shape[1]
        processors, choice = sampling.processors(rows, width, self.device)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=self.encoder.stop,
            pad_token_id=self.encoder.stop[0],
        )  # fmt: skip
        with self._computing(ids):
            whole = self.model.generate(
                ids, attention_mask=mask, generation_config=config, logits_processor=processors, streamer=streamer
            )
        if choice.broken is not None and choice.broken.any():
            row = rows[int(choice.broken.nonzero()[0])]
            raise FloatingPointError(
                f"the logits of answered prompt {row + 1} are not numbers: use model.dtype=float32"
            )
        return np.ascontiguousarray(whole[:, width:].cpu().numpy(), dtype="<i4")

    @torch.inference_mode()
    def probabilities(self, prompts: Sequence[np.ndarray], text: str) -> np.ndarray:
        """float64 (rows,), how probable it is that a text answers each prompt and then the turn ends."""
        answer, model = self.encoder.answer(text), self.model
        at_once = max(1, LOGITS_AT_ONCE // (len(answer) * model.config.get_text_config().vocab_size))
        tokens, found = torch.from_numpy(answer).long().to(self.device)[:, None], []
        for first in range(0, len(prompts), at_once):
            some = [np.concatenate([ids, answer[:-1]]) for ids in prompts[first : first + at_once]]
            ids, mask = self._padded(some)
            places = (mask.cumsum(dim=-1) - 1).clamp(min=0)
            with self._computing(ids):
                logits = model(
                    input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False,
                    logits_to_keep=len(answer),
                ).logits.float()  # fmt: skip
                whole = logits.logsumexp(dim=-1)
                logs = logits.gather(-1, tokens.expand(len(some), -1, 1))[..., 0] - whole
            if not whole.isfinite().all():
                raise FloatingPointError("logits are not numbers: use model.dtype=float32")
            found.append(logs.double().sum(dim=-1).exp().cpu().numpy().astype("<f8"))
        return np.concatenate(found)

    def _padded(self, prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Token ids (rows, tokens), padded on the left, and their mask."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.encoder.stop[0])
        mask = torch.zeros_like(ids)
        for at, prompt in enumerate(prompts):
            ids[at, width - len(prompt) :] = torch.from_numpy(prompt)
            mask[at, width - len(prompt) :] = 1
        return ids.to(self.device), mask.to(self.device)

    @contextmanager
    def _computing(self, ids: Tensor) -> Iterator[None]:
        """Computes in the model's dtype, and reports a lack of memory."""
        try:
            with compute_in(self.device, self.recipe.model.dtype):
                yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            rows, width = ids.shape
            if rows == 1:
                raise ValueError(
                    f"a prompt of {width:,} tokens is too long for the memory: shorten it, or set "
                    "model.quantization=nf4"
                ) from error
            raise ValueError(
                f"{rows} prompts of up to {width:,} tokens are too many for the memory: lower --batch"
            ) from error

    def read(self, row: np.ndarray, before: int = 0) -> Answer:
        """The answer in a row of `batch`, which a phrase's probability may stand `before`."""
        ids, no_answer = row[before:], float(row[:before].view("<f8")[0]) if before else None
        ends = np.flatnonzero(np.isin(ids, self.encoder.stop))
        own = ids[: ends[0]] if len(ends) else ids
        text = self.tokenizer.decode(own.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text, "stop" if len(ends) else "length", no_answer)

    def _open_parts(
        self, folder: Path, prompts: Sequence[np.ndarray], sampling: Sampling, tokens: int, phrase: str | None = None
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
            "phrase": phrase,
            "package": __version__,
        }
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        return open_parts(folder, made_from, f"{device_name(self.device)}, {versions}")


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
