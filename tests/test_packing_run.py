"""Whole runs on packed rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import configuration, prepare
from transformers import BloomConfig, BloomForCausalLM

from thrifty.core.errors import ThriftyError
from thrifty.run.checkpoint import checkpoints
from thrifty.run.config import load_config
from thrifty.run.metrics import read_metrics
from thrifty.run.train import train

PACKED: dict[str, Any] = {"packing": True, "per_device_train_batch_size": 2, "save_steps": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def test_from_the_command_line(folder: Path) -> None:
    """Trains, stops, goes on, and says how many rows became how many."""

    def thrifty(*words: str) -> str:
        command = [sys.executable, "-m", "thrifty", "train", "run.yaml", "packing=true", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    values = {key: value for key, value in configuration(folder).items() if key not in ("output_dir", "max_steps")}
    values |= {key: value for key, value in PACKED.items() if key != "packing"} | {"lr_scheduler_type": "constant"}
    (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    said = thrifty("max_steps=8", "output_dir=whole")
    thrifty("max_steps=3", "output_dir=out")
    thrifty("max_steps=8", "output_dir=out", "resume_from_checkpoint=auto")
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    assert summary["data"]["rows"] == 22
    assert 22 / 5 < summary["packed_rows"] < 22 / 2
    assert f"packing: 22 rows in {summary['packed_rows']} of at most 48 tokens" in said
    assert 0 < summary["padding"] < 0.2
    one, other = (checkpoints(folder / name)[-1].folder / "values.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()
    resumed = json.loads((folder / "out" / "summary.json").read_text())
    for key in ("padding", "packed_rows", "tokens", "evaluation"):
        assert resumed[key] == summary[key], key


def test_a_packed_step_is_the_step_of_its_rows(folder: Path) -> None:
    """All rows in one step: packed or not, it is the same step on the same tokens."""
    runs = []
    for number, changes in enumerate(({"packing": True}, {})):
        out = folder / f"out{number}"
        steps = {"per_device_train_batch_size": 22, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
        run = train(configuration(folder, **steps, **changes, logging_steps=1, output_dir=str(out)))
        losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
        runs.append((run.summary, losses, run.delta.plan))
    (packed, losses, plan), (plain, plain_losses, plain_plan) = runs
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    assert packed["tokens"] == plain["tokens"] == 3 * plain["data"]["tokens"]
    assert packed["padding"] < plain["padding"] / 2
    assert plain["packed_rows"] is None
    assert list(plan) == list(plain_plan)
    assert packed["evaluation"]["after"]["loss"] == pytest.approx(plain["evaluation"]["after"]["loss"], rel=1e-5)


def test_a_model_that_mixes_packed_rows_is_refused(folder: Path) -> None:
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = BloomForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2)
    model.save_pretrained(folder / "model")
    with pytest.raises(ThriftyError, match=r"^packing: model type 'bloom' .* set packing: false$"):
        train(configuration(folder, **PACKED))


def test_lora_on_packed_rows(folder: Path) -> None:
    method = {"peft": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}}
    assert train(configuration(folder, **PACKED, method=method, budget=None)).summary["steps"] == 10


def test_a_wrapper_that_drops_the_positions_is_refused(folder: Path) -> None:
    method = {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}}
    with pytest.raises(ThriftyError, match=r"^packing: model type 'llama' .* set packing: false$"):
        train(configuration(folder, **PACKED, method=method, budget=None))


def test_packing_knows_no_order_of_the_file(folder: Path) -> None:
    with pytest.raises(ThriftyError, match="sequential needs packing: false"):
        train(configuration(folder, **PACKED, train_sampling_strategy="sequential"))


SETTINGS = {
    "train_sampling_strategy=batch_rebalance": "train_sampling_strategy must be .*'group_by_length'.* not 'batch_reb",
    "group_by_length=true": "'group_by_length' is written train_sampling_strategy: group_by_length",
    "length_column_name=n": "length_column_name is not to be set",
    "sample_packing=true": "'sample_packing' is called 'packing' here",
    "packing=yes": "packing must be .* write true or false",
    "use_liger_kernel=true": r"taken on CUDA devices .* \(pip install 'thrifty\[liger\]'\)",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_other_tools_words(setting: str) -> None:
    config = {"model": "m", "data": {"train": "x"}}
    assert load_config(config, ["train_sampling_strategy=group_by_length", "packing=true"]).packing is True
    with pytest.raises(ThriftyError, match=SETTINGS[setting]):
        load_config(config, [setting])
