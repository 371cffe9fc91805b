"""Data sets of the Hugging Face hub, fetched once as one parquet file for each split."""

from __future__ import annotations

import re
from pathlib import Path

from arena.progress import console
from arena.storage.files import atomic_write

NAME = re.compile(r"([A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*", re.ASCII)  # owner/name


def is_hub_name(path: str) -> bool:
    """Whether a path that does not exist may name a data set: `owner/name`, where no local folder is called `owner`."""
    name = NAME.fullmatch(path)
    return name is not None and not Path(name[1]).exists()


def hub_folder(name: str, cache: Path) -> Path:
    """The folder under `cache` that holds `train.parquet` and so on, a file for each split of a data set.

    Raises:
        ValueError: the data set cannot be fetched.
    """
    folder = cache / f"hub-{name.replace('/', '--')}"
    if not folder.is_dir():
        import datasets

        console.print(f"fetching the data set {name} from the Hugging Face hub")
        try:
            splits = datasets.load_dataset(name)
        except (OSError, ValueError) as error:  # OSError: also not found, not allowed, and no network
            raise ValueError(
                f"data.path: there is no folder or file {name}, and no data set of that name can be fetched from the "
                f"Hugging Face hub ({str(error).strip().splitlines()[0]}); give a folder with DATA= or --data"
            ) from None
        with atomic_write(folder) as draft:
            draft.mkdir()
            for split, rows in splits.items():
                rows.to_parquet(str(draft / f"{split}.parquet"))
    return folder
