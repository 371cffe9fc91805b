"""The page, in a browser: what is pasted is judged, swapped and kept in the address, and nothing is asked elsewhere."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from arena import Judge
from arena.serving.app import PAGE
from tests.serving.client import Client, served

HOSTILE = "</textarea><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


def test_the_page_needs_no_other_host(client: Client) -> None:
    for file in PAGE.iterdir():
        status, content, headers = client.ask("/" if file.name == "index.html" else f"/{file.name}")
        assert status == 200 and content == file.read_bytes()
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert b"http" not in content.replace(b"http://www.w3.org/2000/svg", b"") and b"innerHTML" not in content


def test_in_a_browser(judges: dict[str, Judge], tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    chromium = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := which(name))), None)
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    report, said, foreign = tmp_path / "report.html", list[str](), list[str]()
    report.write_text("<h1>A report</h1>")
    with served(judges, reports={"second": [report]}) as client, sync_api.sync_playwright() as started:
        home = f"http://127.0.0.1:{client.port}/"
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(reduced_motion="reduce")
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(home) else foreign.append(request.url))
        page.goto(home)
        page.wait_for_selector("body[data-ready]")
        check_the_page(page, judges["first"])
        link = page.url
        page.goto("about:blank")
        page.goto(link)
        page.wait_for_selector("body[data-ready]")
        assert page.get_by_label("Answer B").input_value() == "It is 4."
        page.locator("#judge").select_option("second")
        assert page.locator("#report").get_attribute("href") == "report?judge=second"
        browser.close()
    assert [each for each in said if "422" not in each] == [] and len(said) == 1  # of the refusal, which was wanted
    assert [each for each in foreign if each != "about:blank"] == []


def check_the_page(page: Any, judge: Judge) -> None:
    """Judges a row, swaps it, adds a turn and an answer, and ranks."""
    row = {"prompt": [HOSTILE], "response_a": ["It is 4."], "response_b": ["Five."]}
    page.get_by_label("Prompt").fill(HOSTILE)
    page.keyboard.press("Control+Enter")
    assert page.inner_text("#alert") == "There is nothing to judge: enter an answer."
    assert page.locator("#result").is_hidden() and page.locator("#invented").is_hidden()
    page.get_by_label("Answer A").fill("It is 4.")
    page.get_by_label("Answer B").fill("Five.")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#result:not([hidden]):not(.old)")
    expected = [f"{100 * share:.1f}%" for share in judge.predict_proba([row])[0]]
    assert page.locator("#details > .block .number").all_inner_texts() == expected
    assert (
        page.locator(".pair .bars").count() == 2 and ("flips" in page.inner_text(".note")) == judge.explain(row).flips
    )
    page.get_by_role("button", name="Swap A and B").click()
    page.wait_for_selector("#result:not(.old)")
    assert page.get_by_label("Answer A").input_value() == "Five."
    swapped = {**row, "response_a": row["response_b"], "response_b": row["response_a"]}
    expected = [f"{100 * share:.1f}%" for share in judge.predict_proba([swapped])[0]]
    assert page.locator("#details > .block .number").all_inner_texts() == expected
    page.get_by_role("button", name="Add an answer").click()
    page.keyboard.type("Who knows?")  # the new field has the focus
    page.get_by_role("button", name="Add a turn").click()
    assert page.locator("fieldset").count() == 2
    page.get_by_role("button", name="Remove turn 2").click()
    page.get_by_role("button", name="Judge").click()
    page.wait_for_selector("table")
    ranked = judge.rank([HOSTILE], [["Five."], ["It is 4."], ["Who knows?"]])
    names = page.locator("#details dt").all_inner_texts()
    assert names == [f"Answer {'ABC'[at]}" for at in ranked.order]
    widths = page.locator("#details .fill").evaluate_all("bars => bars.map(bar => bar.offsetWidth)")
    assert all(one >= other for one, other in pairwise(widths)) and widths[0] > 0
    page.get_by_role("button", name="Remove answer C").click()
    page.get_by_label("Prompt").fill("x" * 200_000)
    page.get_by_role("button", name="Judge").click()
    page.wait_for_selector("#alert:not(:empty)")
    assert page.inner_text("#alert") == "Prompt, Answer A, Answer B: has 200,016 characters; 200,000 are allowed"
    assert page.title() == "arena: which answer is better?" and page.locator("main img, main script").count() == 0
