"""What the study's figures have in common: colours, axes, and the pieces of a plotly specification."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

from .budgets import OWN
from .measures import better
from .results import Difference, Results, Score

__all__ = [
    "Trace",
    "axis",
    "dash_of",
    "dash_words",
    "error_bars",
    "grey_line",
    "log_axis",
    "make_figure",
    "measure_axis",
    "points",
    "shown",
    "style",
]

# Okabe and Ito's palette, which colour-blind readers can tell apart; grey for their black, which a dark page would
# swallow, and their yellow last, because a white page nearly does.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A", "#C7B800")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "hexagon")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
Trace = dict[str, Any]


def style(results: Results, method: str) -> tuple[str, str]:
    """Colour and symbol of a method, the same in all figures; beyond eight the colours start again."""
    i = results.methods.index(method)
    return _COLOURS[i % len(_COLOURS)], _SYMBOLS[i % len(_SYMBOLS)]


def dash_of(results: Results, budget: str) -> str:
    """How lines of a budget are broken, the same in all figures; a method's own size is drawn as the first budget."""
    budgets = _budgets(results)
    return _DASHES[budgets.index(budget) % len(_DASHES)] if budget in budgets else _DASHES[0]


def dash_words(results: Results) -> str:
    """What the kinds of line mean; empty where there is one budget only."""
    budgets = _budgets(results)
    said = ", ".join(f"{dash_of(results, budget)} {budget}" for budget in budgets)
    return f" Lines by budget: {said}." if len(budgets) > 1 else ""


def _budgets(results: Results) -> list[str]:
    return list(dict.fromkeys(entry.budget for entry in results.entries if entry.budget != OWN))


def shown(text: str) -> str:
    """plotly reads labels as a small HTML."""
    return html.escape(text, quote=False)


def axis(title: str, **more: Any) -> dict[str, Any]:
    """plotly's `layout.xaxis` or `yaxis`."""
    return {"title": {"text": title}, "automargin": True, "zeroline": False, **more}


def log_axis(title: str, values: Sequence[float], words: Callable[[float], str]) -> dict[str, Any]:
    """Logarithmic, marked at the values that occur, but for those too close to the one before."""
    marks: list[float] = []
    for value in sorted(values):
        if not marks or value > 1.4 * marks[-1]:
            marks.append(value)
    return axis(title, type="log", tickvals=marks, ticktext=[words(mark) for mark in marks])


def make_figure(data: list[Trace], x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    """Traces and axes, with the legend below."""
    legend = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0}
    layout = {
        "xaxis": x,
        "yaxis": y,
        "legend": legend,
        "showlegend": True,
        "margin": {"l": 56, "r": 16, "t": 16, "b": 48},
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def measure_axis(measure: str) -> dict[str, Any]:
    """Says which way is better."""
    return axis(f"{shown(measure)} ({better(measure)} is better)")


def error_bars(found: Sequence[Score | Difference], values: Sequence[float]) -> dict[str, Any]:
    """Error bars from the intervals; none where an interval is missing."""
    up = [0.0 if f.high is None else f.high - v for f, v in zip(found, values)]
    down = [0.0 if f.low is None else v - f.low for f, v in zip(found, values)]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2, "width": 4}


def points(
    results: Results, method: str, *, x: list[float], y: list[float], labels: list[str], mode: str, **more: Any
) -> Trace:
    """One method's points or line, in its colour; `labels` are shown on hovering."""
    colour, symbol = style(results, method)
    return {
        "type": "scatter",
        "mode": mode,
        "name": shown(method),
        "x": x,
        "y": y,
        "text": [shown(label) for label in labels],
        "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "symbol": symbol, "size": 9},
        **more,
    }


def grey_line(name: str, x: list[float], y: list[float], *, dash: str = "dot") -> Trace:
    """A grey line that belongs to no method."""
    line = {"color": "#8A8A8A", "width": 1.5, "dash": dash}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line, "hoverinfo": "name+y"}
