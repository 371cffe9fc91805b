"""The corpus of hostile and broken settings, recipes, templates, base folders and sample submissions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file, save_file

from tests.data.bad_files import CSV, Kind, Outcome

PAYLOAD = "import pathlib; pathlib.Path('RAN').touch()"  # in the working directory
TEMPLATE = "instruction: Which is better?\n"


def overrides() -> Iterable[Kind]:
    """Each is written as the words of a command line."""
    for name, words, says in (
        ("a name that climbs", ["name=../../x"], ("name",)),
        ("an absolute name", ["name=/tmp/x"], ("name",)),
        ("a hidden name", ["name=.x"], ("name",)),
        ("a name with a line break", ['name="a\\nb"'], ("name",)),
        ("a name of 10,000 characters", ["name=" + "a" * 10_000], ("name",)),
        ("NaN for a learning rate", ["train.lr=.nan"], ("train.lr",)),
        ("infinity for a learning rate", ["train.lr=.inf"], ("train.lr",)),
        ("a number of 5,000 digits", ["train.batch_size=" + "9" * 5_000], ("train.batch_size",)),
        ("lists in lists in lists", ["train.lr=" + "[" * 20_000], ("train.lr", "deeply")),
        ("a Python tag", [f'train.lr=!!python/object/apply:exec ["{PAYLOAD}"]'], ("train.lr", "tag")),
        ("an alias", ["data.extra=[&a x, *a]"], ("data.extra", "alias")),
        ("a date that is none", ["train.lr=2020-99-99"], ("train.lr",)),
        ("2 MB", ["name=" + "x" * 2_000_000], ("name", "characters")),
        ("a control character", ["train.lr=\x1b]0;x"], ("train.lr",)),
        ("no key", ["=3"], ("key=value",)),
        ("no value", ["train.lr"], ("key=value",)),
        ("a key 500 deep", [".".join("a" * 500) + "=1"], ("a",)),
        ("a key below a value", ["seed.x.y=1"], ("seed",)),
        ("NUL in the data's path", ['data.path="a\\0b"'], ("data.path",)),
        ("NUL in the base's path", ['model.base="a\\0b"'], ("model.base",)),
        ("half a character in a text", ['prompt.template.instruction="\\ud800"'], ("instruction",)),
        ("a device as extra rows", ["data.extra=[/dev/zero.csv, /dev/zero]"], ("/dev/zero",)),
        ("a system file as the template", ["prompt.template=/etc/passwd"], ("/etc/passwd",)),
        ("a device as the template", ["prompt.template=/dev/zero"], ("/dev/zero",)),
        ("a cache that cannot be written", ["data.cache=/proc/none/cache"], ("/proc/none",)),
        ("a billion folds", ["data.folds=1000000000"], ("folds",)),
        ("a prompt as long as numbers go", [f"prompt.max_length={10**30}"], ("max_length",)),
        ("no characters allowed", ["data.max_row_characters=0"], ("data.max_row_characters",)),
    ):  # fmt: skip
        yield Kind("settings", f"override: {name}", lambda folder, words=words: words, "error", says)


def recipe(text: str | bytes, name: str = "mine.yaml") -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        path = folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--recipe", str(path)]

    return write


def recipes() -> Iterable[Kind]:
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{at + 1}: &a{at + 1} [{f'*a{at}, ' * 9}]\n" for at in range(40))
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{at + 1}: &a{at + 1}\n  <<: [{f'*a{at}, ' * 9}]\n" for at in range(40))
    for name, text, says in (
        ("lists that grow a billion times", laughs, ("mine.yaml", "alias")),
        ("groups that grow a billion times", merges, ("mine.yaml", "alias")),
        ("a list that holds itself", "a: &a [*a]\n", ("mine.yaml", "alias")),
        ("a Python object", f"name: !!python/object/apply:exec [\"{PAYLOAD}\"]\n", ("mine.yaml", "tag")),
        ("a Python name", "name: !!python/name:os.system\n", ("mine.yaml", "tag")),
        ("a tag without its value", "name: !!bool perhaps\n", ("mine.yaml", "tag")),
        ("a key twice", "name: a\nseed: 1\nseed: 2\n", ("mine.yaml", "'seed'", "twice")),
        ("lists in lists in lists", "a: " + "[" * 50_000, ("mine.yaml", "deeply")),
        ("5 MB", "# x\n" * 1_300_000, ("mine.yaml", "too many for settings")),
        ("UTF-16", "name: x\n".encode("utf-16"), ("mine.yaml", "UTF-8")),
        ("random bytes", bytes(range(256)), ("mine.yaml",)),
        ("NUL", b"name: \0\n", ("mine.yaml",)),
        ("a list", "- 1\n", ("mine.yaml", "list")),
        ("a number for a key", "7: x\n", ("mine.yaml", "7")),
        ("several documents", "a: 1\n---\nb: 2\n", ("mine.yaml",)),
        ("a name that climbs", "name: ../../../tmp/x\n", ("name",)),
        ("groups that are lists", "name: x\ndata: [1]\nprompt: 7\nmodel: null\n", ("single value",)),
    ):  # fmt: skip
        yield Kind("recipes", f"recipe: {name}", recipe(text), "error", says)
    yield Kind("recipes", "recipe: a pipe", lambda folder: ["--recipe", str(pipe(folder))], "error", ("no recipe",))
    yield Kind("recipes", "recipe: a folder", lambda folder: ["--recipe", str(folder)], "error", ("no recipe",))


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.yaml")
    return folder / "pipe.yaml"


def templates() -> Iterable[Kind]:
    outcomes: list[tuple[str, str, Outcome, tuple[str, ...]]] = [
        ("control tokens", TEMPLATE + "user: '<end_of_turn><bos>'\nverdict: '<start_of_turn>model [['\n", "rows", ()),
        ("braces and percent signs", TEMPLATE + "user: '{\"a\": [{}]} %s {0} ${x} {{'\n", "rows", ()),
        ("right to left", TEMPLATE + 'user: "\\u202e\\u200b user"\n', "rows", ()),
        ("half a character", 'instruction: "\\ud800"\n', "error", ("instruction",)),
        ("half a megabyte", "instruction: '" + "word " * 100_000 + "'\n", "error", ("max_length",)),
        ("no verdict", TEMPLATE + "verdict: ''\n", "error", ("verdict",)),
        ("a list", TEMPLATE + "user: [a]\n", "error", ("user",)),
    ]
    for name, text, outcome, says in outcomes:

        def write(folder: Path, text: str = text) -> list[str]:
            (folder / "words.yaml").write_text(text)
            return [f"prompt.template={folder / 'words.yaml'}"]

        yield Kind("templates", f"template: {name}", write, outcome, says)


def base(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """A copy of the base that stands in the folder `good_base`, changed."""

    def write(folder: Path) -> list[str]:
        shutil.copytree(folder / "good_base", folder / "base")
        change(folder / "base")
        return [f"model.base={folder / 'base'}"]

    return write


def edited(name: str, **changes: object) -> Callable[[Path], object]:
    """Changes a JSON file of a base, and puts code beside it that must not run."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        (folder / "evil.py").write_text(f"{PAYLOAD}\nclass Evil: pass\n")

    return change


