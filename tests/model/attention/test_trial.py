"""Backends that do not run although they look as if they could: found by a small call, once, and told in words."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from arena.model.attention import trial as module
from arena.model.attention.flash import flash
from arena.model.attention.reference import reference
from arena.model.attention.trial import Trial, first_line, why_it_fails
from tests.model.attention.test_flash import Calls, calls  # noqa: F401

CPU = torch.device("cpu")
TRAINING = Trial(CPU, torch.float16, 256, softcap=True, training=True)
FORWARD = Trial(CPU, torch.float16, 256, softcap=True, training=False)


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_outcomes", {})


class Attend:
    """A backend of the reference that fails as it is told, and notes in which state it is called."""

    def __init__(self, forward: Exception | None = None, backward: Exception | None = None) -> None:
        self.forward, self.backward, self.calls = forward, backward, 0
        self.state: set[Any] = set()

    def __call__(self, q: Tensor, *given: Any, **named: Any) -> Tensor:
        self.calls += 1
        self.state.add((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        if self.forward is not None:
            raise self.forward
        out: Tensor = reference(q, *given, **named)
        if out.requires_grad and self.backward is not None:
            out.register_hook(self.refuse)
        return out

    def refuse(self, grad: Tensor) -> Tensor:
        assert self.backward is not None
        raise self.backward


def test_what_runs_is_called_without_and_with_a_window(calls: Calls) -> None:  # noqa: F811
    assert why_it_fails("flash", flash, TRAINING) is None
    assert [call["window_size"] for call in calls] == [(-1, -1), (module.WINDOW - 1, 0)]
    assert {call["softcap"] for call in calls} == {module.SOFTCAP}
    q, k, *_ = calls[0]["given"]
    assert q.dtype == torch.float16 and q.shape[1:] == (module.HEADS, 256) and k.shape[1:] == (module.KV_HEADS, 256)


def test_a_build_without_a_head_size_is_noticed() -> None:
    lacking = Attend(RuntimeError("This flash attention build does not support head_dim 32.\nat line 3"))
    assert why_it_fails("flash", lacking, TRAINING) == "This flash attention build does not support head_dim 32"


def test_a_build_without_the_backward_runs_forward_alone() -> None:
    lacking = Attend(backward=RuntimeError("This flash attention build does not support backward."))
    assert why_it_fails("flash", lacking, FORWARD) is None
    assert "does not support backward" in str(why_it_fails("flash", lacking, TRAINING))
    assert why_it_fails("flash", lacking, FORWARD) is None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wrong", ["window", "softcap", "boundaries", "not a number", "gradient"])
def test_wrong_numbers_are_noticed(wrong: str, training: bool) -> None:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, *longest: int, **options: Any
    ) -> Tensor:
        if wrong == "window" and options["window"] is not None:
            options["window"] //= 2
        if wrong == "softcap":
            options["softcap"] = 50.0
        if wrong == "boundaries":
            ends_q = ends_k = ends_q[[0, -1]]
        out = reference(q, k, v, ends_q, ends_k, *longest, **options)
        if wrong == "gradient" and out.requires_grad:
            out.register_hook(lambda grad: 1.2 * grad)
        return out * float("nan") if wrong == "not a number" else out

    for trial in (TRAINING if training else FORWARD, replace(TRAINING, dtype=torch.bfloat16, training=training)):
        why = why_it_fails(wrong, attend, trial)
        assert (why is None) if wrong == "gradient" and not training else "numbers are wrong" in str(why), why


def test_a_backend_that_is_ruled_out_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ruled_out", {})
    attend = Attend()
    module.rule_out("flash", "it hung")
    assert why_it_fails("flash", attend, TRAINING) == "it hung" and attend.calls == 0
    assert why_it_fails("flex", attend, TRAINING) is None


def test_each_call_is_tried_once() -> None:
    for attend in (Attend(), Attend(RuntimeError("no kernel image"))):
        found = {why_it_fails(f"{id(attend)}", attend, TRAINING) for _ in range(3)}
        assert len(found) == 1 and attend.calls == (1 if attend.forward else 2)
    good = Attend()
    assert why_it_fails("good", good, TRAINING) is why_it_fails("good", good, FORWARD) is None
    assert good.calls == 2, "what runs with its backward runs without"


@pytest.mark.parametrize("name", ["autocast", "inference", "no_grad", "hooks", "checkpoint"])
def test_the_state_of_the_asking_thread_does_not_matter(name: str) -> None:
    attend, packed = Attend(), []
    states: dict[str, Callable[[], Any]] = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "hooks": lambda: saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x),
    }
    if name == "checkpoint":

        def layer(x: Tensor) -> Tensor:
            assert why_it_fails("flash", attend, TRAINING) is None
            return x * x

        checkpoint(layer, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    else:
        with states[name]():
            assert why_it_fails("flash", attend, TRAINING) is None
    assert attend.state == {(False, False, True)} and packed == [] and attend.calls == 2


def test_nothing_is_tried_within_a_backward() -> None:
    """Reentrant checkpoints run the forward there; on a GPU the backward of a trial would never begin."""
    attend, found = Attend(RuntimeError("no kernel image")), []

    def layer(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            found.append(why_it_fails("flash", attend, TRAINING))
        return x * x

    checkpoint(layer, torch.ones(2, requires_grad=True), use_reentrant=True).sum().backward()
    assert found == [None] and attend.calls == 0
    assert why_it_fails("flash", attend, TRAINING) == "no kernel image"
    checkpoint(layer, torch.ones(2, requires_grad=True), use_reentrant=True).sum().backward()
    assert found[1:] == ["no kernel image"], "what an earlier trial found holds in a backward too"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("CUDA out of memory")]
)
def test_exhausted_memory_does_not_rule_out_a_backend(error: Exception) -> None:
    attend = Attend(error)
    for calls_made in (1, 2):
        with pytest.raises(type(error), match="out of memory"):
            why_it_fails("flash", attend, TRAINING)
        assert attend.calls == calls_made, "it is not remembered"
    too_large = Attend(
        torch.OutOfMemoryError("out of resource: triton_tem_fused_0 Required: 151552 Hardware limit:101376")
    )
    assert "out of resource" in str(why_it_fails("flex", too_large, TRAINING))


def test_two_threads_try_once() -> None:
    attend = Attend()
    threads = [threading.Thread(target=why_it_fails, args=("flash", attend, TRAINING)) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert attend.calls == 2


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A GPU whose tensors are on the CPU, and which may be broken."""
    gpu: dict[str, Any] = {"broken": None, "current": None, "waited": 0}

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            gpu["current"] = self.device

        def __exit__(self, *_: object) -> None:
            gpu["current"] = None

    def synchronize() -> None:
        assert gpu["current"] == torch.device("cuda", 1)
        gpu["waited"] += 1
        if gpu["broken"] is not None:
            raise gpu["broken"]

    on_cpu = {name: getattr(torch, name) for name in ("tensor", "empty")}
    for name, make in on_cpu.items():
        monkeypatch.setattr(torch, name, lambda *a, make=make, device, **k: make(*a, **k))
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    yield gpu


def test_a_device_that_is_broken_is_not_a_backend_that_lacks_something(made_up_gpu: dict[str, Any]) -> None:
    second = Trial(torch.device("cuda", 1), torch.float16, 64, softcap=False, training=True)
    assert why_it_fails("fine", Attend(), second) is None and made_up_gpu["waited"] == 1
    lacking = RuntimeError("CUDA error: no kernel image is available for execution on the device")
    assert "no kernel image" in str(why_it_fails("lacking", Attend(lacking), second))
    made_up_gpu["broken"] = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        why_it_fails("broken", Attend(), second)
    assert made_up_gpu["current"] is None


def test_the_first_informative_line_of_an_error() -> None:
    said = "backend='inductor' raised:\nRuntimeError: No valid triton configs.\n\nSet TORCHDYNAMO_VERBOSE=1"
    assert first_line(RuntimeError(said)) == "RuntimeError: No valid triton configs"
    assert first_line(RuntimeError("\n  one\ntwo")) == "one" and first_line(AssertionError()) == "AssertionError"
    assert len(first_line(RuntimeError("x" * 5000))) == 300
