"""Answers of a model tuned on instructions, to prompts laid out as in training; their scores, and held-out rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from arena.config import change
from arena.data.cells import FieldError
from arena.data.limits import Limits
from arena.data.prepare import prepare_fold
from arena.inference.answers import answer_file
from arena.inference.export import export_judge
from arena.inference.generate import Answer, Generator
from arena.inference.prompt_rows import Wanted, _held_out_ids, read_prompts
from arena.inference.sampling import Sampling
from arena.inference.saved import SavedJudge, as_json
from arena.model.backbone import load_tokenizer
from arena.storage.files import fingerprint, write_json
from arena.tasks import task_of
from arena.tasks.instruction import Instruction
from arena.training.held_out import write_oof
from arena.training.run import run_fold
from tests.helpers import make_base
from tests.inference.test_answers import read
from tests.inference.test_answers import run as generate
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
        ({"prompt": None}, "prompt: is null"),
        ({"prompt": None, "instruction": "x"}, "prompt: is there along with instruction"),
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


SQUAD: list[dict[str, Any]] = [
    {"question": "which is better 3?", "answers": ["x", "The good answer."]},
    {"question": "which is not 29?", "answers": ["answer"]},
    {"question": "which is better 5?", "answers": []},
    {"question": "which is not 7?", "answers": None},
    {"question": "which is better 7?", "answers": ["Unanswerable."]},
]  # the run answers "good answer" to what is better, and else "bad answer"


@pytest.fixture(scope="module")
def tuned(run: Path) -> Generator:
    return Generator(run / "runs/tiny/fold0", device="cpu")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"context": f"text {at // 2}", **row}) + "\n" for at, row in enumerate(rows)))
    return path


def scored(generator: Generator, source: Path, score: str, **more: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and the scores that answering a file writes."""
    out = source.with_name(f"out{source.suffix}")
    answer_file(generator, source, out, NEW, 60, Wanted(score, **more))
    return read(out), json.loads(out.with_name(f"{out.name}.scores.json").read_text())


