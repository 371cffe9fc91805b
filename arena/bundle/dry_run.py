"""Runs a bundle's notebook as Kaggle would: in a fresh environment, from the folder alone, with the network off."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from arena.bundle.kaggle import IMAGE, MARKER, NOTEBOOK, with_values
from arena.bundle.needed import Target, closure, read_list
from arena.bundle.wheels import fill, name_of, reusable
from arena.bundle.write import requirements, show_sizes
from arena.command_line import command
from arena.data.files import data_file, read_files
from arena.demo.synthetic import write_demo
from arena.inference.find import find_models
from arena.inference.infer import check_submission
from arena.inference.saved import SavedJudge, read_judge
from arena.model.base_files import base_folder
from arena.model.gguf_base import is_gguf
from arena.progress import console
from arena.settings import ModelSettings, Recipe

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PREFERENCE = str(Recipe.model_fields["task"].default)  # the demo's task
ROWS = 24  # of the demo, where no test file is named
WITHOUT_NETWORK = ["unshare", "--net", "--map-root-user"]
NOWHERE = "http://127.0.0.1:9"  # nothing answers there
KEPT = ("PATH", "LANG", "LC_ALL", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")  # of the environment
CELLS = """
import json, sys, time
names = {"__name__": "__main__"}
for cell in (each for each in json.loads(open(sys.argv[1], encoding="utf-8").read())["cells"]):
    if cell["cell_type"] == "code":
        began, title = time.monotonic(), cell["source"].splitlines()[0].lstrip("# ")
        exec(compile(cell["source"], title, "exec"), names)
        print(f"{time.monotonic() - began:8.1f} s  {title}", flush=True)
"""


def dry_run(bundle: Path, data: str | None, has_file: Path | None) -> None:
    """Installs and judges from a bundle; prints sizes and times.

    The environment has, of the packages that are installed here, those that Kaggle's image has too. Wheels for this
    Python are fetched if the bundle's are for another one.

    Args:
        data: a folder with a test file, or the file; None: a few rows of the demo.
        has_file: as when the bundle was written.

    Raises:
        ValueError: `bundle` is not a bundle, its notebook failed, or left no valid submission.
    """
    if not (bundle / MARKER).is_file():
        written = command("arena", "bundle", "demo", "--owner", "NAME", "--out", str(bundle))
        raise ValueError(f"{bundle} is not a bundle: write one first, as with `{written}`")
    saved = read_judge(find_models(str(bundle / "judges"), Path("runs"))[0])
    with tempfile.TemporaryDirectory(prefix="arena-dry-run-") as temporary:
        place = Path(temporary)
        began = time.monotonic()
        inputs = place / "input"
        test = lay_test_file(inputs / "competitions/arena", data, saved)
        lay_bundle(bundle, inputs / f"datasets/owner/{bundle.resolve().name}")
        lay_base(bundle, inputs, saved.recipe.model)
        python = environment(place / "env", read_list(has_file or IMAGE), bundle)
        console.print(f"{time.monotonic() - began:8.1f} s  environment with Python {PYTHON} and wheels for it")
        out = place / "working/submission.csv"
        run_notebook(bundle / NOTEBOOK, place, python, {"INPUT": inputs, "OUT": out})
        rows = read_files([test], saved.task, saved.recipe.data, "ignored")
        sample = test.parent / "sample_submission.csv"
        check_submission(out, rows.ids, saved.task.columns, sample if sample.exists() else None)
    show_sizes(bundle)
    console.print(f"the dry run left a valid submission of {len(rows):,} rows")


def lay_test_file(folder: Path, data: str | None, saved: SavedJudge) -> Path:
    """Puts a test file, and the sample beside it, where the competition's would be."""
    if data is None:
        if saved.recipe.task != PREFERENCE:
            raise ValueError(f"the judges are of the task {saved.recipe.task}: name a test file for them with --data")
        write_demo(folder, 1, ROWS, seed=0)
        return folder / "test.csv"
    test = data_file(data, "test", saved.recipe.data.cache)
    folder.mkdir(parents=True)
    for file in (test, test.parent / "sample_submission.csv"):
        if file.exists():
            name = f"test{file.suffix}" if file == test else file.name
            (folder / name).symlink_to(file.resolve())
    return folder / f"test{test.suffix}"


