"""The attention backends, their requirements, and the choice of one by a recipe's `model.attention` and the device."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch
from packaging.version import Version
from torch import Tensor

from arena.model.attention.blockwise import blockwise
from arena.model.attention.flash import HALF, flash
from arena.model.attention.flex import flex
from arena.model.attention.reference import reference
from arena.model.attention.tiles import kernel_options
from arena.model.attention.trial import Trial, why_it_fails
from arena.model.card import Card

Backend = Callable[..., Tensor]

BACKENDS: dict[str, Backend] = {"flash": flash, "flex": flex, "blockwise": blockwise, "reference": reference}
BEST = {"cuda": ("flash", "flex", "blockwise"), "cpu": ("blockwise",)}  # `auto` chooses the first that can run

AMPERE = (8, 0)
WIDEST_HEAD = 256
FLASH_VERSION = "2.6.0"  # the first with a softcap argument
FLASH_VERSION_SOFTCAP = "2.6.2"  # the first with a softcap in the backward


@dataclass(frozen=True)
class Choice:
    """A backend, and the reason for the choice in one line."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_backend(
    setting: str, card: Card, dtype: torch.dtype, head_dim: int, softcap: float | None, *, training: bool = False
) -> Choice:
    """The backend for a value of `model.attention`.

    Args:
        setting: a backend's name, or `auto`: the fastest that can run.
        dtype: of the products.
        training: whether gradients will be needed.

    Raises:
        ValueError: the named backend cannot run here.
    """
    needs = card, dtype, head_dim, softcap
    if setting != "auto":
        why = why_not(setting, *needs, training=training)
        if why is not None:
            instead = choose_backend("auto", *needs, training=training).name
            raise ValueError(
                f"model.attention={setting} cannot run here: {why}. Set model.attention=auto, which is {instead} here"
            )
        return Choice(setting, f"model.attention={setting}")
    passed_over: list[str] = []
    for name in BEST[card.kind]:
        why = why_not(name, *needs, training=training)
        if why is None:
            return Choice(name, "; ".join(passed_over) or f"the fastest on {card.kind}")
        passed_over.append(f"{name}: {why}")
    raise AssertionError("blockwise runs everywhere")


def why_not(
    name: str, card: Card, dtype: torch.dtype, head_dim: int, softcap: float | None, *, training: bool = False
) -> str | None:
    """Why a backend cannot run, in a few words; None if it can. For arguments see `choose_backend`.

    On a real GPU, flash and flex are tried once: flash-attn may be built for certain head sizes and cards only, and
    flex has to be compiled, which takes some seconds.
    """
    assert name in BACKENDS, name
    if name not in ("flash", "flex"):
        return None
    if name == "flash":
        why = _why_not_flash(card, dtype, head_dim, softcap)
    else:
        why = _why_not_flex(card, dtype, head_dim, training)
    if why is not None or card.index is None:
        return why
    trial = Trial(torch.device(card.kind, card.index), dtype, head_dim, softcap is not None, training)
    failed = why_it_fails(name, BACKENDS[name], trial)
    return None if failed is None else f"{_title(name)} does not run here: {failed}"


def _title(name: str) -> str:
    return (
        f"flash-attn {metadata.version('flash-attn')}"
        if name == "flash"
        else f"FlexAttention of torch {torch.__version__}"
    )


def _why_not_flash(card: Card, dtype: torch.dtype, head_dim: int, softcap: float | None) -> str | None:
    if card.kind != "cuda":
        return "it needs a CUDA device"
    if card.capability < AMPERE:
        return _too_old(card)
    if dtype not in HALF:
        return f"it supports bfloat16 and float16, not {_name(dtype)}"
    if head_dim > WIDEST_HEAD or head_dim % 8:
        return f"it supports head sizes up to {WIDEST_HEAD} that are a multiple of 8, not {head_dim}"
    return flash_attn_missing(FLASH_VERSION if softcap is None else FLASH_VERSION_SOFTCAP)


def _why_not_flex(card: Card, dtype: torch.dtype, head_dim: int, training: bool) -> str | None:
    if dtype not in (*HALF, torch.float32):
        return f"it supports bfloat16, float16 and float32, not {_name(dtype)}"
    if card.kind == "cpu":
        return "it has no backward on a CPU" if training else compiler_missing(("g++", "clang++"), "CXX")
    if card.capability < AMPERE:
        return _too_old(card)
    if not 16 <= head_dim <= WIDEST_HEAD:
        return f"it supports head sizes from 16 to {WIDEST_HEAD}, not {head_dim}"
    try:
        kernel_options(card, dtype, head_dim)
    except ValueError as error:
        return str(error)
    return cannot_compile()


def _too_old(card: Card) -> str:
    return f"it needs compute capability 8.0, but {card.name} has {card.capability[0]}.{card.capability[1]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def flash_attn_missing(least: str) -> str | None:
    """Why flash-attn cannot be used: it is missing, older than version `least`, or built for another torch."""
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return "flash-attn is not installed"
    if Version(version) < Version(least):
        return f"flash-attn {version} is older than {least}, the first version that supports this model"
    return _import_error("flash_attn", f"flash-attn {version}")


def cannot_compile() -> str | None:
    """Why torch cannot compile for a GPU here; None if it can."""
    return triton_missing() or compiler_missing(("gcc", "clang"), "CC")


@cache
def triton_missing() -> str | None:
    """Why triton cannot be used; None if it can."""
    return _import_error("triton", "triton")


@cache
def compiler_missing(names: tuple[str, ...], variable: str) -> str | None:
    """Why the code that torch generates cannot be compiled on this machine; None if it can."""
    if os.environ.get(variable) or any(map(shutil.which, names)):
        return None
    return f"it needs a compiler for its kernels, and there is none ({' or '.join(names)})"


def _import_error(module: str, title: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a library built for another torch raises any of these
        lines = str(error).strip().splitlines()
        return f"{title} cannot be imported ({lines[0] if lines else type(error).__name__})"
    return None
