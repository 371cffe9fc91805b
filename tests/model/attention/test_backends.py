"""Which backend is taken on which card, what is said of it, and that a model uses the one it says."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from arena.model.attention import backends, flash, flex, trial
from arena.model.attention.backends import BACKENDS, choose_backend
from arena.model.attention.trial import Trial
from arena.model.attention.varlen import used_backends
from arena.model.backbone import attention_choice
from arena.model.card import Card
from tests.helpers import classifier, exact, pack

CPU = Card("cpu", "a processor", (0, 0), 2**34)
H100 = Card("cuda", "H100", (9, 0), 80 * 2**30)
T4 = Card("cuda", "T4", (7, 5), 16 * 2**30)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PROBES = ((flash, "flash_attn_missing"), (trial, "triton_missing"), (trial, "compiler_missing"))


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every package and compiler were there."""
    for module, probe in PROBES:
        monkeypatch.setattr(module, probe, lambda *_: None)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(
    ("card", "dtype", "head_dim", "training", "expected"),
    [
        (H100, BF16, 256, True, "flash (the fastest on cuda)"),
        (H100, FP16, 128, False, "flash (the fastest on cuda)"),
        (H100, FP32, 256, True, "flex (flash: it supports bfloat16 and float16, not float32)"),
        (H100, BF16, 100, True, "flex (flash: it supports head sizes up to 256 that are a multiple of 8, not 100)"),
        (H100, FP64, 64, True, "blockwise (flash: it supports bfloat16 and float16, not float64; flex: it supports "
         "bfloat16, float16 and float32, not float64)"),
        (H100, BF16, 512, True, "blockwise (flash: it supports head sizes up to 256 that are a multiple of 8, not 512; "
         "flex: it supports head sizes from 16 to 256, not 512)"),
        (T4, FP16, 256, False, "blockwise (flash: it needs compute capability 8.0, but T4 has 7.5; flex: it needs "
         "compute capability 8.0, but T4 has 7.5)"),
        (CPU, BF16, 256, True, "blockwise (the fastest on cpu)"),
        (CPU, FP32, 7, False, "blockwise (the fastest on cpu)"),
    ],
)  # fmt: skip
def test_auto(card: Card, dtype: torch.dtype, head_dim: int, training: bool, expected: str) -> None:
    assert str(choose_backend("auto", card, dtype, head_dim, 50.0, training=training)) == expected


def test_auto_reports_what_is_missing(monkeypatch: pytest.MonkeyPatch, everything: None) -> None:
    monkeypatch.setattr(flash, "flash_attn_missing", lambda _: "flash-attn is not installed")
    assert str(choose_backend("auto", H100, BF16, 256, 50.0)) == "flex (flash: flash-attn is not installed)"
    monkeypatch.setattr(trial, "triton_missing", lambda: "triton cannot be imported (No module named 'triton')")
    choice = choose_backend("auto", H100, BF16, 256, 50.0)
    assert choice.name == "blockwise"
    assert choice.reason == (
        "flash: flash-attn is not installed; flex: triton cannot be imported (No module named 'triton')"
    )


@pytest.mark.usefixtures("everything")
def test_a_named_backend_is_taken_where_it_runs() -> None:
    for name in BACKENDS:
        assert choose_backend(name, H100, BF16, 256, 50.0, training=True).name == name
    for name in ("flex", "blockwise", "reference"):
        assert choose_backend(name, CPU, FP32, 16, None).name == name


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(
    ("setting", "card", "dtype", "training", "message"),
    [
        ("flash", CPU, BF16, False, "model.attention=flash cannot run here: it needs a CUDA device. Set "
         "model.attention=auto, which is blockwise here"),
        ("flash", T4, FP16, False, "compute capability 8.0, but T4 has 7.5.*which is blockwise"),
        ("flash", H100, FP32, True, "bfloat16 and float16, not float32.*which is flex"),
        ("flex", T4, FP16, False, "compute capability 8.0, but T4 has 7.5"),
        ("flex", CPU, FP32, True, "no backward on a CPU.*which is blockwise"),
    ],
)  # fmt: skip
def test_a_named_backend_that_cannot_run_is_an_error(
    setting: str, card: Card, dtype: torch.dtype, training: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_backend(setting, card, dtype, 256, 50.0, training=training)


def fake_flash_attn(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str, code: str) -> None:
    """A package of that name and version, whose import runs `code`."""
    (folder / "flash_attn").mkdir()
    (folder / "flash_attn" / "__init__.py").write_text(code)
    info = folder / f"flash_attn-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)


@pytest.mark.parametrize(
    ("version", "code", "softcap", "reason"),
    [
        ("2.6.2", "", 50.0, None),
        ("2.8.3.post2", "", 50.0, None),
        ("2.6.1", "", 50.0, "flash-attn 2.6.1 is older than 2.6.2, the first version that supports this model"),
        ("2.6.1", "", None, None),
        ("2.5.9", "", None, "flash-attn 2.5.9 is older than 2.6.0, the first version that supports this model"),
        ("2.10.0", "raise ImportError('undefined symbol: c10')", 50.0,
         "flash-attn 2.10.0 cannot be imported (undefined symbol: c10)"),
        ("2.8.3", "raise OSError('libcudart.so.12')", None, "flash-attn 2.8.3 cannot be imported (libcudart.so.12)"),
    ],
)  # fmt: skip
def test_flash_attn_is_looked_at_and_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, code: str, softcap: float | None, reason: str | None
) -> None:
    fake_flash_attn(tmp_path, monkeypatch, version, code)
    monkeypatch.setattr(flash, "flash_attn_missing", flash.flash_attn_missing.__wrapped__)
    assert flash.supports(H100, BF16, 256, softcap, False) == reason
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert flash.flash_attn_missing.__wrapped__("2.6.2") == "flash-attn is not installed"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton cannot be imported (" in trial.triton_missing.__wrapped__()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "there is none (g++ or clang++)" in trial.compiler_missing.__wrapped__(("g++", "clang++"), "CXX")
    monkeypatch.setenv("CXX", "/opt/compiler")
    assert trial.compiler_missing.__wrapped__(("g++", "clang++"), "CXX") is None


@pytest.mark.parametrize("setting", ["auto", "reference", "blockwise"])
def test_a_model_uses_the_backend_that_it_reports(gemma2: Path, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def spy(name: str) -> Any:
        original = BACKENDS[name].attend
        return lambda *given, **named: called.append(name) or original(*given, **named)

    for name in list(BACKENDS):
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], attend=spy(name)))
    model = classifier(exact(gemma2, attention=setting))
    assert used_backends(model) == ""
    expected = attention_choice(model.model, "float32", training=True)
    model(pack([9, 4]))
    assert set(called) == {expected.name} == {used_backends(model)}
    assert len(called) == 3


