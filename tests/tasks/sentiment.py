"""A second task, in one file: one text, two classes. Nothing in the package knows it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from datasets import Features, Value

from arena.data.cells import FieldError, Labels, excerpt, is_blank
from arena.data.encoder import Encoded, Encoder
from arena.data.limits import Limits
from arena.data.rows import Cells
from arena.data.task import Task
from arena.data.text_encoder import TextEncoder
from arena.metrics import accuracy, log_loss
from arena.prompt_settings import PromptSettings


@dataclass(frozen=True)
class Sentiment(Task):
    """Whether a sentence is negative or positive."""

    name = "sentiment"
    classes = ("negative", "positive")
    columns = ("p_negative", "p_positive")
    texts = ("sentence",)
    features = Features({"sentence": Value("string")})
    rows = "sentences"
    group_by = "sentence"
    missing = "sentence"
    metrics = MappingProxyType({"log_loss": log_loss, "accuracy": accuracy})

    def label_columns(self, names: Sequence[str], labels: Labels) -> tuple[str, ...]:
        if labels == "required" and "label" not in names:
            raise FieldError("label", "is missing; write 0 or 1")
        return ("label",) if labels != "ignored" and "label" in names else ()

    def read_texts(self, cells: Cells, limits: Limits) -> Cells:
        return {"sentence": None if is_blank(cells["sentence"]) else str(cells["sentence"])}

    def read_label(self, cells: Cells, labels: Labels) -> list[float] | None:
        if not self.label_columns(list(cells), labels):
            return None
        if str(cells["label"]) not in ("0", "1"):
            raise FieldError("label", f"is {excerpt(cells['label'])}; write 0 or 1")
        return [1.0, 0.0] if str(cells["label"]) == "0" else [0.0, 1.0]

    def has_input(self, row: Mapping[str, Any]) -> bool:
        return row["sentence"] is not None

    def encoder(
        self, tokenizer: Any, settings: PromptSettings, memo: MutableMapping[bytes, np.ndarray] | None = None
    ) -> SentenceEncoder:
        return SentenceEncoder(tokenizer, settings, memo)


class SentenceEncoder(Encoder):
    """The instruction, the sentence, as far as there is room, and the verdict suffix."""

    def __init__(
        self, tokenizer: Any, settings: PromptSettings, memo: MutableMapping[bytes, np.ndarray] | None = None
    ) -> None:
        self.texts = TextEncoder(tokenizer, memo)
        start, end, answer = self.texts.chat(settings.chat)
        self.prefix = start + self.texts.plain(settings.template.instruction + "\n\n")
        self.suffix = end + answer + self.texts.plain(settings.template.verdict)
        self.room = settings.max_length - len(self.prefix) - len(self.suffix)
        self.constant_ids = [self.prefix, self.suffix]

    def tokenise(self, rows: Mapping[str, Sequence[Any]]) -> list[np.ndarray]:
        sentences = [sentence or "" for sentence in rows["sentence"]]
        ids = self.texts.user_texts(set(sentences))
        return [ids[sentence] for sentence in sentences]

    def lay_out(self, rows: Sequence[np.ndarray], *, orders: int) -> Encoded:
        assert orders == 1
        prefix, suffix = (np.array(ids, dtype=np.int32) for ids in (self.prefix, self.suffix))
        cut = [max(0, len(ids) - self.room) for ids in rows]
        return Encoded.of([(prefix, ids[: self.room], suffix) for ids in rows], [0] * len(rows), cut)
