"""Writes a bundle: all that a Kaggle notebook needs to judge without a network, but its image and the base."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from arena.bundle.kaggle import IMAGE, MARKER, NOTEBOOK, SOURCES, Upload
from arena.bundle.needed import Target, Versions, closure, read_list
from arena.bundle.own import own_wheel
from arena.bundle.wheels import check_requirements, fill, name_of, requirements_of, reusable
from arena.inference.saved import SavedJudge, check_alike, read_judge
from arena.model.base_files import DEMO_BASE
from arena.model.gguf_base import OLDEST, is_gguf
from arena.model.packaged import PACKAGED
from arena.model.tuning import is_whole
from arena.progress import console
from arena.storage.files import atomic_write, file_digest, write_json, write_text

OF_THE_IMAGE = ("torch", "torchvision", "torchaudio", "triton")  # with the nvidia-* packages, built for each other
BUDGET = 8192  # tokens of a micro-batch at most, for the 15 GiB of a T4
GGUF = ("gguf", f"transformers>={OLDEST}")  # what reads a GGUF file


@dataclass(frozen=True)
class Asked:
    """What a user says about a bundle; None where it is not said."""

    owner: str
    name: str | None
    competition: str
    deadline: str
    base: str | None
    python: str
    has_file: Path | None


def write_bundle(models: Sequence[Path], out: Path, asked: Asked) -> None:
    """Makes `out` the bundle of these judges, or leaves it as it was; wheels of an earlier one are used again.

    Raises:
        ValueError: the judges cannot be averaged, `out` is something else, a wheel cannot be had, or Kaggle's torch
            would be replaced.
    """
    judges = [read_judge(model) for model in models]
    check_alike(judges)
    upload = upload_of(judges, asked)
    target, there = Target(asked.python), read_list(asked.has_file or IMAGE)
    if out.exists() and not (out / MARKER).is_file():
        raise ValueError(f"--out {out} already exists and is not a bundle: name a new folder")
    with atomic_write(out) as draft:
        (draft / "wheels").mkdir(parents=True)
        wheels = gather(draft / "wheels", needed_of_base(judges), target, there, sorted(out.glob("wheels/*.whl")))
        write_text(draft / "requirements.txt", requirements(wheels))
        for number, model in enumerate(models):
            shutil.copytree(model, draft / f"judges/fold{number}/model")
        write_json(draft / "dataset-metadata.json", upload.dataset_metadata())
        write_json(draft / "kernel-metadata.json", upload.kernel_metadata())
        write_json(draft / NOTEBOOK, upload.notebook())
        write_json(draft / MARKER, {"python": asked.python, "base": upload.place, "judges": list(map(str, models))})
        write_text(draft / "README.md", upload.readme(", ".join(map(str, models)), asked.python))
    show_sizes(out)
    console.print(f"written: {out}; {out / 'README.md'} says how to upload it")


def upload_of(judges: Sequence[SavedJudge], asked: Asked) -> Upload:
    """Where the bundle goes, with what the judges need there.

    Raises:
        ValueError: the judges need different bases, or it is not known where Kaggle has theirs.
    """
    first = judges[0].recipe
    bases = {judge.base: judge.recipe.model.base for judge in judges if not is_whole(judge.folder)}
    if len(bases) > 1:
        raise ValueError(f"the judges have different bases ({', '.join(bases.values())}): bundle those of one base")
    base = next(iter(bases.values()), DEMO_BASE)
    comes_along = base == DEMO_BASE or base in PACKAGED
    source = asked.base or ("" if comes_along else SOURCES.get(base))
    if source is None:
        raise ValueError(
            f"where Kaggle has the base {base} is not known: give its model there with "
            "--base OWNER/MODEL/FRAMEWORK/VARIATION/VERSION, or upload its folder as a dataset: --base OWNER/NAME"
        )
    recipes = [judge.recipe for judge in judges]
    longest, budget = max(each.prompt.max_length for each in recipes), max(each.packing.budget for each in recipes)
    settings = [f"packing.budget={BUDGET}"] if budget > BUDGET >= longest else []
    if "bfloat16" in {each.model.dtype for each in recipes}:  # which a T4 has not
        settings.append("model.dtype=auto")
    name = asked.name or f"arena-{first.name}".lower().replace("_", "-").replace(".", "-")
    return Upload(asked.owner, name, asked.competition, asked.deadline, source, tuple(settings))


def needed_of_base(judges: Sequence[SavedJudge]) -> list[Requirement]:
    """What a base needs besides arena: the packages of a base that comes as such, and the reader of a GGUF file."""
    bases = {judge.recipe.model.base for judge in judges if not is_whole(judge.folder)}
    names = [name for base in bases & set(PACKAGED) for name in PACKAGED[base].packages]
    return [Requirement(each) for each in (*names, *(GGUF if any(map(is_gguf, bases)) else ()))]


def gather(
    folder: Path, more: Sequence[Requirement], target: Target, there: Versions, known: Sequence[Path]
) -> list[Path]:
    """Fills a folder with the wheel of arena and those of what it needs and `there` lacks.

    Args:
        known: wheels of an earlier bundle, which need not be fetched again.
    """
    own = own_wheel(folder)
    wanted = [*target.applying(requirements_of(own)), *more]
    lacking = closure(wanted, target, there)
    if own_of_image := [name for name in lacking if name in OF_THE_IMAGE or name.startswith("nvidia-")]:
        asked = "; ".join(str(each) for each in wanted if each.name in own_of_image) or ", ".join(own_of_image)
        raise ValueError(
            f"{', '.join(own_of_image)} would have to be bundled ({asked} is needed), but Kaggle's image has its own "
            "torch, built for its driver: take versions of arena and of the image that go together"
        )
    wheels = fill(folder, lacking, target, reusable(known, lacking, target))
    check_requirements(wheels, wanted, target, there, hint="--has-file names a list of what else is there")
    return wheels


def requirements(wheels: Sequence[Path]) -> str:
    """A requirements file for `pip install --require-hashes`."""
    versions = [(name_of(wheel), wheel.name.split("-")[1], file_digest(wheel)) for wheel in wheels]
    return "".join(f"{name}=={version} --hash=sha256:{digest}\n" for name, version, digest in versions)


def show_sizes(out: Path) -> None:
    """Prints how large a bundle and its parts are."""
    parts = [*sorted(out.glob("wheels/*.whl")), *sorted(out.glob("judges/*/model"))]
    for part in parts:
        console.print(f"{size_of(part):8.2f} MiB  {part.relative_to(out)}", soft_wrap=True)
    console.print(f"{size_of(out):8.2f} MiB  {out}", soft_wrap=True)


def size_of(place: Path) -> float:
    """MiB of a file, or of all files below a folder."""
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files) / 2**20