def test_a_backend_that_cannot_run_is_an_error_at_loading(gemma2: Path) -> None:
    model = classifier(exact(gemma2, attention="flash"))
    for ask in (lambda: attention_choice(model.model, "float32", training=False), lambda: model(pack([9, 4]))):
        with pytest.raises(ValueError, match=r"model\.attention=flash cannot run here: it needs a CUDA device"):
            ask()
    flex = classifier(exact(gemma2, attention="flex"))
    with pytest.raises(ValueError, match="no backward on a CPU"):
        attention_choice(flex.model, "float32", training=True)
    with pytest.raises(ValueError, match="no backward on a CPU"):
        flex(pack([9, 4]))


FOUND = replace(H100, index=0)
LACKS = "flash-attn 2.8.3 does not run here: This flash attention build does not support head_dim 32"
TOO_LARGE = "out of resource: triton_tem_fused_0 Required: 151552 Hardware limit:101376"


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, everything: None) -> list[tuple[str, Trial]]:
    """A GPU on which flash-attn lacks heads of 32 and flex does not compile for float16; what is tried there."""
    made: list[tuple[str, Trial]] = []

    def why(name: str, attend: Any, trial: Trial) -> str | None:
        assert attend is BACKENDS[name].attend
        made.append((name, trial))
        if name == "flash":
            return None if trial.head_dim == 256 else LACKS.split(": ")[1]
        return TOO_LARGE if trial.dtype == FP16 else None

    for module in (flash, flex):
        monkeypatch.setattr(module, "why_it_fails", why)
    monkeypatch.setattr(metadata, "version", lambda _: "2.8.3")
    return made


def test_what_does_not_run_is_passed_over(tried: list[tuple[str, Trial]]) -> None:
    assert str(choose_backend("auto", FOUND, BF16, 256, 50.0, training=True)) == "flash (the fastest on cuda)"
    assert tried == [("flash", Trial(torch.device("cuda", 0), BF16, 256, softcap=True, training=True))], "flex is not"
    assert str(choose_backend("auto", FOUND, BF16, 32, None)) == f"flex (flash: {LACKS})"
    choice = choose_backend("auto", FOUND, FP16, 32, None)
    assert choice.name == "blockwise"
    assert (
        choice.reason
        == f"flash: {LACKS}; flex: FlexAttention of torch {torch.__version__} does not run here: {TOO_LARGE}"
    )


def test_a_named_backend_that_does_not_run_is_an_error(tried: list[tuple[str, Trial]]) -> None:
    assert choose_backend("flash", FOUND, BF16, 256, None).name == "flash"
    with pytest.raises(ValueError, match=f"model.attention=flash cannot run here: {LACKS}. Set .* which is flex here"):
        choose_backend("flash", FOUND, BF16, 32, None)
    with pytest.raises(ValueError, match=r"flex cannot run here: FlexAttention of torch .*out of resource.*blockwise"):
        choose_backend("flex", FOUND, FP16, 32, None)


def test_only_what_is_there_and_looks_able_is_tried(tried: list[tuple[str, Trial]]) -> None:
    for card, dtype in ((H100, BF16), (CPU, FP32), (replace(T4, index=0), FP16)):
        choose_backend("auto", card, dtype, 32, None)
    for name in ("blockwise", "reference"):
        choose_backend(name, FOUND, BF16, 32, None)
    assert tried == []


def test_too_little_shared_memory_is_a_reason() -> None:
    small = Card("cuda", "an old card", (8, 0), 2**34, shared=48 << 10)
    why = flex.supports(small, FP32, 256, None, False)
    assert why == "its smallest tiles need 69 KiB of shared memory, but there are 48"


@pytest.mark.parametrize("training", [True, False])
def test_layers_ask_for_what_they_will_do(gemma2: Path, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def choose(*given: Any, training: bool) -> backends.Choice:
        asked.append(training)
        return choose_backend(*given, training=training)

    monkeypatch.setattr("arena.model.attention.varlen.choose_backend", choose)
    model = classifier(exact(gemma2))
    with torch.set_grad_enabled(training):
        model(pack([9, 4]))
    assert asked == [training] * 3
