"""Bases in single GGUF files, as llama.cpp uses them, turned once into folders in transformers' own format.

The folders are in the user's cache, under a name that depends on the file's content: `tokenizer` holds the config and
the tokenizer, and a folder for each dtype all that a base needs. Each is written whole or not at all, and every byte is
verified before it is read.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from arena.command_line import command
from arena.model.packaged import PACKAGED, packaged_file
from arena.model.safety import SAFE, SAFE_WEIGHTS, check_loaded
from arena.progress import console, loading_quietly
from arena.storage.files import atomic_write, fingerprint, remembered_digest, remove_scratch, user_cache
from arena.storage.lock import locked
from arena.storage.manifest import NAME as MANIFEST
from arena.storage.manifest import damage, write_manifest

FORMAT = 1  # increase it when the folders' content changes
OLDEST = "5.18"  # of transformers: those before merge the pieces of Gemma's tokenizers in another order
SUFFIX = ".gguf"
SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
BLOCK = re.compile(r"blk\.(\d+)\.")
LARGEST_GEMMAS = {"gemma2": 46, "gemma3": 62}  # the layers of the 27B sizes


def is_gguf(base: str) -> bool:
    """Whether a base is a GGUF file, by its name."""
    return base in PACKAGED or (base.lower().endswith(SUFFIX) and not Path(base).is_dir())


def gguf_digest(base: str) -> str:
    """Fingerprint of a GGUF base: that of its file, whatever it is turned into and wherever that is kept."""
    return fingerprint("gguf", remembered_digest(_file(base)))


def tokenizer_folder(base: str) -> Path:
    """The folder with the config and the tokenizer of a GGUF base.

    Raises:
        ValueError: it is no GGUF file, one of several parts, damaged, without weights, or of an architecture that
            transformers does not read; or the packages that are needed are missing.
    """
    file = _file(base)
    return _cached(file, "tokenizer", lambda draft: _write_tokenizer(file, draft))


def weights_folder(base: str, dtype: str) -> Path:
    """The folder with config, tokenizer and weights of a GGUF base, dequantised to `dtype`. Raises as above."""
    file, described = _file(base), tokenizer_folder(base)
    return _cached(file, dtype, lambda draft: _write_weights(file, described, dtype, draft))


def _file(base: str) -> Path:
    if base in PACKAGED and Path(base).exists():
        raise ValueError(
            f"model.base={base} is a base from packages, and there is also {Path(base).resolve()}: write ./{base} for "
            "what is there, or call from another folder"
        )
    path = packaged_file(base) if base in PACKAGED else Path(base)
    if not path.is_file():
        raise ValueError(f"model.base: there is no file {path}: give the path of a GGUF file, a folder or a hub name")
    return path


def _cached(file: Path, kind: str, write: Callable[[Path], None]) -> Path:
    """The folder `kind` of what a file is turned into, which `write` fills unless it is there and whole."""
    home = user_cache() / "gguf" / fingerprint(FORMAT, remembered_digest(file), transformers.__version__)
    folder = home / kind
    if damage(folder, remembered_digest) is None:
        return folder
    with locked(home, wait=True):
        how = damage(folder, remembered_digest)
        if how is None:  # another process has written it meanwhile
            return folder
        again = f" again ({how})" if folder.exists() else ""
        console.print(f"writing the {kind} of {file} into {folder}{again}, once")
        remove_scratch(home)
        with atomic_write(folder) as draft:
            draft.mkdir()
            write(draft)
            write_manifest(draft, {"made_from": file.name, "transformers": transformers.__version__})
    return folder


def _write_tokenizer(file: Path, draft: Path) -> None:
    reader = _checked(file)
    architecture = reader.fields["general.architecture"].contents()
    with _alone(file) as place:
        try:
            config = AutoConfig.from_pretrained(place, gguf_file=file.name, **SAFE)
        except Exception as error:  # the header may say anything
            raise ValueError(
                f"model.base: transformers {transformers.__version__} cannot read {file}, a GGUF file of the "
                f"architecture {architecture} ({_reason(error)}): use the model as a folder"
            ) from error
        _check_config(file, reader, config)
        with _loading(file):
            AutoTokenizer.from_pretrained(place, gguf_file=file.name, **SAFE).save_pretrained(str(draft))
    config.save_pretrained(str(draft))


def _write_weights(file: Path, described: Path, dtype: str, draft: Path) -> None:
    shutil.copytree(described, draft, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    options: dict[str, Any] = {"config": AutoConfig.from_pretrained(described, **SAFE), "dtype": getattr(torch, dtype)}
    if dequantise := getattr(transformers, "GgufConfig", None):  # older versions do nothing else
        options["quantization_config"] = dequantise(dequantize=True)
    with _alone(file) as place, _loading(file):
        model, report = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=file.name, output_loading_info=True, **options, **SAFE_WEIGHTS
        )
    check_loaded(str(file), model, report, head=None)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"model.base: {file} has values in {name} that {dtype} cannot hold: fetch it again")
    # transformers remembers that the weights come from a GGUF file, and refuses to save them
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    with _loading(file):
        model.save_pretrained(str(draft))


def _checked(file: Path) -> Any:
    """gguf's reader of a file that is whole, by what its header says. Raises as `tokenizer_folder`."""
    if Version(transformers.__version__) < Version(OLDEST):
        raise ValueError(
            f"model.base: transformers {transformers.__version__} makes wrong tokenizers of GGUF files such as {file}: "
            f"run `{command('pip', 'install', f'transformers>={OLDEST}')}`"
        )
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        hint = command("pip", "install", "gguf")
        raise ValueError(f"model.base: {file} needs the package gguf: run `{hint}`") from None
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ValueError(f"model.base: {file} is not a GGUF file (it does not begin with GGUF): fetch it again")
    name = SPLIT.search(file.name)
    try:
        reader = GGUFReader(file)  # fails if a tensor goes beyond the end of the file
        facts = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
        architecture, parts, kind = (
            facts["general.architecture"], facts.get("split.count", 1), facts.get("general.type", "model"),
        )  # fmt: skip
    except Exception as error:
        raise ValueError(f"model.base: {file} is damaged or incomplete ({_reason(error)}): fetch it again") from error
    if parts > 1 or (name and int(name[1]) > 1):
        raise ValueError(
            f"model.base: {file} is one of several parts: join them with llama.cpp's `llama-gguf-split --merge FIRST "
            "WHOLE.gguf`, and name the whole file"
        )
    if kind != "model" or not reader.tensors:
        held = "a vocabulary without weights" if kind == "model" else f"{kind!r}"
        raise ValueError(f"model.base: {file} holds no model but {held} ({architecture}): name a file with weights")
    return reader


