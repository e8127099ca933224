"""The study's figures, as plain plotly specifications: {"data": [...], "layout": {...}}."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.plan import kind_of, layer_of
from .curves import Curve, mean_curve, pareto
from .measures import better
from .rates import written
from .results import Costs, Difference, Entry, Results, Score
from .words import count_words, slug

__all__ = ["Plot", "plots"]

# Okabe and Ito's palette, which colour-blind readers can tell apart; grey for their black, which a dark page would
# swallow, and their yellow last, because a white page nearly does.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A", "#C7B800")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "hexagon")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_Trace = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """`figure` is JSON for plotly. `says`: how to read it."""

    name: str
    title: str
    says: str
    figure: dict[str, Any]


def plots(results: Results, task: str) -> list[Plot]:
    """All figures of one task for which there are numbers."""
    found = [
        _plateau(results, task),
        _against_cost(results, task, "seconds", "train time, probe included (s)", lambda costs: costs.train_seconds),
        _against_cost(results, task, "memory", "peak memory (MiB)", _mebibytes),
        _curves(results, task, "seconds"),
        _curves(results, task, "steps"),
        _forgetting(results, task),
        _search(results, task),
        *(_chosen(entry) for entry in results.of(task) if any(share < 1 for share in entry.chosen.values())),
    ]
    return [plot for plot in found if plot.figure["data"]]


def _mebibytes(costs: Costs) -> float | None:
    return None if costs.peak_bytes is None else costs.peak_bytes / 2**20


def _style(results: Results, method: str) -> tuple[str, str]:
    """Colour and symbol of a method, the same in all figures; beyond eight the colours start again."""
    i = results.methods.index(method)
    return _COLOURS[i % len(_COLOURS)], _SYMBOLS[i % len(_SYMBOLS)]


def _dash(results: Results, budget: str) -> str:
    budgets = list(dict.fromkeys(entry.budget for entry in results.entries))
    return _DASHES[budgets.index(budget) % len(_DASHES)]


def _shown(text: str) -> str:
    """plotly reads labels as a small HTML."""
    return html.escape(text, quote=False)


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "automargin": True, "zeroline": False, **more}


def _log_axis(title: str, values: Sequence[float], words: Callable[[float], str]) -> dict[str, Any]:
    """Logarithmic, marked at the values that occur, but for those too close to the one before."""
    marks: list[float] = []
    for value in sorted(values):
        if not marks or value > 1.4 * marks[-1]:
            marks.append(value)
    return _axis(title, type="log", tickvals=marks, ticktext=[words(mark) for mark in marks])


def _figure(data: list[_Trace], x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
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


def _measure_axis(measure: str) -> dict[str, Any]:
    return _axis(f"{_shown(measure)} ({better(measure)} is better)")


def _bars(found: Sequence[Score | Difference], values: Sequence[float]) -> dict[str, Any]:
    """Error bars from the intervals; none where an interval is missing."""
    up = [0.0 if f.high is None else f.high - v for f, v in zip(found, values)]
    down = [0.0 if f.low is None else v - f.low for f, v in zip(found, values)]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2, "width": 4}


def _points(
    results: Results, method: str, *, x: list[float], y: list[float], labels: list[str], mode: str, **more: Any
) -> _Trace:
    colour, symbol = _style(results, method)
    return {
        "type": "scatter",
        "mode": mode,
        "name": _shown(method),
        "x": x,
        "y": y,
        "text": [_shown(label) for label in labels],
        "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "symbol": symbol, "size": 9},
        **more,
    }


def _line(name: str, x: list[float], y: list[float], *, dash: str = "dot") -> _Trace:
    """A grey line that belongs to no method."""
    line = {"color": "#8A8A8A", "width": 1.5, "dash": dash}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line, "hoverinfo": "name+y"}


def _plateau(results: Results, task: str) -> Plot:
    measure = results.mains[task]
    data = []
    for method in results.methods:
        mine = [e for e in results.of(task) if e.method == method and measure in e.scores and e.costs.trainable]
        if mine:
            scores = [entry.scores[measure] for entry in mine]
            x, y = [entry.costs.trainable or 0.0 for entry in mine], [score.mean for score in scores]
            labels = [entry.label for entry in mine]
            bars = _bars(scores, y)
            data.append(_points(results, method, x=x, y=y, labels=labels, mode="lines+markers", error_y=bars))
    base = results.bases.get(task, {}).get(measure)
    every = [value for trace in data for value in trace["x"]]
    if data and base is not None:
        data.append(_line("base model", [min(every), max(every)], [base.mean, base.mean]))
    return Plot(
        f"plateau-{slug(task)}",
        f"{measure} against trained parameters",
        "One line for each method over its budgets, with 95 % intervals: does it level off, or fall?",
        _figure(data, _log_axis("trained parameters", every, count_words), _measure_axis(measure)),
    )


def _against_cost(results: Results, task: str, name: str, title: str, cost: Callable[[Costs], float | None]) -> Plot:
    measure = results.mains[task]
    found = [(e, c) for e in results.of(task) if measure in e.scores and (c := cost(e.costs)) is not None]
    data = []
    for method in results.methods:
        mine = [(entry, x) for entry, x in found if entry.method == method]
        if mine:
            scores = [entry.scores[measure] for entry, _ in mine]
            x, y = [x for _, x in mine], [score.mean for score in scores]
            labels = [entry.label for entry, _ in mine]
            data.append(_points(results, method, x=x, y=y, labels=labels, mode="markers", error_y=_bars(scores, y)))
    if found:
        costs, qualities = [x for _, x in found], [entry.scores[measure].mean for entry, _ in found]
        front = pareto(costs, qualities, better=better(measure))
        line = _line("Pareto front", [costs[i] for i in front], [qualities[i] for i in front], dash="dash")
        data.append(line | {"line": line["line"] | {"shape": "hv"}})
    return Plot(
        f"{name}-{slug(task)}",
        f"{measure} against {'time' if name == 'seconds' else 'memory'}",
        "The dashed line joins what nothing else beats: no point on it has another that is both cheaper and better.",
        _figure(data, _axis(title, rangemode="tozero"), _measure_axis(measure)),
    )


def _curves(results: Results, task: str, over: str) -> Plot:
    def x_of(curve: Curve) -> list[float]:
        return list(curve.seconds if over == "seconds" else curve.steps)

    data = []
    for entry in results.of(task):
        dash = _dash(results, entry.budget)
        average = mean_curve(list(entry.curves.values()))
        lines = [(c, 1.0, 0.35, False, f"{entry.label}, seed {s}") for s, c in entry.curves.items()]
        for curve, width, opacity, named, label in [*lines, (average, 2.0, 1.0, True, entry.label)]:
            if not curve.steps:
                continue
            labels = [f"{label}, step {step}" for step in curve.steps]
            trace = _points(
                results, entry.method, x=x_of(curve), y=list(curve.losses), labels=labels, mode="lines", opacity=opacity
            )
            trace |= {"name": _shown(entry.label), "legendgroup": _shown(entry.label), "showlegend": named}
            data.append(trace | {"line": trace["line"] | {"dash": dash, "width": width}})
    title = "seconds, probe included" if over == "seconds" else "optimizer steps"
    return Plot(
        f"curves-{over}-{slug(task)}",
        f"Held-out loss by {'time' if over == 'seconds' else 'step'}",
        "Thick: the mean over seeds; thin: each seed. The dashes tell budgets apart.",
        _figure(data, _axis(title, rangemode="tozero"), _axis("loss on held-out rows")),
    )


def _forgetting(results: Results, task: str) -> Plot:
    data = []
    for method in results.methods:
        mine = [
            (entry, gain, entry.forgetting)
            for entry in results.of(task)
            if entry.method == method and entry.forgetting is not None and (gain := results.gain(entry)) is not None
        ]
        if mine:
            rises = [rise for _, _, rise in mine]
            x, y = [gain for _, gain, _ in mine], [rise.value for rise in rises]
            labels = [entry.label for entry, _, _ in mine]
            data.append(_points(results, method, x=x, y=y, labels=labels, mode="markers", error_y=_bars(rises, y)))
    measure = results.mains[task]
    return Plot(
        f"forgetting-{slug(task)}",
        "Forgetting against gain",
        "Right: better at the task than the base model. Up: worse on general text. The best lie low and right.",
        _figure(data, _axis(f"gain in {_shown(measure)}"), _axis("rise of the loss on general text")),
    )


def _search(results: Results, task: str) -> Plot:
    data = []
    finite = [x for e in results.of(task) if e.search for x in e.search.losses.values() if math.isfinite(x)]
    tried = [rate for e in results.of(task) if e.search for rate in e.search.losses]
    top = max(finite, default=1.0) * 1.05
    for entry in results.of(task):
        if entry.search is None:
            continue
        rates, losses = list(entry.search.losses), list(entry.search.losses.values())
        failed = [not math.isfinite(loss) for loss in losses]
        labels = [
            f"{entry.label}, {written(rate)}{' failed' if bad else ' chosen' if rate == entry.search.best else ''}"
            for rate, bad in zip(rates, failed)
        ]
        y = [top if bad else loss for loss, bad in zip(losses, failed)]
        trace = _points(results, entry.method, x=rates, y=y, labels=labels, mode="lines+markers")
        symbols = ["x" if bad else trace["marker"]["symbol"] for bad in failed]
        sizes = [13 if rate == entry.search.best else 7 for rate in rates]
        data.append(
            trace
            | {
                "name": _shown(entry.label),
                "line": trace["line"] | {"dash": _dash(results, entry.budget), "width": 1.5},
            }
            | {"marker": trace["marker"] | {"symbol": symbols, "size": sizes, "line": {"width": 0}}}
        )
    return Plot(
        f"search-{slug(task)}",
        "The search for the learning rate",
        "Loss on held-out training rows after a short run; the large mark is the rate that was chosen, a cross at the "
        "top a run that failed.",
        _figure(data, _log_axis("learning rate", tried, written), _axis("loss")),
    )


def _chosen(entry: Entry) -> Plot:
    """Share trained by layer and kind of matrix; tensors outside the layers in a row of their own."""
    cells: dict[tuple[str, tuple[str, str]], list[float]] = {}
    for name, share in entry.chosen.items():
        layer = layer_of(name)
        column = kind_of(name), name.removesuffix(".weight").split(".")[-1]
        cells.setdefault(("outside" if layer is None else str(layer), column), []).append(100 * share)
    columns = sorted(
        dict.fromkeys(column for _, column in cells), key=lambda c: ("attention", "mlp", "other").index(c[0])
    )
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer == "outside", layer.zfill(6)))
    values = [
        [sum(found) / len(found) if (found := cells.get((layer, column))) else None for column in columns]
        for layer in layers
    ]
    heat = {
        "type": "heatmap",
        "x": [[_shown(kind) for kind, _ in columns], [_shown(name) for _, name in columns]],
        "y": layers,
        "z": values,
        "zmin": 0,
        "colorscale": "Cividis",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"title": {"text": "%"}, "thickness": 12},
        "hovertemplate": "layer %{y}, %{x}: %{z:.2f} %<extra></extra>",
    }
    figure = _figure([heat] if entry.chosen else [], _axis(""), _axis("layer", type="category", autorange="reversed"))
    figure["layout"]["showlegend"] = False
    return Plot(
        f"chosen-{slug(entry.task)}-{slug(entry.label)}",
        f"Where {entry.label} trains",
        "The share of each matrix's numbers that is trained, in per cent.",
        figure,
    )
