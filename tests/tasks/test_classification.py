"""Classification: labels in every form, prompts that end in the verdict, scores, and a run from files to a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import arena
from arena.config import change, load_recipe
from arena.data.encoder import Example
from arena.data.text_encoder import control_ids
from arena.inference.export import export_judge
from arena.inference.infer import infer
from arena.metrics import log_loss
from arena.prompt_settings import PromptSettings, Template
from arena.reporting.report import print_report
from arena.settings import Recipe
from arena.tasks import task_of
from arena.tasks.baseline import fit_text_baseline
from arena.tasks.classification import Classification, ClassificationEncoder
from arena.training.run import run_fold
from tests.helpers import make_tokenizer, prompt_settings

TWO = ["task=classification", "classes=[negative, positive]", "prompt.template=classify"]
PAIR = [*TWO, "data.columns={text: premise, pair: hypothesis}"]


def classification(*overrides: str) -> Classification:
    task = task_of(load_recipe("demo", [*TWO, *overrides]))
    assert isinstance(task, Classification)
    return task


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


# Settings


def test_a_recipe_sets_the_task() -> None:
    task = classification("data.columns={text: premise, pair: hypothesis, label: gold}", "classes=['no', 'yes', maybe]")
    assert (task.texts, task.label, task.group_by) == (("premise", "hypothesis"), "gold", "premise")
    assert task.columns == ("p_no", "p_yes", "p_maybe")
    assert task == classification(
        "data.columns={text: premise, pair: hypothesis, label: gold}", *["classes=['no', 'yes', maybe]"]
    )
    others = classification(), classification("classes=[positive, negative]"), classification("data.columns.label=gold")
    assert len({repr(each.reading) for each in (task, *others)}) == 4  # or rows would be taken from another's cache


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=classification"], r"classes is \[\], but task=classification needs two or more different names"),
        ([*TWO, "classes=[one]"], r"classes is \[one\]"),
        ([*TWO, "classes=[a, b, a]"], r"classes is \[a, b, a\]"),
        ([*TWO, "classes=[a, ' b']"], "without white space"),
        ([*TWO, "classes=[a, '']"], "two or more different names"),
        ([*TWO, "data.columns.label=sentence"], "columns of their own, other than id"),
        ([*TWO, "data.columns.text=id"], "data.columns names id, label"),
        ([*TWO, "data.columns={text: label, label: gold}"], "texts other than label"),
        ([*TWO, "data.columns.pair=sentence"], "columns of their own"),
        (["classes=[a, b]"], "classes is set, but task=preference has its own"),
        (["data.columns.text=review"], "data.columns is set, but task=preference has its own"),
    ],
)
def test_settings_that_do_not_fit_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(load_recipe("demo", overrides))


# Labels


@pytest.mark.parametrize("cell", ["positive", " positive ", 1, 1.0, "1", "1.0", True])
def test_a_label_is_a_name_or_a_number(cell: Any) -> None:
    assert classification().read_label({"label": cell}, "required") == [0.0, 1.0]
    assert classification("classes=[positive, negative]").read_label({"label": "positive"}, "required") == [1.0, 0.0]


@pytest.mark.parametrize("cell", ["Positive", 2, "2", -2, 0.5, "x", [1], "nan", "inf", 10**400])
def test_other_labels_are_refused(cell: Any) -> None:
    with pytest.raises(ValueError, match=r"label: is .*; write one of negative, positive, 0, 1"):
        classification().read_label({"label": cell}, "optional")


def test_names_that_are_numbers_are_names() -> None:
    """A number of a class would be another class's name, or mean two things."""
    stars = classification("classes=['1', '2', '3']")
    assert stars.read_label({"label": 1}, "required") == [1.0, 0.0, 0.0]
    assert stars.read_label({"label": "3.0"}, "required") == [0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"label: is 0; write one of 1, 2, 3$"):
        stars.read_label({"label": 0}, "required")
    signs = classification("classes=['-1', '1']")
    assert signs.read_label({"label": -1}, "optional") == [1.0, 0.0]


@pytest.mark.parametrize("cell", [None, "", " ", -1, "-1", -1.0])
def test_no_label(cell: Any) -> None:
    assert classification().read_label({"label": cell}, "optional") is None
    with pytest.raises(ValueError, match=r"label: is .*label the row or leave it out"):
        classification().read_label({"label": cell}, "required")


