"""Files of preferences in other layouts: told by their columns, and read with the right winners."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from arena.config import load_recipe
from arena.data.conversion import BadRowsError
from arena.data.dataset import read_dataset
from arena.tasks import task_of
from tests.helpers import SHARED, needs_shared

USER, MODEL = "user", "assistant"


def read(path: Path, *overrides: str, labels: Any = "required") -> list[dict[str, Any]]:
    task = task_of(load_recipe("demo", overrides))
    return list(read_dataset([path], path.parent / "cache", task, labels=labels).table)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        lines = map(json.dumps, rows)
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(lines), encoding="utf-8")
    return path


def chat(*texts: Any, system: str | None = None) -> list[dict[str, Any]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": (USER, MODEL)[at % 2], "content": text} for at, text in enumerate(texts)]


def parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image": None}]


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(BadRowsError) as found:
        read(path, *overrides)
    return str(found.value)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_conversations_with_roles_and_parts(tmp_path: Path, ending: str) -> None:
    a, b = chat(parts("Hi"), parts("Yes"), parts("And?"), parts("No")), chat(parts("Hi"), parts("Oh"), parts("And?"))
    rows = [
        {"conversation_a": a, "conversation_b": b, "winner": winner}
        for winner in ("model_b", "both_bad", "tie (bothbad)")
    ]
    found = read(write(tmp_path / f"train.{ending}", rows))
    assert [row["id"] for row in found] == ["1", "2", "3"]
    assert [row["label"] for row in found] == [[0, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert found[0]["prompt"] == ["Hi", "And?"]
    assert (found[0]["response_a"], found[0]["response_b"]) == (["Yes", "No"], ["Oh", None])


def test_a_vote_on_the_first_turn_shows_that_turn_alone(tmp_path: Path) -> None:
    a, b = chat("Hi", "Yes", "And?", "No", system="Be brief."), chat("Hi", "Oh", "And?", "So", system="Be brief.")
    rows = [{"conversation_a": a, "conversation_b": b, "turn": turn, "winner": "model_a"} for turn in (1, 2)]
    first, second = read(write(tmp_path / "train.jsonl", rows))
    assert first["prompt"] == ["Be brief.\n\nHi"] and first["response_b"] == ["Oh"]
    assert second["response_b"] == ["Oh", "So"]


def test_chosen_and_rejected_texts_share_their_beginning(tmp_path: Path) -> None:
    begin = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    path = write(tmp_path / "train.jsonl", [{"chosen": f"{begin} Then so.", "rejected": f"{begin} Then not."}])
    [row] = read(path)
    assert row["prompt"] == ["Hi", "Why?"] and row["response_a"][0] == row["response_b"][0] == "Hello"
    better = row["response_a" if row["label"] == [1, 0, 0] else "response_b"]
    assert better[1] == "Then so." and sum(row["label"]) == 1


def test_which_answer_becomes_a_tells_nothing_about_the_winner(tmp_path: Path) -> None:
    """The same pair is shown in the same order whoever won, and A wins about half of the time."""
    one = [{"prompt": "Why?", "chosen": f"good {at}", "rejected": f"bad {at}"} for at in range(400)]
    other = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in one]
    found, swapped = (read(write(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("a", one), ("b", other)))
    for row, back in zip(found, swapped, strict=True):
        assert (row["response_a"], row["response_b"]) == (back["response_a"], back["response_b"])
        assert row["label"] == [back["label"][1], back["label"][0], 0]
        assert ("good" in row["response_a"][0]) == (row["label"] == [1, 0, 0])
    assert 160 < sum(row["label"][0] for row in found) < 240


def test_chosen_and_rejected_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"chosen": chat("Hi", "Yes"), "rejected": chat("Hi", "No")}])
    [row] = read(path)
    assert row["prompt"] == ["Hi"] and row["response_a" if row["label"][0] else "response_b"] == ["Yes"]


def test_plain_texts_in_place_of_lists(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "prompt": "Hi", "response_a": "Yes", "response_b": "No", "winner": "model_a"},
        {"id": "2", "prompt": '["x"]', "response_a": "[1, 2]", "response_b": "", "winner": "model_b"},
    ]
    first, second = read(write(tmp_path / "train.csv", rows))
    assert (first["prompt"], first["response_a"], first["label"]) == (["Hi"], ["Yes"], [1, 0, 0])
    assert (second["prompt"], second["response_a"], second["response_b"]) == (['["x"]'], ["[1, 2]"], [None])


def test_label_studio_counts_what_the_annotator_said(tmp_path: Path) -> None:
    shown = {"prompt": "Hi", "response_a": "Yes", "response_b": "No"}
    before = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    short = [{"annotation_id": 7, "id": 5, **shown, **before, "winner": "b_winner"}]
    result = [{"from_name": "winner", "type": "pairwise", "value": {"selected": "right"}}]
    whole = [{"id": 5, "data": {**shown, **before}, "annotations": [{"id": 7, "result": result}]}]
    for name, rows in (("short.csv", short), ("short.json", short), ("whole.json", whole)):
        [row] = read(write(tmp_path / name, rows))
        assert (row["id"], row["prompt"], row["label"]) == ("5", ["Hi"], [0, 1, 0])


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{"id": "1", "question": "Hi", "left": "Yes", "right": "No", "vote": "left"}]
    names = "data.columns.names={prompt: question, response_a: left, response_b: right, winner: vote}"
    [row] = read(write(tmp_path / "train.csv", rows), names)
    assert (row["prompt"], row["response_a"], row["response_b"], row["label"]) == (["Hi"], ["Yes"], ["No"], [1, 0, 0])
    assert "prompt" in complaint(tmp_path / "train.csv")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"conversation_a": chat("Hi", "x"), "conversation_b": chat("Ho", "x")}, "conversation_b: has other prompts"),
        ({"conversation_a": chat("Hi", "x"), "conversation_b": "x"}, "conversation_b: is .*not JSON"),
        ({"conversation_a": [], "conversation_b": []}, "conversation_a: has a user's turn without text"),
        ({"conversation_a": chat([{"type": "image"}]), "conversation_b": []}, 'a part of the type "image"'),
        ({"conversation_a": chat("Hi", "x"), "conversation_b": chat("Hi", "x"), "turn": 0}, "turn: is 0"),
        ({"chosen": "yes", "rejected": "no"}, "rejected: and chosen have no common beginning"),
        ({"chosen": "x\n\nAssistant: a", "rejected": "x\n\nAssistant: b"}, "chosen: is no conversation"),
        ({"annotations": [], "data": {}}, "annotations: are not one annotation"),
        ({"annotations": [{"result": []}], "data": {}}, "annotations: have no single choice"),
    ],
)
def test_rows_that_do_not_fit_the_layout_are_named(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    message = complaint(write(tmp_path / "train.jsonl", [{"id": "1", "winner": "tie", **row}]))
    with pytest.raises(AssertionError, match=what):
        raise AssertionError(message)


def test_labels_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    texts = {"id": "1", "prompt": '["a"]', "response_a": '["b"]', "response_b": '["c"]', "winner": "tie"}
    good, bad = ({"winner_model_a": a, "winner_model_b": 0, "winner_tie": 1 - a} for a in (0, 1))
    assert read(write(tmp_path / "good.csv", [texts | good]))[0]["label"] == [0, 0, 1]
    assert 'winner: is "tie", but winner_model_a' in complaint(write(tmp_path / "bad.csv", [texts | bad]))


@needs_shared
@pytest.mark.parametrize(
    ("name", "winners"),
    [
        ("arena_140k.parquet", (16, 16, 8)),
        ("chosen_rejected.jsonl", None),
        ("labelstudio.csv", (6, 6, 4)),
        ("mtbench_human.jsonl", (3, 15, 7)),
        ("wsdm_train.parquet", (18, 15, 0)),
        ("wsdm_test.parquet", None),
    ],
)
def test_samples_as_people_have_them(tmp_path: Path, name: str, winners: tuple[int, ...] | None) -> None:
    path = tmp_path / name
    path.symlink_to(SHARED / "data/layouts" / name)
    found = read(path, labels="optional")
    if winners is not None:
        counted = Counter(row["label"].index(1) for row in found)
        assert tuple(counted[at] for at in range(3)) == winners
    if name == "chosen_rejected.jsonl":
        chosen = pd.read_json(path, lines=True)["chosen"]
        for row, text in zip(found, chosen, strict=True):
            assert text.strip().endswith(row["response_a" if row["label"][0] else "response_b"][-1])
    if name == "arena_140k.parquet":
        table = pd.read_parquet(path)
        for row, conversation in zip(found, table["conversation_a"], strict=True):
            spoken = [message["content"][0]["text"] for message in conversation]
            both = [text for turn in zip(row["prompt"], row["response_a"], strict=True) for text in turn]
            assert both == json.loads(json.dumps(spoken))
