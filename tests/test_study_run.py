"""`thrifty compare` in real processes: a tiny study run, killed, resumed, extended and reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import prepare

from thrifty.cli.main import main

THRIFTY = [sys.executable, "-m", "thrifty"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

STUDY: dict[str, Any] = {
    "run": {"model": "model", "max_length": 48, "max_steps": 6, "per_device_train_batch_size": 4, "probe_units": 2},
    "tasks": {
        "sums": {
            "train": {"path": "train.jsonl", "split": "[:16]"},
            "held_out": {"path": "train.jsonl", "split": "[16:]"},
            "eval": "$ROWS/eval.jsonl",
            "measures": {"loss": True, "exact_match": 3, "forgetting": "general.txt"},
        }
    },
    "methods": {
        "smt": {"smt": {"block_size": 8}},
        "lora": {"peft": {"peft_type": "LORA", "r": "fit", "lora_alpha": "2*fit"}},
        "biases": {"method": "bitfit", "budgets": "own"},  # the model has none: it fails
    },
    "budgets": "5%",
    "seeds": [0, 1],
    "search": {"learning_rate": [1e-2], "run": {"max_steps": 3}, "widen": 0},
    "curve": {"every": 3},
    "baseline": "lora",
}


def compare(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*THRIFTY, "compare", *words],
        cwd=folder,
        env=ENVIRONMENT | {"ROWS": str(folder)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "studies/mine/runs").glob("*.json")}


def interrupted(folder: Path, number: int) -> int:
    """The exit code of a study that gets signal `number` as soon as two of its runs are over."""
    child = subprocess.Popen(
        [*THRIFTY, "compare", "mine.yaml", "--workers", "2", "--threads", "1"],
        cwd=folder,
        env=ENVIRONMENT | {"ROWS": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(records(folder)) < 2:
        assert child.poll() is None
        time.sleep(0.1)
    child.send_signal(number)
    return child.wait(timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was interrupted, and then run to its end."""
    folder = prepare(tmp_path_factory.mktemp("study"))
    (folder / "general.txt").write_text("the cat sat on the mat. " * 100)
    (folder / "mine.yaml").write_text(yaml.safe_dump(STUDY))
    assert interrupted(folder, signal.SIGINT) == 130
    kept = {name: (folder / f"studies/mine/runs/{name}.json").stat().st_mtime_ns for name in records(folder)}
    done = compare(folder, "mine.yaml", "--workers", "2", "--threads", "1")
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    for name, when in kept.items():
        assert (folder / f"studies/mine/runs/{name}.json").stat().st_mtime_ns == when  # not made again
    return folder


def test_every_run_is_there_and_what_failed_is_said(folder: Path) -> None:
    found = records(folder)
    good = {name for name, record in found.items() if record["train_info"]["status"] == "success"}
    assert good == {
        "base-sums",
        *(f"search-sums-{method}-5pct-1e-2" for method in ("smt", "lora")),
        *(f"final-sums-{method}-5pct-s{seed}" for method in ("smt", "lora") for seed in (0, 1)),
    }
    assert set(found) - good == {"search-sums-biases-own-1e-2", *(f"final-sums-biases-own-s{n}" for n in (0, 1))}
    assert "bias" in found["search-sums-biases-own-1e-2"]["run_info"]["error_msg"]
    said = (folder / "said.txt").read_text()
    assert "search-sums-biases-own-1e-2: FAILED" in said
    assert "biases" in said.splitlines()[-1] or "biases" in said  # in the table too


def test_a_record_has_the_shape_of_pefts_results(folder: Path) -> None:
    lora = records(folder)["final-sums-lora-5pct-s1"]
    assert set(lora) == {"run_info", "train_info", "meta_info"}
    assert lora["run_info"]["peft_config"]["lora_alpha"] == 2 * lora["run_info"]["peft_config"]["r"]
    assert lora["run_info"]["train_config"]["seed"] == 1
    assert "$ROWS" not in json.dumps(lora["run_info"]["train_config"]["data"])  # rows of the judges are not trained on
    train = lora["train_info"]
    assert train["num_trainable_params"] <= 0.05 * train["num_total_params"]
    assert train["file_size"] > 4 * train["num_trainable_params"]
    assert train["accelerator_memory_max"] > 0
    curve = [(entry["step"], entry["train time"]) for entry in train["metrics"] if "eval loss" in entry]
    assert [step for step, _ in curve] == [3, 6]
    assert 0 < curve[0][1] <= curve[1][1] <= train["train_time"]
    assert len(train["measures"]["loss"]["rows"]) == 9
    assert len(train["measures"]["exact_match"]["rows"]) == 3
    smt = records(folder)["final-sums-smt-5pct-s0"]["train_info"]
    assert sum(trained for trained, _ in smt["chosen"].values()) == smt["num_trainable_params"]
    assert lora["meta_info"]["package_info"]["torch-version"]


def test_the_report_and_the_table_are_there(folder: Path) -> None:
    page = (folder / "studies/mine/report.html").read_text()
    assert all(label in page for label in ("smt", "lora", "biases"))
    said = (folder / "said.txt").read_text()
    assert "smt" in said
    report = folder / "studies/mine/report.html"
    before = report.stat().st_mtime_ns
    again = compare(folder, "studies/mine", "--report")
    assert again.returncode == 0, again.stderr
    assert report.stat().st_mtime_ns > before


def test_a_finished_study_makes_nothing_and_takes_a_method_more(folder: Path) -> None:
    times = {p.name: p.stat().st_mtime_ns for p in (folder / "studies/mine/runs").glob("*.json")}
    more = STUDY | {"methods": STUDY["methods"] | {"blocks": {"random_blocks": {"block_size": 8}}}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(more))
    done = compare(folder, "mine.yaml", "--threads", "1", "--workers", "2", "--only", "blocks")
    assert done.returncode == 0, done.stderr
    kept = folder / "studies/mine/study.yaml"
    assert yaml.safe_load(kept.read_text()) == more
    assert yaml.safe_load((folder / "studies/mine/study.yaml.bak").read_text()) == STUDY
    assert "studies/mine/study.yaml.bak" in done.stdout
    new = {p.name for p in (folder / "studies/mine/runs").glob("*.json")} - set(times)
    assert new == {
        "search-sums-blocks-5pct-1e-2.json",
        "final-sums-blocks-5pct-s0.json",
        "final-sums-blocks-5pct-s1.json",
    }
    assert all((folder / "studies/mine/runs" / name).stat().st_mtime_ns == when for name, when in times.items())
    (folder / "mine.yaml").write_text(yaml.safe_dump(STUDY))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mine.yaml", "run.max_steps=7"], "was made with other settings than the study has now: delete it"),
        (["nothing.yaml"], "no such file"),
        (["mine.yaml", "--only", "smtt"], "did you mean 'smt'?"),
        (["mine.yaml", "--workers", "0"], "--workers must be 1 or more"),
        (["mine.yaml", "tasks.sums.measures={los: true}"], "did you mean"),
        (["mine.yaml", "methods.smt={smt: {blok: 3}}"], "unknown option"),
        (["seeds=[0]"], "name a study file"),
    ],
)
def test_mistakes_are_said_in_one_line(
    folder: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ROWS", str(folder))
    kept = (folder / "studies/mine/study.yaml").read_text()
    assert main(["compare", *words]) == 2
    assert (folder / "studies/mine/study.yaml").read_text() == kept
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert said in error
