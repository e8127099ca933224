"""A delta's life on a real model: SmolLM2-135M, SMT at 1 %. See docs/results/delta.md.

    DATA=<folder of the data> OUT=<scratch folder> python results/delta/study.py [--threads N]

Resumable: what has a JSON file beside this script is skipped; runs whose folder OUT has lost are trained again. Each
file holds the commit and the threads under "study".
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
STEPS, BATCH, MAX_LENGTH, ROWS, EXACT = 80, 16, 256, 200, 100
RANKS = (8, 16, 32, 64)
CODINGS = ("int8", "int4", "top_k=10%", "delta_come=2x8,32x3,128x2")  # its own ceiling leaves no room here
SMT = "{smt: {scope: per_matrix}}"
SWAPS = 1000


class Study:
    """What is measured, one JSON file each."""

    def __init__(self, *, data: Path, out: Path, threads: int, only: tuple[str, ...] = ("",)) -> None:
        self.data, self.out, self.threads, self.only = data, out, threads, only
        git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
        self.commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()

    def train(self, name: str, *, task: str, method: str, steps: int, budget: str | None = "1%") -> Path:
        """The folder of a finished run."""
        folder = self.out / name
        if not (folder / "summary.json").is_file():
            words = [f"model={MODEL}", f"data.train={self.data}/{task}_train.jsonl", f"method={method}", "bf16=true"]
            words += [f"max_steps={steps}", f"per_device_train_batch_size={BATCH}", "learning_rate=1e-2", "seed=0"]
            words += [f"max_length={MAX_LENGTH}", "save_strategy=no", f"output_dir={folder}"]
            words += [] if budget is None else [f"budget={budget}"]
            self.run("train", *words)
        self.keep(f"train-{name}", lambda: json.loads((folder / "summary.json").read_text()))
        return folder

    def run(self, *words: str) -> None:
        subprocess.run([sys.executable, "-m", "thrifty", *words], check=True)

    def keep(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, kept as a file."""
        path = HERE / f"{name}.json"
        if not path.exists() and name.startswith(self.only):
            began = time.monotonic()
            found = make()
            study = {"commit": self.commit, "threads": self.threads, "seconds": round(time.monotonic() - began, 1)}
            path.write_text(json.dumps(found | {"study": study}, indent=1) + "\n")
            print(f"{time.strftime('%H:%M')} {name} ({study['seconds']:.0f} s)", flush=True)
        return json.loads(path.read_text()) if path.exists() else {}

    def score(self, model: Any, task: str) -> dict[str, float]:
        """snips: loss and greedy exact match; boolq: loss and choice of true or false. Rows from the valid files."""
        from thrifty.data import load
        from thrifty.data.source import Source
        from thrifty.run.config import EvalConfig
        from thrifty.run.evaluate import evaluate
        from thrifty.run.model import load_tokenizer

        rows = load([Source(path=str(self.data / f"{task}_valid.jsonl"), split=f"[:{ROWS}]")], seed=0)
        asked = EvalConfig(exact_match=EXACT) if task == "snips" else EvalConfig(choice=ROWS)
        return evaluate(model, load_tokenizer(MODEL), rows, asked, max_length=MAX_LENGTH)


def fresh() -> Any:
    from thrifty.run.model import load_model

    return load_model(MODEL)


def file_name(how: str) -> str:
    """Of what a compression gave."""
    return "compressed-" + how.replace("=", "-").replace(",", "-").replace("%", "")


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def everything(study: Study) -> None:
    from thrifty.delta import Delta
    from thrifty.delta.algebra import average, combine
    from thrifty.delta.compress import compress, measure

    snips = study.train("smt-snips", task="snips", method=SMT, steps=STEPS)
    boolq = study.train("smt-boolq", task="boolq", method=SMT, steps=STEPS)
    equal = study.train(
        "lora-r4", task="snips", method="{peft: {peft_type: LORA, r: 4, lora_alpha: 8}}", steps=2, budget=None
    )
    one, other = Delta.load(snips / "delta"), Delta.load(boolq / "delta")
    study.keep("sizes", lambda: sizes(study, snips, equal))
    both = {"sum": combine([(one, 1.0), (other, 1.0)]), "mean": average([one, other]), "snips": one, "boolq": other}
    for task in ("snips", "boolq"):
        for name, delta in both.items():
            study.keep(f"tasks-{name}-on-{task}", lambda d=delta, t=task: study.score(d.apply(fresh()), t))
    study.keep("tasks-base-on-boolq", lambda: study.score(fresh(), "boolq"))
    for rank in RANKS:
        study.keep(f"lora-{rank}", lambda r=rank: as_lora(study, one, rank=r))

    def compressed(how: str) -> dict[str, Any]:
        folder = study.out / f"compressed-{how}"
        compress(one, how).save(folder)
        small = Delta.load(folder)
        total, model = measure(one, small).total, small.apply(fresh())
        found = {"bytes": size(folder), "lost": total.error} | study.score(model, "snips")
        small.remove(model)
        base = dict(fresh().named_parameters())
        found["removed_exactly"] = all(bool((p == base[name]).all()) for name, p in model.named_parameters())
        return found

    for how in CODINGS:
        study.keep(file_name(how), lambda h=how: compressed(h))
    study.keep("swaps", lambda: swaps({"snips": one, "boolq": other, "sum": replace(both["sum"])}))
    study.keep("exported", lambda: exported(study, snips, one))


