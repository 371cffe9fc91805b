"""The HTML report: its figures are those of the run, its bars open their rows, and no text in it is ever run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree, ignore_patterns, which
from typing import Any

import numpy as np
import pandas as pd
import pytest

from arena.config import change, load_recipe
from arena.html_report import page, rows
from arena.html_report.report import write_report
from arena.html_report.source import read_source
from arena.inference.saved import SavedJudge, as_json
from arena.settings import Recipe
from arena.storage.files import write_json
from arena.training.cross_validation import _union
from tests.helpers import arena, tiny_recipe
from tests.html_report.runs import EFFORT, write_fold, write_rest

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)><!-- &lt; \u2028\u2029 \x00\x1b[31m\x07 "
    "\u202egnp.exe\u2066 \u200f <style>*{}</style> javascript:alert(1) ]]> 🚂"
)
Content = dict[str, Any]


class Parsed(HTMLParser):
    """The elements of a page, and the text of each script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts.append(data)

    @property
    def content(self) -> Content:
        return dict(json.loads(self.scripts[0]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `tiny` of two folds, one of which is also that of `other`, and their rows, some hostile."""
    folder = tmp_path_factory.mktemp("report")
    recipe = tiny_recipe(folder, folder, "data.folds=2", "name=tiny")
    table = pd.read_csv(folder / "rows/train.csv", dtype=str)
    table.loc[3, "prompt"] = json.dumps([HOSTILE, "and then?"])
    table.loc[3, ["response_a", "response_b"]] = [json.dumps([HOSTILE, None]), json.dumps(["good", "\ud83d half"])]
    table.loc[4, ["response_a", "response_b"]] = "[null]"  # without input
    table.loc[5, "id"] = "<b>&amp;</b>"
    table.iloc[:-3].to_csv(folder / "rows/train.csv", index=False)  # so that folds are not of the same size
    folds = [write_fold(recipe, folder / "runs", fold) for fold in range(2)]
    _union(recipe, folder / "runs/tiny", folds)
    write_fold(change(recipe, ["name=other", "train.lr=0.5"]), folder / "runs", 0, seed=1)
    return folder


@pytest.fixture(autouse=True, scope="module")
def bundle() -> Iterator[Callable[[], str]]:
    """No JavaScript of charts, which takes seconds to make; a browser gets the real one."""
    real = page._vega
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_vega", lambda: "charts")
        yield real


@pytest.fixture(scope="module")
def fold(place: Path) -> Content:
    """The content of the report of fold 0 of `tiny`."""
    return written(place, place, str(place / "runs/tiny/fold0"))


@pytest.fixture(scope="module")
def run(place: Path) -> Content:
    """The content of the report of all folds of `tiny`, which is left in `place`."""
    return written(place, place, "tiny")


def written(place: Path, out: Path, *names: str, data: Path | None = None) -> Content:
    return Parsed(
        write_report(names, place / "runs", out / "report.html", None if data is None else str(data), 2000)
    ).content


def charts(content: Content, title: str) -> list[Content]:
    (found,) = [part for part in content["sections"] if part["title"] == title]
    return list(found["charts"])


def opens(chart: Content) -> bool:
    """Whether bars of a chart open rows."""
    return any("filter" in datum for datum in chart["data"]["table"])


def bars(content: Content) -> Iterator[tuple[Content, int]]:
    """Each bar that opens rows, and how many there are for it."""
    held = content["rows"]
    for section in content["sections"]:
        for bar in (bar for chart in section.get("charts", ()) for bar in chart["data"]["table"] if "filter" in bar):
            chosen = [np.array(held["columns"][column]) == value for column, value in bar["filter"]]
            yield bar, int(np.logical_and.reduce(chosen).sum())


def test_the_figures_of_a_fold_are_those_of_its_metrics(place: Path, fold: Content) -> None:
    metrics = json.loads((place / "runs/tiny/fold0/metrics.json").read_text())
    first, score = fold["sections"][0], metrics["scores"]["log_loss"]
    assert first["big"] == {"value": f"{score['value']:.4f}", "note": f"{score['low']:.4f} to {score['high']:.4f}"}
    shown = {bar["name"]: bar["value"] for bar in first["charts"][0]["data"]["table"]}
    assert shown == {"this run": score["value"], "best possible": 0.5, "prior": metrics["prior_log_loss"]}
    for chart in charts(fold, "Slices"):
        for bar in chart["data"]["table"]:
            assert {key: bar[key] for key in score} == metrics["slices"][chart["title"]][bar["name"]]["log_loss"]
    assert {chart["title"] for chart in charts(fold, "Slices")} == metrics["slices"].keys()
    (loss, *_) = charts(fold, "Training")
    assert len(loss["data"]["table"]) == 30 and [each["loss"] for each in loss["data"]["held_out"]] == [1.05]
    assert loss["data"]["table"][1]["grad_norm"] is None  # it overflowed, and JSON has no infinity


def test_each_bar_opens_as_many_rows_as_it_counts(place: Path, fold: Content) -> None:
    counted = list(bars(fold))
    assert len(counted) > 40 and all(bar["rows"] == found and bar["says"] in bar["tip"] for bar, found in counted)
    held, metrics = fold["rows"], json.loads((place / "runs/tiny/fold0/metrics.json").read_text())
    assert sum(bar["rows"] for bar in charts(fold, "Confusion")[0]["data"]["table"]) == metrics["n_eval"]
    flips = metrics["scores"]["flip_rate"]
    (flipped,) = charts(fold, "Position bias")
    assert sum(bar["rows"] for bar in flipped["data"]["table"]) == round(flips["value"] * flips["rows"]) > 0
    (lead,) = [part["lead"] for part in fold["sections"] if part["title"] == "Position bias"]
    assert f"The table is of the {flips['rows']} rows with a response to judge" in lead
    oof = pd.read_csv(place / "runs/tiny/fold0/oof.csv", dtype={"id": str}).set_index("id")
    worst = oof.loc[held["ids"][0]]
    assert held["losses"] == sorted(held["losses"], reverse=True) and len(held["ids"]) == len(oof)
    assert held["probabilities"][0] == pytest.approx(worst.iloc[:3].tolist(), abs=1e-4)
    assert held["names"][held["columns"]["label"][0]] == worst["label"]
    assert held["losses"][0] == pytest.approx(-np.log(held["of_label"][0]), abs=1e-2)


def test_all_folds_together_have_the_scores_of_cross_validation(place: Path, run: Content, tmp_path: Path) -> None:
    cv = json.loads((place / "runs/tiny/cv.json").read_text())
    assert run["sections"][0]["big"]["value"] == f"{cv['best']['log_loss']['value']:.4f}"
    shown = {bar["name"]: bar["value"] for bar in charts(run, "Log-loss")[0]["data"]["table"]}
    sums = [fold["prior_log_loss"] * fold["n_eval"] for fold in cv["folds"]]
    assert shown["prior"] == pytest.approx(sum(sums) / 57) and run["rows"]["total"] == 57
    by_length = next(chart for chart in charts(run, "Slices") if chart["title"] == "length")["data"]["table"]
    assert sum(bar["value"] * bar["rows"] for bar in by_length) / 57 == pytest.approx(shown["this run"])
    assert all(bar["rows"] == found for bar, found in bars(run))
    assert {point["fold"] for point in charts(run, "Training")[0]["data"]["table"]} == {0, 1}
    copytree(place / "runs/tiny", tmp_path / "tiny", ignore=ignore_patterns("cv.json"))
    with pytest.raises(
        ValueError, match=r"2 finished folds, but no cv\.json: name one, as in `.*arena report .*fold0`"
    ):
        read_source("tiny", tmp_path)
    write_json(tmp_path / "tiny/cv.json", cv | {"folds": cv["folds"][:1]})
    with pytest.raises(ValueError, match=r"cv\.json is not of the folds that are there now: run `.*arena cv"):
        read_source("tiny", tmp_path)


def test_two_runs_have_paired_differences_and_both_curves(place: Path, tmp_path: Path) -> None:
    content = written(place, tmp_path, str(place / "runs/tiny/fold0"), "other")
    (compared,) = [part for part in content["sections"] if part["title"] == "Compared with other"]
    (loss, *_) = compared["table"]["rows"]
    one, other = (
        json.loads((place / f"runs/{name}/fold0/metrics.json").read_text())["log_loss"] for name in ("tiny", "other")
    )
    assert loss[3] == f"{one - other:+.4f}"
    assert loss[1:3] == pytest.approx([one, other]) and "train.lr is" in compared["notes"][0]
    assert {point["run"] for point in charts(content, "Training")[0]["data"]["table"]} == {"tiny", "other"}


def test_no_text_leaves_the_data(place: Path, run: Content, tmp_path: Path) -> None:
    """The control is a page of harmless texts: it has the same elements and the same attributes."""
    parsed = Parsed(place / "report.html")
    assert parsed.tags.count("script") == len(parsed.scripts) == 3
    every = json.dumps(run["rows"]["texts"], ensure_ascii=False)
    assert all(each in every for each in ("</script><script>alert(1)", "\u202egnp.exe", "🚂", "\\u001b[31m"))
    assert "<b>&amp;</b>" in run["rows"]["ids"]
    odd = {f"{HOSTILE}{at}": [HOSTILE, "\ud83d", "\udc00x", float("nan"), {"<": HOSTILE}] for at in range(3)}
    elements = []
    for name, content in (("plain", {"text": "plain"}), ("odd", odd)):
        page.write_page(tmp_path / f"{name}.html", HOSTILE if name == "odd" else "plain", content)
        found = Parsed(tmp_path / f"{name}.html")
        policies = [value for key, value in found.attributes if key == "content" and "default-src" in str(value)]
        assert len(policies) == 1 and "unsafe" not in str(policies[0]) and "default-src 'none'" in str(policies[0])
        elements.append((found.tags, [each for each in found.attributes if each != ("content", policies[0])]))
    assert elements[0] == elements[1] == (parsed.tags, elements[0][1])
    assert found.content == {key: [HOSTILE, "\ud83d", "\udc00x", None, {"<": HOSTILE}] for key in odd}
    assert not re.search("[<>&\u2028\u2029]", found.scripts[0] + parsed.scripts[0])


def test_equal_bytes_and_what_is_left_out(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one.html", "two.html"):
        arena(monkeypatch, "report", "tiny", "--runs", place / "runs", "--out", tmp_path / name, "--texts", "5")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    found = Parsed(tmp_path / "one.html").content["rows"]
    assert len(found["texts"]) == 5 and "Only the 5 most confidently wrong rows have their texts" in found["note"]
    held_out = rows.read_held_out(read_source("tiny", place / "runs"), None)
    monkeypatch.setattr(rows, "LONGEST", 10)
    (((cut, more),), *_) = rows.texts(held_out, [0], 1)[0]
    assert (cut, more) == ("which is b", len("which is better 0?") - 10)
    assert len(rows.texts(held_out, list(range(57)), 57)) == 57
    monkeypatch.setattr(rows, "TEXT_BYTES", 1000)
    assert 2 < len(rows.texts(held_out, list(range(57)), 57)) < 30


@pytest.mark.parametrize("what", ["gone", "others"])
def test_without_its_data_a_report_says_so_and_has_the_rest(what: str, place: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows"
    if what == "others":
        table = pd.read_csv(place / "rows/train.csv", dtype=str)
        data.mkdir()
        table.assign(winner_model_a=table["winner_model_b"], winner_model_b=table["winner_model_a"]).to_csv(
            data / "train.csv", index=False
        )
    content = written(place, tmp_path, str(place / "runs/tiny/fold0"), data=data)
    held = content["rows"]
    reason = "there is no folder or file" if what == "gone" else "are not those of the run"
    assert held["texts"] == [] and reason in held["note"] and len(held["ids"]) == held["total"] == 29
    assert all("filter" not in bar for chart in charts(content, "Slices") for bar in chart["data"]["table"])
    assert all(bar["rows"] == found for bar, found in bars(content)) and charts(content, "Reliability")


def test_without_its_tokenizer_a_report_says_so_and_has_the_rest(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny/fold0"
    copytree(place / "runs/tiny/fold0", folder, ignore=ignore_patterns("*token*"))
    content = written(place, tmp_path, str(folder))
    assert "The slices by length are missing here: " in content["rows"]["note"]
    assert all(text for text in content["rows"]["texts"]) and "length" not in content["rows"]["columns"]
    by_title = {chart["title"]: chart["data"]["table"] for chart in charts(content, "Slices")}
    assert all("filter" not in bar for bar in by_title["length"]) and all("filter" in bar for bar in by_title["turns"])
    assert all(bar["rows"] == found for bar, found in bars(content))


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("log.jsonl", lambda text: text[:-9], r"line 31 is not JSON"),
        ("log.jsonl", lambda text: "7\n" + text, r"line 1 is not a JSON object"),
        ("metrics.json", lambda text: text[:-9], r"it is not JSON"),
        ("metrics.json", lambda _: "{}", r"it has no fold"),
        ("metrics.json", lambda _: "[]", r"it is not a JSON object"),
        ("oof.csv", lambda _: "", r"it is not a CSV file with a header"),
        ("oof.csv", lambda text: text.split("\n")[0] + "\n", r"it has no rows"),
        ("oof.csv", lambda _: "id,x\n1,2\n", r"it has no column label_winner_model_a"),
        ("oof.csv", lambda text: text[: text.rindex("\n", 0, -1) + 1], r"it has 28 rows, but metrics\.json is of 29"),
        (
            "oof.csv",
            lambda text: re.sub(r"\n(\w+),[\d.]+,", r"\n\1,,", text, count=1),
            r"row 1 has no number in .*model_a",
        ),
        ("oof.csv", lambda text: re.sub(r"\n(\w+),[\d.]+,", r"\n\1,nan,", text, count=1), r"row 1 has no number in "),
    ],
)
def test_damaged_files_are_named(
    name: str, change: Callable[[str], str], what: str, place: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny/fold0"
    copytree(place / "runs/tiny/fold0", folder)
    (folder / name).write_text(change((folder / name).read_text()))
    with pytest.raises(ValueError, match=rf"fold0/{re.escape(name)} is damaged: {what}.*; copy it anew from "):
        written(place, tmp_path, str(folder))


def sentiment(folder: Path) -> Recipe:
    table = pd.DataFrame(
        {"id": [f"r{at}" for at in range(40)], "sentence": "good", "label": [at % 2 for at in range(40)]}
    )
    table["sentence"] += table["id"]
    folder.mkdir()
    table.to_csv(folder / "train.csv", index=False)
    places = [
        f"data.path={folder}",
        f"data.cache={folder}/cache",
        "data.validation=null",
        "data.folds=2",
        "name=words",
        "prompt.max_length=256",
    ]
    return load_recipe("gemma-3-270m-sst2", places)


def test_classification_has_the_same_page(tmp_path: Path) -> None:
    write_fold(sentiment(tmp_path / "rows"), tmp_path / "runs", 0)
    content = written(tmp_path, tmp_path, "words")
    titles = [part["title"] for part in content["sections"]]
    assert "Position bias" not in titles and {"Reliability", "Confusion", "Slices"} <= set(titles)
    held = content["rows"]
    assert all(text == [f"good{name}"] for name, text in zip(held["ids"], held["texts"], strict=True))
    assert all(bar["rows"] == found for bar, found in bars(content))


def test_instruction_tuning_has_its_curve_slices_and_settings(tmp_path: Path) -> None:
    recipe, folder = load_recipe("gemma-3-270m-dolly", ["name=told"]), tmp_path / "runs/told/fold0"
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "rows": 7}
    metrics = {"recipe": "told", "fold": 0, "n_eval": 7, "n_train": 9, "log_loss": 0.5, "base_log_loss": 3.0, **EFFORT}
    metrics |= {
        "scores": {"log_loss": score},
        "slices": {"length": {"all": {"log_loss": score, "base_log_loss": score}}},
    }
    write_rest(folder, recipe, metrics | {"perplexity": 1.6})
    write_json(folder / "model/judge.json", as_json(SavedJudge(folder / "model", recipe, np.zeros(2), "", "")))
    (folder / "oof.csv").write_text("id,nll,tokens\na,0.5,1\n")
    content = written(tmp_path, tmp_path, "told")
    assert [part["title"] for part in content["sections"]] == [
        "Log-loss", "Training", "Slices", "Data and packing", "Settings"
    ]  # fmt: skip
    assert content["rows"] is None and not list(bars({**content, "rows": {}}))
    assert ["task", "instruction", "preference"] in content["sections"][-1]["table"]["rows"]


def test_without_the_extra_a_message_says_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ValueError, match=r"needs Altair and vl-convert-python .*: run `.*pip install .*altair"):
        write_report(["tiny"], place / "runs", None, None, 10)
    assert not (place / "runs/tiny/report.html").exists()


def test_in_a_browser_a_bar_opens_its_rows_and_nothing_leaves_the_page(
    run: Content, bundle: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    chromium = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := which(name))), None)
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    path = tmp_path / "report.html"
    monkeypatch.setattr(page, "_vega", bundle)
    fewer = [part | {"charts": part.get("charts", [])[:1]} for part in run["sections"]]  # one of each kind
    page.write_page(path, "report", run | {"sections": fewer})
    assert not re.search("</script|<!--", Parsed(path).scripts[1])
    said, asked = list[str](), list[str]()
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        shown = browser.new_page(reduced_motion="reduce")
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("dialog", lambda dialog: said.append(dialog.message))
        shown.route(re.compile("^(?!file:)"), lambda route: (asked.append(route.request.url), route.abort()))
        shown.goto(path.as_uri())
        shown.wait_for_selector("body[data-drawn]", timeout=60_000)
        assert shown.locator(".opens").count() == sum(any(opens(chart) for chart in part["charts"]) for part in fewer)
        bar = shown.locator("[aria-label^='length: longest third']")
        bar.click()
        (longest,) = [each["rows"] for each, _ in bars(run) if each["says"] == "length: longest third"]
        assert f"{longest} of 57 rows: length: longest third" in shown.locator("#count").inner_text()
        assert shown.locator("#rows tbody tr:not(.detail)").count() == longest
        shown.locator("#back").click()
        shown.keyboard.press("ArrowUp")
        shown.keyboard.press("Enter")
        assert "length: middle third" in shown.locator("#count").inner_text()
        shown.locator("#clear").click()
        shown.locator("#query").fill("GNP.exe")
        row = shown.locator("#rows tbody button.link")
        assert row.count() == 1
        row.press("Enter")
        detail = shown.locator("#rows tr.detail").inner_text()
        assert "</script><script>alert(1)</script><img src=x" in detail and "U+202E" in detail and "U+001B" in detail
        assert shown.evaluate("document.querySelectorAll('img, #rows script, #rows style').length") == 0
        browser.close()
    assert said == [] and asked == []
