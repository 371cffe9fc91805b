"""The table of families: all of it is tested, and a family that is not in it keeps transformers' own numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import HeliumConfig

from arena.model import families
from arena.model.backbone import backbone, load_base
from arena.model.families import FAMILIES, UNKNOWN
from arena.model.last_layer import takes_last_token
from arena.model.memory.fused import PARTS
from arena.tasks.preference import CLASSES
from tests import helpers
from tests.helpers import CONFIGS, classifier, exact, make_base, pack
from tests.model.test_classifier import logits_and_gradients, relative


@pytest.fixture
def helium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A family whose rotary embedding pairs neighbouring dimensions."""
    monkeypatch.setitem(helpers.CONFIGS, "helium", HeliumConfig)
    return make_base(tmp_path, "helium", head_dim=16)


def fused_against_plain(base: Path) -> float:
    """The largest relative difference of logits and gradients that fusing everything makes."""
    batch, results = pack([40, 1, 9, 8, 33]), []
    for fuse in ("none", PARTS):
        model = classifier(exact(base, fuse=fuse)).train()
        results.append(logits_and_gradients(model.model, model(batch), batch))
    return max(relative(ours, plain) for ours, plain in zip(*results, strict=True))


def test_every_family_in_the_table_is_tested() -> None:
    assert set(FAMILIES) == set(CONFIGS)


def test_a_family_that_is_not_in_the_table_runs_without_the_extras(helium: Path) -> None:
    assert fused_against_plain(helium) <= 1e-5
    assert not takes_last_token(backbone(load_base(exact(helium), CLASSES)))


def test_a_wrong_entry_in_the_table_fails_the_comparison(helium: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setitem(families.FAMILIES, "helium", replace(UNKNOWN, rotary_halves=True))
    assert fused_against_plain(helium) > 1e-3


def test_training_prints_what_an_unknown_family_does_without(
    helium: Path, gemma2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_base(exact(helium), CLASSES, announce=True)
    assert "helium is not in this package's table of families" in " ".join(capsys.readouterr().out.split())
    load_base(exact(gemma2), CLASSES, announce=True)
    assert "table" not in capsys.readouterr().out
