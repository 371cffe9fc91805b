"""What Kaggle is told about a bundle: its notebook, the metadata of both uploads, and a page on how to upload them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arena.inference.deadline import seconds_of

IMAGE = Path(__file__).with_name("image.txt")
MARKER, NOTEBOOK = "arena-bundle.json", "submit.ipynb"
# the name of two T4 for `kaggle kernels push`, as in docs/kernels.md of Kaggle/kaggle-api (2026-01-30)
MACHINE = "NvidiaTeslaT4"
# where Kaggle has bases that recipes name, if they were seen there
SOURCES = {"google/gemma-2-9b-it": "google/gemma-2/transformers/gemma-2-9b-it/2"}
CODE: dict[str, Any] = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

README = """# {name}

Made by `arena bundle` from {judges}. It has all that the notebook needs except Kaggle's image, the
competition's files and the base model.

1. On Kaggle, accept the rules of {competition}, and the base's licence if it has one.
2. `kaggle datasets create --path . --dir-mode zip` uploads this folder as {owner}/{name}, and
   `kaggle datasets version --path . --dir-mode zip --message again` a later one.
3. `kaggle kernels push --path .` uploads `{notebook}` with its inputs and runs it on two T4 GPUs without internet.
4. On the notebook's page, submit its `submission.csv` to the competition.

Kaggle's own torch is kept. The wheels are for Python {python} (`requirements.txt` has their SHA-256).
"""


@dataclass(frozen=True)
class Upload:
    """Where a bundle goes, and how it judges there.

    Attributes:
        owner: the Kaggle user.
        name: of the dataset and of the notebook.
        source: where Kaggle has the base: OWNER/MODEL/FRAMEWORK/VARIATION/VERSION, or a dataset, OWNER/NAME; empty: the
            judges need none.
        settings: for `arena infer`.
    """

    owner: str
    name: str
    competition: str
    deadline: str
    source: str
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, slug in (("--owner", self.owner), ("--name", self.name), ("--competition", self.competition)):
            if not SLUG.fullmatch(slug.lower()):
                raise ValueError(f"{option} {slug!r}: give the name as it is in Kaggle's addresses, such as my-judges")
        if not 6 <= len(self.name) <= 50 or self.name != self.name.lower():
            raise ValueError(f"--name {self.name}: Kaggle takes names of 6 to 50 small letters, digits and hyphens")
        seconds_of(self.deadline)
        if self.source and self.source.count("/") not in (1, 4):
            raise ValueError(
                f"--base {self.source}: name a model as OWNER/MODEL/FRAMEWORK/VARIATION/VERSION, or a dataset as "
                "OWNER/NAME"
            )

    @property
    def place(self) -> str:
        """Where the base is below Kaggle's folder of inputs, whatever stands before it."""
        return self.source.partition("/")[2]

    def dataset_metadata(self) -> dict[str, Any]:
        """The content of `dataset-metadata.json`."""
        return {"id": f"{self.owner}/{self.name}", "title": self.name, "licenses": [{"name": "other"}]}

    def kernel_metadata(self) -> dict[str, Any]:
        """The content of `kernel-metadata.json`; what is left out there is not always off."""
        is_model = self.source.count("/") == 4
        return {
            "id": f"{self.owner}/{self.name}",
            "title": self.name,
            "code_file": NOTEBOOK,
            "language": "python",
            "kernel_type": "notebook",
            "is_private": True,
            "enable_gpu": True,
            "enable_tpu": False,
            "enable_internet": False,
            "machine_shape": MACHINE,
            "dataset_sources": [f"{self.owner}/{self.name}", *([self.source] if self.source and not is_model else [])],
            "competition_sources": [self.competition],
            "kernel_sources": [],
            "model_sources": [self.source] if is_model else [],
        }

    def notebook(self) -> dict[str, Any]:
        """The notebook with this bundle's settings."""
        source = Path(__file__).with_name("submit.py").read_text(encoding="utf-8")
        values = {"DEADLINE": self.deadline, "BASE": self.place, "SETTINGS": list(self.settings)}
        first, *cells = re.split(r"^# %% ?", with_values(source, values), flags=re.MULTILINE)
        text: dict[str, Any] = {"cell_type": "markdown", "metadata": {}, "source": first.strip().strip('"').strip()}
        code = [{**CODE, "source": f"# {cell.strip()}"} for cell in cells]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        return {"cells": [text, *code], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}

    def readme(self, judges: str, python: str) -> str:
        """A page on how to upload the folder."""
        return README.format(
            name=self.name, owner=self.owner, competition=self.competition, judges=judges, python=python,
            notebook=NOTEBOOK,
        )  # fmt: skip


def with_values(source: str, values: Mapping[str, object]) -> str:
    """Source with other values in the lines `NAME = VALUE` or `NAME: TYPE = VALUE`; their comments stay.

    Raises:
        ValueError: a name is not set in exactly one line.
    """
    for name, value in values.items():
        text = f"Path({json.dumps(str(value))})" if isinstance(value, Path) else json.dumps(value)
        line = re.compile(rf'^({name}(?:: [^=]+)? = )(?:Path\("[^"]*"\)|"[^"]*"|\[[^]]*\])', re.MULTILINE)
        source, count = line.subn(lambda found, text=text: found[1] + text, source)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{name} is set in {count} lines of the notebook instead of one: make the bundle again")
    return source
