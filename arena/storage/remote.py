"""A place at a URL that holds folders with a manifest. The manifest is uploaded last and so marks a complete folder.

Uploads are left to the store's client, which retries and, as for S3, sends checksums; here only sizes are compared.
What is fetched is verified against the manifest's SHA-256.
"""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from arena.command_line import command
from arena.progress import format_error
from arena.storage.files import atomic_write
from arena.storage.manifest import LARGEST, NAME, damage, read_manifest

MOST_FILES = 1000  # in a folder
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "hf": "huggingface_hub", "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol", "webdav": "webdav4",
}  # fmt: skip
# Stores without real folders: none has to be created, and creating one might create a bucket from a misspelt name.
FLAT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory"}
# errors that mean a wrong name or key; all others are taken to mean that the store is unreachable
WRONG = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, ValueError)
WRONG_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "LocalTokenNotFoundError",
               "RepositoryNotFoundError", "GatedRepoError"}  # fmt: skip


class PermanentError(ValueError):
    """A folder that cannot be transferred, however often that is tried."""


class Store:
    """One run's place in a store.

    Args:
        url: a folder, or a URL that fsspec supports, without passwords.
        place: the run's path below it.

    Raises:
        ValueError: no such protocol, or its package is not installed.
    """

    def __init__(self, url: str, place: str) -> None:
        self.url = url
        if "::" in url:
            raise ValueError(f"train.mirror={url}: chained URLs are not supported, name the store itself")
        self.fs, root = file_system(url, f"train.mirror={url}", skip_instance_cache=True, use_listings_cache=False)
        self.flat = _protocol(url) in FLAT
        self.root = f"{root.rstrip('/')}/{place}"

    def check(self, patience: float) -> str | None:
        """Writes, reads and removes a small file. Returns None, or why the store cannot be used at the moment.

        Raises:
            ValueError: the store refuses because of a wrong name, key or permission.
        """
        answer: list[BaseException | None] = []

        def probe() -> None:
            try:
                self._probe()
                answer.append(None)
            except BaseException as error:
                answer.append(error)

        thread = threading.Thread(target=probe, daemon=True, name="mirror-check")
        thread.start()
        thread.join(patience)
        if not answer:
            return f"no answer within {patience:g} s"
        if answer[0] is not None and _wrong(answer[0]):
            raise ValueError(
                f"train.mirror={self.url} cannot be written to ({format_error(answer[0])}): correct the address, the "
                "credentials or the permissions there, or train without a mirror"
            )
        return None if answer[0] is None else format_error(answer[0])

    def _probe(self) -> None:
        path, content = f"{self.root}/.writable-{uuid.uuid4().hex[:8]}", b"arena"
        self._make_parent(path)
        self.fs.pipe_file(path, content)
        if self.fs.cat_file(path) != content:
            raise OSError("a small file was read back with other content")
        with suppress(Exception):  # a store that does not permit removal keeps old checkpoints, which is reported later
            self.fs.rm_file(path)

    def names(self, folder: str) -> list[str]:
        """The names in a folder of the place; none if there is no such folder."""
        self.fs.invalidate_cache()
        try:
            paths = self.fs.ls(f"{self.root}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted({str(path).rstrip("/").rpartition("/")[2] for path in paths})

    def put(self, folder: Path, name: str) -> None:
        """Uploads a folder that has a manifest, unless the store has it already.

        Raises:
            PermanentError: the local folder is damaged.
            Exception: whatever the store raises; the folder is then incomplete there and ignored.
        """
        if why := damage(folder):
            raise PermanentError(why)
        manifest, content = f"{self.root}/{name}/{NAME}", (folder / NAME).read_bytes()
        try:
            if self.fs.cat_file(manifest) == content:
                return
            self.fs.rm_file(manifest)  # its files are about to be replaced
        except FileNotFoundError:
            pass
        for file in (*listed(read_manifest(folder)), NAME):
            path = f"{self.root}/{name}/{file}"
            self._make_parent(path)
            self.fs.put_file(str(folder / file), path)
            self.fs.invalidate_cache()
            if self.fs.info(path)["size"] != (folder / file).stat().st_size:
                raise OSError(f"{path} did not arrive complete")

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of a folder in the store.

        Raises:
            PermanentError: it is missing, damaged or unsafe to follow.
        """
        with tempfile.TemporaryDirectory(prefix="arena-mirror-") as draft:
            return self._fetch_manifest(name, Path(draft))

    def fetch(self, name: str, target: Path) -> None:
        """Downloads a folder to a scratch folder, verifies every SHA-256, and renames it to `target`.

        Raises:
            PermanentError: it is incomplete or damaged, or its manifest is unsafe to follow; `target` is unchanged.
            Exception: whatever the store raises.
        """
        with atomic_write(target) as draft:
            draft.mkdir()
            files = listed(self._fetch_manifest(name, draft))
            size, free = sum(facts["bytes"] for facts in files.values()), shutil.disk_usage(draft).free
            if size > free:
                raise PermanentError(f"{name} has {size:,} bytes, but only {free:,} are free in {target.parent}")
            for file, facts in files.items():
                self._fetch_file(f"{name}/{file}", draft / file, facts["bytes"])
            if why := damage(draft):
                raise PermanentError(f"{name}: {why}")

    def _fetch_manifest(self, name: str, folder: Path) -> dict[str, Any]:
        """Downloads the manifest into `folder` and reads it."""
        self._fetch_file(f"{name}/{NAME}", folder / NAME, LARGEST)
        try:
            content = read_manifest(folder)
            listed(content)
        except ValueError as error:
            raise PermanentError(f"{name}: {error}".replace(f"{folder}/", "")) from None
        return content

    def _fetch_file(self, name: str, target: Path, most: int) -> None:
        path = f"{self.root}/{name}"
        try:
            if self.fs.info(path)["size"] > most:
                raise PermanentError(f"{name} has more than {most:,} bytes")
            target.parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(path, str(target))
        except FileNotFoundError:
            raise PermanentError(f"{name} is missing") from None

    def remove(self, name: str) -> None:
        """Removes a folder from the store, its manifest first, so that a partly removed folder is ignored."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{name}/{NAME}")
        with suppress(FileNotFoundError):
            self.fs.rm(f"{self.root}/{name}", recursive=True)

    def _make_parent(self, path: str) -> None:
        if not self.flat:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def file_system(url: str, name: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or a URL, and the path there.

    Args:
        name: the URL as a user knows it, for messages.

    Raises:
        ValueError: no such protocol, or its package is not installed.
    """
    try:
        found: tuple[fsspec.AbstractFileSystem, str] = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = PACKAGES.get(_protocol(url))
        remedy = f"`{command('pip', 'install', package)}`" if package else str(error)
        raise ValueError(f"{name} needs a package that is not installed: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return found


@contextmanager
def write_anywhere(place: str) -> Iterator[Path]:
    """Yields a path to write to; what is there when the block ends without an error replaces the file at a path or URL.

    Raises:
        ValueError: as of `file_system`.
        OSError: it cannot be written there.
    """
    fs, path = file_system(place, place)
    if isinstance(fs, LocalFileSystem):
        with atomic_write(Path(path)) as draft:
            yield draft
        return
    with tempfile.TemporaryDirectory(prefix="arena-") as folder:
        draft = Path(folder) / "draft"
        yield draft
        with store_errors(place):
            if _protocol(place) in FLAT:  # whose uploads are whole or not there
                fs.put_file(str(draft), path)
            else:
                fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                fs.put_file(str(draft), f"{path}.incomplete")
                fs.mv(f"{path}.incomplete", path)


def url_of(place: str) -> str:
    """The one URL of a path or URL."""
    fs, path = file_system(place, place)
    return str(fs.unstrip_protocol(path))


def remove_anywhere(place: str) -> None:
    """Removes the file at a path or URL, if there is one."""
    fs, path = file_system(place, place)
    with store_errors(place), suppress(FileNotFoundError):
        fs.rm_file(path)


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Raises an `OSError` that names the URL in place of whatever a store's client raises."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{url} cannot be used ({format_error(error)}): check the address and the credentials") from error


def _protocol(url: str) -> str:
    return url.partition("://")[0] if "://" in url else "file"


def listed(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of a manifest, by their path within its folder.

    Raises:
        PermanentError: a path leads out of the folder, or a size or digest is invalid.
    """
    files = manifest.get("files")
    if not isinstance(files, dict) or len(files) > MOST_FILES:
        raise PermanentError(f"its manifest does not list between 0 and {MOST_FILES:,} files")
    for name, facts in files.items():
        if not _plain(name):
            raise PermanentError(f"its manifest lists {name[:100]!r}, which is not a plain path within its folder")
        known = isinstance(facts, dict) and type(facts.get("bytes")) is int and facts["bytes"] >= 0
        if not known or not re.fullmatch("[0-9a-f]{64}", str(facts.get("sha256"))):
            raise PermanentError(f"its manifest has no valid size and SHA-256 for {name!r}")
    return files


def _plain(name: str) -> bool:
    odd = not name.isprintable() or "\\" in name or ":" in name or len(name) > 200 or name == NAME
    return not odd and all(part not in ("", ".", "..") for part in name.split("/"))


def _wrong(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    read_only = isinstance(error, OSError) and error.errno == errno.EROFS
    return isinstance(error, WRONG) or bool(names & WRONG_NAMES) or read_only