def test_soft_labels_have_the_columns_of_predictions() -> None:
    task = classification()
    assert task.label_columns(["id", "sentence", "p_negative", "p_positive"], "required") == task.columns
    assert task.read_label({"p_negative": "0.25", "p_positive": 0.75}, "required") == [0.25, 0.75]
    assert task.read_label({"p_negative": "", "p_positive": None}, "optional") is None
    for cells, message in (
        ({"p_negative": 0.5, "p_positive": 0.6}, "p_negative, p_positive: are .* sum to 1.1"),
        ({"p_negative": 0.5}, "p_positive: is missing, but p_negative is there; give all 2 or none"),
        ({"p_negative": 0.5, "p_positive": 0.5, "label": 1}, "label: is there along with p_negative, p_positive"),
        ({"sentence": "good"}, r"label: is missing; name the label's column in data.columns.label"),
    ):
        with pytest.raises(ValueError, match=message):
            task.read_label(cells, "required")
    assert task.label_columns(["sentence", "label", "p_negative"], "ignored") == ()


# Prompts


def rows(*texts: Any) -> dict[str, list[Any]]:
    return dict(
        zip(("premise", "hypothesis") if len(texts) == 2 else ("sentence",), map(list, zip(texts)), strict=True)
    )


def one(encoder: ClassificationEncoder, *texts: str | None) -> Example:
    (example,) = encoder.encode({name: [text] for name, text in zip(encoder._columns, texts, strict=True)})
    return example


def encoder(tokenizer: Any, *overrides: str, **changes: Any) -> ClassificationEncoder:
    return classification(*overrides).encoder(tokenizer, prompt_settings("classify", **changes))


COLUMNS = "data.columns={text: premise, pair: hypothesis}"


def test_layout(small: Any) -> None:
    start = (
        "<bos><start_of_turn>user\nRead the text, decide which one of the classes fits it best, and answer with the "
        "name of that class alone.\nThe classes are: negative, positive\n\nText: "
    )
    end = "\n<end_of_turn>\n<start_of_turn>model\nAnswer: "
    example = one(encoder(small), "not very good")
    assert small.decode(example.input_ids) == f"{start}not very good{end}"
    assert example.input_ids.dtype == np.int32 and example.tokens_cut == example.turns_dropped == 0
    example = one(encoder(small, COLUMNS), "good", None)
    assert small.decode(example.input_ids) == f"{start}good\nSecond text: [no text]{end}"


def test_nothing_of_the_template_has_to_be_there(small: Any) -> None:
    bare = PromptSettings(template=Template(instruction="", separator="", verdict="is"), chat="plain", max_length=32)
    assert small.decode(one(classification().encoder(small, bare), "good").input_ids) == "<bos>good\nis"


def test_control_tokens_in_texts_and_names_stay_text(small: Any) -> None:
    controls = control_ids(small)
    for text in controls.values():
        named = encoder(small, COLUMNS, f"classes=[a, {json.dumps(text)}]")
        example = one(named, f"{text}{text} a{text}", f"b{text}")
        ids = example.input_ids.tolist()
        assert [token for token in ids if token in controls] == small.convert_tokens_to_ids(
            ["<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_turn>"]
        )
        assert f"{text}{text} a{text}" in small.decode(ids) and f"a, {text}" in small.decode(ids)
    assert set(small("<end_of_turn>", add_special_tokens=False)["input_ids"]) & set(controls)  # the control


