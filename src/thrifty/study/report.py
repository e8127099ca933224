"""One HTML file with a study's conclusions, tables and plots, which loads nothing; and the plots as PNG."""

from __future__ import annotations

import html
import importlib.resources
import importlib.util
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from ..core.errors import ThriftyError
from ..core.files import disk_errors, write_text
from .measures import better
from .plots import Plot, plots
from .rates import written
from .records import Record
from .results import Results
from .table import Cell, Table, cost_table, failure_table, quality_table
from .words import caveats, headlines, seconds_words, slug

__all__ = ["write_plots", "write_report"]

REPORT, PLOTS, STUDY = "report.html", "plots", "study.yaml"


def write_report(results: Results, folder: Path, *, planned: tuple[int, int] | None = None) -> Path:
    """Write `report.html` into a study's folder, finished or not, and return its path.

    `planned`: runs that are over, and runs in all, where that is known. ThriftyError where plotly is not installed.
    """
    study = folder / STUDY
    text = page(results, planned=planned, study=study.read_text(encoding="utf-8") if study.is_file() else "")
    path = folder / REPORT
    with disk_errors(str(path), fix="free some space"):
        write_text(path, text)
    return path


def page(results: Results, *, planned: tuple[int, int] | None = None, study: str = "") -> str:
    """The report as HTML. `study`: the study's own file."""
    drawn = {task: plots(results, task) for task in results.tasks}
    tasks = [_task(results, task, drawn[task]) for task in results.tasks]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_page_file("report.html")).render(
        results=results,
        meta=_meta(results.records),
        tasks=tasks,
        caveats=caveats(results, planned=planned),
        failures=failure_table(results),
        made=_made(results.records),
        study=study,
        runs=_runs(results.records),
        configurations=_configurations(results.records),
        figures={plot.name: plot.figure for task in results.tasks for plot in drawn[task]},
        css=Markup(_page_file("report.css")),
        js=Markup(_page_file("report.js")),
        plotly=Markup(_plotly_file().read_text(encoding="utf-8")),
    )


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Write the report's plots as `plots/*.png` into a study's folder, for papers; their paths.

    kaleido draws them in Chrome or Chromium, found on PATH or through the variable BROWSER_PATH. ThriftyError where
    plotly, kaleido or the browser is missing.
    """
    library = _plotly_file()
    try:
        import kaleido
        from kaleido.errors import ChromeNotFoundError
    except ImportError:
        raise ThriftyError("plots as PNG need kaleido: pip install 'thrifty[plots]'") from None
    target = folder / PLOTS
    target.mkdir(parents=True, exist_ok=True)
    size = {"format": "png", "width": 800, "height": 520, "scale": 2}
    drawn = [(task, plot) for task in results.tasks for plot in plots(results, task)]
    paths = [target / f"{plot.name}.png" for _, plot in drawn]
    wanted = [{"fig": _on_paper(task, plot), "path": path, "opts": size} for (task, plot), path in zip(drawn, paths)]
    try:
        kaleido.write_fig_from_object_sync(wanted, cancel_on_error=True, kopts={"plotlyjs": library, "mathjax": False})
    except ChromeNotFoundError:
        raise ThriftyError(
            "plots as PNG are drawn by Chrome or Chromium, and none was found: install one (apt install chromium, or "
            "kaleido_get_chrome), or set BROWSER_PATH to it"
        ) from None
    return paths


def _on_paper(task: str, plot: Plot) -> dict[str, Any]:
    """With its title, on white."""
    title = {"text": html.escape(f"{task}: {plot.title}", quote=False), "x": 0.02, "xanchor": "left"}
    margin = {"l": 70, "r": 24, "t": 48, "b": 60}
    axis = {"gridcolor": "#D9DEE6", "linecolor": "#8A8A8A"}
    layout = plot.figure["layout"]
    axes = {name: layout[name] | axis for name in ("xaxis", "yaxis")}
    more = {"title": title, "margin": margin, "plot_bgcolor": "white", "font": {"color": "#1D2430", "size": 13}}
    return {"data": plot.figure["data"], "layout": layout | axes | more}


def _plotly_file() -> Path:
    """plotly.js as the Python package brings it; ThriftyError where that is not installed."""
    if importlib.util.find_spec("plotly") is None:
        raise ThriftyError("reports and plots need plotly: pip install 'thrifty[plots]'")
    return Path(str(importlib.resources.files("plotly") / "package_data" / "plotly.min.js"))


def _page_file(name: str) -> str:
    return (importlib.resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


def _task(results: Results, task: str, drawn: Sequence[Plot]) -> dict[str, Any]:
    found = [table for table in (quality_table(results, task), cost_table(results, task)) if table.rows]
    return {
        "name": task,
        "slug": slug(task),
        "measure": results.mains[task],
        "better": better(results.mains[task]),
        "headlines": headlines(results, task),
        "tables": found,
        "plots": [vars(plot) | {"small": plot.name.startswith("chosen-")} for plot in drawn],
    }


def _meta(records: Sequence[Record]) -> str:
    """How many runs of which stage, and from when to when."""
    stages = Counter(record.run_info["stage"] for record in records)
    counted = ", ".join(f"{count} {stage}" for stage, count in stages.items())
    return f"{len(records)} runs ({counted}), {_dates(records)}"


def _dates(records: Sequence[Record]) -> str:
    dates = [record.run_info.get("created_at") or "" for record in records]
    first, last = (date[:16].replace("T", " ") for date in (min(dates), max(dates)))
    return first if first == last else f"{first} to {last}"


def _made(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The command, versions and machines; every value that occurs."""

    def every(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))

    systems = [record.meta_info.get("system_info") or {} for record in records]
    machines = (" ".join(str(s.get(key, "")) for key in ("system", "release", "machine", "processor")) for s in systems)
    packages = [record.meta_info.get("package_info") or {} for record in records]
    names = dict.fromkeys(name for found in packages for name in found)
    versions = [(name.removesuffix("-version"), every(found.get(name) for found in packages)) for name in names]
    hours = sum(float(record.run_info.get("total_time") or 0) for record in records) / 3600
    found = [
        ("command", f"thrifty compare {STUDY}"),
        ("made", _dates(records)),
        ("compute", f"{hours:.1f} hours over all runs"),
        ("commit", every(record.run_info.get("commit") for record in records)),
        ("threads", every(record.run_info.get("threads") for record in records)),
        ("machine", every(" ".join(machine.split()) for machine in machines)),
        ("cores", every(system.get("cpus") for system in systems)),
        ("model", every((record.meta_info.get("model_info") or {}).get("sha") for record in records)),
        ("data", every(_data_digests(records))),
        ("packages", ", ".join(f"{name} {version}" for name, version in versions if version)),
    ]
    return [(name, value) for name, value in found if value]