def lay_bundle(bundle: Path, folder: Path) -> None:
    """Makes a dataset of the bundle, with wheels for this Python."""
    folder.mkdir(parents=True)
    for entry in bundle.resolve().iterdir():
        (folder / entry.name).symlink_to(entry)
    target, wheels = Target(PYTHON), sorted(bundle.glob("wheels/*.whl"))
    listed = [Requirement(line.split()[0]) for line in (bundle / "requirements.txt").read_text().splitlines()]
    lacking = {each.name: each for each in listed}
    fitting = reusable(wheels, lacking, target)
    if len(fitting) < len(wheels):
        for name in ("wheels", "requirements.txt"):
            (folder / name).unlink()
        (folder / "wheels").mkdir()
        fetched = fill(folder / "wheels", lacking, target, fitting)
        (folder / "requirements.txt").write_text(requirements(fetched), encoding="utf-8")


def lay_base(bundle: Path, inputs: Path, settings: ModelSettings) -> None:
    """Puts the base of the judges, if they need one there, where the notebook looks for it."""
    base = json.loads((bundle / MARKER).read_text(encoding="utf-8"))["base"]
    if not base:
        return
    place = inputs / "models/owner" / base
    place.parent.mkdir(parents=True)
    if is_gguf(settings.base):
        place.mkdir()
        (place / Path(settings.base).name).symlink_to(Path(settings.base).resolve())
    else:
        place.symlink_to(base_folder(settings.base, settings.revision).resolve())


def environment(folder: Path, listed: Iterable[str], bundle: Path) -> Path:
    """A new environment that has what Kaggle's image has, but what the bundle brings; returns its Python.

    The packages are links to those of this environment, with all that they need here. They are in a folder of their
    own, where pip never writes.
    """
    venv.create(folder, symlinks=True, with_pip=True)
    brought = {name_of(wheel) for wheel in bundle.glob("wheels/*.whl")}
    there = closure([Requirement(name) for name in listed], Target(PYTHON), {}).keys() - brought
    link_packages(there, folder / "there")
    site = folder / "lib" / f"python{PYTHON}" / "site-packages"
    (site / "there.pth").write_text(f"{folder / 'there'}\n", encoding="utf-8")
    return folder / "bin/python"


def link_packages(names: Iterable[str], folder: Path) -> None:
    """Links the installed ones of these packages into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        for entry in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (folder / entry).is_symlink():  # some packages share a folder
                (folder / entry).symlink_to(Path(str(package.locate_file(entry))))


def run_notebook(notebook: Path, place: Path, python: Path, values: Mapping[str, Path]) -> None:
    """Runs the code cells in a process without a network, with the notebook's paths replaced; prints what it prints.

    Raises:
        ValueError: a cell failed.
    """
    for name in ("home", "tmp", "working"):
        (place / name).mkdir()
    copy = place / notebook.name
    copy.write_text(with_values_in_notebook(notebook.read_text(encoding="utf-8"), values), encoding="utf-8")
    off = shutil.which(WITHOUT_NETWORK[0]) is not None
    off = off and subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True, check=False).returncode == 0
    console.print(f"network: {'off (unshare)' if off else 'proxies that refuse, as unshare is not allowed here'}")
    own = {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "PIP_CONFIG_FILE": os.devnull}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), NOWHERE)
    env = {name: os.environ[name] for name in KEPT if name in os.environ} | proxies | own
    words = [*(WITHOUT_NETWORK if off else []), str(python), "-c", CELLS, str(copy)]
    done = subprocess.run(words, cwd=place / "working", env=env, check=False)
    if done.returncode:
        raise ValueError(f"the notebook failed (status {done.returncode}): what it printed above says why")


def with_values_in_notebook(text: str, values: Mapping[str, Path]) -> str:
    """A notebook with other values in its first code cell."""
    notebook = json.loads(text)
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    first["source"] = with_values(first["source"], values)
    return json.dumps(notebook)
