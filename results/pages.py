"""Write the tables of docs/results from the runs of the studies beside this script, in seconds.

    python results/pages.py                          # each page's part between `<!-- study ... -->` and `<!-- end -->`
    thrifty compare results/where --report --png     # the same as an interactive report, and plots as PNG

In a page, `<!-- study where measure=exact_match baseline=lora methods=smt,lora -->` takes the study results/where.
"""

import dataclasses
import re
from pathlib import Path

from thrifty.study.compare import results_of
from thrifty.study.config import load_study
from thrifty.study.records import read_records
from thrifty.study.table import markdown

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "results"
BLOCK = re.compile(r"(<!-- study (\S+)([^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def block(match: re.Match[str]) -> str:
    """One study's conclusions and tables."""
    folder = HERE / match[2]
    options = dict(word.split("=") for word in match[3].split())
    if not read_records(folder):
        return f"{match[1]}\nNo run of this study is over yet.\n\n{match[4]}"
    study = dataclasses.replace(load_study(folder / "study.yaml"), output_dir=str(folder))
    results, planned = results_of(study)
    if "methods" in options:
        wanted = options["methods"].split(",")
        entries = tuple(entry for entry in results.entries if entry.method in wanted)
        results = dataclasses.replace(results, entries=entries, methods=tuple(wanted))
    return f"{match[1]}\n{markdown(results, planned=planned)}\n{match[4]}"


def main() -> None:
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        written, blocks = BLOCK.subn(block, text)
        if blocks != text.count("<!-- study "):
            raise SystemExit(f"{page}: a `<!-- study ... -->` has no `<!-- end -->` after it")
        if written != text:
            page.write_text(written, encoding="utf-8")
            print(f"wrote {page.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
