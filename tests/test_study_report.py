"""The report's words, tables and figures, and what it says where something is missing."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_study import base, final, make_study, rows_of, run, search, write_run
from PIL import Image
from rich.console import Console

from thrifty.core.errors import ThriftyError
from thrifty.study.gather import read_results
from thrifty.study.plots import plots
from thrifty.study.report import page, write_plots, write_report
from thrifty.study.results import Results
from thrifty.study.table import markdown, quality_table, rich_tables, tables
from thrifty.study.words import bytes_words, caveats, count_words, headlines, number, seconds_words, slug


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("made") / "claim")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return read_results(folder)


def _read(tmp_path: Path, *records: dict[str, Any], **options: Any) -> Results:
    for record in records:
        write_run(tmp_path, record)
    return read_results(tmp_path, **options)


# --- words ---


def test_the_leader_is_named_with_how_sure_it_is(results: Results) -> None:
    first, against, times = headlines(results, "snips")
    entry = next(entry for entry in results.entries if entry.label == "smt 8%")
    difference = entry.differences["exact_match"]
    assert first.startswith(f"smt 8% leads with exact_match {entry.scores['exact_match'].mean:.3f} (95 % interval ")
    assert f"It is better than lora 8% by {difference.value:+.3f}, and the interval {difference.low:+.3f}" in first
    assert first.endswith("excludes 0.")
    assert "better: smt (all sizes), full; worse: random_blocks 2%, random_blocks 0.5%" in against
    assert "cannot be told apart: random_blocks 8%" in against
    assert "smt 8% in 0.65 of its time" in times
    assert "never by random_blocks (all sizes)" in times


def test_what_cannot_be_told_apart_is_not_called_better(tmp_path: Path) -> None:
    found = _read(tmp_path, base(), final("lora", quality=0.40), final("smt", quality=0.41))
    assert "It cannot be told apart from lora 1%: the difference is " in headlines(found, "snips")[0]
    assert "holds 0" in headlines(found, "snips")[0]


def test_a_leading_baseline_is_compared_with_the_best_other(tmp_path: Path) -> None:
    found = _read(tmp_path, base(), final("lora", quality=0.6), final("smt", quality=0.3), final("full", quality=0.2))
    assert (
        "It is the baseline. The best other is smt 1%. It is worse than lora 1% by -0." in headlines(found, "snips")[0]
    )


def test_where_lower_is_better_the_lowest_leads(results: Results, folder: Path) -> None:
    by_loss = read_results(folder, main="loss")
    best = min(by_loss.entries, key=lambda entry: entry.scores["loss"].mean)
    assert headlines(by_loss, "snips")[0].startswith(f"{best.label} leads with loss ")
    assert f"It is better than lora 8% by {best.differences['loss'].value:+.3f}" in headlines(by_loss, "snips")[0]
    assert by_loss.gain(best) > 0


def test_doubts_are_named(results: Results) -> None:
    said = caveats(results, planned=(51, 60))
    assert said[0] == "51 of 60 runs are over; the rest is still to come."
    assert said[1] == "8 of 51 runs failed (1 final, 7 search); each is listed below."
    assert any(sentence.startswith("snips: exact_match counts") for sentence in said)
    assert any(sentence.startswith("Few seeds (1 to 2)") for sentence in said)
    assert any("lies at the edge for smt 0.5% (snips), smt 2% (snips), smt 8% (snips)" in sentence for sentence in said)
    assert caveats(results, planned=(60, 60))[0] == "60 of 60 runs are over."


def test_a_study_without_final_runs_says_so(tmp_path: Path) -> None:
    found = _read(tmp_path, base(), *search("smt", {1e-3: 0.5}))
    assert headlines(found, "snips") == ["No final run has exact_match yet."]
    assert "claim" not in page(found)


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_numbers_are_read_back_within_their_digits(value: float) -> None:
    assert float(number(value)) == pytest.approx(value, rel=0.06, abs=1e-9)
    assert float(number(value, signed=True)) == float(number(value))


def test_units() -> None:
    assert [number(None), number(0.25), number(-0.0), number(2e-17), number(1234.5)] == [
        "",
        "0.250",
        "0",
        "0",
        "1.23e+03",
    ]
    assert [count_words(x) for x in (None, 5, 1_300_000, 2e9)] == ["", "5", "1.3M", "2G"]
    assert [bytes_words(x) for x in (None, 12, 2048, 5.2 * 2**20)] == ["", "12 B", "2.0 KiB", "5.2 MiB"]
    assert [seconds_words(x) for x in (None, 3.21, 42, 272, 7300)] == ["", "3.2 s", "42 s", "4 min 32 s", "2 h 01 min"]
    assert slug("arc/easy 1%") == "arc-easy-1pct"


# --- tables ---


def test_tables_hold_every_entry_and_every_failure(results: Results) -> None:
    found = {table.name: table for table in tables(results)}
    assert list(found) == ["quality-snips", "costs-snips", "failures"]
    assert len(found["quality-snips"].rows) == len(results.entries) + 1  # and the base model
    assert len(found["costs-snips"].rows) == len(results.entries)
    assert len(found["failures"].rows) == len(results.failures) == 8
    for table in found.values():
        assert {len(row) for row in table.rows} == {len(table.headers)}


def test_cells_carry_what_they_are_sorted_by(results: Results) -> None:
    table = quality_table(results, "snips")
    row = next(row for row in table.rows if (row[0].text, row[1].text) == ("smt", "8%"))
    entry = next(entry for entry in results.entries if entry.label == "smt 8%")
    by_header = dict(zip(table.headers, row))
    assert by_header["exact_match ↑"].value == entry.scores["exact_match"].mean
    assert by_header["exact_match ↑"].text == "0.438 ± 0.0025"
    assert by_header["difference to lora"].value == entry.differences["exact_match"].value
    assert by_header["verdict"].text == "better"
    assert by_header["forgetting ↓"].value == entry.forgetting.value
    assert [table.is_number(i) for i in (0, 1, 2)] == [False, True, True]


def test_the_terminal_shows_the_same_figures(results: Results) -> None:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(*rich_tables(results))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 120
    assert re.search(r"smt +8% +2 +0\.438 ± 0\.0025 +\+0\.232 +\+0\.175 to \+0\.293 +better", shown)
    assert "MemoryError: no room" in shown


def test_markdown_is_one_table_row_a_line(tmp_path: Path) -> None:
    found = _read(
        tmp_path, final("lora"), final("a|b<c>*", budget="2%"), run("final", "smt", error="first\nsecond | third")
    )
    text = markdown(found, planned=(3, 3))
    assert "| a\\|b&lt;c>\\* | 2% |" in text
    assert "| final-snips-smt-1pct-s0 | final | first second \\| third |" in text
    assert text.index("## snips") < text.index("## How sure this is") < text.index("## Runs that failed")
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


# --- figures ---


def test_figures_are_what_plotly_accepts(results: Results) -> None:
    for plot in plots(results, "snips"):
        go.Figure(plot.figure)  # refuses unknown keys and values
        json.dumps(plot.figure, allow_nan=False)


def test_a_method_has_one_colour_everywhere(results: Results) -> None:
    colours: dict[str, set[str]] = {}
    for plot in plots(results, "snips"):
        for trace in plot.figure["data"]:
            if trace.get("marker"):
                colours.setdefault(trace["name"].split()[0], set()).add(trace["marker"]["color"])
    assert set(colours) == {"full", "lora", "random_blocks", "smt"}
    assert {len(found) for found in colours.values()} == {1}
    assert len(set.union(*colours.values())) == 4


def test_the_plateau_plot_holds_scores_and_intervals(results: Results) -> None:
    plateau = next(plot for plot in plots(results, "snips") if plot.name == "plateau-snips")
    trace = next(trace for trace in plateau.figure["data"] if trace["name"] == "smt")
    mine = [entry for entry in results.entries if entry.method == "smt"]
    assert trace["x"] == [entry.costs.trainable for entry in mine]
    assert trace["y"] == [entry.scores["exact_match"].mean for entry in mine]
    ends = [y + up for y, up in zip(trace["y"], trace["error_y"]["array"])]
    assert ends == pytest.approx([entry.scores["exact_match"].high for entry in mine])
    assert plateau.figure["layout"]["xaxis"]["type"] == "log"


def test_the_heat_map_is_by_layer_and_kind(results: Results) -> None:
    heat = next(plot for plot in plots(results, "snips") if plot.name == "chosen-snips-smt-2pct").figure["data"][0]
    assert heat["x"] == [
        ["attention"] * 3 + ["mlp"] * 3,
        ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ]
    assert heat["y"] == ["0", "1", "2", "3"]
    entry = next(entry for entry in results.entries if entry.label == "smt 2%")
    share = entry.chosen["model.layers.3.mlp.gate_proj.weight"]
    assert heat["z"][3][3] == pytest.approx(100 * share)
    assert "full" not in " ".join(plot.name for plot in plots(results, "snips"))


def test_failed_rates_are_drawn_as_crosses(results: Results) -> None:
    found = next(plot for plot in plots(results, "snips") if plot.name == "search-snips")
    lora, smt = (
        next(t for t in found.figure["data"] if t["text"][0].startswith(name)) for name in ("lora 2%", "smt 2%")
    )
    assert lora["marker"]["symbol"] == ["square", "square", "x"]
    assert "failed" in lora["text"][2]
    assert np.argmax(smt["marker"]["size"]) == 2


# --- the page ---


def test_the_page_needs_no_network(results: Results) -> None:
    text = page(results, study="tasks: {}\n")
    own = text[: text.index('id="figures"')]
    assert not re.search(r'(src|href)="(?!#)', own)
    assert "default-src 'none'" in own
    assert text.count("<script") == text.count("</script") == 3  # figures, plotly, ours
    assert "tasks: {}" in text
    assert "abc1234" in text


def test_every_run_and_failure_is_on_the_page(results: Results) -> None:
    text = page(results)
    for record in results.records:
        assert record.name in text
    for failure in results.failures:
        assert failure.message in text


def test_labels_and_messages_are_escaped(tmp_path: Path) -> None:
    evil = '</script><script>bad("&")</script>'
    record = final(evil, measures={"exact_match": {"rows": rows_of(np.ones(4))}})
    record["run_info"]["experiment_name"] = "final-evil"
    failed = run("final", "smt", error=evil)
    text = page(_read(tmp_path, final("lora"), record, failed), study=evil)
    assert "bad(" in text
    assert "<script>bad" not in text


def test_the_report_is_written_whole_and_again(folder: Path, results: Results) -> None:
    first = write_report(results, folder, planned=(51, 51))
    assert first == folder / "report.html"
    before = first.read_text(encoding="utf-8")
    again = write_report(read_results(folder), folder, planned=(51, 51))
    assert again.read_text(encoding="utf-8") == before  # the same draws each time


def test_without_plotly_the_extra_is_named(folder: Path, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "plotly" else found(name, *a))
    for write in (write_report, write_plots):
        with pytest.raises(ThriftyError, match=r"plotly: pip install 'thrifty\[plots\]'"):
            write(results, folder)


def test_without_kaleido_the_extra_is_named(folder: Path, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == "kaleido":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ThriftyError, match=r"kaleido: pip install 'thrifty\[plots\]'"):
        write_plots(results, folder)


def test_without_a_browser_the_fix_is_named(folder: Path, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chromium")
    with pytest.raises(ThriftyError, match=r"apt install chromium.*BROWSER_PATH"):
        write_plots(results, folder)


@pytest.mark.skipif(not any(map(shutil.which, ("chromium", "chrome", "google-chrome"))), reason="no Chromium or Chrome")
def test_plots_are_written_as_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BROWSER_PATH", raising=False)  # found on PATH
    write_run(tmp_path, base())
    write_run(tmp_path, final("smt", measures={"loss": {"rows": [[1.0, 2.0]]}}, metrics=[]))
    paths = write_plots(read_results(tmp_path), tmp_path)
    assert [path.name for path in paths] == [
        "plateau-snips.png", "seconds-snips.png", "memory-snips.png", "chosen-snips-smt-1pct.png",
    ]  # fmt: skip
    for path in paths:
        picture = Image.open(path).convert("RGB")
        assert picture.size == (1600, 1040)
        assert len(picture.getcolors(1600 * 1040) or []) > 20  # a blank one has a single colour
