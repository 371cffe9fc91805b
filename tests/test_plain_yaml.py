"""YAML as settings need it, and any text at all."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arena.config import load_recipe
from arena.prompt_settings import read_yaml, read_yaml_file
from arena.settings import Recipe

PIECES = [
    "a", "7", ":", "- ", "\n", "  ", "[", "]", "{", "}", ", ", "&a ", "*a", "!!int ", "!!python/name:os.system ",
    "'", '"', "|", ">", "<<: ", "? ", "# ", "---", "...", "%YAML 9", "0x_", "1:99:99", "2020-13-45", ".inf", "\\ud800",
    "\0", "\t", "\ufeff", "é", "\U0001f600", "~", "null", "true", "1e999", "0b_", "=",
]  # fmt: skip


def test_plain_values_are_read() -> None:
    text = "a: 1\nb: [x, 2.5, null, true]\nc: {d: 'e: f'}\ng: |\n  two\n  lines\n"
    assert read_yaml(text, "it") == {"a": 1, "b": ["x", 2.5, None, True], "c": {"d": "e: f"}, "g": "two\nlines\n"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: &x 1\nb: *x\n", "alias"),
        ("a: !!str 1\n", "tag"),
        ("a: !mine 1\n", "tag"),
        ("a: 1\na: 2\n", "'a' appears twice"),
        ("b:\n  a: 1\n  a: 1\n", "'a' appears twice"),
        ("[" * 5_000, "nested too deeply"),
        ("0b_", "it is not YAML"),
        ("2020-13-45", "it is not YAML"),
        ("a" * 2_000_000, "2,000,000 characters"),
    ],
)
def test_more_than_plain_yaml_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_yaml(text, "it")


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(plain(key) and plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, str | int | float | datetime.date)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=14).map("".join)))
@example("0b_")
@example("2020-99-99 99:99:99")
@example("!!bool x")
@example("? [a]\n: b")
def test_any_text_is_plain_values_or_a_value_error(text: str) -> None:
    try:
        value = read_yaml(text, "it")
    except ValueError:
        return
    assert plain(value)
    assert repr(value) == repr(yaml.safe_load(text))  # nothing is read otherwise than the library does


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_file_are_groups_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path: Path = tmp_path_factory.mktemp("yaml") / "it.yaml"
    path.write_bytes(data)
    try:
        assert isinstance(read_yaml_file(path), dict)
    except ValueError as error:
        assert str(path) in str(error)


KEYS = st.sampled_from(
    ["name", "seed", "data", "data.path", "data.extra", "data.folds", "prompt.template", "prompt.template.user",
     "prompt.max_length", "model.fuse", "model.lora.targets", "train.lr", "train", "x.y.z", "", ".", "a..b"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(KEYS, st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES), max_size=8).map("".join)))
def test_any_override_is_a_recipe_or_a_value_error(key: str, text: str) -> None:
    for override in (f"{key}={text}", text):
        try:
            assert isinstance(load_recipe("demo", [override]), Recipe)
        except ValueError as error:
            assert str(error)
