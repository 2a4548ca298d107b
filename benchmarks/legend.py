"""Draw the legend that the plots share."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure


def legend_below(figure: Figure, **options: Any) -> None:
    """Draw one legend below all axes, each label once, in one row unless ``options`` of Figure.legend say
    otherwise.
    """
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        fontsize=9,
        **{"ncols": len(handles), **options},
    )