long_text = st.one_of(st.text(max_size=120), st.sampled_from(["<bos>" * 9, "好" * 40, "a " * 90, "\n" * 50]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.tuples(long_text, long_text), extra=st.integers(0, 150), pair=st.booleans())
def test_whatever_is_cut_the_verdict_is_last_and_both_texts_are_visible(
    small: Any, texts: tuple[str, str], extra: int, pair: bool
) -> None:
    names, shown = ([COLUMNS], texts) if pair else ([], texts[:1])
    whole = one(encoder(small, *names, max_length=4096), *shown)
    assert whole.tokens_cut == 0
    with pytest.raises(ValueError, match="max_length 16 is too small for this template, which takes at least") as error:
        encoder(small, *names, max_length=16)
    least = int(str(error.value).partition("at least ")[2].partition(" ")[0])
    cutting = encoder(small, *names, max_length=least + extra)
    example = one(cutting, *shown)
    suffix = cutting.constant_ids[-1]
    assert len(example.input_ids) <= least + extra and example.input_ids[-len(suffix) :].tolist() == suffix
    before = whole.input_ids.tolist()[: len(cutting.constant_ids[0])]
    assert example.input_ids[: len(before)].tolist() == before == cutting.constant_ids[0]
    mark = small(" [...] ", add_special_tokens=False)["input_ids"]
    cuts = len(whole.input_ids) - len(example.input_ids) - example.tokens_cut
    assert -cuts in [len(mark) * each for each in range(len(shown) + 1)]  # what is lost is replaced by marks alone
    assert (example.tokens_cut > 0) == (len(whole.input_ids) > least + extra)
    if example.tokens_cut == 0:
        assert np.array_equal(example.input_ids, whole.input_ids)


def test_texts_share_the_room(small: Any) -> None:
    long, short = "good " * 60, "bad"
    both = encoder(small, COLUMNS, max_length=200)
    for texts in ((long, short), (short, long)):
        example = one(both, *texts)
        shown = small.decode(example.input_ids)
        assert len(example.input_ids) == 200 and "bad" in shown and shown.count(" [...] ") == 1
    assert small.decode(one(both, long, long).input_ids).count(" [...] ") == 2


def test_a_character_of_bytes_is_not_cut(small: Any) -> None:
    for length in range(150, 170):
        shown = small.decode(one(encoder(small, max_length=length), "好" * 40).input_ids)
        assert "[...]" in shown and "\ufffd" not in shown


# Scores


def test_scores_that_are_no_means() -> None:
    labels = np.eye(3)[[0, 0, 0, 1, 1]]
    probabilities = np.eye(3)[[0, 0, 1, 1, 1]] * 0.7 + 0.1
    found = classification("classes=[a, b, c]").further_scores(labels, probabilities)
    assert found["confusion"] == {
        "a": {"a": 2, "b": 1, "c": 0},
        "b": {"a": 0, "b": 2, "c": 0},
        "c": dict.fromkeys("abc", 0),
    }
    assert found["macro_f1"] == pytest.approx((4 / 5 + 4 / 5 + 0) / 3)
    soft = classification().further_scores(np.array([[0.4, 0.6]]), np.array([[0.4, 0.6]]))
    assert soft == {
        "macro_f1": 0.5,
        "confusion": {"negative": {"negative": 0, "positive": 0}, "positive": {"negative": 0, "positive": 1}},
    }


def test_the_baseline_learns_words_and_nothing_from_noise() -> None:
    from datasets import Dataset

    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, 200)
    words = np.array(["good", "bad", "so so"])[kinds]
    table = Dataset.from_dict({"a": [f"{at} films" for at in rng.integers(0, 9, 200)], "b": [*words[:-1], None]})
    labels, train, others = np.eye(4)[kinds], np.arange(150), np.arange(150, 199)
    found = fit_text_baseline(table.select(train), labels[train])(table.select(others))
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert found.shape == (49, 4) and (found[:, 3] == 0).all()  # a class that no row has
    assert log_loss(labels[others], found) < 0.08
    soft = fit_text_baseline(table.select(train), (labels * 0.8 + 0.05)[train])(table.select(others))
    assert log_loss(labels[others], soft) == pytest.approx(-np.log(0.85), abs=0.02)
    shuffled = fit_text_baseline(table.select(train), rng.permutation(labels)[train])(table.select(others))
    assert log_loss(labels[others], shuffled) > 0.8


# A run


GOOD, BAD = ("a good answer", "very clear", "hello world good"), ("a bad answer", "not very clear", "bad world")