def _data_digests(records: Sequence[Record]) -> list[str]:
    """`train d3ab...` of each data set."""
    sets = [record.meta_info.get("dataset_info") or {} for record in records]
    return [
        f"{name} {str(entry.get('sha'))[:16]}" for found in sets for name, entry in found.items() if entry.get("sha")
    ]


def _runs(records: Sequence[Record]) -> Table:
    rows = []
    for record in records:
        info = record.run_info
        rate, seconds = info.get("learning_rate"), info.get("total_time")
        cells = [
            Cell(str(info.get(key) or ""), str(info.get(key) or "") or None) for key in ("task", "method", "budget")
        ]
        rows.append(
            (
                Cell(record.name, record.name),
                Cell(info["stage"], info["stage"]),
                *cells,
                Cell("" if rate is None else written(rate), rate),
                Cell(str(info.get("seed", "")), info.get("seed")),
                Cell(str(record.train_info["status"]), str(record.train_info["status"])),
                Cell(seconds_words(seconds), seconds),
            )
        )
    headers = ("run", "stage", "task", "method", "budget", "learning rate", "seed", "status", "whole time")
    return Table("runs", "All runs", headers, tuple(rows), (0, 7, 8))


def _configurations(records: Sequence[Record]) -> list[tuple[str, str]]:
    """By method and budget the configuration of its first final run, as YAML."""
    found: dict[str, str] = {}
    for record in records:
        info = record.run_info
        if info["stage"] == "final" and info.get("train_config"):
            label = f"{info['task']}: {info['method']} {info['budget']}"
            found.setdefault(label, yaml.safe_dump(info["train_config"], sort_keys=False, allow_unicode=True))
    return list(found.items())
