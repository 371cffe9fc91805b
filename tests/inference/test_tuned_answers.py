"""Answers of a model tuned on instructions: by its run and exported, to prompts laid out as in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from arena.data.cells import FieldError
from arena.data.limits import Limits
from arena.inference.answers import answer_file
from arena.inference.generate import Answer, Generator
from arena.inference.sampling import Sampling
from arena.inference.saved import export_judge
from arena.storage.files import fingerprint
from arena.tasks.instruction import Instruction
from arena.training.run import run_fold
from tests.helpers import make_base
from tests.tasks.test_instruction_run import tiny

NEW = Sampling(12)
QUESTIONS = [f"which is {kind} {number}?" for number in (3, 29) for kind in ("better", "not")]
CHAT = [
    {"role": "system", "content": "be good"}, {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good answer"}, {"role": "user", "content": "which is not 7?"},
]  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"instruction": "which is better?", "context": "hello world", "response": "good answer"},
    {"instruction": "which is <end_of_turn> better?", "response": "bad"},
    {"context": "hello world", "question": "which?", "answers": {"text": ["world"]}},
    {"messages": [*CHAT, {"role": "assistant", "content": "bad answer"}]},
]  # each with an answer
READERS: dict[str, Any] = {
    ".csv": pd.read_csv,
    ".parquet": pd.read_parquet,
    ".jsonl": lambda path: pd.read_json(path, lines=True),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to answer, with its adapter, its base and its export."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "rows").mkdir()
    kinds = [("which is better", "good answer"), ("which is not", "bad answer")]
    rows = [{"instruction": f"{kinds[at % 2][0]} {at // 2}?", "response": kinds[at % 2][1]} for at in range(60)]
    pd.DataFrame(rows).to_csv(folder / "rows/train.csv", index=False)
    recipe = tiny(folder, make_base(folder / "base"), folder / "rows", "train.lr=1e-2")
    run_fold(recipe, 0, folder / "runs")
    export_judge(folder / "runs/tiny/fold0/model", folder / "plain", dtype="float32")
    return folder


def test_a_run_a_fold_and_an_exported_folder_answer_alike(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    expected = [Answer(f"{kind} answer", "stop") for kind in ("good", "bad")] * 2
    for name in ("tiny", "runs/tiny", "runs/tiny/fold0", "runs/tiny/fold0/model", "plain"):
        assert Generator(name, device="cpu").generate(QUESTIONS, NEW) == expected, name
    assert Generator("base", device="cpu").generate(QUESTIONS, NEW) != expected  # the control


@pytest.mark.parametrize("chat", ["auto", "plain"])
def test_a_prompt_is_what_stood_before_the_answer_in_training(run: Path, chat: str) -> None:
    generator = Generator(run / "runs/tiny/fold0", [f"prompt.chat={chat}"], device="cpu")
    encoder = Instruction().encoder(generator.tokenizer, generator.recipe.prompt)
    for row in ROWS:
        read = Instruction().read_texts(row, Limits())
        encoded = encoder.lay_out(encoder.tokenise({name: [each] for name, each in read.items()}), orders=1)
        answered = next(key for key in ("response", "answers", "messages") if key in row)
        asked = {**row, answered: row[answered][:-1]} if answered == "messages" else {**row}
        if answered != "messages":
            del asked[answered]
        assert encoded.targets is not None
        *_, last = np.split(places := encoded.targets.places, np.flatnonzero(np.diff(encoded.targets.places) > 1) + 1)
        assert len(places) and generator.encode(asked, NEW).tolist() == encoded.input_ids[: last[0] + 1].tolist()
        assert generator.encode(row, NEW).tolist() == generator.encode(asked, NEW).tolist()  # an answer is not read
    as_prompt = generator.encode({"prompt": "which is better?"}, NEW)
    assert as_prompt.tolist() == generator.encode({"instruction": "which is better?"}, NEW).tolist()


def test_batches_with_an_adapter_equal_the_merged_model_one_by_one(run: Path) -> None:
    """The token ids, of answers that are not the ones learned as well."""
    generator = Generator(run / "runs/tiny/fold0", device="cpu")
    prompts = [
        generator.encode({"prompt": text}, NEW) for text in (*QUESTIONS, "hello " * 20, "judge", "A B tie", "[[")
    ]
    plain: Any = AutoModelForCausalLM.from_pretrained(run / "plain", attn_implementation="eager", dtype=torch.float32)
    found = generator.batch(prompts, range(len(prompts)), NEW)
    for ids, own in zip(prompts, found, strict=True):
        whole = plain.generate(torch.from_numpy(ids)[None].long(), max_new_tokens=12, do_sample=False)
        new = whole[0, len(ids) :].tolist()
        assert own.tolist()[: len(new)] == new


def test_files_of_each_layout(run: Path, tmp_path: Path) -> None:
    generator = Generator(run / "runs/tiny/fold0", device="cpu")
    pd.DataFrame([{**ROWS[0], "category": "qa"}]).to_csv(tmp_path / "dolly.csv", index=False)
    pd.DataFrame([{**ROWS[2], "id": "a", "title": "T"}]).to_parquet(tmp_path / "squad.parquet")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    for name in ("dolly.csv", "squad.parquet", "chat.jsonl"):
        out = tmp_path / f"new-{name}"
        answer_file(generator, tmp_path / name, out, NEW, 1000)
        readers = {
            ".csv": pd.read_csv,
            ".parquet": pd.read_parquet,
            ".jsonl": lambda path: pd.read_json(path, lines=True),
        }
        before, after = (readers[out.suffix](path) for path in (tmp_path / name, out))
        assert list(after.columns) == [*before.columns, "answer", "finish"] and len(after) == 1
        assert set(after["finish"]) <= {"stop", "length"}
    assert json.loads(out.read_text())["answer"] == "bad answer"


def test_rows_without_a_question(run: Path) -> None:
    generator = Generator(run / "runs/tiny/fold0", device="cpu")
    for row, message in (
        ({"text": "x"}, "instruction: is missing, and so are question and messages"),
        ({"instruction": " ", "context": "x"}, "instruction: is empty or missing"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages: has the role"),
        ({"prompt": None, "instruction": "x"}, "prompt: is null"),
    ):
        with pytest.raises(FieldError, match=message):
            generator.encode(row, NEW)
    with pytest.raises(ValueError, match=r"prompt 2, messages: .*JSON"):
        generator.generate([QUESTIONS[0], {"messages": "[{"}], NEW)


def test_other_weights_do_not_use_saved_parts(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompts of the base and of the run are told apart."""
    keys = []
    monkeypatch.setattr(
        "arena.inference.generate.open_parts", lambda folder, made, machine: keys.append(fingerprint(made))
    )
    for place in (run / "base", run / "plain", run / "runs/tiny/fold0"):
        generator = Generator(place, device="cpu")
        generator._open_parts(tmp_path, [generator.encode({"prompt": "a"}, NEW)], NEW, 100)
    assert len(set(keys)) == 3
