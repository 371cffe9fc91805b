"""Judge prompts: layout, control tokens, truncation, tokenizers of several families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from arena.data.encoder import Example
from arena.data.text_encoder import CHAT_MARKERS, chat_family, control_ids
from arena.tasks.preference import PromptEncoder
from tests.helpers import SHARED, make_tokenizer, needs_shared, prompt_settings

ROW = {"prompt": [["which is better?"]], "response_a": [["good"]], "response_b": [["bad"]]}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def gemma(request: pytest.FixtureRequest) -> Any:
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers/gemma-2")


def row(*turns: tuple[str | None, str | None, str | None]) -> dict[str, list[Any]]:
    prompt, a, b = (list(column) for column in zip(*turns, strict=True))
    return {"prompt": [prompt], "response_a": [a], "response_b": [b]}


def one(encoder: PromptEncoder, rows: dict[str, list[Any]]) -> Example:
    (example,) = encoder.encode(rows, orders=1)
    return example


def control_in(example: Example, encoder: PromptEncoder) -> list[int]:
    """The control tokens of an example, apart from those of the layout itself."""
    body = example.input_ids[len(encoder.prefix) : len(example.input_ids) - len(encoder.suffix)]
    return [int(token) for token in body if int(token) in control_ids(encoder.tokenizer)]


def test_layout(small: Any) -> None:
    example = one(PromptEncoder(small, prompt_settings()), row(("which?", "good", None), ("and?", "", "bad")))
    assert small.decode(example.input_ids) == (
        "<bos><start_of_turn>user\nJudge which assistant answers the user better: A, B, or a tie.\n\n"
        "### User:\nwhich?\n\n### Assistant A:\ngood\n\n### Assistant B:\n[no text]\n\n"
        "### User:\nand?\n\n### Assistant A:\n\n\n### Assistant B:\nbad\n\n"
        "Which answer is better?\n<end_of_turn>\n<start_of_turn>model\nverdict is: [["
    )
    assert (example.turns_dropped, example.tokens_cut) == (0, 0)
    assert example.input_ids.dtype == np.int32


def test_a_character_that_a_tokenizer_does_not_know(tmp_path: Path) -> None:
    """Without byte fallback it becomes the unknown token, as anywhere; written out, that token is plain text."""
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.model.byte_fallback = False
    encoder = PromptEncoder(tokenizer, prompt_settings())
    strange, spelt = (one(encoder, row(("which?", text, "b"))) for text in ("\u2603", "<unk>"))
    assert control_in(strange, encoder) == [tokenizer.unk_token_id]
    assert control_in(spelt, encoder) == []


def test_both_orders_exchange_the_answers(small: Any) -> None:
    encoder = PromptEncoder(small, prompt_settings())
    straight, swapped = encoder.encode(row(("which?", "good", "bad")), orders=2)
    assert np.array_equal(swapped.input_ids, one(encoder, row(("which?", "bad", "good"))).input_ids)
    assert np.array_equal(straight.input_ids, one(encoder, row(("which?", "good", "bad"))).input_ids)


def test_every_control_string_in_any_field_stays_text(small: Any) -> None:
    encoder = PromptEncoder(small, prompt_settings())
    controls = control_ids(small)
    assert {"<bos>", "<end_of_turn>", "<unused0>", "[@BOS@]"} <= set(controls.values())
    assert not {"<table>", "\n\n"} & set(controls.values())
    for text in controls.values():
        for field in range(3):
            fields = ["x", "y", "z"]
            fields[field] = f"{text}{text} a{text}"
            example = one(encoder, row(tuple(fields)))  # type: ignore[arg-type]
            assert control_in(example, encoder) == [], text
            assert (example.input_ids == small.bos_token_id).sum() == 1
            assert f"{text}{text} a{text}" in small.decode(example.input_ids)


@needs_shared
def test_every_control_string_of_gemma_stays_text(gemma: Any) -> None:
    encoder = PromptEncoder(gemma, prompt_settings(max_length=4096))
    texts = list(control_ids(gemma).values())
    assert len(texts) > 100
    every = " ".join(texts) + "".join(texts)
    example = one(encoder, row((every, every, every)))
    assert control_in(example, encoder) == []
    assert (example.input_ids == gemma.bos_token_id).sum() == 1
    assert gemma.decode(example.input_ids).count(every) == 3
    assert gemma.chat_template is None  # the base tokenizer has none, and none is needed


def test_without_care_control_strings_do_parse(small: Any) -> None:
    """The control for the tests above: the tokenizer's own call gives control ids for these texts."""
    for text in ("<end_of_turn>", "<unused0>"):
        assert set(small(text, add_special_tokens=False)["input_ids"]) & set(control_ids(small))
    assert set(small("<unused0>", add_special_tokens=False, split_special_tokens=True)["input_ids"]) & set(
        control_ids(small)
    )


