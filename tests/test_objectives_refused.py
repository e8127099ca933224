"""What is refused, and told, of objectives, their rows and their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from objective_runs import GRPO, pair, prompt, values
from tiny_run import prepare

from thrifty.core.errors import ThriftyError
from thrifty.core.registry import get
from thrifty.data import CONVERTERS, one_form
from thrifty.run.config import load_config
from thrifty.run.train import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nearest objective": ({"objective": "dpoo"}, "did you mean 'dpo'"),
    "nearest option": ({"objective": {"dpo": {"betta": 1}}}, "did you mean 'beta'"),
    "wrong type": ({"objective": {"dpo": {"beta": "high"}}}, "'beta' of objective dpo must be a number"),
    "a choice": ({"objective": {"kto": {"loss_type": "kt"}}}, "did you mean 'kto'"),
    "options of sft": ({"objective": {"sft": {"beta": 1}}}, "objective sft takes no options"),
    "a run's own key": ({"objective": {"dpo": {"learning_rate": 1}}}, "it stands at the top level"),
    "a second model": ({"objective": {"dpo": {"sync_ref_model": True}}}, "the reference is the untouched base"),
    "vllm": ({"objective": {"grpo": {"reward_funcs": ["exact_match"], "use_vllm": True}}}, "transformers' generate"),
    "no rewards": ({"objective": "grpo"}, "objective grpo needs reward_funcs"),
    "no such check": ({"objective": {"grpo": {"reward_funcs": ["exact"]}}}, "neither exact_match nor module:function"),
    "unknown loss": ({"objective": {"dpo": {"loss_type": "nothing"}}}, "Unknown loss type: nothing"),
    "resume": ({"resume_from_checkpoint": "auto"}, "resume_from_checkpoint does not go with objective dpo"),
    "packing": ({"packing": True}, "packing does not go with objective dpo"),
    "early stopping": ({"early_stopping_patience": 2, "eval_steps": 2}, "early_stopping_patience does not go"),
    "the best": ({"load_best_model_at_end": True, "eval_steps": 2}, "load_best_model_at_end does not go"),
    "evaluation": ({"eval_steps": 2}, "eval_steps does not go with objective dpo"),
    "checkpoints": ({"save_steps": 2}, "save_steps does not go with objective dpo"),
    "sampling": ({"train_sampling_strategy": "group_by_length"}, "TRL decides which rows meet"),
    "a head of PEFT": (
        {"method": {"peft": {"peft_type": "LORA", "r": 2, "target_modules": ["lm_head"]}}, "budget": None},
        "TRL refuses: Applying a PEFT adapter to `lm_head`",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ThriftyError) as error:
        train({**values(folder, "dpo", pair), **changes})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rewards_that_never_differ_are_told(folder: Path) -> None:
    given = values(folder, {"grpo": {"reward_funcs": ["exact_match"], **GRPO}}, prompt, max_steps=1)
    with pytest.raises(ThriftyError, match="with grpo, whether rewards differ within a group"):
        train(given)


def test_mistakes_in_rewards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "wrong_rewards.py").write_text(
        "def score(completions, **_):\n    return 1\n\n\ndef lacks(**_):\n    return []\n", encoding="utf-8"
    )

    def fails(name: str, message: str, **changes: Any) -> None:
        given = values(folder, {"grpo": {"reward_funcs": [name], **GRPO, **changes}}, prompt, method="random_blocks")
        with pytest.raises(ThriftyError, match=message):
            train(given, output_dir=str(folder / name.replace(":", "_")))

    fails("no_rewards_here:score", "no module 'no_rewards_here'")
    fails("wrong_rewards:scores", "did you mean 'score'")
    fails("wrong_rewards:score", "must return a list of 4 numbers")
    fails("wrong_rewards:lacks", "must return a list of 4 numbers")
    fails("exact_match", "do not fit in the model's 64 positions", max_completion_length=64)


ROWS: dict[str, tuple[str, Sequence[Any], str]] = {
    "no rejected": ("dpo", [{"prompt": "a", "chosen": "b", "reject": "c"}], "its nearest column is 'reject'"),
    "an empty answer": ("dpo", [{"prompt": "a", "chosen": " ", "rejected": "c"}], "field 'chosen' is empty"),
    "no prompt": ("dpo", [{"chosen": "b", "rejected": "c"}], "no field 'prompt'"),
    "nothing shared": (
        "dpo",
        [{side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}],
        "must begin alike",
    ),
    "a label": ("kto", [{"prompt": "a", "completion": "b", "label": "good"}], "field 'label' is 'good'"),
    "mixed forms": (
        "kto",
        [{"prompt": p, "completion": "b", "label": True} for p in ("a", [{"role": "user", "content": "a"}])],
        "plain text and messages are mixed",
    ),
    "a column in some rows": ("grpo", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "no field 'completion'"),
    "tools": ("grpo", [{"prompt": "a", "tools": [{}]}], "only objective: sft takes tools"),
}  # fmt: skip


@pytest.mark.parametrize(("objective", "rows", "message"), ROWS.values(), ids=ROWS)
def test_broken_rows(objective: str, rows: Sequence[Any], message: str) -> None:
    with pytest.raises(ThriftyError) as error:
        one_form([CONVERTERS[objective](row, origin=f"rows.jsonl:{i}") for i, row in enumerate(rows, 1)])
    assert message in str(error.value)
    assert str(error.value).startswith("rows.jsonl:")


def test_a_prompt_and_answers_in_two_forms_become_messages() -> None:
    answer = [{"role": "assistant", "content": "b"}]
    made = CONVERTERS["dpo"]({"prompt": "a", "chosen": answer, "rejected": "c"}, origin="x:1")
    asked = [{"role": "user", "content": "a"}]
    assert made.columns == {"prompt": asked, "chosen": answer, "rejected": [{"role": "assistant", "content": "c"}]}


def test_the_default_learning_rate_is_that_of_trl_to_sft() -> None:
    def rate(objective: str) -> float:
        return load_config({"model": "m", "data": {"train": "t"}, "objective": objective}).training["learning_rate"]

    assert rate("sft") == get("smt").learning_rate
    assert rate("dpo") == pytest.approx(get("smt").learning_rate / 20)