def sizes(study: Study, run: Path, lora: Path) -> dict[str, Any]:
    full = study.out / "full"
    if not full.exists():
        study.run("delta", "apply", str(run), "--output", str(full))
    trained = {
        name: json.loads((p / "summary.json").read_text())["trainable_parameters"]
        for name, p in (("smt", run), ("lora", lora))
    }
    return {
        "smt_bytes": size(run / "delta"),
        "smt_numbers": trained["smt"],
        "lora_bytes": size(lora / "delta"),
        "lora_numbers": trained["lora"],
        "full_bytes": (full / "model.safetensors").stat().st_size,
    }


def as_lora(study: Study, delta: Any, *, rank: int) -> dict[str, Any]:
    """The delta as a stock adapter: its size, what is lost, and how it scores once PEFT has merged it."""
    from peft import PeftModel

    from thrifty.delta.adapter import adapter_difference
    from thrifty.delta.to_peft import save_lora

    folder = study.out / f"adapter-{rank}"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    adapter = save_lora(delta, folder, fresh(), rank=rank, base_model=MODEL)
    found = {"bytes": size(folder), "lost": adapter.error, "logits": adapter_difference(delta, folder, fresh())}
    model = PeftModel.from_pretrained(fresh(), str(folder)).merge_and_unload()
    return found | study.score(model, "snips")


def swaps(deltas: dict[str, Any]) -> dict[str, Any]:
    """Random swaps among deltas and the base: milliseconds each, and whether the weights are those of each alone."""
    from thrifty import Deltas
    from thrifty.delta import fingerprint

    def marks(model: Any) -> dict[str, str]:
        return {name: fingerprint(p) for name, p in model.named_parameters()}

    alone = {name: marks(delta.apply(fresh())) for name, delta in deltas.items()} | {None: marks(fresh())}
    model, draw, times = fresh(), random.Random(0), []
    held, wrong = Deltas(model, deltas), 0
    for number in range(SWAPS):
        name = draw.choice([other for other in [*deltas, None] if other != held.active])
        began = time.perf_counter()
        held.deactivate() if name is None else held.activate(name)
        times.append(1000 * (time.perf_counter() - began))
        if number % 100 == 99:
            wrong += marks(model) != alone[name]
    held.deactivate()
    quartiles = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "swaps": SWAPS,
        "milliseconds": quartiles,
        "checked": SWAPS // 100 + 1,
        "wrong": wrong + (marks(model) != alone[None]),
    }


def exported(study: Study, run: Path, delta: Any) -> dict[str, Any]:
    """Does transformers alone, in compute the same logits from the merged checkpoint?"""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.arange(1, 65).view(2, 32)
    expected = delta.apply(fresh()).eval()(input_ids=ids).logits
    found = AutoModelForCausalLM.from_pretrained(study.out / "full").eval()(input_ids=ids).logits
    return {"largest_logit_difference": float((found - expected).detach().abs().max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS (all)")
    parser.add_argument("--only", default="", metavar="A,B", help="what begins so; two sittings can share the work")
    given = parser.parse_args()
    if not {"DATA", "OUT"} <= set(os.environ):
        parser.error("set DATA and OUT in the environment")
    os.environ |= {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
    out = Path(os.environ["OUT"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    only = tuple(given.only.split(","))
    everything(Study(data=Path(os.environ["DATA"]).resolve(), out=out, threads=given.threads, only=only))
    print("no measurement is left to make", flush=True)


if __name__ == "__main__":
    main()
