"""Whole trainers on real rows: `thrifty train` and TRL's `SFTTrainer` with PEFT LoRA, step by step from inside.

Both get the same rows, in the same order, through the same chat template, in batches of the same size and precision; a
step lasts from the end of one to the end of the next, so collating and logging count.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from transformers import TrainerCallback

import thrifty
from thrifty.run.memory import MemoryMeter
from thrifty.run.model import load_model, load_tokenizer
from thrifty.run.order import row_order

from .gate import Gate, Stopped

__all__ = ["run_trainer"]

_WARM_UP = 2  # steps
_MAX_LENGTH = 1024  # tokens, as TRL's own default
_ORDER = {"train_sampling_strategy": "sequential"}  # the rows lie shuffled in their file, the same for all


class _Gated(TrainerCallback):
    """Put into every Trainer of this process: after the warm-up each step waits for the gate."""

    gate: Gate
    start: float | None = None
    ready = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if state.global_step < _WARM_UP:
            return
        if _Gated.ready:
            assert _Gated.start is not None
            _Gated.gate.say(seconds=now - _Gated.start)
        else:
            _Gated.ready = True
            _Gated.gate.say(ready=True)
        try:
            _Gated.gate.wait()
        except Stopped:
            control.should_training_stop = True
        _Gated.start = time.perf_counter()


def prompt_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its last answer as `completion`: the form in which both train the same tokens."""
    if "messages" in row:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    return {"prompt": row["prompt"], "completion": row["completion"]}


def run_trainer(spec: Mapping[str, Any], gate: Gate) -> dict[str, Any]:
    """Train as `spec` says (`trainer`, `data`, `rows`, `batch`, `bf16`, `checkpointing`, ...); what it cost, in bytes
    and seconds."""
    _Gated.gate = gate
    transformers.trainer.DEFAULT_CALLBACKS.append(_Gated)
    source = Path(os.environ["DATA"]) / f"{spec['data']}_train.jsonl"
    lines = source.read_text().splitlines()
    order = row_order(len(lines), seed=0, epoch=0)[: spec["rows"]]
    rows = [prompt_completion(json.loads(lines[i])) for i in order]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return (_thrifty if spec["trainer"] == "thrifty" else _trl)(spec, path, Path(folder) / "out")


def _thrifty(spec: Mapping[str, Any], rows: Path, output: Path) -> dict[str, Any]:
    run = thrifty.train(
        {
            "model": "smollm2-135m",
            "data": {"train": str(rows)},
            "method": spec["method"],
            "budget": spec.get("budget"),
            "per_device_train_batch_size": spec["batch"],
            "max_length": _MAX_LENGTH,
            "max_steps": 100_000,
            "probe_units": 4,  # instead of 16: a quarter of the wait, and the same peak
            "bf16": spec["bf16"],
            "activation_checkpointing": spec["checkpointing"],
            "learning_rate": 1e-4,
            "save_strategy": "no",
            "eval": {"loss": False},
            "output_dir": str(output),
            **_ORDER,
        }
    )
    return {
        "peak_bytes": run.summary["peak_memory_bytes"],
        "probe_seconds": run.summary["probe_seconds"],
        "trained": run.summary["trainable_parameters"],
    }


def _trl(spec: Mapping[str, Any], rows: Path, output: Path) -> dict[str, Any]:
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model = load_model("smollm2-135m", dtype="float32", device=torch.device("cpu"))
    tokenizer = load_tokenizer("smollm2-135m")
    dataset = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(output) + "-cache")
    arguments = SFTConfig(
        output_dir=str(output),
        use_cpu=True,
        per_device_train_batch_size=spec["batch"],
        max_length=_MAX_LENGTH,
        max_steps=100_000,
        bf16=spec["bf16"],
        activation_checkpointing=spec["checkpointing"],
        activation_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=1e-4,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        **_ORDER,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    # after the rows were tokenized, as in thrifty; the adapter was made since loading and counts
    meter, adapter = MemoryMeter(model), sum(p.nbytes for p in trained)
    trainer.train()
    return {"peak_bytes": meter.peak() + adapter, "trained": sum(p.numel() for p in trained)}