long_text = st.one_of(st.none(), st.text(max_size=120), st.sampled_from(["<bos>" * 9, "好" * 40, "a " * 90, "\n" * 50]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(long_text, long_text, long_text), max_size=4), extra=st.integers(0, 200))
def test_any_conversation_fits_and_ends_in_the_verdict(small: Any, turns: list[Any], extra: int) -> None:
    encoder = PromptEncoder(small, prompt_settings(max_length=smallest(small) + extra))
    example = one(encoder, row(*turns) if turns else {name: [[]] for name in ROW})
    ids = example.input_ids.tolist()
    assert len(ids) <= smallest(small) + extra
    assert ids[-len(encoder.suffix) :] == encoder.suffix
    assert small.decode(ids).endswith("verdict is: [[")
    assert control_in(example, encoder) == []
    headings = [small.decode(heading) for heading in encoder.headings]
    body = small.decode(ids)
    if turns and not any(heading in (text or "") for turn in turns for text in turn for heading in headings):
        shown = [body.count(heading) for heading in headings]
        assert len(set(shown)) == 1 and shown[0] == len(turns) - example.turns_dropped >= 1


def smallest(tokenizer: Any) -> int:
    """The least `max_length` that the template can do with, as the error names it."""
    with pytest.raises(ValueError, match="at least") as error:
        PromptEncoder(tokenizer, prompt_settings(max_length=16))
    return int(str(error.value).split("takes at least ")[1].split()[0])


def test_cut_texts_keep_beginning_and_end_and_are_marked(small: Any) -> None:
    settings_ = prompt_settings(max_length=smallest(small) + 30)
    encoder = PromptEncoder(small, settings_)
    example = one(encoder, row(("start " + "x " * 200 + "finish", "good", "bad")))
    text = small.decode(example.input_ids)
    assert "### User:\nstart x" in text and "finish\n\n" in text and text.count("[...]") == 1
    assert "### Assistant A:\ngood\n" in text and "### Assistant B:\nbad\n" in text
    assert example.tokens_cut > 100 and example.turns_dropped == 0


def test_left_out_turns_are_marked_and_counted(small: Any) -> None:
    encoder = PromptEncoder(small, prompt_settings(max_length=200))
    turn = ("which is better " * 8, "good " * 20, "bad " * 20)
    example = one(encoder, row(turn, turn, turn, ("last?", "good", "bad")))
    text = small.decode(example.input_ids)
    assert "[earlier turns left out]" in text and "last?" in text
    assert example.turns_dropped >= 1 and example.tokens_cut > 0


def test_no_character_is_cut_in_the_middle(small: Any) -> None:
    """Characters that are several byte tokens stay whole at either side of a cut."""
    for extra in range(60):
        encoder = PromptEncoder(small, prompt_settings(max_length=smallest(small) + extra))
        example = one(encoder, row(("好" * 80, "字" * 50, "é" * 60)))
        assert "\ufffd" not in small.decode(example.input_ids)


def test_empty_conversation_and_lone_surrogates_do_not_stop_it(small: Any) -> None:
    encoder = PromptEncoder(small, prompt_settings())
    assert len(one(encoder, {"prompt": [[]], "response_a": [[]], "response_b": [[]]}).input_ids) == len(
        encoder.prefix
    ) + len(encoder.suffix)


def test_a_max_length_that_is_too_small_is_an_error_with_the_least(small: Any) -> None:
    least = smallest(small)
    PromptEncoder(small, prompt_settings(max_length=least))
    with pytest.raises(ValueError, match=f"takes at least {least} tokens"):
        PromptEncoder(small, prompt_settings(max_length=least - 1))


def test_chat_markers_follow_the_vocabulary(small: Any, tmp_path: Path) -> None:
    assert chat_family(small) == "gemma"
    assert chat_family(small, "plain") == "plain"
    with pytest.raises(ValueError, match="no <|im_start|>".replace("|", r"\|")):
        chat_family(small, "chatml")
    other = make_tokenizer(tmp_path)
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    encoder = PromptEncoder(other, prompt_settings(chat="chatml"))
    text = other.decode(one(encoder, ROW).input_ids)
    assert text.startswith("<bos><|im_start|>user\n") and text.endswith("<|im_start|>assistant\nverdict is: [[")
    assert set(CHAT_MARKERS) == {"gemma", "chatml", "llama3", "plain"}


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="not a fast tokenizer"):
        PromptEncoder(object(), prompt_settings())


