"""`python -m benchmarks SUITE ...`: measure, write one JSON file per suite, print tables."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .machine import describe
from .plots import write_plots
from .profile import profile_table
from .rounds import measure
from .suites import SUITES
from .tables import group_table, target_table

_GROUPS = {
    "bench": ("steps", "probe", "kept", "memory", "snips"),
    "growth": ("share", "block", "tokens", "selections", "gsm8k"),
    "shapes": ("llama", "qwen"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "suites", nargs="*", default=["bench"], help=f"{', '.join([*_GROUPS, *SUITES])}, profile, tables or plots"
    )
    parser.add_argument("--out", type=Path, default=Path("results/performance"), help="folder of the JSON files")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each contender")
    parser.add_argument("--rounds", type=int, help="instead of each suite's own number")
    args = parser.parse_args()
    chosen = [suite for name in args.suites for suite in _GROUPS.get(name, (name,))]
    if chosen == ["tables"]:
        print(_tables(args.out))
        return
    if chosen == ["plots"]:
        print(*write_plots(_results(args.out), Path("docs/performance")), sep="\n")
        return
    if chosen == ["profile"]:
        print(profile_table())
        return
    records = {}
    for name in chosen:
        if name not in SUITES:
            parser.error(f"unknown suite {name!r} (known: {', '.join([*_GROUPS, *SUITES])})")
        if name in ("snips", "gsm8k", "memory", "study") and not os.environ.get("DATA"):
            print(f"{name} is left out: set DATA to the folder of snips_train.jsonl and gsm8k_train.jsonl", flush=True)
            continue
        records[name] = _run(name, args)
    print(target_table(records))


def _run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    machine, start, groups = describe(threads=args.threads), time.time(), []
    record: dict[str, Any] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {len(SUITES[name]())} groups", file=sys.stderr, flush=True)
    for group in SUITES[name]():
        specs = [spec | {"threads": args.threads} for spec in group["specs"]]
        results = measure(specs, rounds=args.rounds or group["rounds"])
        groups.append({"name": group["name"], "results": results})
        print(group_table(groups[-1]), flush=True)
        seconds = round(time.time() - start)
        record = {"suite": name, "seconds": seconds, "machine": machine, "groups": groups}
        (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")  # what is over is kept
    print(_made(record), flush=True)
    return record


def _made(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    return (
        f"`python -m benchmarks {record['suite']}`: {record['seconds']} s with loading, {machine['threads']} threads, "
        f"commit {machine['commit']}\n"
    )


def _results(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _tables(folder: Path) -> str:
    records = _results(folder)
    parts = [target_table(records)]
    for record in records.values():
        parts += [*(group_table(group) for group in record["groups"]), _made(record)]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
