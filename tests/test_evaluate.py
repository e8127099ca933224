"""Evaluation against plain twins: one row at a time, all logits, no padding, no cache."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, VOCAB, build
from tiny_tokenizer import character_tokenizer
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from thrifty.core.errors import ThriftyError
from thrifty.data import Example, encode, prompt_and_reference, stop_ids, with_answer
from thrifty.objective import installed_plan
from thrifty.run.config import EvalConfig
from thrifty.run.evaluate import evaluate
from thrifty.run.evaluation.greedy import continued, greedy_only

ONLY_LOSS = EvalConfig()
LENGTH = 64
WORDS = ("on", "off now", "blue", "it is 7", "no", "a b", "twenty")


def chat(question: str, answer: str, *, number: int = 0, choices: list[str] | None = None) -> Example:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Example(messages=messages, choices=choices, origin=f"rows.jsonl:{number + 1}")


def rows(count: int) -> list[Example]:
    return [chat("ab" * (i % 4) + f"q{i}", WORDS[i % len(WORDS)], number=i) for i in range(count)]


def plain_sums(model: PreTrainedModel, ids: Sequence[int], labels: Sequence[int]) -> tuple[float, int]:
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1].float()
    targets_T = torch.tensor(list(labels))[1:]
    return float(F.cross_entropy(logits_TV, targets_T, reduction="sum")), int((targets_T != -100).sum())


def plain_greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example, *, limit: int
) -> tuple[str, bool]:
    """The answer, and whether it stopped by itself."""
    prompt, _ = prompt_and_reference(example, tokenizer)
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stop_ids(tokenizer):
            return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip(), True
        ids.append(token)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip(), False


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_loss_is_the_mean_over_all_labels(family: str, batch_size: int) -> None:
    model, tokenizer, examples = build(family), character_tokenizer(), rows(7)
    encoded = [encode(example, tokenizer, max_length=LENGTH) for example in examples]
    model.eval()
    sums = [plain_sums(model, row.input_ids, row.labels) for row in encoded]
    model.train()
    scores = evaluate(model, tokenizer, examples, replace(ONLY_LOSS, batch_size=batch_size), max_length=LENGTH)
    expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    assert scores == {"loss": pytest.approx(expected, abs=1e-5)}
    assert model.training
    assert installed_plan(model) is None


def test_a_router_loss_is_no_part_of_the_evaluation() -> None:
    model, tokenizer = build("mixtral"), character_tokenizer()
    plain = evaluate(model, tokenizer, rows(5), ONLY_LOSS, max_length=LENGTH)
    model.config.output_router_logits = True
    assert evaluate(model, tokenizer, rows(5), ONLY_LOSS, max_length=LENGTH) == plain
    assert model.config.output_router_logits is True


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_a_plain_greedy_loop(family: str, tmp_path: Path) -> None:
    model, tokenizer, examples = build(family).eval(), character_tokenizer(), rows(6)
    said = [plain_greedy(model, tokenizer, example, limit=12)[0] for example in examples]
    # Every second reference is what the model says.
    known = [with_answer(e, said[i]) if i % 2 and said[i] else e for i, e in enumerate(examples)]
    right = sum(prompt_and_reference(e, tokenizer)[1] == said[i] for i, e in enumerate(known))
    for batch_size in (1, 4):
        config = EvalConfig(loss=False, exact_match=6, batch_size=batch_size, max_new_tokens=12)
        file = tmp_path / f"{batch_size}.jsonl"
        scores = evaluate(model, tokenizer, known, config, max_length=LENGTH, answers_file=file)
        written = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["answer"] for line in written] == said
        assert [line["question"] for line in written] == [e.messages[0]["content"] for e in examples if e.messages]
        assert scores == {"exact_match": right / 6}
    assert right >= 2


def test_answers_stop_at_the_end_of_the_turn() -> None:
    model, tokenizer, examples = build("llama").eval(), character_tokenizer(), rows(6)
    prompts = [prompt_and_reference(example, tokenizer)[0] for example in examples]
    ids = torch.tensor([prompts[0]])
    for _ in range(3):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    # What the model says third to the first prompt becomes the end-of-turn token.
    end, third = tokenizer.convert_tokens_to_ids("<end>"), int(ids[0, -1])
    weight = model.lm_head.weight.data
    weight[[end, third]] = weight[[third, end]]
    said = [plain_greedy(model, tokenizer, example, limit=20) for example in examples]
    assert said[0][1]
    assert len(said[0][0]) < 3
    known = [with_answer(e, answer) if answer else e for e, (answer, _) in zip(examples, said)]
    config = EvalConfig(loss=False, exact_match=6, batch_size=6, max_new_tokens=20)
    assert evaluate(model, tokenizer, known, config, max_length=LENGTH)["exact_match"] == sum(
        bool(answer) for answer, _ in said
    ) / len(said)


@pytest.mark.parametrize("family", [*FAMILIES, "mamba", "lfm2"])
def test_rows_that_end_leave_the_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    if family == "mamba":
        model = MambaForCausalLM(MambaConfig(**sizes, state_size=4)).eval()
    elif family == "lfm2":  # a convolution's state beside keys and values
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
        model = Lfm2ForCausalLM(Lfm2Config(**sizes, **heads, intermediate_size=48)).eval()
    else:
        model = build(family).eval()
    prompts = [list(range(5 + i, 9 + i + 3 * (i % 3))) for i in range(9)]
    stops = list(range(3, VOCAB, 12))
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 20 and (ids == prompt or ids[-1] not in stops):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    sizes_of_batches: list[int] = []
    forward = type(model).forward

    @functools.wraps(forward)
    def counted(self: Any, *args: Any, **given: Any) -> Any:
        sizes_of_batches.append(len(given["input_ids"]))
        return forward(self, *args, **given)

    with torch.no_grad(), greedy_only(model, stops=stops, pad=0, limit=20) as config:
        monkeypatch.setattr(type(model), "forward", counted)
        found = continued(model, prompts, config)
    assert [ids[: len(plain)] for ids, plain in zip(found, expected)] == expected
    assert len({len(ids) for ids in expected}) > 1
    assert sum(sizes_of_batches) < 9 * max(map(len, expected))


def test_the_models_own_generation_settings_do_not_matter_and_stay() -> None:
    model, tokenizer, examples = build("qwen2").eval(), character_tokenizer(), rows(3)
    known = [with_answer(e, plain_greedy(model, tokenizer, e, limit=10)[0] or "x") for e in examples]
    config = EvalConfig(loss=False, exact_match=3, max_new_tokens=10)
    expected = evaluate(model, tokenizer, known, config, max_length=LENGTH)
    own = model.generation_config
    own.update(repetition_penalty=5.0, do_sample=True, temperature=9.0, use_cache=False)
    own.suppress_tokens = list(range(5, VOCAB - 1))
    model.config.use_cache = False
    assert evaluate(model, tokenizer, known, config, max_length=LENGTH) == expected
    assert expected["exact_match"] > 0
    assert model.generation_config is own
    assert own.repetition_penalty == 5.0


def test_answers_may_be_as_long_as_the_longest_reference_and_16_more(tmp_path: Path) -> None:
    model, tokenizer = build("llama").eval(), character_tokenizer()
    examples = [chat("q", "abc"), chat("r", "abcdefgh")]
    expected = [plain_greedy(model, tokenizer, e, limit=8 + 16)[0] for e in examples]
    config = EvalConfig(loss=False, exact_match=2)
    evaluate(model, tokenizer, examples, config, max_length=LENGTH, answers_file=tmp_path / "a.jsonl")
    assert [json.loads(line)["answer"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_choice_is_the_likeliest_option(family: str) -> None:
    model, tokenizer = build(family).eval(), character_tokenizer()
    options = ["on", "off", "a longer one", "b"]
    chosen = []
    for i in range(5):
        rows_of = [encode(chat(f"which {i}", text), tokenizer, max_length=200) for text in options]
        losses = [plain_sums(model, row.input_ids, row.labels)[0] for row in rows_of]
        chosen.append(options[losses.index(min(losses))])
    # The first three references are what the model prefers, the others are not.
    wrong = [next(text for text in options if text != best) for best in chosen]
    examples = [chat(f"which {i}", (chosen if i < 3 else wrong)[i], number=i) for i in range(5)]
    for batch_size in (1, 7):
        config = EvalConfig(loss=False, choice=5, choices=options, batch_size=batch_size)
        assert evaluate(model, tokenizer, examples, config, max_length=8) == {"choice": 3 / 5}


def test_options_come_from_the_row_then_the_configuration_then_the_answers() -> None:
    model, tokenizer = build("llama"), character_tokenizer()
    config = EvalConfig(loss=False, choice=2)
    own = [chat(f"q{i}", "x", choices=["x", "y"]) for i in range(2)]
    assert 0 <= evaluate(model, tokenizer, own, config, max_length=LENGTH)["choice"] <= 1
    answers = [chat(f"q{i}", "ny"[i % 2] + "o", number=i) for i in range(4)]
    assert 0 <= evaluate(model, tokenizer, answers, config, max_length=LENGTH)["choice"] <= 1

    many = [chat(f"q{i}", f"w{i}", number=i) for i in range(11)]
    with pytest.raises(ThriftyError, match=r"rows.jsonl:1: no options.*11 distinct answers"):
        evaluate(model, tokenizer, many, config, max_length=LENGTH)
    with pytest.raises(ThriftyError, match=r"rows.jsonl:1: the answer 'w0' is none of its options \('a', 'b'\)"):
        evaluate(model, tokenizer, many, replace(config, choices=["a", "b"]), max_length=LENGTH)


def test_numbers_are_the_first_rows_and_true_is_all(tmp_path: Path) -> None:
    model, tokenizer, examples = build("llama"), character_tokenizer(), rows(5)
    for asked, count in ((2, 2), (50, 5), (True, 5)):
        config = EvalConfig(loss=False, exact_match=asked, max_new_tokens=2)
        evaluate(model, tokenizer, examples, config, max_length=LENGTH, answers_file=tmp_path / "a.jsonl")
        questions = [json.loads(line)["question"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert questions == [e.messages[0]["content"] for e in examples[:count] if e.messages]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_forgetting_is_the_loss_of_the_first_windows(family: str, tmp_path: Path) -> None:
    model, tokenizer = build(family).eval(), character_tokenizer()
    text = "".join("the cat is on the mat, no dog. "[i % 31] for i in range(100 * 40))
    (tmp_path / "general.txt").write_text(text)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    sums = [plain_sums(model, w, w) for w in (ids[start : start + 40] for start in range(0, 64 * 40, 40))]
    expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    config = EvalConfig(loss=False, forgetting=str(tmp_path / "general.txt"))
    scores = evaluate(model, tokenizer, [], config, max_length=40)
    assert scores == {"forgetting": pytest.approx(expected, abs=1e-5)}


def test_dropout_is_off_and_each_module_keeps_its_mode() -> None:
    model, tokenizer = build("gpt2"), character_tokenizer()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    config = EvalConfig(exact_match=2, choice=2, choices=list(WORDS), max_new_tokens=3)
    first = evaluate(model, tokenizer, rows(4), config, max_length=LENGTH)
    assert evaluate(model, tokenizer, rows(4), config, max_length=LENGTH) == first
    assert [module.training for module in model.modules()] == modes


def test_bfloat16_is_near_float32() -> None:
    tokenizer, config = character_tokenizer(), EvalConfig(exact_match=3, choice=3, choices=list(WORDS))
    scores = evaluate(build("llama", dtype=torch.bfloat16), tokenizer, rows(7), config, max_length=LENGTH)
    exact = evaluate(build("llama"), tokenizer, rows(7), ONLY_LOSS, max_length=LENGTH)
    assert scores["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_a_model_in_training_is_measured_as_it_stands() -> None:
    from thrifty.update.tuning import attach

    tokenizer, config = character_tokenizer(), EvalConfig(exact_match=3, choice=3, choices=list(WORDS))
    model = build("llama")
    ids = torch.tensor([encode(rows(1)[0], tokenizer, max_length=LENGTH).input_ids])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    tuning = attach(model, {"smt": {"block_size": 8}}, budget=0.05, batches=[batch], seed=0)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.05)
    before = evaluate(model, tokenizer, rows(7), config, max_length=LENGTH)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    during = evaluate(model, tokenizer, rows(7), config, max_length=LENGTH)
    model(**batch).loss.backward()  # evaluation left nothing behind that stops training
    assert during["loss"] != before["loss"]
    assert evaluate(tuning.finish(), tokenizer, rows(7), config, max_length=LENGTH) == during


def test_a_peft_model_is_measured_with_its_adapter() -> None:
    peft = pytest.importorskip("peft")
    tokenizer, model = character_tokenizer(), build("llama")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, lora)
    config = EvalConfig(exact_match=4, choice=4, choices=list(WORDS), max_new_tokens=6)
    scores = evaluate(wrapped, tokenizer, rows(7), config, max_length=LENGTH)
    merged = evaluate(wrapped.merge_and_unload(), tokenizer, rows(7), config, max_length=LENGTH)
    assert scores == pytest.approx(merged, abs=1e-5)


def test_mistakes_are_told_in_one_line() -> None:
    model, tokenizer = build("gpt2"), character_tokenizer()
    config = EvalConfig(loss=False, exact_match=1, max_new_tokens=50)
    with pytest.raises(ThriftyError, match=r"rows.jsonl:1: .* do not fit the model's 64 positions"):
        evaluate(model, tokenizer, [chat("why " * 9, "so")], config, max_length=LENGTH)
    with pytest.raises(ThriftyError, match=r"t.txt:1: a plain text row has no answer"):
        evaluate(model, tokenizer, [Example(text="words", origin="t.txt:1")], config, max_length=LENGTH)
    with pytest.raises(ThriftyError, match=r"eval.exact_match needs data.eval"):
        evaluate(model, tokenizer, [], config, max_length=LENGTH)