def test_squad_scores_of_a_file(tuned: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, scores = scored(tuned, write(tmp_path / "in.jsonl", SQUAD), "squad")
    assert [row["answer"] for row in rows] == ["good answer", "bad answer"] * 2 + ["good answer"]
    asked = [{key: row[key] for key in ("context", "question")} for row in rows]
    alone = [float(tuned.probabilities([tuned.encode(row, NEW)], "unanswerable")[0]) for row in asked]
    assert [math.log(row["no_answer"]) for row in rows] == pytest.approx([math.log(each) for each in alone], abs=1e-5)
    assert scores["rows"] == 4 and scores["without_reference"] == 1 and scores["no_answer_phrase"] == "unanswerable"
    shown = {part: {name: (score["value"], score["rows"]) for name, score in scores[part].items()}
             for part in ("all", "with_answer", "without_answer", "always_abstaining")}  # fmt: skip
    assert shown == {
        "all": {"exact_match": (0.25, 4), "f1": (pytest.approx((1 + 2 / 3) / 4), 4)},
        "with_answer": {"exact_match": (0.5, 2), "f1": (pytest.approx((1 + 2 / 3) / 2), 2)},
        "without_answer": {"exact_match": (0, 2), "f1": (0, 2)},
        "always_abstaining": {"exact_match": (0.5, 4), "f1": (0.5, 4)},
    }
    assert scores["best_thresholds"]["f1"]["value"] >= 0.5 and "cross_fitted_threshold" in scores
    shown_text = " ".join(capsys.readouterr().out.split())
    assert "scores of the answers" in shown_text and "1 rows have no reference" in shown_text


def test_the_phrase_is_the_empty_answer(run: Path, tmp_path: Path) -> None:
    tuned = Generator(run / "runs/tiny/fold0", ["prompt.template.unanswerable=GOOD answer."], device="cpu")
    _, scores = scored(tuned, write(tmp_path / "in.jsonl", SQUAD[1:3]), "squad")
    assert scores["without_answer"]["exact_match"]["value"] == 1 and scores["with_answer"]["f1"]["value"] == 2 / 3


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_references_of_each_kind_of_file(ending: str, tuned: Generator, tmp_path: Path) -> None:
    """Of parquet only the columns that are needed are read."""
    rows = [{"context": "", "title": "T", **row, "answers": {"text": row["answers"] or [], "answer_start": [0]}}
            for row in SQUAD[:3]]  # fmt: skip
    source, table = tmp_path / f"in{ending}", pd.DataFrame(rows)
    if ending == ".parquet":
        table.to_parquet(source)
    elif ending == ".jsonl":
        table.to_json(source, orient="records", lines=True)
    else:
        table["answers"] = table["answers"].map(json.dumps)
        (
            table.to_csv(source, index=False)
            if ending == ".csv"
            else source.write_text("\n".join("\t".join(each) for each in [list(table), *table.values.tolist()]) + "\n")
        )
    found = read_prompts(source, tuned, NEW, Wanted("squad"))
    assert found.references == [["x", "The good answer."], ["answer"], []] and found.rows == [0, 1, 2]
    assert read_prompts(source, tuned, NEW, Wanted("rouge", limit=2)).references == found.references[:2]
    out = tmp_path / f"out{ending}"
    answer_file(tuned, source, out, NEW, 60, Wanted("squad"))
    if ending != ".tsv":
        assert 0 < float(read(out)[0]["no_answer"]) < 1


def test_rouge_compares_with_what_the_file_has(tuned: Generator, tmp_path: Path) -> None:
    ask = {"role": "user", "content": "which is better 3?"}
    chat = [{"messages": [ask, {"role": "assistant", "content": "good answers"}]}, {"messages": [ask]}]
    rows, scores = scored(tuned, write(tmp_path / "chat.jsonl", chat), "rouge")
    assert scores["all"]["rouge_l"]["value"] == 1 and scores["without_reference"] == 1 and scores["rows"] == 1
    assert "no_answer" not in rows[0]
    dolly = [
        {"instruction": "which is better 3?", "response": "a good one"},
        {"prompt": "which is not?", "response": ""},
    ]
    _, scores = scored(tuned, write(tmp_path / "dolly.jsonl", dolly), "rouge")
    assert scores["all"]["rouge_l"]["value"] == pytest.approx(2 / 5) and scores["without_reference"] == 1
    _, scores = scored(tuned, write(tmp_path / "squad.jsonl", SQUAD[2:3]), "rouge")
    assert scores["all"]["rouge_l"]["value"] == 0 and scores["rows"] == 1  # compared with "unanswerable"


def test_interrupted_it_resumes_to_the_same_bytes(
    tuned: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "in.jsonl", SQUAD), tmp_path / "out.jsonl"
    files = [out, tmp_path / "out.jsonl.scores.json"]
    scored(tuned, source, "squad")
    whole = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    computed, probabilities = [], Generator.probabilities

    def interrupted(self: Generator, *args: Any) -> np.ndarray:
        computed.append(args)
        if len(computed) == 3:
            raise SystemExit
        return probabilities(self, *args)

    monkeypatch.setattr(Generator, "probabilities", interrupted)
    with pytest.raises(SystemExit):
        scored(tuned, source, "squad")
    assert not any(path.exists() for path in files)
    scored(tuned, source, "squad")
    assert [path.read_bytes() for path in files] == whole and len(computed) == 1 + 5
    answer_file(tuned, source, out, NEW, 60)
    assert not files[1].exists(), "scores of earlier answers do not stay beside new ones"


def test_held_out_rows_are_those_of_the_fold(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run)
    own, out = run / "rows/train.csv", tmp_path / "out.csv"
    every, ids = pd.read_csv(own), pd.read_csv("runs/tiny/fold0/oof.csv")["id"]
    words = ("tiny", own, out, "--held-out", "--score=rouge", "--max-new-tokens=12")
    assert generate(monkeypatch, *words) == 0
    assert 10 < len(ids) < 30
    assert pd.read_csv(out)["instruction"].tolist() == every["instruction"][sorted(ids - 1)].tolist()
    scores = json.loads((tmp_path / "out.csv.scores.json").read_text())
    assert scores["limit"] is None and scores["sampling"]["max_new_tokens"] == 12 and scores["model"].endswith("model")
    assert scores["held_out"] and scores["rows"] == len(ids) and scores["all"]["rouge_l"]["value"] == 1
    assert generate(monkeypatch, *words, "--limit=3") == 0
    assert pd.read_csv(out)["instruction"].tolist() == every["instruction"][sorted(ids - 1)[:3]].tolist()
    every.iloc[:30].to_csv(tmp_path / "other.csv", index=False)
    for name, source, message in (
        ("plain", own, "plain is not in the folder of a fold"),
        ("tiny", tmp_path / "other.csv", "holds out rows of"),
    ):
        assert generate(monkeypatch, name, source, out, "--held-out") == 2
        assert message in capsys.readouterr().out.replace("\n", " ")
    content = own.read_bytes()
    for changed, source, message in (
        (content + b"what?,x\n", own, "is no longer what"),
        (None, tmp_path / "other.csv", "needs the data that"),
    ):
        own.write_bytes(changed) if changed else own.unlink()
        assert generate(monkeypatch, "tiny", source, out, "--held-out") == 2
        own.write_bytes(content)
        assert message in capsys.readouterr().out.replace("\n", " ")


def test_held_out_rows_of_a_file_of_their_own(run: Path, tmp_path: Path) -> None:
    """Rows of both files have the same numbers; `data.extra` belongs to the data too."""
    for name, word in (("train", "good"), ("dev", "bad"), ("more", "hello")):
        rows = [{"instruction": f"{word} {at}?", "response": word} for at in range(6)]
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    recipe = tiny(tmp_path, run / "base", tmp_path, "data.validation=dev", f'data.extra=["{tmp_path}/more.csv"]')
    task, folder = task_of(recipe), tmp_path / "run/fold0/model"
    data = prepare_fold(recipe, task, 0, load_tokenizer(str(run / "base")))
    folder.mkdir(parents=True)
    write_json(folder / "judge.json", as_json(SavedJudge(folder, recipe, data.prior, data.trained_on, "")))
    write_oof(folder.parent / "oof.csv", data, np.ones((6, 2)))
    assert _held_out_ids(folder, tmp_path / "dev.csv", recipe.data) == {*"123456"}
    with pytest.raises(ValueError, match=r"holds out rows of .*dev.csv, not of .*train.csv: name that file"):
        _held_out_ids(folder, tmp_path / "train.csv", recipe.data)
    (tmp_path / "moved").mkdir()
    for name in ("train", "dev", "more"):
        (tmp_path / f"{name}.csv").rename(tmp_path / f"moved/{name}.csv")
    with pytest.raises(ValueError, match=r"name where they are now with data\.path=PLACE"):
        _held_out_ids(folder, tmp_path / "moved/dev.csv", recipe.data)
    moved = change(recipe, [f"data.path={tmp_path}/moved", f'data.extra=["{tmp_path}/moved/more.csv"]']).data
    assert _held_out_ids(folder, tmp_path / "moved/dev.csv", moved) == {*"123456"}
