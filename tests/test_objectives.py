"""DPO, KTO and GRPO from a run file: what they train, where their reference comes from, and what they refuse."""

from __future__ import annotations

import copy
import gc
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batches, build
from objective_runs import GRPO, LORA, check_delta, judged, logged, pair, prompt, values
from test_loops_trl import SETTINGS
from test_loops_trl import rows as trl_rows
from tiny_run import prepare
from tiny_tokenizer import character_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

import thrifty.run.preference as preference
from thrifty import attach
from thrifty.cli.main import main
from thrifty.core.errors import ThriftyError
from thrifty.run.config import load_config
from thrifty.run.metrics import read_metrics
from thrifty.run.train import train

LOW_RANK = [{"select": {"weights": {"target_modules": ["q_proj", "v_proj"]}}, "update": {"low_rank": {"r": 3}}}]
METHODS: dict[str, tuple[Any, float | None]] = {
    "smt": ({"smt": {"scope": "global"}}, 0.3),
    "full": ("full", None),
    "lora": (LORA, None),
    "low_rank": (LOW_RANK, None),
}
Make = Callable[[int, int], dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


class Seen:
    """What is looked at when TRL's trainer has made its last step and the model is still attached."""

    def __init__(self) -> None:
        self.models = 0

    def look(self, trainer: Any) -> None:
        self.trainer = trainer
        gc.collect()
        self.models = sum(isinstance(thing, LlamaForCausalLM) for thing in gc.get_objects())
        self.adapters = list(getattr(trainer.model, "peft_config", {}))
        if trainer.ref_model is not None:
            self.weights = list(trainer.ref_model.parameters())
        if hasattr(trainer, "compute_ref_log_probs"):
            self.batch = next(iter(trainer.get_train_dataloader()))
            self.reference = trainer.compute_ref_log_probs(trainer.ref_model, self.batch)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen, stock = Seen(), preference._Reported.train

    def spied(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = stock(self, *args, **kwargs)
        seen.look(self)
        return out

    monkeypatch.setattr(preference._Reported, "train", spied)
    return seen


def models_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, LlamaForCausalLM) for thing in gc.get_objects())


def log_probs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed over each row's completion, from plain logits: float32 [B]."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    each = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (each * mask).sum(1)


@pytest.mark.parametrize("case", METHODS)
def test_dpo_takes_the_base_as_its_reference(case: str, folder: Path, seen: Seen) -> None:
    method, budget = METHODS[case]
    before = models_alive()
    run = train(values(folder, {"dpo": {"beta": 0.5}}, pair, method=method, budget=budget))
    losses, margins = logged(folder, "loss"), logged(folder, "rewards/margins")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4), "the model is its own reference at the start"
    assert losses[-1] < losses[0] - 0.1
    assert margins[-1] > 0.2

    assert seen.models == before + 1, "one model, and no second as a reference"
    assert seen.weights == []
    assert seen.adapters == (["default"] if case == "lora" else [])
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert torch.allclose(torch.cat(seen.reference), log_probs(base, seen.batch), atol=1e-4)
    assert not torch.allclose(log_probs(run.model, seen.batch), log_probs(base, seen.batch), atol=0.1)

    if case != "lora":  # whose merge rounds
        check_delta(folder, run)
    assert not vars(run.model).keys() & {"forward", "_original_forward"}
    summary = json.loads((folder / "out/summary.json").read_text(encoding="utf-8"))
    assert summary == run.summary
    assert summary["objective"] == {"dpo": {"beta": 0.5}}
    assert summary["steps"] == summary["result_step"] == 4
    assert summary["tokens"] > 0
    assert summary["evaluation"]["after"]["loss"] != summary["evaluation"]["before"]["loss"]
    assert not list((folder / "out").glob("checkpoint-*"))


