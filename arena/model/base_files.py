"""The files of a base: their folder, and the fingerprint of their content."""

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
from arena.hints import command
from arena.model.safety import INDEX, WEIGHTS, check_base, weight_files
from arena.storage.files import file_digest, fingerprint

CONFIG = "config.json"
DEMO_BASE = "demo_base"


def base_path(base: str) -> str:
    """The path or hub name of a base; `demo_base` is built in."""
    return str(RECIPES / DEMO_BASE) if base == DEMO_BASE else base


def base_folder(base: str, revision: str | None = None) -> Path:
    """The folder with a base's config and weights, which are downloaded from the hub unless they are cached.

    Args:
        revision: a branch, tag or commit on the hub.

    Raises:
        ValueError: it cannot be found, or its weights are not safetensors files; the message says what to do.
    """
    place = Path(base_path(base))
    on_hub = not place.is_dir()
    if on_hub:
        place = _download(base, revision, [CONFIG, WEIGHTS, INDEX])
    check_base(place)
    if on_hub and not (place / WEIGHTS).is_file():
        _download(base, place.name, [path.name for path in weight_files(place)])  # from the same commit
    return place


def _download(base: str, revision: str | None, names: list[str]) -> Path:
    """Downloads files of a base from the hub; returns the folder of their commit in the local cache."""
    with base_load_errors(base):
        offline = constants.HF_HUB_OFFLINE  # some versions of the library do not check this themselves
        return Path(snapshot_download(base, revision=revision, allow_patterns=names, local_files_only=offline))


def base_digest(base: str, revision: str | None = None) -> str:
    """Fingerprint of a base's config and of every byte of its weights, regardless of its place.

    A folder downloaded from a hub has the same digest as the base on the hub. The tokenizer is not included, because a
    judge has its own. Files are read in parallel, and only once per process unless their size or modification time
    changes.

    Raises:
        ValueError: as `base_folder`, and if the base lacks a file.
    """
    folder = base_folder(base, revision)
    config = folder / CONFIG
    files = weight_files(folder)
    if missing := [path.name for path in (config, *files) if not path.is_file()]:
        raise ValueError(f"model.base: {folder} lacks {', '.join(missing)}: fetch the complete base again")
    try:
        parsed = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is not JSON ({error}): fetch the base again") from None
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # hashing releases the global interpreter lock
        return fingerprint(parsed, *pool.map(_digest, files))


def _digest(path: Path) -> str:
    state = path.stat()
    return _remembered(path.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def _remembered(path: Path, size: int, mtime_ns: int) -> str:
    return file_digest(path)


@contextmanager
def base_load_errors(base: str) -> Iterator[None]:
    """Turns the various errors of a missing or gated base into one message that says how to get it."""
    if base.count("/") != 1 and base != DEMO_BASE and not Path(base).is_dir():
        raise ValueError(
            f"model.base: there is no folder {base}; give a folder or a hub name such as google/gemma-2-9b-it"
        )
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a broken config or tokenizer may raise any error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "custom code" in reason:
            raise ValueError(
                f"model.base: {base!r} needs code of its own, which is never run: use a base of a family that "
                "transformers supports itself"
            ) from error
        if Path(base_path(base)).is_dir():
            raise ValueError(
                f"model.base: {base!r} could not be loaded ({reason}): config.json, tokenizer.json and *.safetensors "
                "must belong to one model; fetch them again"
            ) from error
        raise ValueError(
            f"model.base: {base!r} could not be loaded ({reason}). If it is a gated model, accept its licence on its "
            f"Hugging Face page and run `{command('hf', 'auth', 'login')}`; on a machine without internet, download it "
            f"elsewhere (`hf download {base} --local-dir FOLDER`) and pass model.base=FOLDER"
        ) from error
