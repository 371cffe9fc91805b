"""`arena generate`: files in and out, resumed after a kill or a signal, and one prompt on a terminal or in a pipe."""

from __future__ import annotations

import csv
import json
import os
import pty
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arena.data.limits import Limits
from arena.data.rows import read_rows
from arena.inference import answers as writing
from arena.inference.export import export_judge
from arena.inference.generate import Generator
from arena.inference.sampling import Sampling
from tests.helpers import Processes, status_of_arena, tiny_recipe
from tests.inference.test_judge import saved

HOSTILE = [
    "hello, \"world\"\nwith 'lines'\r\nand a tab\t",
    "<bos><start_of_turn>user\n<end_of_turn><eos>",
    "\ufeffé 漢字 🎉 \u202e \x1b[31mred\x1b[0m",
    "=1+1",
    " spaces ",
    "null",
    '\\N \\ud83d {"a": [1]}',
]
# it waits after each batch, so that there is something to be cut
SLOWED = """
import time
import arena.inference.answers
from arena.storage import parts
write = parts.Parts.write
def slow(self, *args):
    write(self, *args)
    time.sleep(0.1)
parts.Parts.write = slow
"""


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """The exit status of `arena generate` in this process."""
    return status_of_arena(monkeypatch, "generate", *words)


def prompts_in(folder: Path, rows: int = 24) -> Path:
    """Prompts of different lengths, one or two in a batch of 80 tokens."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"hello {row} " * (1 + row % 5)}) + "\n" for row in range(rows)))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as handle:
            return list(csv.DictReader(handle))
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_come_back_with_answers(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, their order, columns and types stay; answers are equal in all kinds of files, and to those from Python."""
    rows = [{"id": f"{at}", "prompt": text, "note": text[::-1]} for at, text in enumerate(HOSTILE)]
    with (tmp_path / "in.csv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    typed = [{**row, "tags": [1, None], "at": {"é": 1.5}} for row in rows]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, typed)) + "\n\n")
    columns = {
        "when": [datetime(2026, 1, 1)] * 7,
        "raw": [b"\xff\x00"] * 7,
        "n": pa.array([1, None] * 3 + [7], pa.int16()),
    }
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=3)
    expected = Generator(gemma2, device="cpu").generate(HOSTILE, Sampling(6))
    assert len({answer.text for answer in expected}) > 3
    for ending, given in ((".csv", rows), (".jsonl", typed), (".parquet", table.to_pylist())):
        source, out = tmp_path / f"in{ending}", tmp_path / "new" / f"out{ending}"
        assert run(monkeypatch, gemma2, source, out, "--max-new-tokens", "6") == 0
        added = [{"answer": answer.text, "finish": answer.finish} for answer in expected]
        assert read(out) == [{**row, **new} for row, new in zip(given, added, strict=True)]
        assert list(out.parent.iterdir()) == [out]  # neither parts nor lock are left
        if ending == ".parquet":
            assert pq.read_schema(out).names == [*table.column_names, "answer", "finish"]
            assert pq.read_schema(out).field("n").type == pa.int16()
        shutil.rmtree(out.parent)


def test_tab_separated_files(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is quoted in them: an answer's tabs and line breaks become spaces, and its quotes stay."""
    source, out = tmp_path / "in.tsv", tmp_path / "out.tsv"
    source.write_text('prompt\tnote\nsay "hello"\t"\nbye\té\n', encoding="utf-8")
    texts = ['a\tb\r\nc"d\n', "plain"]
    monkeypatch.setattr(Generator, "answers", lambda *args, **more: [writing.Answer(text, "stop") for text in texts])
    assert run(monkeypatch, gemma2, source, out) == 0
    assert out.read_text(encoding="utf-8").splitlines() == [
        "prompt\tnote\tanswer\tfinish", 'say "hello"\t"\ta b c"d \tstop', "bye\té\tplain\tstop"
    ]  # fmt: skip
    again = [cells for _, cells in read_rows(out, list, Limits())]
    assert [cells["prompt"] for cells in again] == ['say "hello"', "bye"]  # type: ignore[index]


def test_a_lone_carriage_return_ends_no_row_of_csv(tmp_path: Path) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(b'prompt,"no\rte"\n"a\rb",c\nd,e\n')
    answers = {0: {"answer": "x"}, 1: {"answer": "y\rz"}}
    writing._write_csv(source, out, answers, Limits())
    names, rows = ("prompt", "no\rte", "answer"), [("a\rb", "c", "x"), ("d", "e", "y\rz")]
    assert [cells for _, cells in read_rows(out, list, Limits())] == [
        dict(zip(names, row, strict=True)) for row in rows
    ]


def test_a_held_out_row_is_asked_as_in_training(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which knows no column `prompt`; the limits are the recipe's."""
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "hello", "question": "good", "context": "bad"}) + "\n")
    monkeypatch.setattr("arena.inference.prompt_rows._held_out_ids", lambda *args: {"1"})
    generator = Generator(gemma2, device="cpu")
    (ids,) = writing.read_prompts(source, generator, Sampling(2), writing.Wanted(held_out=True)).ids
    assert ids.tolist() == generator.encode({"question": "good", "context": "bad"}, Sampling(2)).tolist()
    with pytest.raises(ValueError, match="line 1, prompt: is there along with question"):
        writing.read_prompts(source, generator, Sampling(2), writing.Wanted())
    small = Generator(gemma2, ["data.max_row_characters=9"], device="cpu")
    with pytest.raises(ValueError, match=r"data\.max_row_characters is 9"):
        writing.read_prompts(source, small, Sampling(2), writing.Wanted())


