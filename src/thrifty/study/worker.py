"""One run of a study, in a process of its own: `python -m thrifty.study.worker SPEC.json RECORD.json FOLDER`."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from thrifty.core.budget import distinct_parameters
from thrifty.core.errors import ThriftyError
from thrifty.core.files import write_json
from thrifty.delta import Delta
from thrifty.delta.peer import PeerDelta
from thrifty.run.config import RunConfig
from thrifty.run.evaluate import examples_of
from thrifty.run.metrics import read_metrics
from thrifty.run.model import load_model, load_tokenizer
from thrifty.run.provenance import commit
from thrifty.run.summary import versions
from thrifty.run.train import Run, run_training
from thrifty.run.yaml_source import plain

from .fit import fitted
from .measures import Subject, measure
from .spec import Spec, run_config

__all__ = ["main", "run_info"]


def run_info(spec: Spec) -> dict[str, Any]:
    """What a record says of a run before it has begun."""
    return {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "total_time": 0.0,
        "experiment_name": spec.name,
        "train_config": spec.config,
        "peft_config": None,
        "error_msg": "",
        "stage": spec.stage,
        "task": spec.task,
        "method": spec.method,
        "budget": spec.budget,
        "learning_rate": spec.learning_rate,
        "seed": spec.seed,
        "trial": spec.trial,
        "proposed_budget": spec.proposed_budget,
        "commit": commit(),
        "spec_sha256": spec.digest(),
    }


def main(arguments: list[str]) -> int:
    """Make the run and write its record. What goes wrong is raised: the study reads the last line."""
    spec_file, record_file, folder = map(Path, arguments)
    began = time.monotonic()
    spec = Spec(**json.loads(spec_file.read_text(encoding="utf-8")))
    info = run_info(spec)
    try:
        record = _base(spec) if spec.stage == "base" else _trained(spec, folder)
    except ThriftyError as error:
        sys.stderr.write(f"thrifty: {error}\n")
        return 2
    info |= record["run_info"] | {"total_time": time.monotonic() - began, "threads": torch.get_num_threads()}
    write_json(record_file, {**record, "run_info": info})
    return 0


def _trained(spec: Spec, folder: Path) -> dict[str, Any]:
    size = 1
    if spec.fit_to is not None:
        asked = run_config(spec)
        trusted = asked.trust_remote_code
        size = fitted(spec.config["method"], budget=spec.fit_to, model=asked.model, trust_remote_code=trusted)
    config = run_config(spec, size=size, output_dir=str(folder))
    run = run_training(config, console=Console())
    measures = _measured(spec, run.model, run.tokenizer, config=config)
    adapter = run.delta.config if isinstance(run.delta, PeerDelta) else None
    train_config = {k: v for k, v in config.to_dict().items() if k != "output_dir"} | {"data": spec.config["data"]}
    return {
        "run_info": {"train_config": plain(train_config), "peft_config": _plain_config(adapter)},
        "train_info": _train_info(run, folder) | {"measures": measures, "status": "success"},
        "meta_info": _meta_info(run.summary["fingerprints"]),
    }


def _base(spec: Spec) -> dict[str, Any]:
    """The measures of the model before training."""
    config = run_config(spec)
    tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model: nn.Module = load_model(
        config.model,
        dtype=config.dtype,
        quantize=config.quantize,
        trust_remote_code=config.trust_remote_code,
        device=device,
    )
    measures = _measured(spec, model, tokenizer, config=config)
    info = {"status": "success", "metrics": [], "measures": measures, "num_total_params": distinct_parameters(model)}
    return {"run_info": {}, "train_info": info, "meta_info": _meta_info({})}


def _measured(spec: Spec, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, config: RunConfig) -> dict[str, Any]:
    if not spec.measures:
        return {}
    # one seed for all runs: the rows of several files would otherwise be mixed in another order
    judged = run_config(spec, data={"train": spec.config.get("data", {}).get("train"), "eval": spec.judged_by}, seed=0)
    examples = examples_of(judged) if spec.judged_by else []
    subject = Subject(
        model=model,
        tokenizer=tokenizer,
        examples=examples,
        max_length=config.max_length,
        batch_size=config.eval.batch_size,
    )
    return measure(subject, spec.measures)


def _train_info(run: Run, folder: Path) -> dict[str, Any]:
    """Costs, and the curve."""
    summary, logged = run.summary, read_metrics(folder / "metrics.jsonl")
    memory = sorted(entry["memory_bytes"] for entry in logged if "memory_bytes" in entry)
    names = {"loss": "train loss", "eval_loss": "eval loss", "tokens_per_second": "tokens / sec"}
    return {
        "accelerator_memory_reserved_avg": sum(memory) / len(memory) if memory else None,
        "accelerator_memory_max": summary["peak_memory_bytes"],
        "accelerator_memory_reserved_99th": memory[int(0.99 * (len(memory) - 1))] if memory else None,
        "train_time": summary["train_seconds"],
        "probe_seconds": summary["probe_seconds"],
        "file_size": sum(path.stat().st_size for path in (folder / "delta").rglob("*") if path.is_file()),
        "num_trainable_params": summary["trainable_parameters"],
        "num_total_params": round(summary["trainable_parameters"] / summary["trainable_share"]),
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "tokens_per_second": summary["tokens_per_second"],
        "plan_sha256": summary["plan_sha256"],
        "chosen": _chosen(run.delta),
        "data": summary["data"],
        "device": summary["device"],
        "metrics": [
            {"step": entry["step"], "train time": entry["train_seconds"]}
            | {theirs: entry[ours] for ours, theirs in names.items() if ours in entry}
            for entry in logged
        ],
    }


def _chosen(delta: Delta) -> dict[str, list[int]]:
    """Trained numbers and all numbers of each tensor that was touched; of thrifty's own methods only."""
    if isinstance(delta, PeerDelta):
        return {}
    shapes = {name: tuple(piece.shape) for name, piece in delta.pieces.items()}
    return {name: [region.size(shapes[name]), torch.Size(shapes[name]).numel()] for name, region in delta.plan.items()}


def _plain_config(config: Any) -> dict[str, Any] | None:
    """PEFT's configuration as JSON takes it."""
    if config is None:
        return None
    return {key: sorted(value) if isinstance(value, set) else plain(value) for key, value in config.to_dict().items()}


def _meta_info(fingerprints: Mapping[str, str]) -> dict[str, Any]:
    packages = {f"{name}-version": version for name, version in versions().items()}
    machine = platform.uname()
    system = {name: getattr(machine, name) for name in ("system", "release", "machine", "processor")}
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "N/A"
    data = {name: {"sha": sha, "created_at": None} for name, sha in fingerprints.items() if name != "model"}
    return {
        "model_info": {"sha": fingerprints.get("model"), "created_at": None},
        "dataset_info": data,
        "package_info": packages,
        "system_info": {**system, "accelerator": cuda, "cpus": os.cpu_count()},
        "pytorch_info": torch.__config__.show(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
