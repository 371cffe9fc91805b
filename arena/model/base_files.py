"""The files of a base: where they are, what identifies them, and the limits of the input that they can take."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download

from arena.command_line import command
from arena.data.tokens import TokenStore
from arena.model.gguf_base import gguf_digest, is_gguf, tokenizer_folder, weights_folder
from arena.model.safety import INDEX, WEIGHTS, check_base, weight_files
from arena.prompt_settings import RECIPES
from arena.storage.files import fingerprint, remembered_digest

CONFIG = "config.json"
DEMO_BASE = "demo_base"


def base_path(base: str) -> str:
    """The path or hub name of a base; `demo_base` is built in."""
    return str(RECIPES / DEMO_BASE) if base == DEMO_BASE else base


def config_place(base: str) -> str:
    """The folder or hub name with a base's config and tokenizer. Raises `ValueError` as `base_folder`."""
    return str(tokenizer_folder(base)) if is_gguf(base) else base_path(base)


def base_folder(base: str, revision: str | None = None, dtype: str = "float32") -> Path:
    """The folder with a base's config and weights.

    They are downloaded from the hub, or made from a GGUF file, unless they are cached.

    Args:
        revision: a branch, tag or commit on the hub.
        dtype: in which a GGUF file's weights are cached; a folder has a dtype of its own.

    Raises:
        ValueError: it cannot be found, or its weights are neither safetensors nor a GGUF file that can be used; the
            message says what to do.
    """
    if is_gguf(base):
        if revision is not None:
            raise ValueError(f"model.revision={revision}, but {base} is a file and not on the hub: leave it out")
        return weights_folder(base, dtype)
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

    A folder downloaded from a hub has the same digest as the base on the hub, and a GGUF file has one whatever its
    weights are dequantised to. The tokenizer is not included, because a judge has its own. Files are read in parallel,
    and only once per process unless their size or modification time changes.

    Raises:
        ValueError: as `base_folder`, and if the base lacks a file.
    """
    if is_gguf(base):
        return gguf_digest(base)
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
        return fingerprint(parsed, *pool.map(remembered_digest, files))


@contextmanager
def base_load_errors(base: str) -> Iterator[None]:
    """Turns the various errors of a missing or gated base into one message that says how to get it."""
    local = base == DEMO_BASE or is_gguf(base) or Path(base).is_dir()
    if base.count("/") != 1 and not local:
        raise ValueError(
            f"model.base: there is no folder {base}; give a folder, a GGUF file, or a hub name such as "
            "google/gemma-2-9b-it"
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
        if local:
            raise ValueError(
                f"model.base: {base!r} could not be loaded ({reason}): config.json, tokenizer.json and *.safetensors "
                "must belong to one model; fetch them again"
            ) from error
        raise ValueError(
            f"model.base: {base!r} could not be loaded ({reason}). If it is a gated model, accept its licence on its "
            f"Hugging Face page and run `{command('hf', 'auth', 'login')}`; on a machine without internet, download it "
            f"elsewhere (`hf download {base} --local-dir FOLDER`) and pass model.base=FOLDER"
        ) from error


def check_length(config: Any, max_length: int, base: str) -> None:
    """Raises `ValueError` if examples may have more tokens than a base has positions, as far as its config tells."""
    most = positions(config)
    if most is not None and max_length > most:
        raise ValueError(
            f"prompt.max_length is {max_length:,}, but {base} supports at most {most:,} tokens "
            f"(max_position_embeddings in its config): pass prompt.max_length={most} or less"
        )


def positions(config: Any) -> int | None:
    """The number of tokens that a base supports; None if its config does not tell.

    Scaling of rotary embeddings extends the positions that they were trained on; `max_position_embeddings` includes the
    extension in some configs, and not in others.
    """
    text = config.get_text_config()
    most: int | None = getattr(text, "max_position_embeddings", None)
    if most is None:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    scalings = [
        rope,
        *(each for each in rope.values() if isinstance(each, dict)),
    ]  # some configs have one per kind of layer
    stretched = [
        int((each.get("original_max_position_embeddings") or most) * each["factor"])
        for each in scalings
        if each.get("factor")
    ]
    return max(most, *stretched) if stretched else most


def check_ids(config: Any, store: TokenStore, tokenizer: Any, base: str) -> None:
    """Raises `ValueError` if a token of the store has no row in the base's embedding.

    Only tokens that occur are checked, because some published tokenizers have unused ids beyond the embedding.
    """
    rows, largest = config.get_text_config().vocab_size, store.largest_id()
    if largest >= rows:
        raise ValueError(
            f"the tokenizer of {base} gives the token {tokenizer.convert_ids_to_tokens(largest)!r} the id {largest:,}, "
            f"but the embedding has {rows:,} rows: add rows to the base (resize_token_embeddings, then train them), "
            "or use the tokenizer that the base was trained with"
        )
