"""Files of preferences in layouts other than the competition's, told by their columns and their first row.

Each layout is a function from a row's cells to those of the competition's layout: `prompt`, `response_a` and
`response_b` with a list of turns each, and the label as `winner`, or as it is in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import blake2b
from itertools import takewhile
from typing import Any

from arena.data.cells import FieldError, excerpt, is_blank, read_json
from arena.data.messages import read_exchanges
from arena.data.rows import Cells

TURNS = ("prompt", "response_a", "response_b")
CONVERSATIONS = ("conversation_a", "conversation_b")  # messages with roles, as the arena and MT-Bench publish them
CHOSEN = ("chosen", "rejected")  # texts or messages, as in Anthropic's HH
ANNOTATIONS = ("annotations", "data")  # Label Studio's JSON
ANNOTATED = "annotation_id"  # Label Studio's CSV and short JSON
WINNER = "winner"  # a column with the label as a word
SPEAKER, ANSWER = re.compile(r"\n\n(Human|Assistant):\s?"), "\n\nAssistant:"

Layout = Callable[[Cells], Cells]
Exchange = tuple[str, str | None]  # a prompt and its answer


def columns_of(names: Collection[str]) -> tuple[str, ...]:
    """The columns of texts in a file with columns of these names."""
    if CONVERSATIONS[0] in names:
        return (*CONVERSATIONS, *(name for name in ("turn",) if name in names))
    if CHOSEN[0] in names:
        return (*CHOSEN, *(name for name in ("prompt",) if name in names))
    if ANNOTATIONS[0] in names:
        return ANNOTATIONS
    return (*TURNS, *(name for name in (ANNOTATED,) if name in names))


def layout_of(first: Mapping[str, Any]) -> Layout | None:
    """The layout of a file with this first row; None if it is the competition's."""
    if CONVERSATIONS[0] in first:
        return _from_conversations
    if CHOSEN[0] in first:
        return _from_chosen
    if ANNOTATIONS[0] in first:
        return _from_annotations
    if ANNOTATED in first:
        return _annotated
    texts = [cell for name in TURNS if isinstance(cell := first.get(name), str) and not is_blank(cell)]
    return _from_plain if texts and not any(text.lstrip().startswith(("[", "{")) for text in texts) else None


def layout_of_record(cells: Mapping[str, Any]) -> Layout | None:
    """The layout of a row in memory. Its texts are plain unless all of them are JSON lists, as they are in files."""
    texts = [cell for name in TURNS if isinstance(cell := cells.get(name), str) and not is_blank(cell)]
    if (own := layout_of(cells)) is not None or (texts and all(map(_is_list, texts))):
        return own
    return _from_plain


def _is_list(text: str) -> bool:
    try:
        return isinstance(read_json(text, "the text"), list)
    except FieldError:
        return False


def _from_plain(cells: Cells) -> Cells:
    """A text in place of a list of turns, as in WSDM's files."""
    for name in TURNS:
        if not isinstance(cell := cells.get(name), str | list | None):
            raise FieldError(name, f"is {excerpt(cell)}, not a text; write a text, or a list with one for each turn")
    return {**cells, **{name: [cells[name] or None] for name in TURNS if isinstance(cells.get(name), str | None)}}


def _annotated(cells: Cells) -> Cells:
    """A row as a person labelled it in Label Studio; the task that was shown may have had a label before."""
    row = {name: cell for name, cell in cells.items() if not name.startswith(f"{WINNER}_")}
    return (layout_of({name: row.get(name) for name in TURNS}) or dict)(row)


def _from_annotations(cells: Cells) -> Cells:
    """A task of Label Studio with the one choice, or the one pairwise decision, of its annotation."""
    data, annotations = cells.get("data"), cells.get("annotations")
    if not isinstance(data, dict) or not isinstance(annotations, list) or len(annotations) != 1:
        raise FieldError(ANNOTATIONS[0], "are not one annotation with data; export one annotation a task, or as CSV")
    try:
        (result,) = annotations[0]["result"]
        value = result["value"]
        choice = value["selected"] if "selected" in value else value["choices"][0]
    except (KeyError, TypeError, ValueError, IndexError):
        raise FieldError(ANNOTATIONS[0], "have no single choice of a winner; label the task or leave it out") from None
    return _annotated({"id": cells.get("id"), **data, WINNER: choice})


def _from_conversations(cells: Cells) -> Cells:
    """Two conversations with the same prompts; `turn` counts the turns that were judged."""
    both = [read_exchanges(cells, name) for name in CONVERSATIONS]
    turn = cells.get("turn")
    if turn is not None:
        if not str(turn).isdecimal() or int(turn) < 1:
            raise FieldError("turn", f"is {excerpt(turn)}; write the number of turns that were judged")
        both = [exchanges[: int(turn)] for exchanges in both]
    return {**cells, **_as_turns(CONVERSATIONS[1], *both)}


def _from_chosen(cells: Cells) -> Cells:
    """A preferred answer and another one. Which of them becomes A is drawn from their texts, so that it tells nothing.

    Texts are those of whole conversations, with the speakers of Anthropic's HH, or of answers beside a `prompt`.
    """
    texts = [cells.get(name) for name in CHOSEN]
    if all(isinstance(text, str) and not text.lstrip().startswith("[{") for text in texts):
        better, worse = _split(cells.get("prompt"), *map(str, texts))
    else:
        better, worse = (read_exchanges(cells, name) for name in CHOSEN)
    a, b = sorted((better, worse), key=str)  # an order that does not depend on which was preferred
    if blake2b(str((a, b)).encode("utf-8", "surrogatepass"), digest_size=1).digest()[0] % 2:
        a, b = b, a
    winner = "tie" if better == worse else "model_a" if a == better else "model_b"
    return {**cells, **_as_turns(CHOSEN[1], a, b), WINNER: winner}


def _split(prompt: Any, better: str, worse: str) -> tuple[list[Exchange], list[Exchange]]:
    """The exchanges of two texts, which begin alike or answer a prompt."""
    if not is_blank(prompt):
        if not isinstance(prompt, str):
            raise FieldError("prompt", f"is {excerpt(prompt)}; write a text")
        first, second = ([(prompt, text.removeprefix(prompt).strip() or None)] for text in (better, worse))
        return first, second
    common = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(better, worse, strict=False)))
    at = better.rfind(ANSWER, 0, common)
    if at < 0:
        raise FieldError(
            CHOSEN[1], f"and {CHOSEN[0]} have no common beginning that ends in {ANSWER.strip()!r}; add a column prompt"
        )
    _, *pieces = SPEAKER.split(better[:at])
    speakers, said = pieces[::2], pieces[1::2]
    if not said or speakers != [("Human", "Assistant")[turn % 2] for turn in range(len(said))] or len(said) % 2 == 0:
        raise FieldError(CHOSEN[0], "is no conversation in which Human and Assistant take turns; leave the row out")
    before: list[Exchange] = list(zip(said[:-1:2], said[1::2], strict=True))
    first, second = ([*before, (said[-1], text[at + len(ANSWER) :].strip() or None)] for text in (better, worse))
    return first, second


def _as_turns(field: str, a: Sequence[Exchange], b: Sequence[Exchange]) -> Cells:
    """The cells of two conversations with the same prompts."""
    (prompts, of_a), (others, of_b) = (zip(*each, strict=True) for each in (a, b))
    if prompts != others:
        raise FieldError(field, "has other prompts than the conversation beside it; leave the row out")
    return dict(zip(TURNS, (list(prompts), list(of_a), list(of_b)), strict=True))
