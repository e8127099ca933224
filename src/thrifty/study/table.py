"""The results as tables: for the terminal, for Markdown, and (their cells) for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import rich.box
import rich.table
from rich.text import Text

from .measures import better
from .rates import written
from .results import Entry, Results, Score
from .words import bytes_words, caveats, count_words, headlines, number, plus_minus, seconds_words, slug, span

__all__ = ["Cell", "Table", "cost_table", "failure_table", "markdown", "quality_table", "rich_tables", "tables"]

_VERDICTS = {"better": "better", "worse": "worse", "unclear": "cannot tell"}


@dataclass(frozen=True)
class Cell:
    """`value` is what a column is sorted by; None sorts last."""

    text: str
    value: float | str | None = None


@dataclass(frozen=True)
class Table:
    """`headers` name the columns; `name` is a word for links; `brief` are the columns that a terminal has room for."""

    name: str
    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    brief: tuple[int, ...]

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers; it is then set to the right."""
        return any(isinstance(row[column].value, int | float) for row in self.rows)


def tables(results: Results) -> list[Table]:
    """For each task its qualities and its costs; then what failed."""
    found = [make(results, task) for task in results.tasks for make in (quality_table, cost_table)]
    return [table for table in [*found, failure_table(results)] if table.rows]


def quality_table(results: Results, task: str) -> Table:
    """Scores with standard errors over seeds, the main one with its interval and difference; forgetting as a rise."""
    main, entries, base = results.mains[task], results.of(task), results.bases.get(task, {})
    names = dict.fromkeys([*base, *(name for entry in entries for name in entry.scores)])
    others = [name for name in names if name not in (main, "forgetting")]
    forgets = any(entry.forgetting is not None for entry in entries)
    headers = ["method", "budget", "trained", "seeds", _arrow(main), "95 % interval"]
    headers += [f"difference to {results.baseline}", "its interval", "verdict", *map(_arrow, others)]
    headers += ["forgetting ↓"] if forgets else []
    rows = []
    if base:
        first = [_text("(base model)"), _text(""), _number(0, "0"), _text(""), *_main_cells(base.get(main))]
        rest = [_score(base.get(name)) for name in others] + ([_number(0.0, "0")] if forgets else [])
        rows.append((*first, _text(""), _text(""), _text(""), *rest))
    for entry in entries:
        cells = [*_who(entry), _seeds(entry), *_main_cells(entry.scores.get(main)), *_difference_cells(entry, main)]
        cells += [_score(entry.scores.get(name)) for name in others]
        if forgets:
            rise = entry.forgetting.value if entry.forgetting is not None else None
            cells.append(_number(rise, number(rise, signed=True)))
        rows.append(tuple(cells))
    return Table(f"quality-{slug(task)}", f"{task}: quality", tuple(headers), tuple(rows), (0, 1, 3, 4, 6, 7, 8))


def cost_table(results: Results, task: str) -> Table:
    """What each method takes; means over finished seeds."""
    headers = ["method", "budget", "trained", "share", "learning rate", "searched to both sides", "peak memory"]
    headers += ["train time", "of it probe", "tokens/s", "result on disk"]
    headers += [f"time to {results.baseline}'s best loss", f"share of {results.baseline}'s time"]
    rows = []
    for entry in results.of(task):
        costs, timed = entry.costs, entry.time_to
        both = "" if entry.search is None else "yes" if entry.search.interior else "no: best at the edge"
        if entry.search is not None and entry.search.best is None:
            both = "all failed"
        reached = timed.seconds if timed is not None else None
        ratio = timed.ratio if timed is not None else None
        rate = entry.learning_rate
        rows.append(
            (
                *_who(entry),
                _number(costs.share, "" if costs.share is None else f"{costs.share:.3%}"),
                _number(rate, "" if rate is None else written(rate)),
                Cell(both, both),
                _number(costs.peak_bytes, bytes_words(costs.peak_bytes)),
                _number(costs.train_seconds, seconds_words(costs.train_seconds)),
                _number(costs.probe_seconds, seconds_words(costs.probe_seconds)),
                _number(costs.tokens_per_second, count_words(costs.tokens_per_second)),
                _number(costs.file_bytes, bytes_words(costs.file_bytes)),
                _number(reached, "never" if timed is not None and reached is None else seconds_words(reached)),
                _number(ratio, "" if ratio is None else f"{ratio:.2f}"),
            )
        )
    return Table(f"costs-{slug(task)}", f"{task}: costs", tuple(headers), tuple(rows), (0, 1, 2, 4, 6, 7, 12))


