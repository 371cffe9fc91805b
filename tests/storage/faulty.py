"""A store in memory that fails as it is told to, and folders to send there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from arena.storage.manifest import write_manifest
from arena.storage.mirror import Mirror

URL = "faulty://bucket/runs"
PLACE = "demo/fold0"


class Faulty(MemoryFileSystem):
    """`put_file` and `open` go through the hooks, which the tests set; `sent` counts bytes."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    before: ClassVar[Callable[[str], None]] = staticmethod(lambda path: None)  # raises or sleeps
    change: ClassVar[Callable[[bytes], bytes]] = staticmethod(lambda data: data)  # what of a file arrives
    cut_after: ClassVar[int | None] = None  # bytes, after which the sender is no more
    puts: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("faulty://", "/", 1)))

    @classmethod
    def reset(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.puts.clear()
        cls.mend()

    @classmethod
    def mend(cls) -> None:
        cls.before = staticmethod(lambda path: None)
        cls.change = staticmethod(lambda data: data)
        cls.cut_after = None

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        kind = type(self)
        kind.puts.append(rpath)
        data = kind.change(Path(lpath).read_bytes())
        kind.before(rpath)
        left = len(data) if kind.cut_after is None else min(kind.cut_after, len(data))
        self.pipe_file(rpath, data[:left])
        if kind.cut_after is not None:
            kind.cut_after -= left
            if left < len(data) or kind.cut_after == 0:
                kind.before = staticmethod(gone)
                raise ConnectionError("cut")

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        type(self).before(path)
        return super().ls(path, detail=detail, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        if ".writable" in path:
            type(self).before(path)
        return super().pipe_file(path, value, mode, **kwargs)


fsspec.register_implementation("faulty", Faulty, clobber=True)


def gone(path: str) -> None:
    raise ConnectionError("the store is down")


def slow(seconds: float) -> Callable[[str], None]:
    return lambda path: time.sleep(seconds)


def failing(times: int) -> Callable[[str], None]:
    """Fails so many times, then never again."""
    left = [times]

    def before(path: str) -> None:
        if ".writable" not in path and left[0] > 0:
            left[0] -= 1
            raise ConnectionError("no route")

    return before


def checkpoint(run: Path, number: int, loss: float | None = None) -> Path:
    """A checkpoint of three small files, and its evaluation if `loss` is given."""
    folder = run / "checkpoints" / f"step-{number:08d}"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(bytes(range(40)) + b"%08d" % number)
    (folder / "deep/optimizer.safetensors").write_bytes(b"optimizer" * 5)
    (folder / "empty").touch()
    write_manifest(folder, {"step": number})
    if loss is not None:
        evaluation = run / "checkpoints" / f"evaluation-{number:08d}"
        evaluation.mkdir()
        (evaluation / "probabilities.safetensors").write_bytes(b"p%d" % number)
        write_manifest(evaluation, {"log_loss": loss})
    return folder


def evaluation(folder: Path) -> Path:
    return folder.parent / folder.name.replace("step", "evaluation")


class Messages(list[str]):
    """Messages, as the console would get them."""

    def about(self, text: str) -> int:
        return sum(text in line for line in self)


def mirror(tmp_path: Path, url: str = URL, messages: Messages | None = None, **options: Any) -> Mirror:
    report: Callable[[str], None] = Messages().append if messages is None else messages.append
    return Mirror(url, PLACE, tmp_path / "staging", report=report, **options)


def steps(found: list[Path]) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in found]
