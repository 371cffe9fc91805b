"""The gather's gradient: torch's own in float32, and rounded once in bfloat16 however many segments see a token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arena.model.attention.gather import gather
from tests.model.test_classifier import relative

SEEN = torch.cat([torch.arange(20).repeat(60), torch.arange(20, 50)])  # twenty tokens that sixty segments see


def gradient(ours: bool, dtype: torch.dtype, index: Tensor = SEEN, device: str = "cpu") -> Tensor:
    torch.manual_seed(0)
    states = torch.randn(50, 2, 8).to(device, dtype).requires_grad_()
    weights, index = torch.rand(len(index), 2, 8).bfloat16().to(device, dtype), index.to(device)
    gathered = gather(states, index) if ours else states.index_select(0, index)
    assert torch.equal(gathered, states[index])
    (gathered * weights).sum().backward()
    assert states.grad is not None
    return states.grad.float().cpu()


def test_the_gradient_is_the_sum_of_all_that_see_a_token() -> None:
    truth = gradient(False, torch.float32)
    assert relative(gradient(True, torch.float32), truth) <= 1e-6
    assert relative(gradient(True, torch.bfloat16), truth) <= 2e-3
    assert relative(gradient(True, torch.float32, SEEN.flip(0)), truth) > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_is_rounded_once_too() -> None:
    truth = gradient(False, torch.float32)
    assert relative(gradient(True, torch.bfloat16, device="cuda"), truth) <= 2e-3
