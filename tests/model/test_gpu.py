"""What only a GPU can show: the same numbers there as on the CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arena.model.classifier import loss_sum
from arena.training.optim import trainable
from tests.helpers import classifier, exact, pack
from tests.model.test_classifier import shared_batch, swap_pairs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LENGTHS = [40, 1, 9, 8, 33]


@pytest.mark.parametrize("share", [False, True])
def test_logits_and_gradients_equal_those_of_the_cpu(gemma2: Path, share: bool) -> None:
    results = []
    for device in ("cpu", "cuda"):
        model = classifier(exact(gemma2)).to(device)
        batch = (shared_batch(swap_pairs(), 4) if share else pack(LENGTHS)).pin_memory().to(device)
        logits = model(batch)
        loss_sum(logits, batch.label).backward()
        grads = torch.cat([parameter.grad.reshape(-1) for parameter in trainable(model.model).values()])
        results.append((logits.detach().cpu(), grads.cpu()))
    for cpu, cuda in zip(*results, strict=True):
        assert (cuda - cpu).norm() / cpu.norm() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_four_bit_training_step(gemma2: Path, dtype: str) -> None:
    model = classifier(exact(gemma2, quantization="nf4", dtype=dtype)).to("cuda")
    batch = pack(LENGTHS).to("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(batch)
    loss_sum(logits, batch.label).backward()
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainable(model.model).values())
