"""The report in a real browser: nothing fails, everything is drawn, tables sort, nothing is wider than the window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_study import final, make_study, run, write_run
from PIL import Image

from thrifty.study.gather import read_results
from thrifty.study.report import write_report

WIDTHS = (390, 1280)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
EVIL = "<script>window.hacked = 1</script>"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH")

# Runs inside the report, waits until every plot has traces, clicks each header twice, and tells its parent.
PROBE = """
<script>
const drawn = (plot) => plot.querySelectorAll(".scatterlayer .trace path, .heatmaplayer image").length;
const column = (table, i) => [...table.tBodies[0].rows].map((row) => row.cells[i].dataset.value);
function look() {
  for (const part of document.querySelectorAll("details")) part.open = true;
  const boxed = (element) => element.closest(".scroll, nav, pre");
  const wide = [...document.body.querySelectorAll("*")]
    .filter((e) => !e.closest("svg") && !boxed(e.parentElement) && e.getBoundingClientRect().right > innerWidth + 1);
  const sorts = [];
  for (const table of document.querySelectorAll("table")) {
    [...table.tHead.rows[0].cells].forEach((header, i) => {
      const button = header.querySelector("button");
      button.click();
      const up = [header.getAttribute("aria-sort"), column(table, i)];
      button.click();
      const down = [header.getAttribute("aria-sort"), column(table, i)];
      sorts.push({ table: table.id, header: button.textContent, up, down,
        sorted: table.querySelectorAll('[aria-sort$="ending"]').length, focus: button.tabIndex });
    });
  }
  const divs = [...document.querySelectorAll(".plot")];
  const plots = Object.fromEntries(divs.map((plot) => [plot.id, [drawn(plot), plot.clientWidth]]));
  const scrolls = [...document.querySelectorAll(".scroll")].some((box) => box.scrollWidth > box.clientWidth);
  console.log("looked");
  const page = document.documentElement.scrollWidth;
  parent.postMessage(JSON.stringify({ width: innerWidth, page, plots, sorts, scrolls,
    wide: wide.map((e) => e.outerHTML.slice(0, 90)), hacked: window.hacked || 0,
    names: column(document.querySelector("table"), 0) }), "*");
}
let tries = 0;
const wait = setInterval(() => {
  if ([...document.querySelectorAll(".plot")].every(drawn) || ++tries > 150) { clearInterval(wait); look(); }
}, 100);
</script>
"""
FRAMES = """<!doctype html><body style="margin:0">{frames}<script>
addEventListener("message", (event) => {{
  const found = document.createElement("pre");
  found.className = "found";
  found.textContent = event.data;
  document.body.append(found);
}});
</script>"""


def _browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=30000"]
    fixed += [f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr"]
    return subprocess.run(
        [BROWSER, *fixed, *options, page.as_uri()], capture_output=True, text=True, timeout=240, check=True
    )


def _frames(folder: Path, report: Path, *, widths: tuple[int, ...], height: int) -> Path:
    """A page that shows the report in frames: a window of headless Chromium cannot be as narrow as a phone."""
    frames = "".join(
        f'<iframe src="{report.as_uri()}" style="border:0;width:{width}px;height:{height}px"></iframe>'
        for width in widths
    )
    page = folder / f"frames-{'-'.join(map(str, widths))}.html"
    page.write_text(FRAMES.format(frames=frames), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a study some of whose labels and messages are written to break pages."""
    folder = make_study(tmp_path_factory.mktemp("report") / "claim")
    write_run(folder, final(EVIL, budget="2%", quality=0.3))
    write_run(folder, run("final", "lora", budget="2%", seed=7, error=f'</pre><img src="x" onerror="hacked=1">{EVIL}'))
    (folder / "study.yaml").write_text(f"methods: {{smt: smt}} # </pre></script>{EVIL}\n", encoding="utf-8")
    return write_report(read_results(folder), folder, planned=(54, 60))