def _check_config(file: Path, reader: Any, config: Any) -> None:
    """Checks that a config describes the file: transformers passes over what it does not know.

    Raises:
        ValueError: it does not; the model would compute something else.
    """
    names = [tensor.name for tensor in reader.tensors]
    layers = {int(found[1]) for name in names if (found := BLOCK.match(name))}
    if layers != set(range(config.num_hidden_layers)):
        raise ValueError(
            f"model.base: {file} has {len(layers)} layers, but {config.num_hidden_layers} by its header: fetch it again"
        )
    facts = {key.partition(".")[2]: field for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    scaling = facts["rope.scaling.type"].contents() if "rope.scaling.type" in facts else "none"
    softcap = facts["attn_logit_softcapping"].contents() if "attn_logit_softcapping" in facts else None
    unread = None
    if scaling != "none" or any(name.startswith(("rope_freqs", "rope_factors")) for name in names):
        unread = "a scaled rotary embedding"
    elif softcap is not None and softcap != config.attn_logit_softcapping:
        unread = f"a soft cap of {softcap:g}"
    elif len(layers) == LARGEST_GEMMAS.get(config.model_type.removesuffix("_text")):
        unread = "an attention scale of its own"
    if unread:
        raise ValueError(
            f"model.base: {file} has {unread}, which transformers does not read from GGUF files: use the model as a "
            "folder"
        )


@contextmanager
def _alone(file: Path) -> Iterator[str]:
    """A folder that holds the file and nothing else: transformers would prefer a tokenizer.json beside it."""
    with TemporaryDirectory() as place:
        (Path(place) / file.name).symlink_to(file.resolve())
        yield place


@contextmanager
def _loading(file: Path) -> Iterator[None]:
    """Turns whatever a damaged or unknown file raises into one message; a full disk or memory is no fault of it.

    Progress bars are shown on a terminal only.
    """
    bars = nullcontext() if console.is_terminal else redirect_stderr(StringIO())
    try:
        with loading_quietly(), bars:
            yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(
            f"model.base: {file} could not be loaded ({_reason(error)}): fetch it again, or use the model as a folder"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
