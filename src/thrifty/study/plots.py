"""The study's figures, as plain plotly specifications: {"data": [...], "layout": {...}}."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.plan import kind_of, layer_of
from .curves import Curve, mean_curve, pareto
from .drawing import (
    Trace,
    axis,
    dash_of,
    dash_words,
    error_bars,
    grey_line,
    log_axis,
    make_figure,
    measure_axis,
    points,
    shown,
)
from .measures import better
from .rates import written
from .results import Costs, Entry, Results
from .words import count_words, slug

__all__ = ["Plot", "plots"]


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


def _plateau(results: Results, task: str) -> Plot:
    measure = results.mains[task]
    data = []
    for method in results.methods:
        mine = [e for e in results.of(task) if e.method == method and measure in e.scores and e.costs.trainable]
        if mine:
            scores = [entry.scores[measure] for entry in mine]
            x, y = [entry.costs.trainable or 0.0 for entry in mine], [score.mean for score in scores]
            labels = [entry.label for entry in mine]
            bars = error_bars(scores, y)
            data.append(points(results, method, x=x, y=y, labels=labels, mode="lines+markers", error_y=bars))
    base = results.bases.get(task, {}).get(measure)
    every = [value for trace in data for value in trace["x"]]
    if data and base is not None:
        data.append(grey_line("base model", [min(every), max(every)], [base.mean, base.mean]))
    return Plot(
        f"plateau-{slug(task)}",
        f"{measure} against trained parameters",
        "One line for each method over its budgets, with 95 % intervals: does it level off, or fall?",
        make_figure(data, log_axis("trained parameters", every, count_words), measure_axis(measure)),
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
            data.append(points(results, method, x=x, y=y, labels=labels, mode="markers", error_y=error_bars(scores, y)))
    if found:
        costs, qualities = [x for _, x in found], [entry.scores[measure].mean for entry, _ in found]
        front = pareto(costs, qualities, better=better(measure))
        front_line = grey_line("Pareto front", [costs[i] for i in front], [qualities[i] for i in front], dash="dash")
        data.append(front_line | {"line": front_line["line"] | {"shape": "hv"}})
    return Plot(
        f"{name}-{slug(task)}",
        f"{measure} against {'time' if name == 'seconds' else 'memory'}",
        "The dashed line joins what nothing else beats: no point on it has another that is both cheaper and better.",
        make_figure(data, axis(title, rangemode="tozero"), measure_axis(measure)),
    )


def _curves(results: Results, task: str, over: str) -> Plot:
    def x_of(curve: Curve) -> list[float]:
        return list(curve.seconds if over == "seconds" else curve.steps)

    data: list[Trace] = []
    listed: set[str] = set()  # a legend of methods, not of their budgets too
    for entry in results.of(task):
        dash = dash_of(results, entry.budget)
        average = mean_curve(list(entry.curves.values()))
        lines = [(c, 1.0, 0.35, False, f"{entry.label}, seed {s}") for s, c in entry.curves.items()]
        for curve, width, opacity, named, label in [*lines, (average, 2.0, 1.0, True, entry.label)]:
            if not curve.steps:
                continue
            labels = [f"{label}, step {step}" for step in curve.steps]
            trace = points(
                results, entry.method, x=x_of(curve), y=list(curve.losses), labels=labels, mode="lines", opacity=opacity
            )
            trace |= {"legendgroup": trace["name"], "showlegend": named and entry.method not in listed}
            listed |= {entry.method} if named else set()
            data.append(trace | {"line": trace["line"] | {"dash": dash, "width": width}})
    title = "seconds, probe included" if over == "seconds" else "optimizer steps"
    return Plot(
        f"curves-{over}-{slug(task)}",
        f"Held-out loss by {'time' if over == 'seconds' else 'step'}",
        f"Thick: the mean over seeds; thin: each seed.{dash_words(results)}",
        make_figure(data, axis(title, rangemode="tozero"), _loss_axis(data)),
    )


def _loss_axis(data: list[Trace]) -> dict[str, Any]:
    """Logarithmic, so that late differences show; marked at 1, 2 and 5 of each power of ten."""
    losses = [loss for trace in data for loss in trace["y"]] or [1.0]
    steps = [float(f"{digit}e{power}") for power in range(-6, 7) for digit in (1, 2, 5)]
    marks = [step for step in steps if min(losses) / 2 < step < 2 * max(losses)]
    return log_axis("loss on held-out rows", marks, "{:g}".format)


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
            data.append(points(results, method, x=x, y=y, labels=labels, mode="markers", error_y=error_bars(rises, y)))
    measure = results.mains[task]
    return Plot(
        f"forgetting-{slug(task)}",
        "Forgetting against gain",
        "Right: better at the task than the base model. Up: worse on general text. The best lie low and right.",
        make_figure(data, axis(f"gain in {shown(measure)}"), axis("rise of the loss on general text")),
    )


def _search(results: Results, task: str) -> Plot:
    data: list[Trace] = []
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
        trace = points(results, entry.method, x=rates, y=y, labels=labels, mode="lines+markers")
        symbols = ["x" if bad else trace["marker"]["symbol"] for bad in failed]
        sizes = [13 if rate == entry.search.best else 7 for rate in rates]
        data.append(
            trace
            | {
                "legendgroup": trace["name"],
                "showlegend": all(trace["name"] != before["name"] for before in data),
                "line": trace["line"] | {"dash": dash_of(results, entry.budget), "width": 1.5},
            }
            | {"marker": trace["marker"] | {"symbol": symbols, "size": sizes, "line": {"width": 0}}}
        )
    return Plot(
        f"search-{slug(task)}",
        "The search for the learning rate",
        "Loss on held-out training rows after a short run; the large mark is the rate that was chosen, a cross at the "
        f"top a run that failed.{dash_words(results)}",
        make_figure(data, log_axis("learning rate", tried, written), _loss_axis(data)),
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
        "x": [[shown(kind) for kind, _ in columns], [shown(name) for _, name in columns]],
        "y": layers,
        "z": values,
        "zmin": 0,
        "colorscale": "Cividis",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"title": {"text": "%"}, "thickness": 12},
        "hovertemplate": "layer %{y}, %{x}: %{z:.2f} %<extra></extra>",
    }
    figure = make_figure([heat] if entry.chosen else [], axis(""), axis("layer", type="category", autorange="reversed"))
    figure["layout"]["showlegend"] = False
    return Plot(
        f"chosen-{slug(entry.task)}-{slug(entry.label)}",
        f"Where {entry.label} trains",
        "The share of each matrix's numbers that is trained, in per cent.",
        figure,
    )
