"""The demo data: labels follow the stated model, and everything that model reads is in the written text."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from arena.config import load_recipe
from arena.demo import synthetic, synthetic_text
from arena.demo.synthetic import ensure_demo
from arena.tasks.preference import COLUMNS as CLASSES

N_TRAIN, N_TEST = 2500, 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("demo")
    synthetic.write_demo(target, N_TRAIN, N_TEST, seed=3)
    return target


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def train(folder: Path) -> list[dict[str, str]]:
    return _read(folder / "train.csv")


@pytest.fixture(scope="module")
def rows(train: list[dict[str, str]]) -> list[synthetic.Row]:
    return [synthetic.Row(*(json.loads(row[name]) for name in synthetic.Row._fields)) for row in train]


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, list[float]]:
    rows = _read(folder / "truth.csv")
    return {row["id"]: [float(row[label]) for label in CLASSES] for row in rows}


def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        synthetic.write_demo(tmp_path / name, 40, 10, seed)
    for file in ("train.csv", "test.csv", "truth.csv", "sample_submission.csv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert (tmp_path / "one/train.csv").read_bytes() != (tmp_path / "three/train.csv").read_bytes()


def test_files_have_the_competitions_shape(folder: Path, train: list[dict[str, str]]) -> None:
    test, sample = _read(folder / "test.csv"), _read(folder / "sample_submission.csv")
    assert tuple(train[0]) == synthetic.TRAIN_COLUMNS and len(train) == N_TRAIN
    assert tuple(test[0]) == synthetic.TEST_COLUMNS and len(test) == N_TEST
    assert tuple(sample[0]) == ("id", *CLASSES)
    assert [row["id"] for row in sample] == [row["id"] for row in test]
    assert len({row["id"] for row in [*train, *test]}) == N_TRAIN + N_TEST
    assert all(sorted(row[label] for label in CLASSES) == ["0", "0", "1"] for row in train)
    raw = (folder / "train.csv").read_bytes()
    assert raw.isascii() and b"\\ud83d" in raw


def test_slashes_are_escaped_as_in_the_competition() -> None:
    assert synthetic._cell(["a/b", None, "é"]) == '["a\\/b",null,"\\u00e9"]'


def test_truth_is_what_the_written_text_says(
    train: list[dict[str, str]], rows: list[synthetic.Row], truth: dict[str, list[float]]
) -> None:
    for written, row in zip(train, rows, strict=True):
        assert truth[written["id"]] == list(synthetic.preference(row.response_a, row.response_b))
        assert sum(truth[written["id"]]) == pytest.approx(1, abs=1e-12)


def _chi_square(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic per degree of freedom, over twenty groups of rows with like P(A); near 1 if they agree."""
    groups = np.array_split(np.argsort(probabilities[:, 0]), 20)
    seen = np.array([labels[group].sum(axis=0) for group in groups])
    expected = np.array([probabilities[group].sum(axis=0) for group in groups])
    return float(((seen - expected) ** 2 / expected).sum() / (2 * len(groups)))


def test_labels_follow_the_stated_model(train: list[dict[str, str]], truth: dict[str, list[float]]) -> None:
    labels = np.array([[int(row[label]) for label in CLASSES] for row in train])
    stated = np.array([truth[row["id"]] for row in train])
    assert _chi_square(labels, stated) < 1.7
    flatter = stated**0.8 / (stated**0.8).sum(axis=1, keepdims=True)
    assert _chi_square(labels, flatter) > 1.7  # control: a model a fifth less sure is told apart
    assert _chi_square(labels, stated[:, [1, 0, 2]]) > 10  # control: A and B exchanged


def test_floor_leaves_room_between_it_and_the_prior(truth: dict[str, list[float]]) -> None:
    floor = np.mean([synthetic.entropy(p) for p in truth.values()])
    prior = synthetic.entropy(np.mean(list(truth.values()), axis=0))
    assert 0.80 < floor < 0.95
    assert prior - floor > 0.2


def test_exchanging_the_answers_exchanges_the_probabilities(rows: list[synthetic.Row]) -> None:
    for row in rows[:300]:
        a, b, tie = synthetic.preference(row.response_a, row.response_b)
        assert synthetic.preference(row.response_b, row.response_a) == pytest.approx((b, a, tie), abs=1e-12)


