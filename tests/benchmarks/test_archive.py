"""The archive of results: enough to go on in an empty folder, never half-written, nothing outside of its folder."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks.archive import pack, unpack
from benchmarks.parts import Parts


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    parts = Parts(tmp_path / "there/h100", {"device": "h100"})
    parts.do("a", lambda: {"status": "done", "call": 1})
    parts.do("b", lambda: {"status": "failed", "reason": "it"})
    (parts.folder / "tests,flash.jsonl").write_text("{}\n")
    (parts.folder / "losses/runs").mkdir(parents=True)
    (parts.folder / "losses/part,x.json").write_text("{}")
    for left_out in ("losses/runs/large.json", ".scratch.json", "weights.bin"):
        (parts.folder / left_out).write_text("left out")
    page = tmp_path / "bench-h100-9b.md"
    page.write_text("a page")
    pack(tmp_path / "there", [page], tmp_path / "results.zip")
    return tmp_path / "results.zip"


def test_an_empty_folder_resumes_from_the_archive(packed: Path, tmp_path: Path) -> None:
    added = unpack(packed, tmp_path / "here")
    assert sorted(added) == [
        "h100/about.json", "h100/losses/part,x.json", "h100/part,a.json", "h100/part,b.json", "h100/tests,flash.jsonl",
    ]  # fmt: skip
    parts = Parts(tmp_path / "here/h100", {"device": "h100"})
    assert parts.do("a", lambda: {"status": "done", "call": 2})["call"] == 1
    with ZipFile(packed) as archive:
        assert archive.read("pages/bench-h100-9b.md") == b"a page"


def test_what_stands_in_the_folder_stays(packed: Path, tmp_path: Path) -> None:
    parts = Parts(tmp_path / "here/h100", {"device": "h100"})
    parts.do("a", lambda: {"status": "done", "call": 2})
    assert "h100/part,a.json" not in unpack(packed, tmp_path / "here")
    assert parts.do("a", lambda: {"status": "done"})["call"] == 2
    assert unpack(packed, tmp_path / "here") == []


def test_another_device_has_a_folder_of_its_own(packed: Path, tmp_path: Path) -> None:
    unpack(packed, tmp_path / "here")
    other = Parts(tmp_path / "here/l4", {"device": "l4"})
    assert other.get("a") is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "no zip"])
def test_a_damaged_archive_is_refused(packed: Path, tmp_path: Path, damage: str) -> None:
    data = bytearray(packed.read_bytes())
    if damage == "flipped":
        data[60] ^= 0xFF
    packed.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "no zip": b"text"}[damage])
    with pytest.raises(ValueError, match=r"results\.zip is damaged or no archive of results"):
        unpack(packed, tmp_path / "here")
    assert not [path for path in tmp_path.glob("here/**/*") if path.name.startswith(".")]


def test_names_that_leave_the_folder_are_passed_over(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "results.zip", "w") as archive:
        for name in ("state/../../out.json", "/state/abs.json", "elsewhere/x.json", "state/in.json"):
            archive.writestr(name, "{}")
    assert unpack(tmp_path / "results.zip", tmp_path / "a/here") == ["in.json"]
    assert not list(tmp_path.rglob("out.json"))
