"""The files of a base: the folder that they stand in, and the fingerprint of their content."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download

from arena.config import RECIPES
from arena.files import file_digest, fingerprint
from arena.hints import command
from arena.model.safety import INDEX, WEIGHTS, check_base, weight_files

CONFIG = "config.json"
DEMO_BASE = "demo_base"


def base_path(base: str) -> str:
    """Where a base stands: `demo_base` ships with the package, anything else is a folder or a hub name."""
    return str(RECIPES / DEMO_BASE) if base == DEMO_BASE else base


def base_folder(base: str, revision: str | None = None) -> Path:
    """The folder that holds a base's config and weights; those of a hub are downloaded, unless they are in its cache.

    Args:
        revision: on a hub: a branch, tag or commit.

    Raises:
        ValueError: there is none, or its weights are not safetensors files; says what to do.
    """
    place = Path(base_path(base))
    on_hub = not place.is_dir()
    if on_hub:
        place = _download(base, revision, [CONFIG, WEIGHTS, INDEX])
    check_base(place)
    if on_hub and not (place / WEIGHTS).is_file():
        _download(base, place.name, [path.name for path in weight_files(place)])  # of that commit and no later one
    return place


def _download(base: str, revision: str | None, names: list[str]) -> Path:
    """Files of a hub's base in the local cache: the folder of their commit."""
    with base_load_errors(base):
        offline = constants.HF_HUB_OFFLINE  # not all versions of the library see by themselves that they need not ask
        return Path(snapshot_download(base, revision=revision, allow_patterns=names, local_files_only=offline))


def base_digest(base: str, revision: str | None = None) -> str:
    """Fingerprint of what is loaded of a base, wherever it stands: its config, and every byte of its weights.

    A folder that was downloaded from a hub has the digest of that hub's base. The tokenizer does not count: a judge
    keeps its own. Files are read in parallel, and once in a process unless their size or time of change differs.

    Raises:
        ValueError: as `base_folder`, and for a base that lacks a file.
    """
    folder = base_folder(base, revision)
    config = folder / CONFIG
    files = weight_files(folder)
    if missing := [path.name for path in (config, *files) if not path.is_file()]:
        raise ValueError(f"model.base: {folder} lacks {', '.join(missing)}: fetch the base again, whole")
    try:
        parsed = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is not JSON ({error}): fetch the base again") from None
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # hashing does not hold the interpreter's lock
        return fingerprint(parsed, *pool.map(_digest, files))


def _digest(path: Path) -> str:
    state = path.stat()
    return _remembered(path.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def _remembered(path: Path, size: int, mtime_ns: int) -> str:
    return file_digest(path)


@contextmanager
def base_load_errors(base: str) -> Iterator[None]:
    """Turns the many errors of a missing or gated base into one message that says how to get it."""
    if base.count("/") != 1 and base != DEMO_BASE and not Path(base).is_dir():
        raise ValueError(
            f"model.base: there is no folder {base}; give a folder, or a hub name such as google/gemma-2-9b-it"
        )
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # what a broken config or tokenizer raises is of any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "custom code" in reason:
            raise ValueError(
                f"model.base: {base!r} brings code of its own, which is never run: use a base of a family that "
                "transformers has itself"
            ) from error
        if Path(base_path(base)).is_dir():
            raise ValueError(
                f"model.base: {base!r} could not be loaded ({reason}): config.json, tokenizer.json and *.safetensors "
                "must be those of one model; fetch them again"
            ) from error
        raise ValueError(
            f"model.base: {base!r} could not be loaded ({reason}). If it is a gated model, accept its licence on its "
            f"Hugging Face page and run `{command('hf', 'auth', 'login')}`; on a machine without internet, download it "
            f"elsewhere (`hf download {base} --local-dir FOLDER`) and pass model.base=FOLDER"
        ) from error