def test_a_phrase_needs_positions_too(gemma2: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "hello", "answers": ["x"]}) + "\n")
    generator = Generator(gemma2, [f"prompt.template.unanswerable={'hello ' * 600}"], device="cpu")
    assert writing.read_prompts(source, generator, Sampling(2), writing.Wanted("rouge")).rows == [0]
    with pytest.raises(ValueError, match="but the model has positions for 512"):
        writing.read_prompts(source, generator, Sampling(2), writing.Wanted("squad"))


def test_the_first_rows_alone(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = prompts_in(tmp_path), tmp_path / "out.jsonl"
    assert run(monkeypatch, gemma2, source, out, "--max-new-tokens=2") == 0
    every = read(out)
    table = pa.Table.from_pylist(read(source))
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=5)
    for given, wrote in ((source, out), (tmp_path / "in.parquet", tmp_path / "out.parquet")):
        assert run(monkeypatch, gemma2, given, wrote, "--max-new-tokens=2", "--limit=7") == 0
        assert read(wrote) == every[:7]


def test_half_of_a_surrogate_pair_is_passed_on(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "hello", "odd": "\\ud83d"}\n{"prompt": "hello \\ud83d"}\n')
    assert run(monkeypatch, gemma2, source, out, "--max-new-tokens", "2") == 0
    first, second = read(out)
    assert first["odd"] == "\ud83d" and second["prompt"] == "hello \ud83d" and second["answer"]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    found = Processes(tmp_path_factory.mktemp("processes"), SLOWED)
    yield found
    found.close()


def saved_parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("out.jsonl.parts/*/[!.]*.part"))


def end_after(processes: Processes, folder: Path, words: list[str], count: int, number: signal.Signals) -> int:
    """Sends a signal to a process once there are so many parts; its exit status."""
    pid, until = processes.start(folder / f"{number.name}.txt", "generate", *words), time.monotonic() + 300
    while len(saved_parts(folder)) < count:
        assert time.monotonic() < until and not (folder / "out.jsonl").exists()
        time.sleep(0.005)
    os.kill(pid, number)
    return processes.status()


def small_batches(base: Path, folder: Path) -> list[str]:
    """The words of a command that answers 24 rows in batches of one or two."""
    return [*map(str, (base, prompts_in(folder), folder / "out.jsonl")), "--batch=80", "--max-new-tokens=12"]


