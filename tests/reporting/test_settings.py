"""The list of settings: complete, described, readable at 80 columns."""

from __future__ import annotations

from typing import Any

import pytest

from arena.config import load_recipe
from arena.reporting.settings import print_settings, settings


def leaves(tree: dict[str, Any], above: str = "") -> set[str]:
    return {
        key
        for name, value in tree.items()
        for key in (leaves(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}"})
    }


def test_every_key_of_a_recipe_is_listed_and_described() -> None:
    every = list(settings())
    keys = [each.key for each in every]
    assert len(set(keys)) == len(keys)
    assert set(keys) == leaves(load_recipe("demo").model_dump(mode="json")) | {"prompt.template"}
    assert [each.key for each in every if not each.about] == []


def test_defaults_are_what_an_override_takes() -> None:
    """Every default, written as an override, leaves the demo's recipe valid and holds that default."""
    for each in settings():
        if each.default is None or each.key.startswith("prompt.template."):  # these are set in a template's file
            continue
        recipe = load_recipe(
            "demo", ["model.tune=lora", "packing.budget=4096", f"{each.key}={each.default}"]
        ).model_dump()
        for part in each.key.split("."):
            recipe = recipe[part]
        model: Any = type(load_recipe("demo"))
        for part in each.key.split(".")[:-1]:
            model = model.model_fields[part].annotation
        assert recipe == model.model_fields[each.key.rpartition(".")[2]].get_default(call_default_factory=True), (
            each.key
        )


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("train.lr", "number > 0"), ("train.max_seconds", "number > 0 or null"), ("packing.share", "true or false"),
        ("data.extra", "list of text or a group of path, labels, weight, smoothing, temperature"),
        ("data.synthetic_rows", "list of 2 integers or null"),
        ("train.evaluate_every", "integer or epoch"), ("train.tracking.name", "text or null"),
        ("model.tune", "lora, head, full"), ("model.lora.dropout", "number >= 0 and < 1"),
    ],
)  # fmt: skip
def test_types_are_words(key: str, kind: str) -> None:
    assert {each.key: each.kind for each in settings()}[key] == kind


def test_printed_at_80_columns_and_filtered(capsys: pytest.CaptureFixture[str]) -> None:
    print_settings()
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:-1])) <= 80  # the last one is a command, by its path
    assert r'prompt.template.user: text; default "### User:\n"' in shown
    print_settings(("train.", "Seconds"))
    found = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith((" ", "To "))]
    assert found == ["train.max_seconds: number > 0 or null; default null"]


@pytest.mark.parametrize(
    ("word", "hint"), [("epocs", "did you mean train.epochs"), ("qwertz", "arena settings` lists")]
)
def test_a_word_without_settings_gets_a_hint(word: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        print_settings((word,))
