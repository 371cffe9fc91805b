"""Data sets of the Hugging Face hub, fetched once as one parquet file for each split."""

from __future__ import annotations

import re
from pathlib import Path

from arena.progress import console
from arena.storage.files import atomic_write

# owner/name, or owner/name:configuration
NAME = re.compile(r"(?P<data_set>(?P<owner>[A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*)(:(?P<part>[\w.+-]+))?", re.ASCII)


def is_hub_name(path: str) -> bool:
    """Whether a path that does not exist may name a data set, where no local folder is called like its owner.

    It is `owner/name`, or `owner/name:configuration` for a data set that has several.
    """
    name = NAME.fullmatch(path)
    return name is not None and not Path(name["owner"]).exists()


def hub_folder(name: str, cache: Path) -> Path:
    """The folder under `cache` that holds `train.parquet` and so on, a file for each split of a data set.

    Args:
        name: for which `is_hub_name` is true.

    Raises:
        ValueError: the data set cannot be fetched, or is one of several configurations and `name` has none of them.
    """
    folder = cache / f"hub-{name.replace('/', '--').replace(':', '--')}"
    if not folder.is_dir():
        import datasets

        found = NAME.fullmatch(name)
        assert found is not None, name
        console.print(f"fetching the data set {name} from the Hugging Face hub")
        try:
            splits = datasets.load_dataset(found["data_set"], found["part"])
        # OSError: also not found, not allowed, and no network
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            if isinstance(error, ValueError):
                _check_configuration(found["data_set"], found["part"])
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"data.path: there is no folder or file {name}, and no data set of that name can be fetched from the "
                f"Hugging Face hub ({reason}); give a folder with DATA= or --data"
            ) from None
        with atomic_write(folder) as draft:
            draft.mkdir()
            for split, rows in splits.items():
                rows.to_parquet(str(draft / f"{split}.parquet"))
    return folder


def _check_configuration(data_set: str, part: str | None) -> None:
    """Raises `ValueError` if a data set that exists has several configurations, and `part` is none of them."""
    import datasets

    try:
        known = datasets.get_dataset_config_names(data_set)
    except (
        OSError,
        ValueError,
        datasets.exceptions.DatasetsError,
    ):  # what is wrong is something else, which loading has reported
        return
    if part not in known and (part is not None or (len(known) > 1 and "default" not in known)):
        wrong = "consists of several configurations" if part is None else f"has no configuration {part!r}"
        raise ValueError(
            f"data.path: the data set {data_set} {wrong}: name one after a colon, as in data.path={data_set}:"
            f"{known[0]}; there are {', '.join(known)}"
        ) from None
