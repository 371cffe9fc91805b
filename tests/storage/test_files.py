"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from arena.storage.files import (
    SCRATCH,
    atomic_write,
    file_digest,
    fingerprint,
    local_path,
    remove_scratch,
    write_json,
    write_text,
)  # fmt: skip


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_write(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_replace_folders(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    for text in ("one", "two"):
        with atomic_write(target) as draft:
            draft.mkdir()
            (draft / text).write_text(text)
    assert [path.name for path in target.iterdir()] == ["two"]
    assert list(target.parent.iterdir()) == [target]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_fingerprints_tell_parts_apart(tmp_path: Path) -> None:
    prints = [fingerprint("ab", "c"), fingerprint("a", "bc"), fingerprint(b"ab", "c"), fingerprint({"a": 1, "b": 2})]
    assert len(set(prints)) == 4
    assert fingerprint({"b": 2, "a": 1}) == prints[3]
    write_text(tmp_path / "x", "hello")
    assert file_digest(tmp_path / "x") == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/precious").touch()
    with pytest.raises(IsADirectoryError, match="name a file"):
        write_text(tmp_path / "folder", "x")
    assert (tmp_path / "folder/precious").exists()


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from arena.storage.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as draft: draft.write_text('half'); os.kill(os.getpid(), 9)"
    )
    (tmp_path / "kept").write_text("whole")
    (tmp_path / ".hidden").write_text("another's")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "kept")], check=False)
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("kept", ".hidden")]
    assert len(left) == 1 and left[0].endswith(SCRATCH)
    remove_scratch(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "kept"]
    assert (tmp_path / "kept").read_text() == "whole"


def test_errors_of_other_languages_are_errors_of_the_system(tmp_path: Path) -> None:
    class RustError(Exception):
        pass

    with pytest.raises(OSError, match=r"No space left on device: .*a\.txt") as found, atomic_write(tmp_path / "a.txt"):
        raise RustError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert found.value.errno == 28
    with pytest.raises(RustError), atomic_write(tmp_path / "a.txt"):
        raise RustError("something else")


def test_the_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*out.csv'"), atomic_write(tmp_path / "out.csv"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_is_put_back_if_its_successor_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("old")
    replace = Path.replace

    def fails(self: Path, other: Path) -> Path:
        if self.name == "folder" and Path(other) == target and not (self / "old").exists():
            raise OSError("no")
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no"), atomic_write(target) as draft:
        draft.mkdir()
    assert (target / "old").read_text() == "old"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask_whatever_a_library_makes_of_them(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "mode", "x")  # called as the sample beside the draft might be
        with atomic_write(tmp_path / "deep" / "folder") as draft:
            (draft / "inner").mkdir(parents=True)
            (draft / "inner" / "x.safetensors").touch(mode=0o600)
            tempfile.mkdtemp(dir=draft)
    finally:
        os.umask(before)
    paths = list(tmp_path.rglob("*"))
    assert len(paths) == 6
    for path in paths:
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


REFUSALS = ["EINVAL", "ENOTSUP", "ENOSYS", "EACCES"]


def refuse_fsync(monkeypatch: pytest.MonkeyPatch, of_folders: bool, number: int) -> None:
    real = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_file_system_that_cannot_flush_folders_takes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    refuse_fsync(monkeypatch, True, getattr(errno, name))
    with atomic_write(tmp_path / "folder") as draft:
        draft.mkdir()
        (draft / "x").write_text("x")
    write_text(tmp_path / "folder" / "y", "y")
    assert [(tmp_path / "folder" / each).read_text() for each in "xy"] == ["x", "y"]


def test_a_folder_that_fails_to_be_flushed_for_another_reason_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_fsync(monkeypatch, True, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "x", "x")


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EACCES"])
def test_a_file_that_cannot_be_flushed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    refuse_fsync(monkeypatch, False, getattr(errno, name))
    with pytest.raises(OSError) as found:
        write_text(tmp_path / "x", "x")
    assert found.value.errno == getattr(errno, name) and list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_flush_at_all_takes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fsync(monkeypatch, False, errno.ENOTSUP)
    write_text(tmp_path / "x", "x")
    assert (tmp_path / "x").read_text() == "x"


@pytest.mark.parametrize(
    "path", ["s3://b/x.csv", "s3:/b/x.csv", "https://host/x.csv", "file:///tmp/x.csv", Path("gs://b/x.csv")]
)
def test_urls_are_no_local_paths(path: str | Path) -> None:
    with pytest.raises(ValueError, match=r"--out .* is a URL: write to a local path and copy"):
        local_path(path, "--out", [".csv"])


def test_a_file_has_one_of_the_endings(tmp_path: Path) -> None:
    for name in ("x", "x.parquet", "x.csv.gz", "csv"):
        with pytest.raises(ValueError, match=r"--out x.*|--out csv.*ends in \.csv"):
            local_path(name, "--out", [".csv"])
    with pytest.raises(ValueError, match=r"ends in \.png, \.svg"):
        local_path("x.docx", "--out", [".png", ".svg"])
    with pytest.raises(ValueError, match="is a folder: name the file"):
        local_path(tmp_path, "--out", [".csv"])
    for path in ("x.csv", "a/b.CSV", "C:/x.csv", "C:\\x.csv", "a:b.csv", "./s3:/x.csv"):
        assert local_path(path, "--out", [".csv"]) == Path(path)
    assert local_path(tmp_path, "--runs") == tmp_path