def test_tone_is_mark_and_negation_together() -> None:
    for text, tone in (
        ("It is indeed really clear.", 1),
        ("It is not, in my view, really clear.", -1),
        ("It was always very vague here.", -1),
        ("It was hardly, to be fair, vague here.", 1),
    ):
        assert synthetic_text.tones(text) == [tone]
    assert synthetic_text.tones("This never involves rain. Take the list first. 然后等十分钟。 Pots") == []
    assert synthetic_text.tones("This is never involved.\nIt is indeed very clear.") == [1]


def test_every_claim_reads_back_and_plain_talk_has_no_tone() -> None:
    rng = Random(1)
    for _ in range(500):
        tone = rng.choice((1, -1))
        assert synthetic_text.tones(synthetic_text.claim(rng, tone)) == [tone]
        topic = rng.choice(list(synthetic_text.TOPICS))
        assert synthetic_text.tones(synthetic_text.talk(rng, topic)) == []
    for text in (*synthetic_text.OTHER_SCRIPTS, synthetic_text.REFUSAL):
        assert synthetic_text.tones(text) == []


def test_words_and_neighbouring_pairs_do_not_tell_the_tone() -> None:
    rng = Random(2)
    tones = np.array([rng.choice((1, -1)) for _ in range(4000)])
    claims = [synthetic_text.claim(rng, tone) for tone in tones]
    counts = CountVectorizer(ngram_range=(1, 2)).fit_transform(claims)
    linear = LogisticRegression(C=0.1, max_iter=1000).fit(counts[:3000], tones[:3000])
    assert linear.score(counts[3000:], tones[3000:]) < 0.56
    words = [set(claim.replace(",", " ").rstrip(".").split()) for claim in claims]
    pair = [bool(w & set(synthetic_text.GOOD)) != bool(w & set(synthetic_text.NEGATORS)) for w in words]
    assert (np.where(pair, 1, -1) == tones).all()  # control: mark and negator together tell it always


def test_every_irregularity_occurs(rows: list[synthetic.Row]) -> None:
    answers = [answer for row in rows for side in row[1:] for answer in side]
    assert {len(row.prompt) for row in rows} == {1, 2, 3, 4}
    assert any(len(row.response_a) != len(row.response_b) for row in rows)
    assert any(row.response_a == [None] and row.response_b == [None] for row in rows)
    assert sum(row.response_a == row.response_b for row in rows) > 20
    assert any(None in row.response_a and row.response_b != row.response_a for row in rows)
    assert {"", " ", "null"} <= set(answers)
    assert len({row.prompt[0] for row in rows}) < len(rows) - 100
    assert any(synthetic_text.REFUSAL in (answer or "") for answer in answers)
    text = " ".join(answer or "" for answer in answers)
    assert all(script in text for script in "вή水ل🙂") and any("\ud83d" in (answer or "") for answer in answers)


def test_lengths_spread_twentyfold(rows: list[synthetic.Row]) -> None:
    words = sorted(sum(len((text or "").split()) for part in row for text in part) for row in rows)
    assert words[-3] >= 20 * words[len(words) // 50]
    assert 80 < words[len(words) // 2] < 150
    assert words[-1] < 1200


def test_no_rows_make_files_of_headers_only(tmp_path: Path) -> None:
    synthetic.write_demo(tmp_path, 0, 0, 1)
    assert _read(tmp_path / "train.csv") == []


def test_demo_rows_of_another_number_are_not_taken_for_those_of_the_recipe(tmp_path: Path) -> None:
    small, large = (
        load_recipe("demo", [f"data.path={tmp_path / 'demo'}", f"data.synthetic_rows=[{n},6]"]) for n in (30, 40)
    )
    assert ensure_demo(small) and not ensure_demo(small)
    with pytest.raises(ValueError, match=r"has demo data of 30 and 6 rows, .* asks for 40 and 6: remove that folder"):
        ensure_demo(large)
    (tmp_path / "demo" / "truth.csv").unlink()  # rows of one's own are nobody else's business
    assert not ensure_demo(large)
