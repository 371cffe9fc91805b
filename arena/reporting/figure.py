"""Figures that are written to files, without a window or display and regardless of environment variables."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any


def new_figure(rows: int = 1, columns: int = 1, *, sharey: bool = False, **settings: Any) -> tuple[Any, Any]:
    """A matplotlib figure without pyplot, and its axes: one, or an array (rows, columns) of a grid.

    Args:
        settings: arguments of `matplotlib.figure.Figure`.
    """
    # notebooks export a backend that may not be installed, and then matplotlib could not even be imported
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # for other figures of this process
    figure = matplotlib.figure.Figure(layout="constrained", **settings)
    return figure, figure.subplots(rows, columns, sharey=sharey, squeeze=rows == columns == 1)
