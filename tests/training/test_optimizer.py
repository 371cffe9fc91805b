"""Parameter groups and schedules."""

from __future__ import annotations

from pathlib import Path

import pytest

from arena.settings import TrainSettings
from arena.training.optimizer import make_optimizer, make_schedule, trainable
from tests.helpers import classifier, exact


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_head_and_adapters_have_their_own_rates(gemma2: Path, kind: str) -> None:
    model = classifier(exact(gemma2)).model
    settings = TrainSettings.model_validate({"lr": 0.1, "head_lr": 0.2, "weight_decay": 0.3, "optimizer": kind})
    head, rest = make_optimizer(model, settings).param_groups
    assert (head["lr"], head["weight_decay"], len(head["params"])) == (0.2, 0.0, 1)
    assert (rest["lr"], rest["weight_decay"]) == (0.1, 0.3)
    assert len(rest["params"]) == len(trainable(model)) - 1


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_warms_up_then_decays_to_zero(gemma2: Path, schedule: str) -> None:
    settings = TrainSettings.model_validate({"lr": 1.0, "head_lr": 2.0, "warmup": 0.2, "schedule": schedule})
    optimizer = make_optimizer(classifier(exact(gemma2)).model, settings)
    scheduler = make_schedule(optimizer, settings, 20)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert [rate[1] for rate in rates[:5]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert rates[4][0] == 2.0
    assert scheduler.get_last_lr()[1] == pytest.approx(0, abs=1e-9)
