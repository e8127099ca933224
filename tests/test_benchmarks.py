"""The benchmark's own arithmetic, and one interleaved measurement of two small processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import rounds
from benchmarks.plots import write_plots
from benchmarks.suites import SUITES
from benchmarks.tables import group_table, target_table

_WORKER = """
import json, sys
spec = json.loads(sys.argv[1])
print(json.dumps({"imported": True}), flush=True)
assert sys.stdin.readline().strip() == "go"
print(json.dumps({"ready": True}), flush=True)
for number, line in enumerate(sys.stdin):
    if line.strip() != "go":
        break
    print(json.dumps({"seconds": spec["factor"] * (number + 1)}), flush=True)
print(json.dumps({"record": {"peak_bytes": 7}}), flush=True)
"""


def test_rounds_are_interleaved_and_compared_round_by_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)
    start = rounds.subprocess.Popen

    def stand_in(command: list[str], **options: object) -> object:
        return start([sys.executable, str(worker), command[-1]], **options)

    monkeypatch.setattr(rounds.subprocess, "Popen", stand_in)
    results = rounds.measure([{"name": "floor", "factor": 1.0}, {"name": "SMT", "factor": 1.5}], rounds=4)
    assert results["floor"]["seconds"] == [1.0, 2.0, 3.0, 4.0]
    assert results["SMT"]["peak_bytes"] == 7
    assert rounds.ratio(results, "SMT", "floor") == (1.5, 1.5, 1.5)


def test_a_contender_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    start = rounds.subprocess.Popen
    monkeypatch.setattr(
        rounds.subprocess, "Popen", lambda command, **options: start([sys.executable, "-c", "exit(3)"], **options)
    )
    with pytest.raises(RuntimeError, match="broken ended with exit code 3"):
        rounds.measure([{"name": "broken"}], rounds=1)


def _record(**seconds: list[float]) -> dict:
    results = {name: {"spec": {}, "seconds": times, "peak_bytes": 2**20} for name, times in seconds.items()}
    return {"groups": [{"name": "group", "results": results}]}


def test_targets_are_judged_by_the_median_of_the_ratios() -> None:
    names = {"floor": [1.0, 1.0, 1.0], "SMT 1 %, 64": [1.01, 1.02, 9.0], "SMT 5 %, 64": [1.1, 1.1, 1.0]}
    lora = {"LoRA, as many numbers as SMT 5 %": [1.4, 1.4, 1.4]}
    others = {"DoRA r16": [2.0, 2.0, 2.0], "SHiRA r16": [1.2, 1.2, 1.2], "full": [2.0, 2.0, 2.0]}
    table = target_table({"steps": _record(**names, **lora, **others)})
    assert "| step, SMT 1 % over the floor | ≤ 1.03 | 1.020 | 1.015-5.010 | met |" in table
    assert "| step, SMT 5 % over the floor | ≤ 1.06 | 1.100 |" in table
    assert "SHiRA over SMT 5 % | ≥ 1.3 | 1.091 | 1.091-1.145 | missed |" in table
    assert "(SMT" not in table
    assert "probe" not in table  # not measured
    assert "| SMT 1 %, 64 |  | 1.02 | 1.020 |" in group_table(_record(**names)["groups"][0])


def test_overhead_memory_and_trl_are_the_figures_that_their_rows_name() -> None:
    steps = {
        "floor": [1.0, 2.0, 1.0],
        "SMT 5 %, 64": [1.1, 2.3, 1.4],
        "LoRA, as many numbers as SMT 5 %": [1.5, 2.5, 3.0],
    }
    steps |= {name: [1.0, 2.0, 1.0] for name in ("SMT 1 %, 64", "DoRA r16", "SHiRA r16", "full")}
    table = target_table({"steps": _record(**steps)})
    assert "as a share of LoRA's at equal count | ≤ 0.5 | 0.200 | 0.200-0.400 | met |" in table  # 0.2, 0.6, 0.2

    probe = _record(inference=[1.0], probe=[2.3], full=[2.0])
    for name, peak in (("inference", 100), ("probe", 160), ("full", 300)):
        probe["groups"][0]["results"][name]["peak_bytes"] = peak
    table = target_table({"probe": probe})
    assert "| probe over full steps, time | ≤ 1.2 | 1.150 |  | met |" in table
    assert "| probe over full steps, memory above inference | ≤ 0.35 | 0.300 |  | met |" in table  # 60 of 200

    ours, trl = "thrifty, SMT 1 %", "TRL, PEFT LoRA r16"
    seconds = {ours: [1.0], "thrifty, PEFT LoRA r16": [1.2], trl: [2.4], f"{trl}, checkpointing": [2.2]}
    snips = _record(**seconds)
    snips["groups"][0]["results"][ours]["peak_bytes"] = 2**19
    table = target_table({"snips": snips})
    assert "| examples/s over TRL, snips | ≥ 2.0 | 2.200 |  | met |" in table  # the faster of TRL's two
    assert "LoRA r16 in TRL's SFTTrainer | ≤ 0.5 | 0.500 |  | met |" in table


def test_plots_are_written_for_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = _record(floor=[1.0, 1.0], **{"1.0%": [1.1, 1.1], "5.0%": [1.2, 1.2]})
    (path,) = write_plots({"share": record}, tmp_path)
    assert "trained share" in path.read_text()


def test_every_suite_names_each_contender_once() -> None:
    for name, groups in SUITES.items():
        for index, group in enumerate(groups()):
            names = [spec["name"] for spec in group["specs"]]
            assert len(set(names)) == len(names), name
            if name in ("steps", "selections", "quick") or (name in ("llama", "qwen") and index == 0):
                assert group["rounds"] >= 25, name
