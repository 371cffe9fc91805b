"""Every test begins with an empty store that works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage.faulty import Faulty


@pytest.fixture(autouse=True)
def working_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("arena.storage.mirror.PAUSES", (0.0, 0.0))
    Faulty.reset()
    yield
    Faulty.reset()
