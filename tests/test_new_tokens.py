"""New tokens: their rows are trained beside the method's part, and the delta brings them to a plain base and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attached import step
from families import batches, build
from tiny_tokenizer import CHAT_TEMPLATE, character_tokenizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from thrifty import Delta, add_tokens, attach
from thrifty.core.errors import ThriftyError
from thrifty.delta import vocabulary

TOKENS = ["<tool>", "<end tool>"]
FAMILIES = ("llama", "gemma2")  # a head of its own, and a tied one
METHODS: dict[str, Any] = {
    "smt": {"smt": {"block_size": 8}},
    "full": "full",
    "lisa": {"lisa": {"layers": 1, "period": 1}},
    "hft": {"hft": {"period": 1}},
    "lift": {"lift": {"rank": 4, "refresh": 1}},
    "greentrainer": {"greentrainer": {"period": 3}},
    "composable_sft": {"composable_sft": {"phase1": 1}},
    "embedding_columns": [{"select": {"columns": {"target_modules": ".*(embed_tokens|lm_head)"}}}],
}
(BATCH,) = batches(1, 3, 10)


def checkpoint(folder: Path, *, family: str = "llama", padded: int = 0) -> Path:
    """A tiny model with the 97 rows of its tokenizer; `padded`: with so many rows more."""
    model = build(family, layers=2)
    if padded:
        model.resize_token_embeddings(97 + padded, mean_resizing=False)
    model.save_pretrained(folder)
    character_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def batch(rows: list[int]) -> dict[str, torch.Tensor]:
    ids = BATCH["input_ids"].clone()
    ids[0, 2], ids[1, 4] = rows
    return {**BATCH, "input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    ("method", "family", "padded"),
    [
        *[(method, family, 0) for family in FAMILIES for method in ("smt", "full", "lisa", "embedding_columns")],
        *[(method, "llama", 0) for method in ("hft", "lift", "greentrainer", "composable_sft")],
        *[(method, "llama", padded) for padded in (1, 5) for method in ("smt", "full")],
    ],
)
def test_a_delta_brings_new_tokens_to_a_plain_base_and_back(
    method: str, family: str, padded: int, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "base", family=family, padded=padded)
    model = AutoModelForCausalLM.from_pretrained(folder)
    base = weights(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    new = add_tokens(model, tokenizer, TOKENS)
    assert new.ids == {"<tool>": 97, "<end tool>": 98}
    start = weights(model)
    budget = None if method in ("full", "lisa", "hft", "greentrainer") else 0.05
    tuning = attach(model, METHODS[method], budget=budget, batches=[batch([97, 98])], new_tokens=new)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
    for _ in range(4):
        step(tuning, optimizer, batch([97, 98]))
    with tuning.base():
        assert torch.equal(model.get_input_embeddings().weight, start["model.embed_tokens.weight"])
    tuning.delta().save(tmp_path / "delta")
    trained = weights(tuning.finish())

    plain = AutoModelForCausalLM.from_pretrained(folder)
    delta = Delta.load(tmp_path / "delta")
    assert delta.new_tokens == new
    delta.apply(plain)
    after = weights(plain)
    assert after.keys() == trained.keys()
    for name, values in trained.items():
        assert torch.equal(after[name], values), name
    assert plain.config.vocab_size == len(trained["model.embed_tokens.weight"]) == max(99, 97 + padded)
    with pytest.raises(ThriftyError, match="applied already"):
        delta.apply(plain)
    delta.remove(plain)
    again = weights(plain)
    assert again.keys() == base.keys()
    assert plain.config.vocab_size == 97 + padded
    for name, values in base.items():
        assert torch.equal(again[name], values), name
    with pytest.raises(ThriftyError, match="nothing to remove"):
        delta.remove(plain)
    loaded = AutoTokenizer.from_pretrained(folder)
    delta.new_tokens.extend(loaded)
    assert loaded("a<tool>b", add_special_tokens=False).input_ids == [
        *loaded("a").input_ids,
        97,
        *loaded("b").input_ids,
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_new_rows_of_the_embedding_change(family: str, dtype: torch.dtype) -> None:
    model, tokenizer = build(family, dtype, layers=2), character_tokenizer()
    old = weights(model)
    new = add_tokens(model, tokenizer, TOKENS)
    start = weights(model)
    names = [name for name in start if "embed_tokens" in name or "lm_head" in name]
    assert len(names) == (2 if family == "llama" else 1)
    for name in names:
        mean = old[name].mean(0, dtype=torch.float64).to(dtype)
        assert torch.equal(start[name], torch.cat([old[name], mean[None], mean[None]])), name
    alone = attach(build(family, dtype, layers=2), METHODS["smt"], budget=0.05, batches=[BATCH]).trainable_parameters
    tuning = attach(model, METHODS["smt"], budget=0.05, batches=[batch([97, 98])], new_tokens=new)
    rows = 2 * 40 * len(names)
    assert alone <= tuning.trainable_parameters - rows <= 1.02 * alone  # the budget counts the grown model
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
    for _ in range(2):
        step(tuning, optimizer, batch([97, 98]))
    tuning.finish()
    for name, values in weights(model).items():
        moved = values != start[name]
        if name in names:
            assert not moved[:97].any(), name
            assert moved[97:].any(dim=1).all(), name
        else:
            assert not moved[~tuning.plan[name].mask(values.shape)].any() if name in tuning.plan else not moved.any()


def test_the_bias_of_a_head_grows_and_trains() -> None:
    model, tokenizer = build("llama", layers=1), character_tokenizer()
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 3, 97))
    new = add_tokens(model, tokenizer, TOKENS)
    assert torch.equal(model.lm_head.bias[97:], torch.full((2,), 1.0))
    tuning = attach(model, {"custom": {"parts": [{"select": "norms"}]}}, new_tokens=new)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=1.0)
    step(tuning, optimizer, batch([97, 98]))
    delta = tuning.delta()
    tuning.finish()
    bias = model.lm_head.bias.detach()
    assert torch.equal(bias[:97], torch.linspace(-1, 3, 97))
    assert (bias[97:] != 1.0).all()
    delta.remove(model)
    assert torch.equal(model.lm_head.bias, torch.linspace(-1, 3, 97))


def test_a_delta_that_does_not_fit_leaves_the_vocabulary_as_it_was(tmp_path: Path) -> None:
    model, tokenizer = build("llama", layers=1), character_tokenizer()
    new = add_tokens(model, tokenizer, TOKENS)
    tuning = attach(model, "random_rows", budget=0.02, new_tokens=new)
    step(tuning, torch.optim.SGD(tuning.parameters(), lr=0.1), batch([97, 98]))
    delta = tuning.delta()
    other = build("llama", layers=1, seed=1)
    before = weights(other)
    with pytest.raises(ThriftyError, match="differs from the base of this delta"):
        delta.apply(other)
    for name, values in weights(other).items():
        assert torch.equal(values, before[name]), name
    assert other.config.vocab_size == other.lm_head.out_features == 97
    other.resize_token_embeddings(120, mean_resizing=False)
    with pytest.raises(ThriftyError, match=r"vocabulary has 120 rows; the tokens were added to one of 97"):
        delta.apply(other)
    delta.save(tmp_path / "delta")
    head = json.loads((tmp_path / "delta" / "delta.json").read_text())
    del head["sha256"]
    for key, value in (("rows", 96), ("base_rows", 0), ("ids", {"<tool>": 99})):
        broken = head | {"new_tokens": head["new_tokens"] | {key: value}}
        (tmp_path / "delta" / "delta.json").write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(ThriftyError, match="garbles new_tokens"):
            Delta.load(tmp_path / "delta")
    wrong = character_tokenizer()
    wrong.add_tokens(["<other>"])
    with pytest.raises(ThriftyError, match=r"token '<tool>' is id 98 in this tokenizer, 97 in the delta"):
        new.extend(wrong)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "add_tokens must be a list of at least one token"),
        ("<tool>", "add_tokens must be a list of at least one token"),
        (["<tool>", ""], "a token must be a text that is not empty"),
        (["<tool>", 7], "a token must be a text that is not empty, not 7"),
        (["<tool>", "<x>", "<tool>"], "'<tool>' is listed twice"),
        (["<tool>", "<turn>", "a"], "'<turn>', 'a' are in the tokenizer's vocabulary already"),
    ],
)
def test_bad_tokens_are_named_and_nothing_changes(tokens: Any, message: str) -> None:
    model, tokenizer = build("llama", layers=1), character_tokenizer()
    with pytest.raises(ThriftyError, match=message):
        add_tokens(model, tokenizer, tokens)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == 97


def test_what_cannot_take_tokens_says_so() -> None:
    model, tokenizer = build("llama", layers=1), character_tokenizer()
    new = add_tokens(model, tokenizer, TOKENS)
    with pytest.raises(ThriftyError, match="beside a PEFT method"):
        attach(model, {"peft": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}}, new_tokens=new)
    with pytest.raises(ThriftyError, match="Linear is no transformers model"):
        add_tokens(nn.Linear(2, 2), character_tokenizer(), TOKENS)


def test_rows_do_not_join_a_rotated_basis() -> None:
    model, tokenizer = build("llama", layers=1), character_tokenizer()
    new = add_tokens(model, tokenizer, TOKENS)
    method = {"sparsegrad": {"target_modules": ["lm_head"]}}
    with pytest.raises(ThriftyError, match=r"lm_head\.weight is trained in a rotated basis.*leave it out") as error:
        attach(model, method, batches=[batch([97, 98])], new_tokens=new)
    assert "\n" not in str(error.value)


def test_a_second_call_is_refused_until_the_first_is_undone() -> None:
    model, tokenizer = build("llama", layers=1), character_tokenizer()
    new = add_tokens(model, tokenizer, ["<tool>"])
    with pytest.raises(ThriftyError, match="give all tokens in one call"):
        add_tokens(model, tokenizer, ["<end tool>"])
    assert len(tokenizer) == model.config.vocab_size == 98
    new.shrink(model)
    assert add_tokens(model, character_tokenizer(), TOKENS).base_rows == 97


class SummedRows(TorchDispatchMode):
    """How many rows each sum or mean in float64 takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (kwargs or {}).get("dtype") == torch.float64 and func.overloadpacket in _SUMS:
            self.seen.append(len(args[0]))
        return func(*args, **(kwargs or {}))


_SUMS = (torch.ops.aten.sum, torch.ops.aten.mean)


def test_the_mean_of_the_rows_takes_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_ROWS", 10, raising=False)
    model, tokenizer = build("llama", layers=1), character_tokenizer()
    with SummedRows() as watch:
        add_tokens(model, tokenizer, TOKENS)
    assert watch.seen == 2 * [*[10] * 9, 7]
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        mean = weight.detach()[:97].mean(0, dtype=torch.float64).float()
        torch.testing.assert_close(weight.detach()[98], mean, rtol=1e-6, atol=1e-9)


def test_whatever_stops_a_delta_the_vocabulary_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build("llama", layers=1), character_tokenizer()
    delta = attach(model, "random_rows", budget=0.02, new_tokens=add_tokens(model, tokenizer, TOKENS)).delta()

    def full(_: torch.Tensor) -> str:
        raise MemoryError

    monkeypatch.setattr("thrifty.delta.delta.fingerprint", full)
    plain = build("llama", layers=1)
    before = weights(plain)
    with pytest.raises(MemoryError):
        delta.apply(plain)
    assert plain.config.vocab_size == 97
    assert all(torch.equal(values, before[name]) for name, values in weights(plain).items())
