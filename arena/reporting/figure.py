"""Figures for files: no window, no display, and no setting of the environment is needed to draw one."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any


def new_figure(rows: int = 1, columns: int = 1, *, sharey: bool = False, **settings: Any) -> tuple[Any, Any]:
    """A matplotlib figure, not pyplot's, and its axes: one, or for a grid an array (rows, columns).

    Args:
        settings: of `matplotlib.figure.Figure`.
    """
    # notebooks export a backend that may not be installed here: then matplotlib could not even be imported
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # for what else this process may draw
    figure = matplotlib.figure.Figure(layout="constrained", **settings)
    return figure, figure.subplots(rows, columns, sharey=sharey, squeeze=rows == columns == 1)