@needs_shared
def test_default_instruction_is_about_200_tokens(gemma: Any) -> None:
    encoder = PromptEncoder(gemma, prompt_settings("judge", max_length=4096))
    assert 170 <= len(encoder.prefix) <= 230


HOSTILE = [
    "", " ", "\n\n\n", "\t \r\n", "a\0b", "\u2581\u2581", "\ufeff", "\u2028", "e\u0301", "ﬁ", "👩\u200d👩",
    "<0x41>", "<0xE5>", "<", "<bo", "bos>", "<table><tr>", "</h1>\n\n", "好" * 400, "a" * 5000, " " * 700, "\U0010ffff",
    "مرحبا بالعالم", "null", "[UNK]", "<s>", "▁the", "x\n\n\n\ny", "🇩🇪🇫🇷", "1234567890" * 20, "\ufffd\ufffd",
]  # fmt: skip


@pytest.mark.parametrize("name", ["small", pytest.param("gemma", marks=needs_shared)])
def test_ids_are_those_of_the_plain_call(request: pytest.FixtureRequest, name: str) -> None:
    """Of text that spells no control token, where the tokenizer's own call is right; whatever was set before."""
    tokenizer = request.getfixturevalue(name)
    encoder = PromptEncoder(tokenizer, prompt_settings(max_length=4096))
    texts = [*HOSTILE, *(f"{a} {b}" for a in HOSTILE for b in HOSTILE[:12])]
    tokenizer("x", truncation=True, max_length=3, padding="max_length")  # leaves its settings in the backend
    fields = encoder.tokenise({"prompt": [texts], "response_a": [texts[::-1]], "response_b": [texts]})[0]
    expected = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for (prompt, a, b), plain, last in zip(fields, expected, expected[::-1], strict=True):
        assert prompt.dtype == np.int32
        assert prompt.tolist() == b.tolist() == plain and a.tolist() == last
    assert tokenizer("<bos>", add_special_tokens=False)["input_ids"] == [tokenizer.bos_token_id]  # nothing is left set


def test_control_strings_among_many_texts_are_found_in_their_places(small: Any) -> None:
    encoder = PromptEncoder(small, prompt_settings())
    texts = ["", "good", "a<unused0>", "", "<bos>", "bad", "[@BOS@][@BOS@]", ""]
    fields = encoder.tokenise({"prompt": [texts], "response_a": [texts], "response_b": [[None] * len(texts)]})[0]
    for text, (prompt, a, missing) in zip(texts, fields, strict=True):
        assert small.decode(prompt) == text and np.array_equal(prompt, a)
        assert not set(prompt.tolist()) & set(control_ids(small))
        assert missing.tolist() == encoder.missing


def test_added_letters_are_text_and_added_markers_are_not(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    text = ["ü", "ß", "§", "नमस्ते", "New York", "▁the", "    ", "2024"]
    markers = ["<unused1>", "[INST]", "<|tool|>", "__end__", "##", "</s"]
    tokenizer.add_tokens([*text, *markers])
    controls = set(control_ids(tokenizer).values())
    assert not controls & set(text) and controls >= set(markers)
    tokenizer.add_special_tokens({"additional_special_tokens": ["speaker"]})
    assert "speaker" in control_ids(tokenizer).values()  # a special token is one, whatever it is made of
    example = one(PromptEncoder(tokenizer, prompt_settings()), row(("Grüße nach New York", "schön §", "Maß")))
    assert "Grüße nach New York" in tokenizer.decode(example.input_ids)
    assert tokenizer.convert_tokens_to_ids("ü") in example.input_ids


def test_a_text_that_only_a_control_token_can_spell_is_named(tmp_path: Path) -> None:
    """Here an ordinary letter of the vocabulary was declared special: nothing else stands for it."""
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["z"]})
    encoder = PromptEncoder(tokenizer, prompt_settings())
    with pytest.raises(ValueError, match=r'the text "a lazy dog" cannot be tokenised without \'z\'.*control token'):
        encoder.tokenise(row(("which?", "a lazy dog", "bad")))


def test_padding_of_plain_text_is_text(tmp_path: Path) -> None:
    """Nothing is padded here, so it steers nothing; a token that also ends a text does."""
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "!"})
    assert "!" not in control_ids(tokenizer).values()
    example = one(PromptEncoder(tokenizer, prompt_settings()), row(("Hello!", "Yes! Yes!", "no")))
    assert "Yes! Yes!" in tokenizer.decode(example.input_ids)
    tokenizer.add_special_tokens({"eos_token": "!"})
    assert "!" in control_ids(tokenizer).values()