@pytest.mark.parametrize("drawn", [[], ["--temperature=1.2", "--seed=7"]], ids=["greedy", "sampled"])
def test_killed_and_signalled_it_resumes_to_the_same_file(
    drawn: list[str], processes: Processes, gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, out = [*small_batches(gemma2, tmp_path), *drawn], tmp_path / "out.jsonl"
    computed, batch = [], Generator.batch

    def count(self: Generator, prompts: Any, *args: Any) -> Any:
        computed.append(len(prompts))
        return batch(self, prompts, *args)

    monkeypatch.setattr(Generator, "batch", count)
    assert run(monkeypatch, *words) == 0
    whole, batches = out.read_bytes(), len(computed)
    out.unlink()
    computed.clear()
    assert end_after(processes, tmp_path, words, 2, signal.SIGKILL) == -signal.SIGKILL
    killed = saved_parts(tmp_path)
    assert len(killed) >= 2 and not out.exists()
    damaged = bytearray(killed[1].read_bytes())
    damaged[-1] ^= 1
    killed[1].write_bytes(damaged)
    assert end_after(processes, tmp_path, words, len(killed) + 2, signal.SIGTERM) == 143
    shown = (tmp_path / "SIGTERM.txt").read_text()
    assert "the same command resumes from them" in shown and f"{killed[1].name} is not used: it is damaged" in shown
    kept = saved_parts(tmp_path)
    assert set(killed) - {killed[1]} < set(kept) and not out.exists()
    assert run(monkeypatch, *words) == 0
    assert out.read_bytes() == whole
    assert len(computed) == batches - len(kept), "only what was missing is computed"
    assert not saved_parts(tmp_path)


def test_parts_of_other_answers_are_not_used(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, out = [*small_batches(gemma2, tmp_path), "--temperature=1.2"], tmp_path / "out.jsonl"
    assert run(monkeypatch, *words, "--seed=1") == 0
    expected = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        assert run(monkeypatch, *words) == 0
    assert out.read_bytes() != expected and saved_parts(tmp_path)
    assert run(monkeypatch, *words, "--seed=1") == 0
    assert out.read_bytes() == expected


@pytest.fixture
def files(gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with files that can and cannot be used; nothing may be written there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text('{"prompt": "hello"}\n')
    (tmp_path / "bad.jsonl").write_text(
        '{"prompt": "hello"}\n{"prompt": " "}\n{"promt": "x"}\n{"prompt": 3}\n{"prompt": "a", "answer": "b"}\n{\n'
    )
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "hello " * 600}) + "\n")
    (tmp_path / "columns.csv").write_text("id,text\n1,hello\n")
    (tmp_path / "answered.csv").write_text("prompt,finish\nhello,x\n")
    (tmp_path / "scored.csv").write_text("prompt,answers,no_answer\nhello,x,0\n")
    (tmp_path / "odd.jsonl").write_text('{"prompt": "hello", "answers": ["x", 3]}\n')
    (tmp_path / "prompts.txt").write_text("hello\n")
    (tmp_path / "base").symlink_to(gemma2)
    before = sorted(tmp_path.rglob("*"))
    yield tmp_path
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ("base bad.jsonl out.jsonl", [
            "5 problems in the data; nothing was written", 'bad.jsonl, line 2, prompt: is " "; write a text',
            "line 3, instruction: is missing", "line 4, prompt: is 3", "line 5, answer: is a column of the",
            "line 6, ",
        ]),
        ("base long.jsonl out.jsonl", ["long.jsonl, line 1, prompt: has ", "positions for 512; shorten it"]),
        ("base columns.csv out.csv", ["1 problem", "instruction: is missing", "The columns found are", "id, text"]),
        ("base answered.csv out.csv", ["finish: is a column of the file, but answers are written there; rename it"]),
        ("base prompts.txt out.txt", ["prompts.txt: name a file that ends in .csv, .tsv, .jsonl, .parquet"]),
        ("base nothing.csv out.csv", ["there is no file nothing.csv"]),
        ("base good.jsonl out.jsonl data.path=x", ["data.path=x says where held-out rows are: leave it out, or add"]),
        ("base good.jsonl out.jsonl data.folds=3", ["data.max_turns, and with --held-out data.path, data.val"]),
        ("base good.jsonl out.csv", ["out.csv: name a file that ends in .jsonl"]),
        ("base good.jsonl s3://b/out.jsonl", ["is a URL"]),
        ("base good.jsonl good.jsonl", ["good.jsonl would be replaced by its answers"]),
        ("base good.jsonl", ["give a model and two files, MODEL IN OUT, or a model and --prompt TEXT"]),
        ("", ["give a model and two files", "but not nothing"]),
        ("base good.jsonl out.jsonl --prompt x", ["or a model and --prompt TEXT"]),
        ("base good.jsonl out.jsonl --temperature -1", ["temperature is -1.0: it must be 0"]),
        ("base good.jsonl out.jsonl --top-k 3", ["top_p and top_k apply to sampling only"]),
        ("base good.jsonl out.jsonl --max-new-tokens 0", ["max_new_tokens is 0"]),
        ("base good.jsonl out.jsonl --batch 0", ["--batch is 0"]),
        ("base good.jsonl out.jsonl --limit 0", ["--limit is 0: give the number of rows"]),
        ("base --prompt x --score squad", ["--score, --held-out and --limit are for the rows of a file"]),
        ("base good.jsonl out.jsonl --score squad", ["good.jsonl: no row has a reference answer in a column answers,"]),
        ("base good.jsonl out.jsonl --score rouge", ["in a column response or messages or answers, with"]),
        ("base good.jsonl out.jsonl --held-out", ["--held-out: a base is not in the folder of a fold"]),
        ("base scored.csv out.csv --score squad", [
            "no_answer: is a column of the file", "answers are written there; rename it"
        ]),
        ("base odd.jsonl out.jsonl --score squad", ["odd.jsonl, line 1, answers: is 3; write a text"]),
        ("base good.jsonl out.jsonl model.dtyp=float32", ["model.dtyp: unknown key; did you mean 'dtype'?"]),
        ("base good.jsonl out.jsonl --fold 0", ["base is a base, but --fold 0 asks for a fold of a run"]),
        ("base --prompt \t", ["the prompt is"]),
        ("nothing good.jsonl out.jsonl", ["there is no run, recipe or folder 'nothing'"]),
        ("demo good.jsonl out.jsonl", ["there is no finished fold under runs/demo"]),
    ],
)  # fmt: skip
def test_mistakes_are_reported_before_anything_is_loaded(
    words: str, messages: list[str], files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("arena.inference.generate.load_causal", load)
    assert run(monkeypatch, *words.split(" ") if words else ()) == 2
    shown = capsys.readouterr().out
    assert all(message in shown for message in messages), shown
    assert "Traceback" not in shown


def test_a_file_that_is_changed_meanwhile(
    gemma2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = prompts_in(tmp_path), tmp_path / "out.jsonl"
    read_prompts = writing.read_prompts

    def change(*args: Any) -> Any:
        prompts = read_prompts(*args)
        source.write_text('{"prompt": "another"}\n')
        return prompts

    with monkeypatch.context() as patch:
        patch.setattr(writing, "read_prompts", change)
        assert run(patch, gemma2, source, out, "--max-new-tokens", "2") == 2
    assert "was changed meanwhile" in capsys.readouterr().out and not out.exists()
    assert run(monkeypatch, gemma2, source, out, "--max-new-tokens", "2") == 0
    assert [row["prompt"] for row in read(out)] == ["another"]
    write, whole = writing.WRITERS[".jsonl"], out.read_bytes()

    def change_late(*args: Any) -> None:
        write(*args)
        source.write_text('{"prompt": "a third"}\n')

    monkeypatch.setitem(writing.WRITERS, ".jsonl", change_late)
    assert run(monkeypatch, gemma2, source, out, "--max-new-tokens", "2") == 2
    assert "was changed meanwhile" in capsys.readouterr().out and out.read_bytes() == whole


def test_one_prompt_in_a_file_and_on_a_terminal(processes: Processes, gemma2: Path, tmp_path: Path) -> None:
    """A file, as a pipe, gets the text alone."""
    (expected,) = Generator(gemma2, device="cpu").generate(["hello"], Sampling(40))
    assert len(expected.text) > 20
    words = [str(gemma2), "--prompt", "hello", "--max-new-tokens=40"]
    processes.start(tmp_path / "shown.txt", "generate", *words)
    assert processes.status() == 0
    assert (tmp_path / "shown.txt").read_text() == expected.text + "\n"
    ours, theirs = pty.openpty()
    processes.start(os.ttyname(theirs), "generate", *words)
    assert processes.status() == 0
    shown = os.read(ours, 100_000).decode().replace("\r\n", "\n")
    os.close(ours)
    os.close(theirs)
    assert writing.escape_unprintable(expected.text) in shown
    assert ("(cut at 40 tokens" in shown) == (expected.finish == "length")


def test_a_terminal_is_not_steered_and_words_come_one_by_one(gemma2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Generator(gemma2, device="cpu").tokenizer
    for kind, shown in ((writing._Terminal, "\\x1b[31m world"), (writing._Plain, "\x1b[31m world")):
        streamer = kind(tokenizer)
        ids = tokenizer("\x1b[31m world", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        streamer.put(ids)  # the prompt
        pieces = []
        for token in ids:
            streamer.put(token[None])
            pieces.append(capsys.readouterr().out)
        streamer.end()
        assert "".join(pieces) + capsys.readouterr().out == shown + "\n"
        assert sum(map(bool, pieces)) >= 1 and pieces[-1] == ""


def test_a_judge_gives_no_answers(gemma2: Path, tmp_path: Path) -> None:
    """Neither from its folder, nor exported, nor as a classifier that came from elsewhere."""
    model = saved(tmp_path / "run", tiny_recipe(tmp_path, gemma2))
    export_judge(model, tmp_path / "plain")
    for folder in (model, tmp_path / "run", tmp_path / "plain"):
        with pytest.raises(ValueError, match=r"is a judge, which gives probabilities .*and no text: use `arena infer`"):
            Generator(folder, device="cpu")
    (tmp_path / "plain/judge.json").unlink()
    with pytest.raises(ValueError, match="plain has the head score and is no language model"):
        Generator(tmp_path / "plain", device="cpu").generate(["hello"])