def test_dpo_equals_dpo_with_a_second_model(tmp_path: Path) -> None:
    def run(second: bool) -> tuple[list[float], list[torch.Tensor]]:
        model = build("llama")
        copied = copy.deepcopy(model).eval()
        tuning = attach(model, {"smt": {"block_size": 8}}, budget=0.05, batches=batches(2, 4, 12))
        trainer = DPOTrainer(
            model=tuning.model,
            ref_model=copied if second else preference.Reference(tuning),
            args=DPOConfig(output_dir=str(tmp_path), bf16=False, gradient_accumulation_steps=2, **SETTINGS),
            train_dataset=trl_rows().select_columns(["prompt", "chosen", "rejected"]),
            processing_class=character_tokenizer(),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, [leaf.detach().clone() for leaf in tuning.parameters()]

    (losses, leaves), (expected, twins) = run(second=False), run(second=True)
    assert losses == expected
    assert all(torch.equal(leaf, twin) for leaf, twin in zip(leaves, twins, strict=True))


def test_kto_trains(folder: Path, seen: Seen) -> None:
    run = train(values(folder, {"kto": {"beta": 0.5, "desirable_weight": 1.5}}, judged, max_steps=8))
    losses = logged(folder, "loss")
    assert losses[-1] < losses[0]
    assert seen.trainer.desirable_weight == 1.5
    assert seen.weights == []
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert torch.allclose(seen.reference[0], log_probs(base, seen.batch), atol=1e-4)
    check_delta(folder, run)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_follows_a_reward_of_the_users_own(
    beta: float, folder: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "sevens.py").write_text(
        "def score(prompts, completions, digit, reference, **kwargs):\n"
        "    assert all(text.strip().isdigit() for text in reference)\n"
        "    return [text.count(d) / 6 for text, d in zip(completions, digit)]\n",
        encoding="utf-8",
    )
    before = models_alive()
    grpo = {"reward_funcs": ["sevens:score", "exact_match"], "beta": beta, **GRPO}
    run = train(values(folder, {"grpo": grpo}, prompt, max_steps=12, per_device_train_batch_size=16, budget=0.2))
    rewards = logged(folder, "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3]), rewards
    assert len(logged(folder, "rewards/exact_match/mean")) == 12
    assert seen.models == before + 1
    assert (seen.trainer.ref_model is None) == (beta == 0.0)
    if beta:
        kl = logged(folder, "kl")
        assert kl[0] == pytest.approx(0, abs=1e-5)
        assert kl[-1] > 1e-4
        assert seen.weights == []
    check_delta(folder, run)
    assert run.summary["method"] == "smt"


def test_grpo_takes_peft_without_its_adapter_as_the_reference(folder: Path, seen: Seen) -> None:
    grpo = {"beta": 0.1, **GRPO}
    (folder / "digits.py").write_text(
        "def score(completions, **_):\n    return [sum(map(str.isdigit, text)) for text in completions]\n"
    )
    sys.path.insert(0, str(folder))
    try:
        given = values(folder, {"grpo": {**grpo, "reward_funcs": ["digits:score"]}}, prompt, method=LORA, budget=None)
        train(given)
    finally:
        sys.path.remove(str(folder))
    assert seen.adapters == ["default"]
    kl = logged(folder, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert kl[-1] > 1e-5


@pytest.mark.parametrize("method", ["smt", "full"])
def test_precomputed_reference_log_probs_give_the_same_run(method: str, folder: Path) -> None:
    losses = {}
    for precomputed in (False, True):
        dpo = {"precompute_ref_log_probs": precomputed}
        budget = 0.3 if method == "smt" else None
        out = folder / str(precomputed)
        train(values(folder, {"dpo": dpo}, pair, method=method, budget=budget, output_dir=str(out)))
        losses[precomputed] = [entry["loss"] for entry in read_metrics(out / "metrics.jsonl")]
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)


def test_grpo_without_answers_trains_what_needs_no_probe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "short.py").write_text("def score(completions, **_):\n    return [-len(c) for c in completions]\n")
    options = {"grpo": {"reward_funcs": ["short:score"], **GRPO}}
    given = values(folder, options, lambda a, b: {"prompt": f"{a}+{b}="}, data={}, eval={})
    given["data"] = {"train": str(folder / "rows.jsonl")}
    with pytest.raises(ThriftyError, match="method 'smt' chooses by the loss on answers"):
        train(given)
    run = train(given, method="random_blocks", max_steps=2)
    assert run.summary["data"]["rows_without_labels"] == 16
    assert run.summary["tokens"] > 0


def test_the_same_seed_gives_the_same_bytes(folder: Path) -> None:
    given = values(folder, "dpo", pair, max_steps=3)
    train(given)
    train(folder / "out" / "run.yaml", output_dir=str(folder / "again"))
    name = "delta/delta.safetensors"
    assert (folder / "again" / name).read_bytes() == (folder / "out" / name).read_bytes()


@pytest.mark.parametrize(
    "changes", [{"bf16": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}]
)
def test_dpo_under_what_a_run_can_set(changes: dict[str, Any], folder: Path) -> None:
    run = train(values(folder, "dpo", pair, max_steps=3, **changes))
    assert logged(folder, "loss")[-1] < math.log(2)
    check_delta(folder, run)


def test_a_plan_that_changes_while_it_trains(folder: Path) -> None:
    method = {"smt": {"block_size": 8, "reselect_every": 2}}
    run = train(values(folder, "dpo", pair, method=method, max_steps=5))
    assert logged(folder, "loss")[-1] < math.log(2)
    check_delta(folder, run)


def test_conversations(folder: Path, seen: Seen) -> None:
    def turns(a: int, b: int) -> dict[str, Any]:
        asked = [{"role": "user", "content": f"{a}+{b}"}]
        return {side: [*asked, {"role": "assistant", "content": text}] for side, text in
                (("chosen", str(a + b)), ("rejected", f"-{a}"))}  # fmt: skip

    train(values(folder, "dpo", turns, max_steps=3))
    assert logged(folder, "rewards/margins")[-1] > 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    row, mask = seen.batch["input_ids"][0], seen.batch["completion_mask"][0].bool()
    assert tokenizer.eos_token_id in row[mask].tolist(), "an answer ends as thrifty writes it"
    assert "=" not in tokenizer.decode(row)


def test_the_whole_path_on_the_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = values(folder, {"dpo": {"beta": 0.5}}, pair)
    (folder / "run.yaml").write_text(json.dumps(given), encoding="utf-8")

    def thrifty(*words: str) -> str:
        assert main(list(words)) == 0
        return capsys.readouterr().out

    command = [sys.executable, "-m", "thrifty", "train", "run.yaml", "objective.dpo.beta=0.7"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "rewards/margins" in done.stdout
    monkeypatch.chdir(folder)
    assert load_config(folder / "out/run.yaml").objective == {"dpo": {"beta": 0.7}}
    summary = json.loads((folder / "out/summary.json").read_text(encoding="utf-8"))
    scores = dict(line.split(": ") for line in thrifty("eval", "out").splitlines())
    assert float(scores["loss"]) == pytest.approx(summary["evaluation"]["after"]["loss"], rel=1e-4)
    thrifty("export", "out", "--output", "plain")
    AutoModelForCausalLM.from_pretrained(folder / "plain")
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1\n"))
    thrifty("chat", "out")
