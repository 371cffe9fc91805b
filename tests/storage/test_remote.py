"""What is refused at the start, what is taken for a store that is down, and manifests that must not be followed."""

from __future__ import annotations

import errno
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arena.storage import manifest as manifests
from arena.storage.manifest import NAME
from arena.storage.remote import PermanentError, Store
from tests.storage.faulty import PLACE, URL, Faulty, Messages, checkpoint, gone, mirror, slow, steps


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nope://bucket/x", "Protocol not known: nope"),
        ("sftp://host/x", "pip install paramiko"),
        ("simplecache::memory://x", "chained URLs"),
    ],
)
def test_addresses_that_cannot_be_used(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mirror(tmp_path, url)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ValueError, match=r"train.mirror=s3://bucket/x needs a package .*: `\S*pip install s3fs`"):
        mirror(tmp_path, "s3://bucket/x")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written to"):
        mirror(tmp_path, str(tmp_path / "file/deep"))


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (PermissionError("403"), True),
        (FileNotFoundError("no such bucket"), True),
        (OSError(errno.EROFS, "read-only"), True),
        (type("NoCredentialsError", (Exception,), {})("no keys"), True),
        (ConnectionError("refused"), False),
        (TimeoutError("slow"), False),
        (OSError(errno.ENOSPC, "full"), False),
        (RuntimeError("503"), False),
    ],
)
def test_wrong_settings_are_errors_and_a_store_that_is_down_is_not(
    tmp_path: Path, error: Exception, wrong: bool
) -> None:
    def refuse(path: str) -> None:
        raise error

    messages = Messages()
    Faulty.before = staticmethod(refuse)
    if wrong:
        with pytest.raises(ValueError, match=f"cannot be written to .*{error.args[-1]}"):
            mirror(tmp_path, messages=messages)
    else:
        sender = mirror(tmp_path, messages=messages)
        assert messages.about("does not answer") == 1 and messages.about(str(error.args[-1])) == 1
        assert sender.pull(tmp_path / "fresh") == [] and messages.about("cannot be read") == 1
        Faulty.mend()
        sender.push(checkpoint(tmp_path / "run", 1))
        assert sender.close(10) == [] and messages.about("works again") == 1 and len(messages) == 3


def test_an_unresponsive_store_delays_nothing(tmp_path: Path) -> None:
    messages = Messages()
    Faulty.before = staticmethod(slow(1.0))
    start = time.perf_counter()
    mirror(tmp_path, messages=messages, patience=0.1)
    assert time.perf_counter() - start < 0.5 and messages.about("no answer within 0.1 s") == 1


