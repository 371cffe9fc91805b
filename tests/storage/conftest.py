"""Every test begins with an empty store that works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage.faulty import Faulty


@pytest.fixture(autouse=True)
def working_store() -> Iterator[None]:
    Faulty.reset()
    yield
    Faulty.reset()