@pytest.fixture(scope="module")
def seen(report: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """What the probe found at each width, and the lines of the browser's console."""
    folder = tmp_path_factory.mktemp("probe")
    probed = folder / "report.html"
    probed.write_text(report.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    done = _browse(_frames(folder, probed, widths=WIDTHS, height=900), "--dump-dom", "--window-size=1800,1000")
    found = [
        json.loads(unescape(text)) for text in re.findall(r'<pre class="found">(.*?)</pre>', done.stdout, re.DOTALL)
    ]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return {one["width"]: one for one in found}, console


def test_the_console_stays_silent(seen: tuple[dict[int, dict[str, Any]], list[str]]) -> None:
    found, console = seen
    assert sorted(found) == list(WIDTHS)
    assert len(console) == len(WIDTHS), console  # the probe's own word, once in each frame, and nothing else
    assert all("looked" in line for line in console)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_plot_is_drawn(seen: tuple[dict[int, dict[str, Any]], list[str]], width: int) -> None:
    plots = seen[0][width]["plots"]
    assert {name.split("-")[0] for name in plots} == {
        "plateau", "seconds", "memory", "curves", "forgetting", "search", "chosen",
    }  # fmt: skip
    assert len(plots) == 10
    for name, (traces, wide) in plots.items():
        assert traces > 0, name
        assert 250 < wide <= width, name


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(seen: tuple[dict[int, dict[str, Any]], list[str]], width: int) -> None:
    found = seen[0][width]
    assert found["wide"] == []
    assert found["page"] <= width
    assert found["scrolls"] or width > 1000  # a phone shows tables in boxes that scroll


def test_tables_sort_both_ways(seen: tuple[dict[int, dict[str, Any]], list[str]]) -> None:
    sorts = seen[0][1280]["sorts"]
    assert {sort["table"] for sort in sorts} == {"quality-snips", "costs-snips", "failures", "runs"}
    assert sum(len(_numbers(sort["up"][1]) or []) > 3 for sort in sorts) > 10
    for sort in sorts:
        (up_word, up), (down_word, down) = sort["up"], sort["down"]
        assert (up_word, down_word, sort["sorted"], sort["focus"]) == ("ascending", "descending", 1, 0)
        for values in (up, down):  # what has no value is last, whichever way
            assert "" not in values[: len(values) - values.count("")], sort["header"]
        if (numbers := _numbers(up)) is not None:
            assert numbers == sorted(numbers), sort["header"]
            assert _numbers(down) == sorted(numbers, reverse=True), sort["header"]
        else:
            assert [text for text in down if text] == [text for text in up if text][::-1] or len(set(up)) < len(up)
            assert sorted(up) == sorted(down)


def _numbers(values: list[str]) -> list[float] | None:
    """None where a value is no number."""
    try:
        return [float(value) for value in values if value]
    except ValueError:
        return None


def test_labels_are_text_and_never_run(seen: tuple[dict[int, dict[str, Any]], list[str]], report: Path) -> None:
    assert [found["hacked"] for found in seen[0].values()] == [0, 0]
    assert EVIL in seen[0][1280]["names"]
    assert EVIL not in report.read_text(encoding="utf-8")


def test_screenshots_show_a_page(report: Path, tmp_path: Path) -> None:
    wide, narrow = tmp_path / "desktop.png", tmp_path / "phone.png"
    _browse(report, f"--screenshot={wide}", "--window-size=1280,2400")
    phone = _frames(tmp_path, report, widths=(390,), height=2400)
    dark = "--blink-settings=preferredColorScheme=0"
    _browse(phone, f"--screenshot={narrow}", "--window-size=500,2400", dark)
    light = np.asarray(Image.open(wide).convert("RGB"))
    night = np.asarray(Image.open(narrow).convert("RGB"))[:, :390]
    assert light.shape == (2400, 1280, 3)
    for picture, ground in ((light, 255), (night, 20)):
        brightness = picture.mean(axis=2)
        assert abs(float(np.median(brightness)) - ground) < 20  # a white page, and a dark one
        # Text and lines in all quarters of its height.
        quarters = [float((np.abs(part - np.median(brightness)) > 60).mean()) for part in np.split(brightness, 4)]
        assert min(quarters) > 0.005, quarters
    # Marks of the plots: Okabe and Ito's vermillion.
    assert (np.abs(light.astype(int) - (0xD5, 0x5E, 0x00)).max(axis=2) < 12).sum() > 50