def failure_table(results: Results) -> Table:
    """Every run that failed, whatever its stage."""
    rows = tuple(tuple(_text(part) for part in (f.name, f.stage, f.message)) for f in results.failures)
    return Table("failures", "Runs that failed", ("run", "stage", "message"), rows, (0, 1, 2))


def rich_tables(results: Results) -> list[rich.table.Table]:
    """For the terminal, the columns that matter most: `console.print(*rich_tables(results))`."""
    found = []
    for table in tables(results):
        shown = rich.table.Table(
            title=Text(table.title), title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for i in table.brief:
            justify: Literal["left", "right"] = "right" if table.is_number(i) else "left"
            shown.add_column(Text(table.headers[i]), justify=justify, no_wrap=i == 0)
        for row in table.rows:
            shown.add_row(*(Text(row[i].text) for i in table.brief))
        found.append(shown)
    return found


def markdown(results: Results, *, planned: tuple[int, int] | None = None) -> str:
    """Conclusions and tables for a page under docs/results, from headings of the second level on."""
    lines = []
    for task in results.tasks:
        lines += [f"## {task}", "", *(f"- {_plain(sentence)}" for sentence in headlines(results, task)), ""]
        for table in (quality_table(results, task), cost_table(results, task)):
            lines += [*_markdown_rows(table), ""] if table.rows else []
    lines += ["## How sure this is", "", *(f"- {_plain(sentence)}" for sentence in caveats(results, planned=planned))]
    failures = failure_table(results)
    if failures.rows:
        lines += ["", f"## {failures.title}", "", *_markdown_rows(failures)]
    return "\n".join(lines) + "\n"


def _markdown_rows(table: Table) -> list[str]:
    rows = [[_plain(cell.text) for cell in row] for row in table.rows]
    return ["| " + " | ".join(row) + " |" for row in [[*table.headers], ["---"] * len(table.headers), *rows]]


def _plain(text: str) -> str:
    """As text inside a Markdown table."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")
    return " ".join(escaped.split())


def _text(text: str) -> Cell:
    return Cell(text, text or None)


def _number(value: float | None, text: str) -> Cell:
    return Cell(text, value)


def _who(entry: Entry) -> tuple[Cell, Cell, Cell]:
    trained = entry.costs.trainable
    return _text(entry.method), _budget(entry.budget), _number(trained, count_words(trained))


def _budget(label: str) -> Cell:
    """Sorted by its number where it has one."""
    digits = label.rstrip("%")
    return _number(float(digits), label) if digits.replace(".", "", 1).isdigit() else Cell(label, None)


def _seeds(entry: Entry) -> Cell:
    failed = f" ({len(entry.failed)} failed)" if entry.failed else ""
    return _number(len(entry.seeds), f"{len(entry.seeds)}{failed}")


def _main_cells(score: Score | None) -> tuple[Cell, Cell]:
    interval = "" if score is None else span(score.low, score.high)
    return _score(score), _number(score.low if score is not None else None, interval)


def _difference_cells(entry: Entry, main: str) -> tuple[Cell, Cell, Cell]:
    found = entry.differences.get(main)
    if found is None:
        return _text(""), _text(""), _text("")
    return (
        _number(found.value, number(found.value, signed=True)),
        _number(found.low, span(found.low, found.high, signed=True)),
        _text(_VERDICTS[found.verdict]),
    )


def _score(score: Score | None) -> Cell:
    if score is None:
        return _text("")
    return _number(score.mean, number(score.mean) + plus_minus(score.standard_error))


def _arrow(measure: str) -> str:
    return f"{measure} {'↑' if better(measure) == 'higher' else '↓'}"
