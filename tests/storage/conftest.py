"""Every test begins with an empty store that works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from arena.storage import mirror
from tests.storage.faulty import Faulty


@pytest.fixture(autouse=True)
def working_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Faulty.reset()
    monkeypatch.setattr(mirror, "FETCH_PAUSES", (0.01, 0.01))
    yield
    Faulty.reset()
