"""A place at a URL: folders with a manifest, which goes there last, so that one cut short is never taken for whole.

Every file is read back and its SHA-256 compared, whatever the store: checksums that stores give depend on how a file
was sent and with which key.
"""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
import threading
import uuid
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec

from arena.files import file_digest, written_whole
from arena.hints import command
from arena.manifest import LARGEST, NAME, damage, read_manifest
from arena.progress import said

CHUNK = 2**22  # bytes read at a time
MOST_FILES = 1000  # in a folder
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "hf": "huggingface_hub", "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol", "webdav": "webdav4",
}  # fmt: skip
# stores whose folders are parts of names: none has to be made, and making one might make a bucket of a misspelt name
FLAT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory"}
# what a store answers to a wrong name or key; all else is taken for a store that is down
WRONG = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, ValueError)
WRONG_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "LocalTokenNotFoundError",
               "RepositoryNotFoundError", "GatedRepoError"}  # fmt: skip


class Hopeless(ValueError):  # noqa: N818 - said of one folder, which is then passed over
    """A folder that cannot be brought over, however often it is tried."""


class Store:
    """One run's place in a store.

    Args:
        url: a folder or a URL that fsspec knows, without passwords.
        place: the run's path below it.

    Raises:
        ValueError: no such protocol, or its package is not installed.
    """

    def __init__(self, url: str, place: str) -> None:
        self.url = url
        protocol = url.partition("://")[0] if "://" in url else "file"
        if "::" in url:
            raise ValueError(f"train.mirror={url}: chained URLs are not supported, name the store itself")
        try:
            self.fs, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
        except ImportError as error:
            package = PACKAGES.get(protocol)
            remedy = f"`{command('pip', 'install', package)}`" if package else str(error)
            raise ValueError(f"train.mirror={url} needs a package that is not installed: {remedy}") from None
        except ValueError as error:
            raise ValueError(f"train.mirror={url}: {error}") from None
        self.flat = protocol in FLAT
        self.root = f"{root.rstrip('/')}/{place}"

    def check(self, patience: float) -> str | None:
        """Writes, reads and removes a small file. Gives why the store does not answer well now; None where it does.

        Raises:
            ValueError: it answers that this cannot be, because of a wrong name, key or permission.
        """
        answer: list[BaseException | None] = []

        def probe() -> None:
            try:
                self._probe()
            except BaseException as error:
                answer.append(error)
            else:
                answer.append(None)

        thread = threading.Thread(target=probe, daemon=True, name="mirror-check")
        thread.start()
        thread.join(patience)
        if not answer:
            return f"no answer within {patience:g} s"
        if answer[0] is not None and _wrong(answer[0]):
            raise ValueError(
                f"train.mirror={self.url} cannot be written to ({said(answer[0])}): mend the address, the credentials "
                "or the permissions there, or train without it"
            )
        return None if answer[0] is None else said(answer[0])

    def _probe(self) -> None:
        path, content = f"{self.root}/.writable-{uuid.uuid4().hex[:8]}", b"arena"
        self._make_parent(path)
        self.fs.pipe_file(path, content)
        if self.fs.cat_file(path) != content:
            raise OSError("a small file did not come back as it was written")
        with suppress(Exception):  # where nothing may be removed, old checkpoints stay; that is said when it happens
            self.fs.rm_file(path)

    def names(self, folder: str) -> list[str]:
        """What stands in a folder of the place; nothing where there is no such folder."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(f"{self.root}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found})

    def put(self, folder: Path, name: str) -> None:
        """Brings a folder that has a manifest to the store; what a try before left there whole is not sent again.

        Raises:
            Hopeless: it is gone or damaged here.
            Exception: whatever the store raises; the folder does not count there then.
        """
        try:
            files = listed(read_manifest(folder))
            content = (folder / NAME).read_bytes()
        except (OSError, ValueError) as error:
            raise Hopeless(str(error).replace(str(folder), name)) from None
        facts = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        manifest = f"{self.root}/{name}/{NAME}"
        if self._holds(manifest, facts):
            return
        self._remove_file(manifest)  # of another run's folder: its files are about to be replaced
        for file, expected in files.items():
            self._put_file(folder / file, f"{self.root}/{name}/{file}", expected)
        self._put_file(folder / NAME, manifest, facts)

    def _put_file(self, source: Path, path: str, facts: dict[str, Any]) -> None:
        if self._holds(path, facts):
            return
        try:
            self._make_parent(path)
            self.fs.put_file(str(source), path)
        except FileNotFoundError:
            if source.is_file():
                raise
        if not source.is_file():
            raise Hopeless(f"{source} was removed before it had arrived")
        if not self._holds(path, facts):
            if file_digest(source) != facts["sha256"]:
                raise Hopeless(f"{source} is damaged: its SHA-256 is not that of its manifest")
            raise OSError(f"{path} did not arrive as it was sent")

    def _holds(self, path: str, facts: dict[str, Any]) -> bool:
        """Whether a file stands there with these bytes, all of them read back."""
        self.fs.invalidate_cache()
        try:
            if self.fs.info(path)["size"] != facts["bytes"]:
                return False
            digest = sha256()
            with self.fs.open(path, "rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        except FileNotFoundError:
            return False
        return digest.hexdigest() == str(facts["sha256"])

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of a folder there.

        Raises:
            Hopeless: it has none, or one that is damaged or must not be followed.
        """
        with tempfile.TemporaryDirectory(prefix="arena-mirror-") as draft:
            return self._fetch_manifest(name, Path(draft))

    def fetch(self, name: str, target: Path) -> None:
        """Brings a folder here: aside, every SHA-256 verified, then renamed to `target`.

        Raises:
            Hopeless: it is incomplete or damaged there, or its manifest must not be followed; `target` is untouched.
            Exception: whatever the store raises.
        """
        with written_whole(target) as draft:
            draft.mkdir()
            files = listed(self._fetch_manifest(name, draft))
            size, free = sum(facts["bytes"] for facts in files.values()), shutil.disk_usage(draft).free
            if size > free:
                raise Hopeless(f"{name} has {size:,} bytes, but only {free:,} are free in {target.parent}")
            for file, facts in files.items():
                self._fetch_file(f"{self.root}/{name}/{file}", draft / file, facts["bytes"])
            why = damage(draft)
            if why is not None:
                raise Hopeless(f"{name}: {why}")

    def _fetch_manifest(self, name: str, folder: Path) -> dict[str, Any]:
        """Writes it into `folder` and reads it there."""
        self._fetch_file(f"{self.root}/{name}/{NAME}", folder / NAME, LARGEST, exact=False)
        try:
            content = read_manifest(folder)
            listed(content)
        except ValueError as error:
            raise Hopeless(f"{name}: {error}".replace(f"{folder}/", "")) from None
        return content

    def _fetch_file(self, path: str, target: Path, size: int, exact: bool = True) -> None:
        """Copies at most `size` bytes here; what is longer, or where `exact` shorter, is an error."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with self.fs.open(path, "rb") as source, target.open("xb") as file:
                left = size
                while chunk := source.read(min(CHUNK, left + 1)):
                    left -= len(chunk)
                    if left < 0:
                        break
                    file.write(chunk)
        except FileNotFoundError:
            raise Hopeless(f"{path} is missing") from None
        if left < 0 or (exact and left):
            raise Hopeless(f"{path} has {'more' if left < 0 else 'fewer'} than {size:,} bytes")

    def remove(self, name: str) -> None:
        """Removes a folder there, its manifest first, so that it counts for nothing from the beginning."""
        self._remove_file(f"{self.root}/{name}/{NAME}")
        with suppress(FileNotFoundError):
            self.fs.rm(f"{self.root}/{name}", recursive=True)

    def _remove_file(self, path: str) -> None:
        self.fs.invalidate_cache()
        if self.fs.exists(path):
            self.fs.rm_file(path)

    def _make_parent(self, path: str) -> None:
        if not self.flat:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def listed(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of a manifest, by their path within its folder.

    Raises:
        Hopeless: a path that leads elsewhere, or sizes and digests that are none.
    """
    files = manifest.get("files")
    if not isinstance(files, dict) or len(files) > MOST_FILES:
        raise Hopeless(f"its manifest does not name between 0 and {MOST_FILES:,} files")
    for name, facts in files.items():
        if not _plain(name):
            raise Hopeless(f"its manifest names {name[:100]!r}, which is no plain path within its folder")
        known = isinstance(facts, dict) and type(facts.get("bytes")) is int and facts["bytes"] >= 0
        if not known or not re.fullmatch("[0-9a-f]{64}", str(facts.get("sha256"))):
            raise Hopeless(f"its manifest gives no size and SHA-256 of {name!r}")
    return files


def _plain(name: str) -> bool:
    odd = not name.isprintable() or "\\" in name or ":" in name or len(name) > 200 or name == NAME
    return not odd and all(part not in ("", ".", "..") for part in name.split("/"))


def _wrong(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    read_only = isinstance(error, OSError) and error.errno == errno.EROFS
    return isinstance(error, WRONG) or bool(names & WRONG_NAMES) or read_only
