"""Fixtures that several tests share: made once, never changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded in tests
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # side by side, each with its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import arena  # noqa: F401 - before torch, whose threads wait as it says
from tests.helpers import make_base


@pytest.fixture(scope="session")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma-2 with soft cap, sliding window and grouped queries, and its tokenizer."""
    return make_base(tmp_path_factory.mktemp("gemma2"))
