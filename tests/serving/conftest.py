"""Judges that the tests of the server share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from arena import Judge
from tests.helpers import tiny_recipe
from tests.inference.test_judge_model import saved
from tests.serving.client import Client, served


@pytest.fixture(scope="package")
def run(gemma2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two folds."""
    folder = tmp_path_factory.mktemp("serving")
    recipe = tiny_recipe(folder, gemma2, "packing.budget=4096")
    for fold in range(2):
        saved(folder / "run" / f"fold{fold}", recipe, seed=fold)
    return folder / "run"


@pytest.fixture(scope="package")
def judges(run: Path) -> dict[str, Judge]:
    first = Judge.from_pretrained(run / "fold0")
    return {"first": first, "second": Judge.from_pretrained(run / "fold1", beside=[first])}


@pytest.fixture(scope="package")
def client(judges: dict[str, Judge]) -> Iterator[Client]:
    with served(judges) as client:
        yield client
