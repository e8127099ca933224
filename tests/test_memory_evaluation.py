"""Evaluation needs no more memory than training with the same batch, on a model whose logits are most of it."""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_run import configuration, save_checkpoint, start
from transformers import LlamaConfig, LlamaForCausalLM

from thrifty.run import evaluate as evaluation
from thrifty.run.memory import MemoryMeter
from thrifty.run.train import train
from thrifty.run.trainer import ThriftyTrainer

M_MMAP_THRESHOLD = -3  # malloc.h
VOCABULARY, ROWS, PROMPT, ANSWER = 40_000, 16, 30, 60
ALL_LOGITS = 4 * ROWS * (PROMPT + ANSWER) * VOCABULARY  # bytes of one float32 table


def prepare_large(folder: Path) -> None:
    """Like `tiny_run.prepare`, with a large vocabulary and long answers, each one of two options."""
    save_checkpoint(folder / "model")  # for its tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder / "model")
    texts = ["a" * ANSWER, "b" * ANSWER]
    lines = [{"prompt": f"{n:0{PROMPT}d}", "completion": texts[n % 2], "choices": texts} for n in range(2 * ROWS)]
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def metered(peaks: dict[str, int], key: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, which also notes the highest resident size during its calls: all of the process's bytes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        meter = MemoryMeter(torch.nn.Linear(1, 1))
        before = meter.now()
        result = real(*args, **kwargs)
        peaks[key] = max(peaks.get(key, 0), before + meter.peak())
        return result

    return call


def measure(folder: Path) -> None:
    torch.set_num_threads(1)
    # What is freed goes back at once: the peak is what was held, not how glibc's heap was in pieces.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024) == 1
    peaks: dict[str, int] = {}
    for owner, name in (
        (ThriftyTrainer, "training_step"),
        (ThriftyTrainer, "evaluate"),
        *((evaluation, name) for name in ("example_losses", "answer_all", "choose")),
    ):
        setattr(owner, name, metered(peaks, name, getattr(owner, name)))
    sizes = {"per_device_train_batch_size": ROWS, "per_device_eval_batch_size": ROWS, "max_length": 128}
    measured = {"loss": True, "exact_match": True, "choice": True, "batch_size": ROWS}
    train(configuration(folder, **sizes, eval=measured, max_steps=3, eval_steps=2, method="random_blocks"))
    (folder / "peaks.json").write_text(json.dumps(peaks))


def test_no_evaluation_exceeds_the_training_peak(tmp_path: Path) -> None:
    prepare_large(tmp_path)
    child = start(measure, tmp_path)
    child.join()
    assert child.exitcode == 0
    peaks = json.loads((tmp_path / "peaks.json").read_text())
    training = peaks.pop("training_step")
    assert set(peaks) == {"evaluate", "example_losses", "answer_all", "choose"}
    over = {name: peak - training for name, peak in peaks.items()}
    assert max(over.values()) < ALL_LOGITS / 100, over
