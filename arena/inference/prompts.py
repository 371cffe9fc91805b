"""The token ids of prompts, up to where the model's answer begins, and which prompts are answered together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arena.data.cells import FieldError, excerpt, is_blank, whole_characters
from arena.data.limits import Limits
from arena.data.rows import required
from arena.data.task import TokenTask
from arena.data.text_encoder import TextEncoder, chat_family
from arena.inference.causal import Source
from arena.tasks import task_of

PROMPT = "prompt"  # the column of prompts
CONTEXT = "context"  # of an instruction


class PromptEncoder:
    """The token ids of rows, up to where the answer begins, as in training.

    Rows have the columns of the model's task, without an answer, or a `prompt` in place of an instruction, perhaps with
    a `context`. A base without chat markers continues a `prompt` as a text.

    Attributes:
        limits: how large a row may be.
        stop: the tokens that end an answer.
    """

    def __init__(self, source: Source, tokenizer: Any) -> None:
        settings = source.recipe.prompt
        task = task_of(source.recipe)
        if not isinstance(task, TokenTask):
            raise ValueError(f"task={task.name} predicts {', '.join(task.columns)} and no text: leave this setting out")
        self._task = task
        self._encoder = self._task.encoder(tokenizer, settings)
        self._texts = TextEncoder(tokenizer)
        self.limits = Limits.of(source.recipe.data)
        self._continues = not source.tuned and chat_family(tokenizer, settings.chat) == "plain"
        self.stop = sorted({*self._encoder.end_ids, tokenizer.eos_token_id} - {None})

    def columns(self, names: Sequence[str]) -> list[str]:
        """Those of a file's columns that a prompt is made of. Raises `FieldError` if one is missing or too many."""
        if PROMPT not in names:
            return required(self._task.file_columns(names), names)
        self._check_alone(names)
        return [PROMPT, *([CONTEXT] if CONTEXT in names else [])]

    def encode(self, cells: Mapping[str, Any]) -> np.ndarray:
        """The int32 token ids of a row. Raises `FieldError` for one that cannot be used."""
        try:
            if PROMPT in cells:
                self._check_alone(list(cells))
                return self._encode_prompt(cells)
            row = self._task.read_texts(dict(cells), self.limits)
            (ids,) = self._encoder.prompts(self._encoder.tokenise({name: [row[name]] for name in self._task.texts}))
        except FieldError:
            raise
        except ValueError as error:  # of a text that cannot be tokenised
            raise FieldError(PROMPT, str(error)) from None
        return ids

    def answer(self, text: str) -> np.ndarray:
        """The int32 token ids of an answer with its end marker, as in training."""
        return np.concatenate([self._texts.user_texts([text])[text], self._encoder.end_ids[:1]]).astype(np.int32)

    def _check_alone(self, names: Sequence[str]) -> None:
        """Raises `FieldError` if there are the columns of the task too, beside a `prompt`."""
        try:
            others = [name for name in self._task.file_columns(names) if name != CONTEXT]
        except FieldError:  # they are in none of the task's layouts
            return
        raise FieldError(
            PROMPT, f"is there along with {', '.join(others)}, but a row is one prompt: remove the column that is not "
            "to be answered, or rename it"
        )  # fmt: skip

    def _encode_prompt(self, cells: Mapping[str, Any]) -> np.ndarray:
        text = cells[PROMPT]
        if not isinstance(text, str) or is_blank(text):
            raise FieldError(PROMPT, f"is {excerpt(text)}; write a text, or leave the row out")
        if not self._continues:
            return self.encode({"instruction": text, CONTEXT: cells.get(CONTEXT)})
        if not is_blank(cells.get(CONTEXT)):
            raise FieldError(
                CONTEXT, "is there beside a prompt that is continued as a text, where it has no place: write it into "
                "the prompt, and leave the column out"
            )  # fmt: skip
        text = whole_characters(text)
        opening, _, _ = self._texts.chat("plain")
        return np.concatenate([opening, self._texts.user_texts([text])[text]]).astype(np.int32)


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