def planted(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    """Checkpoints 1 and 2 in the store; the manifest of 2 changed, with a digest of its own that is right."""
    store = Store(URL, PLACE)
    for number in (1, 2):
        store.put(checkpoint(tmp_path / "run", number), f"checkpoints/step-{number:08d}")
    content = json.loads((tmp_path / "run/checkpoints/step-00000002" / NAME).read_text())
    del content[manifests.OWN]
    content = change(content) or content
    if isinstance(content, dict):
        content = manifests._text({**content, manifests.OWN: manifests._digest(content)}).encode()
    store.fs.pipe_file(f"{store.root}/checkpoints/step-00000002/{NAME}", content)


def path_of(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["files"].update({name: content["files"]["empty"]})


def size_of(size: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["files"]["empty"].update({"bytes": size})


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "up": (path_of("../../outside"), "not a plain path"),
    "up within": (path_of("deep/../../x"), "not a plain path"),
    "absolute": (path_of("/etc/outside"), "not a plain path"),
    "backslash": (path_of("..\\outside"), "not a plain path"),
    "drive": (path_of("c:outside"), "not a plain path"),
    "nothing": (path_of(""), "not a plain path"),
    "dot": (path_of("./x"), "not a plain path"),
    "control": (path_of("a\x00b"), "not a plain path"),
    "line break": (path_of("a\nb"), "not a plain path"),
    "surrogate": (path_of("a\ud800b"), "damaged|not a plain path"),
    "itself": (path_of(NAME), "not a plain path"),
    "long": (path_of("x" * 5000), "not a plain path"),
    "file and folder": (path_of("empty/x"), "is missing"),
    "not there": (path_of("nowhere"), "is missing"),
    "terabytes": (size_of(10**15), "are free in"),
    "beyond integers": (size_of(10**40), "are free in"),
    "negative": (size_of(-1), "no valid size"),
    "true": (size_of(True), "no valid size"),
    "text size": (size_of("5"), "no valid size"),
    "larger than it is": (size_of(7), "has 0 bytes, not 7"),
    "no digest": (lambda content: content["files"]["empty"].pop("sha256") and None, "no valid size"),
    "odd digest": (lambda content: content["files"]["empty"].update(sha256="0" * 63 + "\n"), "no valid size"),
    "other digest": (lambda content: content["files"]["empty"].update(sha256="0" * 64), "is damaged"),
    "list of files": (lambda content: content.update(files=[1]), "does not list"),
    "no files": (lambda content: content.pop("files") and None, "does not list"),
    "too many": (
        lambda content: content.update(files={str(at): content["files"]["empty"] for at in range(1001)}),
        "does not list",
    ),
    "other format": (lambda content: content.update(format=99), "format 99"),
    "not JSON": (lambda content: b"PK\x03\x04", "damaged"),
    "empty": (lambda content: b" ", "damaged"),
    "a list": (lambda content: b"[]", "damaged"),
    "deep": (lambda content: b"[" * 10**6, "damaged"),
    "huge": (lambda content: b" " * (manifests.LARGEST + 1), "more than"),
    "half": (lambda content: manifests._text(content).encode()[:100], "damaged"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_manifests_that_must_not_be_followed(tmp_path: Path, kind: str) -> None:
    change, message = HOSTILE[kind]
    messages, fresh = Messages(), tmp_path / "home/fresh"
    planted(change, tmp_path)
    before = set(tmp_path.rglob("*"))
    assert steps(mirror(tmp_path, messages=messages).pull(fresh)) == [1]
    assert len(messages) == 1 and "passed over checkpoints/step-00000002" in messages[0]
    assert re.search(message, messages[0]), messages[0]
    made = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert all(fresh / "checkpoints/step-00000001" in path.parents for path in made)


def test_the_control_is_followed(tmp_path: Path) -> None:
    planted(lambda content: None, tmp_path)
    assert steps(mirror(tmp_path).pull(tmp_path / "fresh")) == [2]


def test_damaged_and_incomplete_checkpoints_are_reported_and_passed_over(tmp_path: Path) -> None:
    messages, store = Messages(), Store(URL, PLACE)
    for number in range(1, 6):
        store.put(checkpoint(tmp_path / "run", number), f"checkpoints/step-{number:08d}")
    place = f"{store.root}/checkpoints/step-0000000"
    store.fs.rm_file(f"{place}5/{NAME}")
    store.fs.rm_file(f"{place}4/weights.safetensors")
    data = store.fs.cat_file(f"{place}3/weights.safetensors")
    store.fs.pipe_file(f"{place}3/weights.safetensors", data[:-1] + b"x")
    store.fs.pipe_file(f"{store.root}/checkpoints/step-x/{NAME}", b"{}")
    assert steps(mirror(tmp_path, messages=messages).pull(tmp_path / "fresh")) == [2]
    assert [messages.about(f"step-0000000{number}") for number in (5, 4, 3, 2)] == [1, 1, 1, 0]
    assert [path.name for path in (tmp_path / "fresh/checkpoints").iterdir()] == ["step-00000002"]


def test_a_store_that_fails_within_a_pull(tmp_path: Path) -> None:
    store = Store(URL, PLACE)
    for number in (1, 2):
        store.put(checkpoint(tmp_path / "run", number), f"checkpoints/step-{number:08d}")
    messages = Messages()
    receiver = mirror(tmp_path, messages=messages)
    Faulty.before = staticmethod(gone)
    assert receiver.pull(tmp_path / "fresh") == [] and messages.about("cannot be read") == 1
    with pytest.raises(PermanentError):
        store.fetch("checkpoints/step-00000009", tmp_path / "fresh/x")
    assert not (tmp_path / "fresh/x").exists()
