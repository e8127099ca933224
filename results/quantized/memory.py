"""Memory of SmolLM2-135M on a quantized base: bytes of the weights, and resident memory of two steps.

    python results/quantized/memory.py     # writes results/quantized/memory.json and the table of docs/results

Each cell is a process of its own; bytes only, no seconds. One thread, float32, 4 rows of 128 tokens, SMT (`scope:
per_matrix`, 1 %) or LoRA (r = 8). `resident`: private pages of the process that were not there before the model was
loaded; weights are copied first, because the kernel maps them from the checkpoint's file.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_PAGE = _HERE.parent.parent / "docs" / "results" / "quantized.md"
_TABLE = re.compile(r"(<!-- memory -->\n).*?(<!-- end -->)", re.DOTALL)
_FORMS = ("none", "int8", "int4", "nf4")
_METHODS: dict[str, Any] = {
    "SMT": {"smt": {"scope": "per_matrix"}},
    "LoRA": {"peft": {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}},
}
_MIB = 2**20


def _private() -> int:
    """Bytes of anonymous memory that are resident."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", text)[0])


def measure(form: str, name: str) -> dict[str, Any]:
    """One cell, in this process."""
    import threading
    import time

    import torch

    from thrifty.core.heap import trim_heap
    from thrifty.core.quantized import dequantized, is_quantized, stored_bytes
    from thrifty.run.model import load_model
    from thrifty.update.tuning import attach

    torch.set_num_threads(1)
    batch = {"input_ids": torch.randint(3, 40000, (4, 128), generator=torch.Generator().manual_seed(0))}
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"]), "labels": batch["input_ids"].clone()}
    if form != "none":  # torchao is no part of the model
        import torchao.quantization  # noqa: F401
    if name == "LoRA":
        import peft  # noqa: F401
    before = _private()
    model = load_model("smollm2-135m")
    for p in model.parameters():
        p.data = p.data.clone()
    bare = {n: p.detach() for n, p in model.named_parameters()}
    error = 0.0
    if form != "none":
        from thrifty.update.quantize import quantize

        kept = {n: p.clone() for n, p in bare.items() if "layers.0." in n and p.ndim == 2}
        del bare
        quantize(model, form)
        now = dict(model.named_parameters())
        error = max(float((dequantized(now[n]) - p).norm() / p.norm()) for n, p in kept.items())
        del kept
    linear = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    assert all(is_quantized(p) for p in linear) == (form != "none")
    found = {"form": form, "method": name, "largest_error_of_layer_0": error}
    found["weights"] = sum(stored_bytes(p) for p in model.parameters())
    found["linear"], found["numbers"] = sum(stored_bytes(p) for p in linear), sum(p.numel() for p in linear)
    gc.collect()
    trim_heap()
    found["loaded"] = _private() - before
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], _private())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    budget = "1%" if name == "SMT" else None
    tuning = attach(model, _METHODS[name], budget=budget, batches=[batch])
    found["trained"] = tuning.trainable_parameters
    optimizer = tuning.optimizer(learning_rate=1e-3)
    tuning.model.train()
    peak[0] = 0  # the probe's own peak is not asked for
    for _ in range(2):
        tuning.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.01)
    stop.set()
    thread.join()
    found["peak"] = peak[0] - before
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = "| base | method | trained | linear layers, MiB | bits a number | all weights, MiB | resident, MiB "
    lines = [f"{head}| peak of a step, MiB | error of a matrix |", "| --- " * 9 + "|"]
    for row in rows:
        numbers = [f"{row[key] / _MIB:.0f}" for key in ("weights", "loaded", "peak")]
        bits = f"{8 * row['linear'] / row['numbers']:.2f}"
        error = f"{100 * row['largest_error_of_layer_0']:.1f} %" if row["form"] != "none" else "none"
        name = "float32" if row["form"] == "none" else row["form"]
        cells = [name, row["method"], f"{row['trained']:,}", f"{row['linear'] / _MIB:.0f}", bits, *numbers, error]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], sys.argv[2])))
        return
    file = _HERE / "memory.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    for form in _FORMS:
        for name in _METHODS:
            if any(row["form"] == form and row["method"] == name for row in rows):
                continue
            out = subprocess.run([sys.executable, __file__, form, name], capture_output=True, text=True, check=True)
            rows.append(json.loads(out.stdout.splitlines()[-1]))
            file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = _PAGE.read_text(encoding="utf-8")
    _PAGE.write_text(_TABLE.sub(rf"\1\n{table(rows)}\n\n\2", text), encoding="utf-8")


if __name__ == "__main__":
    main()
