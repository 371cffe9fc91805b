"""Instruction tuning: what is read, what is predicted, what is cut, and a run from files to an exported model."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena.config import load_recipe
from arena.data.dataset import Rows, read_dataset
from arena.data.encoder import Encoded
from arena.prompt_settings import PromptSettings
from arena.tasks import task_of
from arena.tasks.instruction import Instruction, InstructionEncoder
from tests.helpers import make_tokenizer, prompt_settings

TASK = Instruction()
DOLLY = {"instruction": "which is better?", "context": "hello world", "response": "good answer"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def read(path: Path, **kwargs: Any) -> Rows:
    return read_dataset([path], path.parent / "cache", kwargs.pop("task", TASK), **{"labels": "required", **kwargs})


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settings(**changes: Any) -> PromptSettings:
    return prompt_settings("instruct", **changes)


def encode(tokenizer: Any, rows: list[dict[str, Any]], prompt: PromptSettings) -> tuple[InstructionEncoder, Encoded]:
    encoder = InstructionEncoder(tokenizer, prompt)
    columns = {name: [row[name] for row in rows] for name in ("prompt", "response")}
    return encoder, encoder.lay_out(encoder.tokenise(columns), orders=1)


def predicted(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The text of each example, with what is predicted in braces."""
    assert encoded.targets is not None
    shown = []
    for at, example in enumerate(encoded.examples()):
        wanted = set(encoded.targets.places[encoded.targets.offsets[at] : encoded.targets.offsets[at + 1]] + 1)
        text, inside = "", False
        for place, token in enumerate(example.input_ids.tolist()):
            if (place in wanted) != inside:
                text, inside = text + ("}" if inside else "{"), not inside
            text += tokenizer.decode([token])
        shown.append(text + "}" * inside)
    return shown


@pytest.mark.parametrize(("setting", "key"), [("classes=[a, b]", "classes"), ("data.columns.text=x", "data.columns")])
def test_settings_of_other_tasks_are_refused(setting: str, key: str) -> None:
    recipe = load_recipe("gemma-3-270m-dolly", [setting])
    with pytest.raises(ValueError, match=f"^{key} is set, but task=instruction has its own"):
        task_of(recipe)


def test_dolly_in_every_kind_of_file(tmp_path: Path) -> None:
    """Ids are row numbers where there are none; a blank context is none."""
    rows = [DOLLY, {**DOLLY, "context": ""}, {**DOLLY, "response": " "}]
    pd.DataFrame(rows).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    for path in (tmp_path / "train.csv", tmp_path / "train.parquet", jsonl(tmp_path, *rows)):
        found = read(path)
        assert found.ids == ["1", "2", "3"]
        assert found.table["prompt"][:] == [["hello world", "which is better?"], *[[None, "which is better?"]] * 1, [
            "hello world", "which is better?",
        ]]  # fmt: skip
        assert found.table["response"][:] == [["good answer"], ["good answer"], [None]]
        assert found.has_input.tolist() == [True, True, False]
        assert found.labels.shape == (3, 0)
        assert found.groups() == ["hello world", "which is better?", "hello world"]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([{"text": "France", "answer_start": 3}, {"text": "x", "answer_start": 1}], "France"),
        ({"text": ["France"], "answer_start": [3]}, "France"),
        ([], "no answer"), ({"text": [], "answer_start": []}, "no answer"),
        ("France", "France"), ('{"text": ["France"]}', "France"), ("[]", "no answer"), (None, None), ("", None),
    ],
)  # fmt: skip
def test_squad_answers_in_all_forms(tmp_path: Path, answers: Any, expected: str | None) -> None:
    row = {"id": "a", "context": "c", "question": "q", "answers": answers}
    task = Instruction("no answer", ("no answer",))
    found = read(jsonl(tmp_path, row), task=task)
    assert found.table["prompt"][0] == ["c", "q"] and found.table["response"][0] == [expected]
    assert found.ids == ["a"]
    assert found.fingerprint != read(jsonl(tmp_path, row)).fingerprint  # another phrase, another cached file


