"""Collecting wheels for a bare machine, with packages that are made up and a pip that is not there."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tyro
from packaging.requirements import Requirement
from packaging.version import Version

from arena.bundle import wheels
from arena.bundle.needed import PLATFORMS, Target, closure, read_list
from benchmarks import collect
from benchmarks.__main__ import main
from benchmarks.collect import Collect
from benchmarks.start import dependencies
from tests.benchmarks.wheels import install, make_wheel

TARGET = Target("3.12")
PACKAGES: dict[str, tuple[str, list[str]]] = {
    "top": ("2.0", ["middle>=1", "here", 'old; python_version < "3.12"', 'new; python_version >= "3.12"']),
    "middle": ("1.5", ["Low.Est[fast,slow]", 'other; sys_platform == "win32"', 'dark; extra == "unasked"']),
    "low-est": ("1.0", ['speed; extra == "fast"', 'low-est[fast]; extra == "slow"', "base-of-low"]),
    "base-of-low": ("1.0", []), "speed": ("1.0", []), "here": ("1.0", ["here-too"]), "here-too": ("1.0", []),
    "old": ("1.0", []), "new": ("1.0", []), "other": ("1.0", []), "dark": ("1.0", []),
}  # fmt: skip


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up packages, installed here; the project needs the first of them."""
    for name, (number, requires) in PACKAGES.items():
        install(tmp_path / "site", name, number, requires)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(collect, "dependencies", lambda: ["top>=2"])


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was asked of pip, which finds every package that is installed here, and `unknown`."""
    calls: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        wanted = command[command.index("--dest") + 2 :]
        calls.append(sorted(wanted))
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        assert command[command.index("--python-version") + 1] == "3.12"
        for each in wanted:
            asked = Requirement(each)
            name, number = asked.name, str(asked.specifier).removeprefix("==")
            if name == "absent":
                said = f"ERROR: no version of {each}\nERROR: No matching distribution found for {each}\n"
                return subprocess.CompletedProcess(command, 1, "", said)
            requires = PACKAGES.get(name, ("", []))[1]
            make_wheel(folder, name.replace("-", "_"), "7.0" if name == "unknown" else number, requires)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    return calls


def names(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix("-py3-none-any.whl") for path in folder.iterdir())


def test_closure_with_markers_and_extras() -> None:
    def needed(text: str, there: dict[str, Version | None], python: str = "3.12") -> set[str]:
        return set(map(str, closure([Requirement(text)], Target(python), there).values()))

    low = {"low-est==1.0", "speed==1.0", "base-of-low==1.0"}
    here = {"here==1.0", "here-too==1.0"}
    assert needed("top", {}) == {"top==2.0", "middle==1.5", "new==1.0"} | low | here
    assert needed("top", {}, "3.11") == {"top==2.0", "middle==1.5", "old==1.0"} | low | here
    assert needed("top", {"here": None}) == {"top==2.0", "middle==1.5", "new==1.0"} | low
    assert needed("top", {"here": None, "middle": Version("1.0")}) == {"top==2.0", "new==1.0"}
    assert needed("top", {"here": None, "middle": Version("0.9")}) == {"top==2.0", "middle==1.5", "new==1.0"} | low
    assert needed("middle", {"low-est": None, "base-of-low": None}) == {"middle==1.5", "speed==1.0"}
    assert needed("nowhere>=3", {}) == {"nowhere>=3"}


def test_what_the_project_really_needs() -> None:
    there = closure(map(Requirement, collect.THERE), TARGET, {})
    lacking = closure(TARGET.applying(dependencies()), TARGET, dict.fromkeys(there))
    assert {"bitsandbytes", "datasets", "dill", "multiprocess", "tyro", "pytest", "hypothesis"} < lacking.keys()
    assert not {"torch", "transformers", "peft", "numpy", "accelerate", "huggingface-hub"} & lacking.keys()
    assert all(str(each) == f"{name}=={version(name)}" for name, each in lacking.items())


def test_lists_of_packages_in_all_their_forms(tmp_path: Path) -> None:
    place = tmp_path / "list.txt"
    place.write_text(
        "Package Version Editable project location\n---------- ------- ------\nabsl-py\nTyping_Extensions 4.16.0\n"
        "arena-judge 0.1.0   /home/me/arena\n\n# Editable install with no version control\n-e /home/me/other\n"
        "torch==2.11.0+cu130\nown @ file:///home/me/own.whl\nodd===1.0.post1\n"
    )
    assert read_list(place) == {
        "absl-py": None, "typing-extensions": Version("4.16.0"), "arena-judge": Version("0.1.0"),
        "torch": Version("2.11.0+cu130"), "own": None, "odd": Version("1.0.post1"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torch 2.11\nWARNING: pip is old", "line 2: 'WARNING: pip is old' is not a line"),
        ('[{"name": "torch", "version": "2.11"}]', "line 1"),
        ("torch 2.x", "line 1"),
        ("Package Version\n------- -------\n", "lists no packages"),
        ("two words", "line 1"),
    ],
)
def test_files_that_are_not_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / "list.txt")


def test_the_set_is_fetched_once_and_brought_up_to_date(tmp_path: Path, fetched: list[list[str]]) -> None:
    out = tmp_path / "wheels"
    command = Collect("3.12", out, has=("here", "base-of-low"))
    command.run()
    wanted = ["low-est==1.0", "middle==1.5", "new==1.0", "speed==1.0", "top==2.0"]
    assert fetched == [wanted] and names(out) == ["low_est-1.0", "middle-1.5", "new-1.0", "speed-1.0", "top-2.0"]
    command.run()
    assert len(fetched) == 1  # all is there
    (out / "middle-1.5-py3-none-any.whl").rename(out / "middle-1.4-py3-none-any.whl")
    (out / "new-1.0-py3-none-any.whl").write_bytes(b"half")
    (out / "speed-1.0-py3-none-any.whl").rename(out / "speed-1.0-cp311-cp311-linux_x86_64.whl")
    make_wheel(out, "stale")
    command.run()
    assert fetched[1:] == [["middle==1.5", "new==1.0", "speed==1.0"]]
    assert names(out) == ["low_est-1.0", "middle-1.5", "new-1.0", "speed-1.0", "top-2.0"]
    Collect("3.12", out, has=("top",)).run()
    assert len(fetched) == 2  # nothing is needed then, and nothing is fetched


def test_packages_in_the_list_are_not_fetched(
    tmp_path: Path, fetched: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("here 1.0\nMiddle 1.5\nnew 0.1\ntop 1.9\n")
    Collect("3.12", tmp_path / "wheels", has_file=tmp_path / "list.txt").run()
    assert fetched == [["top==2.0"]]  # 1.9 is too old; what middle needs is there, although it is not listed
    shown = capsys.readouterr().out
    assert "top-2.0-py3-none-any.whl" in shown and "1 wheels for Python 3.12" in shown and "MiB" in shown


def test_extras_are_packages_and_wheels(tmp_path: Path, fetched: list[list[str]]) -> None:
    tags = "cp312-cp312-linux_x86_64"
    kernels = make_wheel(tmp_path, "kernels", "3.0", ["top", "unknown>=6"], tags=tags)
    out = tmp_path / "wheels"
    Collect("3.12", out, has=("top",), extra=(str(kernels), "here", "dark==1.0")).run()
    assert fetched == [["dark==1.0", "here==1.0", "unknown>=6"]]
    assert names(out) == ["dark-1.0", "here-1.0", f"kernels-3.0-{tags}.whl", "unknown-7.0"]
    kept = out / kernels.name
    Collect("3.12", out, has=("top",), extra=(str(kept),)).run()  # from the folder itself
    assert names(out) == [kernels.name, "unknown-7.0"] and len(fetched) == 1


def test_a_set_that_is_not_whole_is_refused_and_the_folder_left(tmp_path: Path, fetched: list[list[str]]) -> None:
    out = tmp_path / "wheels"
    Collect("3.12", out, has=("here", "base-of-low")).run()
    before = names(out)
    kernels = make_wheel(tmp_path, "kernels", "3.0", ["middle<1", "here>1"])
    (tmp_path / "list.txt").write_text("here 1.0\n")
    with pytest.raises(ValueError) as caught:
        Collect("3.12", out, has_file=tmp_path / "list.txt", extra=(str(kernels),)).run()
    said = str(caught.value)
    assert f"{kernels.name} needs middle<1, and there is middle 1.5" in said
    assert f"{kernels.name} needs here>1, and there is here 1.0" in said
    with pytest.raises(ValueError, match=r"No matching distribution found for absent$"):
        Collect("3.12", out, has=("top",), extra=("absent",)).run()
    assert names(out) == before and not list(tmp_path.glob(".wheels*"))


def test_a_requirement_of_a_wheel_alone_is_seen(tmp_path: Path, fetched: list[list[str]]) -> None:
    """What pip fetches may need more than the same package here, where Python and the platform are others."""
    wheel = make_wheel(
        tmp_path, "unknown", "7.0", ['deeper; python_version == "3.12"', 'not-there; python_version < "3"']
    )
    there = {"top": None}
    with pytest.raises(ValueError, match=r"^unknown-7.0-py3-none-any.whl needs deeper.*, and it is neither"):
        collect.check_requirements([wheel], [], TARGET, there, hint="")
    collect.check_requirements([wheel], [], Target("3.13"), there, hint="")
    asked = [Requirement("unknown[more]")]
    more = make_wheel(tmp_path, "unknown", "8.0", ['deep; extra == "more"', 'unknown[more]; extra == "more"'])
    with pytest.raises(ValueError, match="needs deep"):
        collect.check_requirements([more], asked, TARGET, there, hint="")
    collect.check_requirements([more], [Requirement("unknown")], TARGET, there, hint="")


@pytest.mark.parametrize(
    ("tags", "fits"),
    [
        ("cp312-cp312-manylinux_2_28_x86_64", True), ("cp39-abi3-manylinux2014_x86_64", True),
        ("py3-none-any", True), ("py2.py3-none-manylinux_2_24_x86_64", True), ("py312-none-any", True),
        ("cp312-cp312-linux_x86_64", True), ("cp311-cp311-manylinux_2_28_x86_64", False),
        ("cp313-abi3-manylinux2014_x86_64", False), ("py311-none-any", True), ("py313-none-any", False),
        ("cp312-cp312-manylinux_2_28_aarch64", False), ("cp312-cp312-manylinux_2_39_x86_64", False),
        ("cp312-cp312t-manylinux_2_28_x86_64", False), ("cp312-cp312-musllinux_1_2_x86_64", False),
    ],
)  # fmt: skip
def test_tags_of_the_target(tmp_path: Path, tags: str, fits: bool) -> None:
    wheel = make_wheel(tmp_path, "kernels", tags=tags)
    if fits:
        collect.check_tags([wheel], TARGET)
        return
    with pytest.raises(ValueError, match=r"kernels.* is not for Python 3\.12 on x86_64 Linux"):
        collect.check_tags([wheel], TARGET)


def test_a_wheel_for_another_python_is_refused_before_anything_is_fetched(
    tmp_path: Path, fetched: list[list[str]]
) -> None:
    wheel = make_wheel(tmp_path, "kernels", tags="cp311-cp311-linux_x86_64")
    with pytest.raises(ValueError, match="is not for Python"):
        Collect("3.12", tmp_path / "wheels", extra=(str(wheel),)).run()
    with pytest.raises(ValueError, match="another wheel of kernels"):
        two = [make_wheel(tmp_path, "kernels", number) for number in ("1.0", "2.0")]
        Collect("3.12", tmp_path / "wheels", extra=tuple(map(str, two))).run()
    assert fetched == []


def test_torch_is_the_machines_own(tmp_path: Path, fetched: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "dependencies", lambda: ["torch>=2.8", "top"])
    for text in ("torch 2.7.1\n", "numpy\n"):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(ValueError, match=r"needs torch>=2.8 of its own"):
            Collect("3.12", tmp_path / "wheels", has_file=tmp_path / "list.txt").run()
    assert fetched == []


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, fetched: list[list[str]]) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").touch()
    with pytest.raises(ValueError, match=r"holds page.md, which is no wheel"):
        Collect("3.12", tmp_path / "docs").run()
    assert fetched == [] and names(tmp_path / "docs") == ["page.md"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--python", "cp312", "--out", "wheels"], "--python cp312: name a version such as 3.12"),
        (["--python", "3.10", "--out", "wheels"], "at least 3.11"),
        (["--python", "3.12", "--out", "s3://bucket/wheels"], "is a URL"),
        (["--python", "3.12", "--out", "wheels", "--extra", "a b"], "a b"),
        (["--python", "3.12", "--out", "wheels", "--has-file", "nowhere"], "nowhere"),
        (["--python", "3.12", "--out", "wheels", "--extra", "no.whl"], "no.whl"),
    ],
)
def test_mistakes_are_reported_without_a_traceback(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "collect", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "wheels").exists()


def test_make_passes_its_arguments_on() -> None:
    words = "--python 3.12 --out wheels/cp312 --has torch --has peft --extra a.whl --extra einops"
    made = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--assume-old=.venv/ready", "--assume-old=.venv/dev",
         "gpu-wheels", f"ARGS={words}"],
        cwd=Path(collect.__file__).parents[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    line = shlex.split(made.stdout)
    assert line[:4] == [".venv/bin/python", "-m", "benchmarks", "collect"]
    parsed = tyro.cli(Collect, args=line[4:])
    assert parsed == Collect("3.12", Path("wheels/cp312"), has=("torch", "peft"), extra=("a.whl", "einops"))


def test_pip_is_asked_for_every_level_the_lowest_first() -> None:
    assert {f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34)} < {*PLATFORMS}
    assert PLATFORMS.index("manylinux2014_x86_64") < PLATFORMS.index("manylinux_2_28_x86_64")
    assert len(PLATFORMS) == len({*PLATFORMS})