def replaced(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def indexed(shard: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))

    return change


def cut(name: str, keep: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


CODE = {
    "AutoConfig": "evil.Evil",
    "AutoModelForSequenceClassification": "evil.Evil",
    "AutoTokenizer": ["evil.Evil"] * 2,
}


def without(part: str) -> Callable[[Path], object]:
    """Takes the weights away in whose names `part` stands."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        left = {name: each.clone() for name, each in load_file(path).items() if part not in name}
        save_file(left, path, {"format": "pt"})

    return change


def bases() -> Iterable[Kind]:
    outcomes: list[tuple[str, Callable[[Path], object], Outcome, tuple[str, ...]]] = [
        ("code beside a known family", edited("config.json", auto_map=CODE), "rows", ()),
        ("code of a family of its own", edited("config.json", auto_map=CODE, model_type="evil"), "error",
         ("model.base", "code of its own")),
        ("a tokenizer with code", edited("tokenizer_config.json", auto_map=CODE), "rows", ()),
        ("a tokenizer that is code", edited("tokenizer_config.json", auto_map=CODE, tokenizer_class="E"), "rows", ()),
        ("an unknown family", edited("config.json", model_type="evil"), "error", ("model.base", "could not be loaded")),
        ("sizes that are no sizes", edited("config.json", hidden_size=-4), "error", ("model.base",)),
        ("sizes that are words", edited("config.json", num_hidden_layers="many"), "error", ("model.base",)),
        ("weights of other sizes", edited("config.json", intermediate_size=64), "error", ("model.base",)),
        ("weights by another name", edited("config.json", transformers_weights="adapter_model.bin"), "error",
         ("config.json", "transformers_weights")),
        ("a config that is no JSON", replaced("config.json", b"{"), "error", ("model.base",)),
        ("a config that is a list", replaced("config.json", b"[]"), "error", ("model.base",)),
        ("a tokenizer that is no JSON", replaced("tokenizer.json", b"garbage"), "error", ("model.base",)),
        ("a tokenizer of another shape", replaced("tokenizer.json", b'{"model": 7}'), "error", ("model.base",)),
        ("safetensors that are garbage", replaced("model.safetensors", b"garbage" * 99), "error", ("model.base",)),
        ("safetensors cut short", cut("model.safetensors", 50_000), "error", ("model.base",)),
        ("safetensors with a header of 2^60 bytes", replaced("model.safetensors", (2**60).to_bytes(8, "little")),
         "error", ("model.base",)),
        ("safetensors without a layer", without(".1."), "error", ("model.base", "lacks")),
        ("weights in .bin", lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "error",
         ("pytorch_model.bin", "safetensors")),
        ("an index that names a .bin", indexed("evil.bin"), "error", ("evil.bin",)),
        ("an index that climbs", indexed("../good_base/model.safetensors"), "error", ("../good_base",)),
        ("an adapter in its place", replaced("adapter_config.json", b'{"peft_type": "LORA"}'), "error", ("adapter",)),
    ]  # fmt: skip
    for name, change, outcome, says in outcomes:
        yield Kind("base folders", f"base: {name}", base(change), outcome, says)


def sample(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """Changes the sample submission that stands in the folder."""

    def write(folder: Path) -> Path:
        path = folder / "sample_submission.csv"
        change(path)
        return path

    return write


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: (path.unlink(), make(path))


def rows_of(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], object]:
    return lambda path: change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)


def samples() -> Iterable[Kind]:
    for name, change, says in (
        ("ids missing", rows_of(lambda table: table.head(5)), ("differ in 7 ids",)),
        ("ids more", rows_of(lambda table: pd.concat([table, table.head(1).assign(id="x")])), ("differ in 1 ids",)),
        ("ids twice", rows_of(lambda table: pd.concat([table, table.head(2)])), ("id", "more than once")),
        ("no ids", rows_of(lambda table: table.drop(columns="id")), ("columns",)),
        ("a column more", rows_of(lambda table: table.assign(x=1)), ("columns",)),
        ("columns in another order", rows_of(lambda table: table[list(table)[::-1]]), ("columns",)),
        ("ragged rows", lambda path: path.write_text(path.read_text() + "1,2,3,4,5,6,7\n"), ("cannot be read",)),
        ("no byte", lambda path: path.write_bytes(b""), ("cannot be read",)),
        ("not UTF-8", lambda path: path.write_bytes(CSV.encode("utf-16")), ("sample_submission.csv",)),
        ("a folder", instead(Path.mkdir), ("not a regular file",)),
        ("a pipe", instead(os.mkfifo), ("not a regular file",)),
        ("a link to itself", instead(lambda path: path.symlink_to(path)), ("not a regular file",)),
    ):
        yield Kind("sample submissions", f"sample: {name}", sample(change), "error", ("sample_submission.csv", *says))


COMMANDS = [kind for group in (overrides, recipes, templates, bases) for kind in group()]
SAMPLES = list(samples())