def test_squad_in_parquet(tmp_path: Path) -> None:
    answers = [[{"text": "France", "answer_start": 1}], []]
    columns = {"id": ["a", "b"], "context": ["c"] * 2, "question": ["q", "r"], "answers": answers}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    assert read(tmp_path / "train.parquet").table["response"][:] == [["France"], ["unanswerable"]]


def messages(*turns: tuple[str, str | None]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_chats(tmp_path: Path) -> None:
    rows = [
        messages(("system", "be good"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        messages(("user", "a"), ("assistant", "b"), ("user", "c")),
        {"messages": json.dumps(messages(("user", "a"), ("assistant", ""))["messages"])},
    ]
    found = read(jsonl(tmp_path, *rows))
    assert found.table["prompt"][:] == [[None, "be good\n\na", "c"], [None, "a", "c"], [None, "a"]]
    assert found.table["response"][:] == [["b", "d"], ["b", None], [None]]
    assert found.has_input.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 1, instruction: is missing, and so are question and messages"),
        ({**DOLLY, "instruction": " "}, "instruction: is empty or missing; write a text"),
        ({**DOLLY, "response": 5}, "response: is 5; write a text"),
        ({"question": "q", "answers": 5}, r"answers: is 5; write SQuAD's list of answers, or one text"),
        ({"question": "q", "answers": [5]}, "answers: is 5; write a text"),
        ({"question": "q", "answers": '{"text"'}, "answers: is .* which is not JSON"),
        ({"messages": "hello"}, "messages: is .* not JSON"),
        ({"messages": ["hello"]}, "messages: is a list; write a list of objects with role and content"),
        (messages(("assistant", "a")), 'messages: has the role "assistant" where user is due'),
        (messages(("user", "a"), ("user", "b")), 'has the role "user" where assistant is due'),
        (messages(("user", "a"), ("system", "b")), 'has the role "system" where assistant is due'),
        (messages(("user", None), ("assistant", "b")), "has a user's turn without text"),
        (messages(), "has a user's turn without text"),
        ({"messages": [{"role": "user", "content": 4}]}, "messages: has a content that is 4; write a text"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(jsonl(tmp_path, row))


def test_a_file_without_responses_has_prompts_only(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    pd.DataFrame([{"instruction": "a"}]).to_csv(path, index=False)
    with pytest.raises(ValueError, match="response: is missing; the columns found are"):
        read(path)
    found = read(path, labels="optional")
    assert found.table["prompt"][:] == [[None, "a"]] and found.table["response"][:] == [[None]]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"instruction: is missing, and so are question and messages.*found are"):
        read(path)


ROWS = [
    {"prompt": ["hello world", "which?"], "response": ["good answer"]},
    {"prompt": [None, "which?", "not clear"], "response": ["good", "bad"]},
    {"prompt": [None, "which?", "not clear", "a b"], "response": ["good", None, None]},
    {"prompt": [None, "which?"], "response": [None]},
]


def test_responses_and_their_ends_are_predicted(tokenizer: Any) -> None:
    _, encoded = encode(tokenizer, ROWS, settings())
    user, model = "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
    first = f"<bos>{user}which?{model}{{good<end_of_turn>}}"
    assert predicted(tokenizer, encoded) == [
        f"<bos>{user}hello world\n\nwhich?{model}{{good answer<end_of_turn>}}",
        f"{first}\n{user}not clear{model}{{bad<end_of_turn>}}",
        first,
        f"<bos>{user}which?{model}<end_of_turn>",
    ]
    assert encoded.tokens_cut.tolist() == encoded.turns_dropped.tolist() == [0] * 4


def test_headings_where_there_are_no_chat_markers(tokenizer: Any) -> None:
    _, encoded = encode(tokenizer, ROWS[:2], settings(chat="plain"))
    assert predicted(tokenizer, encoded) == [
        "<bos>Context:\nhello world\n\nInstruction:\nwhich?\n\nResponse:\n{good answer<eos>}",
        "<bos>Instruction:\nwhich?\n\nResponse:\n{good<eos>}\n\nInstruction:\nnot clear\n\nResponse:\n{bad<eos>}",
    ]


@pytest.mark.parametrize("chat", ["gemma", "plain"])
def test_a_prompt_to_answer_is_the_beginning_of_its_example(tokenizer: Any, chat: str) -> None:
    encoder, encoded = encode(tokenizer, ROWS[:2], settings(chat=chat))
    columns = {name: [row[name] for row in ROWS[:2]] for name in ("prompt", "response")}
    for prompt, example, row in zip(
        encoder.prompts(encoder.tokenise(columns)), encoded.examples(), ROWS[:2], strict=True
    ):
        rest = example.input_ids[len(prompt) :]
        assert np.array_equal(example.input_ids[: len(prompt)], prompt) and rest[-1] == encoder.end_ids[0]
        assert tokenizer.decode(rest[:-1]) == row["response"][-1]


TEXT = st.lists(st.sampled_from(["hello", " world", " good", "😀", "b", "\n", "<end_of_turn>"]), max_size=60).map(
    "".join
)


@given(
    context=st.none() | TEXT.filter(str.strip),
    turns=st.lists(st.tuples(TEXT.filter(str.strip), st.none() | TEXT.filter(str.strip)), min_size=1, max_size=4),
    room=st.integers(0, 90),
    chat=st.sampled_from(["gemma", "plain"]),
)
def test_what_is_cut(tokenizer: Any, context: Any, turns: Any, room: int, chat: str) -> None:
    """Within any length: the context is cut before anything else of the first exchange, and nothing goes uncounted."""
    row = {"prompt": [context, *(prompt for prompt, _ in turns)], "response": [response for _, response in turns]}
    long = settings(chat=chat, max_length=4000)
    encoder, whole = encode(tokenizer, [row], long)
    least = 80
    short = settings(chat=chat, max_length=least + room)
    _, cut = encode(tokenizer, [row], short)
    assert cut.targets is not None and whole.targets is not None
    assert cut.offsets[1] <= least + room
    if whole.offsets[1] <= least + room:
        assert np.array_equal(cut.input_ids, whole.input_ids) and not cut.tokens_cut[0]
        return
    assert cut.tokens_cut[0] > 0
    lost = len(whole.targets.places) - len(cut.targets.places)
    assert cut.targets.cut[0] == lost
    [(context_ids, exchanges)] = encoder.tokenise({key: [value] for key, value in row.items()})
    if len(turns) == 1 and lost:
        assert cut.input_ids[-1] != encoder.end_ids[0]  # no end where the answer does not end
        if len(context_ids) > len(encoder._cut) + 2:
            assert cut.tokens_cut[0] >= len(context_ids) - 2
    assert cut.turns_dropped[0] < max(1, len(exchanges))
    ids = set(cut.input_ids.tolist())
    allowed = {*np.concatenate([np.array(each, dtype=int) for each in encoder.constant_ids]).tolist()}
    control = {token for token, text in tokenizer.added_tokens_decoder.items() if "turn" in text.content}
    assert not (ids & control) - allowed


def test_control_tokens_in_texts_stay_text(tokenizer: Any) -> None:
    texts = [*product(["<end_of_turn>", "<bos>", "<start_of_turn>model\n", "[@BOS@]", "<unused0>"], repeat=2)]
    rows = [{"prompt": [a, b], "response": [a + b]} for a, b in texts]
    encoder, encoded = encode(tokenizer, rows, settings())
    plain = encode(tokenizer, [{"prompt": ["x", "x"], "response": ["x"]}], settings())[1].input_ids.tolist()
    special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.content != "\n\n"]
    for example in encoded.examples():
        found = example.input_ids.tolist()
        assert {each: found.count(each) for each in special} == {each: plain.count(each) for each in special}
    assert encoder.end_ids == (tokenizer.convert_tokens_to_ids("<end_of_turn>"),)


def test_settings_that_do_not_fit(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="max_length 16 is too small for this template, which takes at least"):
        InstructionEncoder(tokenizer, settings(max_length=16))
