"""Curves as SVG, drawn by matplotlib without a display; the same numbers give the same bytes."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from milan_pipe.drawing.sheet import file_url, printable_line
from milan_pipe.extras import needs

with needs("report", "drawing charts"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which the colour-blind can tell apart; black last.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_STYLE: Any = {
    "svg.hashsalt": "milan-pipe",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e8eb",
    "axes.edgecolor": "#8c959f",
    "text.parse_math": False,
}
_MOST_POINTS = 400
_LARGEST = 1e30
_MOST_CHARACTERS = 40
# Characters in a line of the labels below groups of bars, and of the legend below those.
_LABEL_WIDTH = 10
_LEGEND_WIDTH = 80
_SIZE = (5.2, 3.3)


@dataclass(frozen=True)
class Curve:
    """Points of a curve, as many x as y, and the number of its colour: the same for one run in all charts."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0


def _thinned(values: Sequence[float]) -> list[float]:
    """Means of neighbours, so that a page does not grow with the length of a run."""
    size = max(1, -(-len(values) // _MOST_POINTS))
    return [fmean(map(_drawable, values[start : start + size])) for start in range(0, len(values), size)]


def _drawable(value: float) -> float:
    """NaN, which leaves a gap, for what axes have no ticks for."""
    return float(value) if abs(value) < _LARGEST else math.nan


def _label(text: str) -> str:
    """Text that fits into a chart: one line, and of a long one the end, as of paths."""
    line = printable_line(text)
    return line if len(line) <= _MOST_CHARACTERS else f"...{line[-_MOST_CHARACTERS:]}"


def _legend_entry(name: str) -> str:
    # A name that begins with an underscore is none for matplotlib.
    label = _label(name)
    return f" {label}" if label.startswith("_") else label


def line_chart(title: str, x_label: str, y_label: str, curves: Mapping[str, Curve]) -> str:
    """An SVG image, as part of a page, with a curve for each name."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        for name, curve in curves.items():
            x, y = _thinned(curve.x), _thinned(curve.y)
            dash = _DASHES[curve.colour // len(_COLOURS) % len(_DASHES)]
            marker = "o" if len(x) == 1 else None
            label = _legend_entry(name)
            colour = _COLOURS[curve.colour % len(_COLOURS)]
            axes.plot(x, y, dash, color=colour, label=label, linewidth=1.4, marker=marker, markersize=4)
        axes.set_title(_label(title), loc="left", fontsize=10)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=8)
        return _svg(figure)


def bar_chart(title: str, y_label: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """An SVG image, as part of a page: groups of bars, a bar of a name in the same place and colour in each group."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.84 / len(names)
    with mpl.rc_context({**_STYLE, "axes.grid.axis": "y"}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        for number, name in enumerate(names):
            at = [place for place, bars in enumerate(groups.values()) if name in bars]
            heights = [_drawable(bars[name]) for bars in groups.values() if name in bars]
            left = (number - (len(names) - 1) / 2) * width
            at_left, colour = [place + left for place in at], _COLOURS[number % len(_COLOURS)]
            drawn = axes.bar(at_left, heights, 0.9 * width, color=colour, label=_legend_entry(name))
            axes.bar_label(drawn, fmt="{:.0f}", fontsize=7)
        axes.set_axisbelow(True)
        labels = [textwrap.fill(_label(group), _LABEL_WIDTH) for group in groups]
        axes.set_xticks(range(len(groups)), labels)
        axes.set_title(_label(title), loc="left", fontsize=10)
        axes.set_ylabel(y_label)
        below = -0.05 - 0.05 * max(label.count("\n") + 1 for label in labels)
        longest = max(1, *(len(_legend_entry(name)) for name in names))
        ncols = max(1, min(len(names), _LEGEND_WIDTH // longest))
        axes.legend(frameon=False, fontsize=8, ncols=ncols, loc="upper center", bbox_to_anchor=(0.5, below))
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return file_url(buffer.getvalue().encode(), "svg+xml")
