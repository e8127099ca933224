"""Write docs/results/delta.md from the JSON files beside this script; what stands below its `<!-- end -->` is kept.

python results/delta/table.py
"""

import json
from pathlib import Path
from typing import Any

from study import BATCH, CODINGS, EXACT, MAX_LENGTH, RANKS, ROWS, SMT, STEPS, file_name

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "results" / "delta.md"
END = "<!-- end -->"

INTRO = f"""\
# What a delta is good for

SmolLM2-135M-Instruct (float32, bfloat16 autocast) trained with `{SMT}` at 1 % for {STEPS} steps of {BATCH} rows,
learning rate 1e-2, seed 0, on `$DATA/snips_train.jsonl` (SNIPS NLU benchmark) and, apart, on `$DATA/boolq_train.jsonl`
(BoolQ in the instruction form). Loss (per answer token) on the first {ROWS} rows of the valid files, at most
{MAX_LENGTH} tokens each; exact match of greedy answers on the first {EXACT} (standard error at .3:
{(0.21 / EXACT) ** 0.5:.3f}); choice: true or false by likelihood on {ROWS}. One seed: differences of a few hundredths
of exact match say nothing.

```bash
DATA=... OUT=/tmp/delta python results/delta/study.py    # resumable
python results/delta/table.py                            # writes this page from results/delta/*.json
```
"""


def load(name: str) -> dict[str, Any] | None:
    path = HERE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def score(found: dict[str, Any] | None, *keys: str) -> list[str]:
    return [
        "not run" if found is None else f"{found[key]:.4f}" if key == "loss" else f"{found[key]:.3f}" for key in keys
    ]


def mib(count: int) -> str:
    return f"{count / 2**20:.2f}"


def sizes() -> list[str]:
    found = load("sizes")
    if found is None:
        return ["Not measured yet.", ""]
    rows = [
        ["delta of SMT, 1 %", f"{found['smt_numbers']:,}", mib(found["smt_bytes"])],
        ["PEFT LoRA r4, as many numbers as a rank gives", f"{found['lora_numbers']:,}", mib(found["lora_bytes"])],
        ["full checkpoint (float32)", "134,515,008", mib(found["full_bytes"])],
    ]
    held = (
        "A delta holds values and originals (what removing it takes) in the base's dtype, an adapter only its factors."
    )
    return [*table(["on disk", "trained numbers", "MiB"], rows), held, ""]


def smaller() -> list[str]:
    base = load("tasks-snips-on-snips")
    size = load("sizes")
    rows = [["the delta itself", mib(size["smt_bytes"]) if size else "", "0", *score(base, "loss", "exact_match"), ""]]
    for rank in RANKS:
        found = load(f"lora-{rank}")
        cells = [mib(found["bytes"]), f"{found['lost']:.3f}"] if found else ["", ""]
        logits = [f"{found['logits']:.2f}"] if found else [""]
        rows.append([f"as LoRA, rank {rank}", *cells, *score(found, "loss", "exact_match"), *logits])
    for how in CODINGS:
        found = load(file_name(how))
        cells = [mib(found["bytes"]), f"{found['lost']:.3f}"] if found else ["", ""]
        rows.append([f"compressed, {how}", *cells, *score(found, "loss", "exact_match"), ""])
    lines = table(["form", "MiB", "change lost", "loss", "exact match", "largest logit difference"], rows)
    exact = [load(file_name(how)) for how in CODINGS]
    done = [found["removed_exactly"] for found in exact if found]
    if done:
        lines.append(f"Compressed deltas whose removal gave the base bit for bit: {sum(done)} of {len(done)}.")
    return [*lines, ""]


def tasks() -> list[str]:
    rows = []
    for name, label in (
        ("base", "base"),
        ("snips", "trained on snips"),
        ("boolq", "trained on boolq"),
        ("sum", "both deltas added"),
        ("mean", "their mean"),
    ):
        on_snips, on_boolq = load(f"tasks-{name}-on-snips"), load(f"tasks-{name}-on-boolq")
        snips = ["not measured", ""] if name == "base" else score(on_snips, "loss", "exact_match")
        rows.append([label, *snips, *score(on_boolq, "loss", "choice")])
    return table(["model", "snips loss", "exact match", "boolq loss", "choice"], rows)


def rest() -> list[str]:
    lines = []
    if found := load("swaps"):
        low, middle, high = found["milliseconds"]
        right = found["checked"] - found["wrong"]
        lines.append(
            f"- **Swaps**: {found['swaps']:,} random ones among three deltas and the base: {middle:.1f} ms each "
            f"(quartiles {low:.1f}-{high:.1f}; {found['study']['threads']} thread, shared machine); all weights were "
            f"compared {found['checked']} times on the way, {right} times equal bit for bit."
        )
    if found := load("exported"):
        lines.append(
            "- **Exported**: the merged checkpoint, loaded by transformers alone: largest logit difference to the "
            f"applied delta {found['largest_logit_difference']:.2g}."
        )
    return [*lines, ""]


def machine() -> str:
    runs = [json.loads(path.read_text())["study"] for path in sorted(HERE.glob("*.json"))]
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    return f"{len(runs)} files, commits {commits}, threads {', '.join(sorted({str(run['threads']) for run in runs}))}."


def main() -> None:
    parts = [INTRO, machine(), "", "## Size", "", *sizes(), "## Smaller, and as LoRA", "", *smaller()]
    parts += ["## Two tasks, one base", "", *tasks(), "## Switching and exporting", "", *rest(), END]
    kept = DOCUMENT.read_text().partition(END)[2] if DOCUMENT.exists() else "\n"
    DOCUMENT.write_text("\n".join(parts) + (kept or "\n"))
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