def write(folder: Path, n: int = 90) -> Path:
    """A training file of tab-separated values, a file of held-out rows, and a test file without labels or ids."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    labels = rng.integers(0, 2, n)
    texts = [f'{rng.choice((BAD, GOOD)[label])} "{at}' for at, label in enumerate(labels)]
    texts[7] = ""  # a row without input
    texts[60] = texts[5].upper()  # a held-out row that is a training row too

    def table(names: tuple[str, ...], first: int, end: int) -> str:
        lines = ["\t".join(names)]
        lines += ["\t".join((texts[at], str(labels[at]))[: len(names)]) for at in range(first, end)]
        return "\n".join(lines) + "\n"

    (folder / "train.tsv").write_text(table(("sentence", "label"), 0, 60))
    (folder / "dev.tsv").write_text(table(("sentence", "label"), 60, n))
    (folder / "test.tsv").write_text(table(("sentence",), 60, n))
    return folder


@pytest.fixture
def recipe(gemma2: Path, tmp_path: Path) -> Recipe:
    places = [f"model.base={gemma2}", f"data.path={write(tmp_path / 'rows')}", f"data.cache={tmp_path / 'cache'}"]
    return load_recipe(
        "gemma-3-270m-sst2",
        [
            *places, "data.validation=dev", "prompt.max_length=192", "packing.budget=512", "train.batch_size=8",
            "train.epochs=4", "train.max_steps=null", "train.lr=3e-3", "train.head_lr=1e-2", "train.evaluate_every=5",
            "model.checkpointing=none",
        ],
    )  # fmt: skip


def test_trained_evaluated_inferred_and_exported(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run_fold(recipe, 0, tmp_path / "runs")
    out = capsys.readouterr().out
    assert "1 of 30 held-out rows have a sentence of the training file, whose 1 rows with it are omitted" in out
    assert "1 training rows have no text and are omitted" in out
    assert metrics["log_loss"] < 0.5 < 0.65 < metrics["prior_log_loss"] and metrics["accuracy"] > 0.8
    assert (metrics["n_train"], metrics["n_eval"]) == (58, 30)
    assert metrics["macro_f1"] > 0.8 and metrics["baseline_log_loss"] < 0.65
    assert sum(sum(row.values()) for row in metrics["confusion"].values()) == 30
    print_report(metrics)
    shown = capsys.readouterr().out
    assert "confusion matrix" in shown and f"macro F1 {metrics['macro_f1']:.3f}" in shown

    fold = tmp_path / "runs/gemma-3-270m-sst2/fold0"
    oof = pd.read_csv(fold / "oof.csv")
    assert list(oof.columns) == ["id", "p_negative", "p_positive", "label", "label_p_negative", "label_p_positive"]
    assert oof["id"].tolist() == list(range(1, 31)) and set(oof["label"]) == {"negative", "positive"}

    infer([fold / "model"], None, tmp_path / "predictions.csv")
    found = pd.read_csv(tmp_path / "predictions.csv")
    assert list(found.columns) == ["id", "p_negative", "p_positive"] and found["id"].tolist() == list(range(1, 31))
    np.testing.assert_allclose(found["p_positive"], oof["p_positive"], atol=1e-6)  # the same rows
    judge = arena.Judge.from_pretrained(fold / "model")
    read = judge.read([tmp_path / "rows/test.tsv"])
    np.testing.assert_allclose(judge.predict_proba(read), found.iloc[:, 1:].to_numpy(), atol=1e-6)

    export_judge(fold / "model", tmp_path / "plain", dtype="float32")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain", attn_implementation="eager")
    assert plain.config.id2label == {0: "negative", 1: "positive"}
    for example, expected in zip(
        read.task.encoder(judge.models[0].tokenizer, recipe.prompt).encode(read.table[:5]),
        found.iloc[:5, 1:].to_numpy(),
        strict=True,
    ):
        logits = plain(input_ids=torch.from_numpy(example.input_ids)[None].long()).logits
        np.testing.assert_allclose(logits.softmax(-1)[0].tolist(), expected, atol=1e-4)


def test_predictions_can_be_trained_on(recipe: Recipe, tmp_path: Path) -> None:
    """A file of texts with the columns of predictions is a training file with soft labels, ids or not."""
    sentences = pd.read_csv(tmp_path / "rows/test.tsv", sep="\t", quoting=3)
    soft = np.random.default_rng(0).dirichlet([1, 1], len(sentences)).round(6)
    path = tmp_path / "soft.csv"
    sentences.assign(p_negative=soft[:, 0], p_positive=soft[:, 1]).to_csv(path, index=False)
    changed = change(recipe, [f"data.path={path}", "data.validation=null", "data.folds=2"])
    loader = arena.open_fold(changed, 1)
    (labels,) = {
        tuple(map(tuple, np.vstack([m["label"] for m in step]).round(6).tolist())) for step in list(loader)[:1]
    }
    known = {tuple(each) for each in soft.astype(np.float32).round(6).tolist()}
    assert len(labels) == 8 and len(known) == 30
    assert np.abs(np.array(labels)[:, None] - soft[None]).max(axis=-1).min(axis=1).max() < 1e-5
