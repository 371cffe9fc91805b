"""What requests and answers look like. A row has the columns of a judge's task."""

from __future__ import annotations

from typing import Annotated, Any

from datasets import List
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model

from arena.data.cells import excerpt, is_utf8
from arena.data.task import Task

MOST_TURNS = 1000  # that are looked at; fewer are allowed


class Strict(BaseModel):
    """An object without other keys."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Batch(BaseModel):
    """What was judged together with the request."""

    requests: int = Field(description="requests that were judged together")
    rows: int = Field(description="their rows")
    tokens: int = Field(description="tokens that one model computed for them")
    logical_tokens: int = Field(description="the tokens of all their prompts")
    shared_tokens: int = Field(description="tokens that were not computed, because prompts share them")


class Order(BaseModel):
    """A row in one of the orders in which the judge reads it."""

    probabilities: dict[str, float] = Field(description="by class, as of the row as it was given")
    tokens: int
    tokens_cut: int = Field(description="tokens that were omitted because the row is too long")
    turns_dropped: int = Field(description="earlier turns that were omitted")
    prompt: str | None = Field(None, description="what the judge was shown, if prompts are asked for")


class Verdict(BaseModel):
    """What the judge makes of a row."""

    probabilities: dict[str, float] = Field(description="by class; the mean over orders and models")
    orders: list[Order]
    flips: bool = Field(description="whether the most probable class depends on the order")
    is_read: bool = Field(description="false: the row has no text, and the probabilities come from training labels")
    kind: str | None = Field(description="the kind of special rows that the row is of, if any")
    tokens: int = Field(description="of the prompts in all orders")
    tokens_cut: int
    turns_dropped: int


class Failure(BaseModel):
    """Why a row has no verdict, although others of its request have."""

    error: str


class Judged(BaseModel):
    """The verdicts on the rows of a request."""

    judge: str
    rows: list[Verdict | Failure]
    batch: Batch


class Ranked(BaseModel):
    """Answers by how good the judge finds them."""

    judge: str
    order: list[int] = Field(description="the numbers of the answers from 0, the best first")
    strengths: list[float] = Field(
        description="answer i is preferred to j with the odds exp(strengths[i] - strengths[j])"
    )
    wins: list[list[float]] = Field(description="the probability that i is preferred to j, with half of the ties")
    batch: Batch


class Problem(BaseModel):
    """What is wrong with a field."""

    row: int | None = Field(description="from 0; null if it is of no row")
    field: str
    what: str


class Error(BaseModel):
    """What is wrong with a request."""

    message: str
    problems: list[Problem]


class Refusal(BaseModel):
    """The form of all errors."""

    error: Error


def as_turns(value: Any) -> Any:
    """A text as a list of one turn."""
    turns = [value] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"is {excerpt(value)}; write a text, or a list with a text or null for each turn")
    if len(turns) > MOST_TURNS:
        raise ValueError(f"has {len(turns):,} turns; leave out earlier ones")
    for number, turn in enumerate(turns, 1):
        if not (turn is None or isinstance(turn, str)):
            raise ValueError(f"has {excerpt(turn)} as turn {number}; write a text or null")
        if turn is not None:
            as_text(turn)
    return turns


def as_text(value: Any) -> Any:
    """A text as it is."""
    if not isinstance(value, str):
        raise ValueError(f"is {excerpt(value)}; write a text")
    if not is_utf8(value):
        raise ValueError("has half a character (a lone surrogate); write whole characters")
    return value


ONE_TEXT = {"type": "string"}
SCHEMA_OF_TURNS = {
    "anyOf": [ONE_TEXT, {"type": "array", "minItems": 1, "items": {"anyOf": [ONE_TEXT, {"type": "null"}]}}],
    "description": "a text, or a text or null for each turn of a conversation",
}
Turns = Annotated[list[str | None], BeforeValidator(as_turns), WithJsonSchema(SCHEMA_OF_TURNS)]
Text = Annotated[str, BeforeValidator(as_text), WithJsonSchema(ONE_TEXT)]


def reads_turns(task: Task) -> bool:
    """Whether the texts of a task are conversations."""
    return isinstance(task.features[task.texts[0]], List)


def judge_request(task: Task, rows: int) -> type[BaseModel]:
    """A request to judge up to so many rows of a task."""
    kind: Any = Turns if reads_turns(task) else Text
    fields: dict[str, Any] = {f"text_{at}": (kind, Field(alias=name)) for at, name in enumerate(task.texts)}
    row: Any = create_model("Row", __base__=Strict, **fields)
    return create_model(
        "JudgeRequest", __base__=Strict,
        rows=(list[row], Field(min_length=1, max_length=rows)),
        judge=(str | None, Field(None, description="the name of a judge; by default the first one")),
        prompts=(bool, Field(False, description="whether the answer has the prompts that the judge was shown")),
    )  # fmt: skip


def rank_request(answers: int) -> type[BaseModel]:
    """A request to rank up to so many answers."""
    return create_model(
        "RankRequest", __base__=Strict,
        prompt=(Turns, ...), answers=(list[Turns], Field(min_length=2, max_length=answers)),
        judge=(str | None, Field(None, description="the name of a judge; by default the first one")),
    )  # fmt: skip
