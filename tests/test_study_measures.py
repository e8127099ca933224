"""What a study measures: each row's numbers against plain computations, and their sums against `evaluate`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import character_tokenizer
from transformers import PreTrainedModel

import thrifty.run.harness as harness
import thrifty.study.measures.subject as subject_module
from thrifty.core.errors import ThriftyError
from thrifty.data import Example, encode, encode_options, prompt_and_reference, with_answer
from thrifty.objective import installed_plan
from thrifty.run.config import EvalConfig
from thrifty.run.evaluate import evaluate
from thrifty.run.evaluation import evaluating
from thrifty.study.measures import Subject, better, check, measure
from thrifty.study.measures.structured import Structured, pairs, parsed, structured_rows

LENGTH = 64
WORDS = ("on", "off now", "blue", "it is 7", "no", "a b", "twenty")


def chat(question: str, answer: str, *, number: int = 0, choices: list[str] | None = None) -> Example:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Example(messages=messages, choices=choices, origin=f"rows.jsonl:{number + 1}")


def rows(count: int) -> list[Example]:
    return [chat("ab" * (i % 4) + f"q{i}", WORDS[i % len(WORDS)], number=i) for i in range(count)]


def subject(model: PreTrainedModel, examples: Sequence[Example], *, batch_size: int = 3) -> Subject:
    tokenizer = character_tokenizer()
    return Subject(model=model, tokenizer=tokenizer, examples=examples, max_length=LENGTH, batch_size=batch_size)


def plain_sums(model: PreTrainedModel, ids: Sequence[int], labels: Sequence[int]) -> list[float]:
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1].float()
    targets_T = torch.tensor(list(labels))[1:]
    return [float(F.cross_entropy(logits_TV, targets_T, reduction="sum")), int((targets_T != -100).sum())]


def ratio(measured: Mapping[str, Any]) -> float:
    numerators, denominators = zip(*measured["rows"])
    return float(sum(numerators) / sum(denominators))


def close(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> bool:
    return len(found) == len(expected) and all(
        row[1] == plain[1] and row[0] == pytest.approx(plain[0], abs=1e-4) for row, plain in zip(found, expected)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_each_row_alone(family: str, tmp_path: Path) -> None:
    model, examples, tokenizer = build(family).eval(), rows(7), character_tokenizer()
    text = "".join("the cat is on the mat, no dog. "[i % 31] for i in range(300))
    (tmp_path / "general.txt").write_text(text)
    encoded = [encode(example, tokenizer, max_length=LENGTH) for example in examples]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    windows = [ids[start : start + LENGTH] for start in range(0, 300, LENGTH)]
    found = measure(subject(model, examples), {"loss": True, "forgetting": str(tmp_path / "general.txt")})
    assert found.keys() == {"loss", "forgetting"}
    assert close(found["loss"]["rows"], [plain_sums(model, row.input_ids, row.labels) for row in encoded])
    assert close(found["forgetting"]["rows"], [plain_sums(model, window, window) for window in windows])


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_sums_of_rows_are_the_scores_of_evaluate(family: str, tmp_path: Path) -> None:
    model, examples, tokenizer = build(family), rows(7), character_tokenizer()
    model.config.max_position_embeddings = 128
    (tmp_path / "general.txt").write_text("the cat is on the mat. " * 20)
    with evaluating(model):
        third = subject(model, examples[1:2]).answers(True)[0].answer[2]
    # What the model says third to the second row becomes the end of a turn; every second reference is what it says.
    pair = tokenizer.convert_tokens_to_ids(["<end>", third])
    model.lm_head.weight.data[pair] = model.lm_head.weight.data[pair[::-1]]
    with evaluating(model):
        said = subject(model, examples).answers(True)
    known = [with_answer(e, a.answer) if i % 2 and a.answer else e for i, (e, a) in enumerate(zip(examples, said))]
    options = sorted({prompt_and_reference(e, tokenizer)[1] for e in known})
    settings: dict[str, Any] = {"exact_match": 5, "choice": 6, "choices": options}
    settings |= {"loss": True, "forgetting": str(tmp_path / "general.txt")}
    scores = evaluate(model, tokenizer, known, EvalConfig(**settings, batch_size=4), max_length=LENGTH)
    found = measure(subject(model, known), settings)
    assert {name: ratio(value) for name, value in found.items()} == pytest.approx(scores, abs=1e-6)
    assert scores["exact_match"] > 0
    assert [len(found[name]["rows"]) for name in ("loss", "exact_match", "choice")] == [7, 5, 6]
    assert model.training
    assert installed_plan(model) is None


def test_choice_and_its_majority() -> None:
    model, tokenizer = build("llama").eval(), character_tokenizer()
    options = ["on", "off", "a longer one", "b"]
    examples = [chat(f"which {i}", options[min(i, 2)], number=i) for i in range(6)]
    expected = []
    for example, answer in zip(examples, (0, 1, 2, 2, 2)):
        encoded = encode_options(example, options, tokenizer, max_length=200)
        losses = [plain_sums(model, row.input_ids, row.labels)[0] for row in encoded]
        expected.append([int(losses.index(min(losses)) == answer), 1])
    found = measure(subject(model, examples), {"choice": 5, "choices": options})
    assert found == {"choice": {"rows": expected, "majority": 3 / 5}}


def test_answers_are_generated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(len(args[2]))
        return real(*args, **options)

    real = subject_module.answer_all
    monkeypatch.setattr(subject_module, "answer_all", counted)
    model = build("llama")
    model.config.max_position_embeddings = 128
    examples = [chat(f"q{i}", json.dumps({"intent": "a", "slots": {"b": str(i)}}), number=i) for i in range(5)]
    for exact_match, structured, most in ((2, 4, 4), (4, 2, 4), (True, 1, 5), (3, {"rows": True}, 5)):
        asked.clear()
        found = measure(subject(model, examples), {"exact_match": exact_match, "structured": structured})
        assert asked == [most]
        count = 5 if exact_match is True else exact_match
        assert len(found["exact_match"]["rows"]) == count
    measured = subject(model, examples)
    with evaluating(model):
        assert measured.answers(3)[:2] == measured.answers(2)
    assert asked == [5, 3]


def test_structured_measures_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    references = [{"intent": "play", "slots": {"song": "x"}}, {"intent": "stop", "slots": {}}]
    said = ['{"slots": {"song": "y"}, "intent": "play"}', '{"intent": "stop", "slots": {']
    examples = [chat(f"q{i}", json.dumps(one), number=i) for i, one in enumerate(references)]
    measured = subject(build("llama"), examples)

    def answered(*args: Any, **options: Any) -> Any:
        return [subject_module.Answered(question="", answer=answer, reference="") for answer in said]

    monkeypatch.setattr(subject_module, "answer_all", answered)
    assert measure(measured, {"structured": True}) == {
        "json_valid": {"rows": [[1, 1], [0, 1]]},
        "intent_accuracy": {"rows": [[1, 1], [0, 1]]},
        "slot_f1": {"rows": [[0, 2], [0, 0]]},
    }


PAIRS = {
    '{"slots": {"a": "x", "b": "y"}}': [("a", '"x"'), ("b", '"y"')],
    '{"slots": {"a": ["x", "x", "y"]}}': [("a", '"x"'), ("a", '"x"'), ("a", '"y"')],
    '{"slots": {"a": 5, "b": true, "c": null}}': [("a", "5"), ("b", "true"), ("c", "null")],
    '{"slots": {"a": {"z": 1, "y": [2]}}}': [("a", '{"y": [2], "z": 1}')],
    '{"slots": {"a": [[1], {"b": 2}], "c": []}}': [("a", "[1]"), ("a", '{"b": 2}')],
    '{"slots": "none"}': [],
    '{"slots": ["a"]}': [],
    "{}": [],
}


@pytest.mark.parametrize(("text", "expected"), PAIRS.items(), ids=PAIRS)
def test_pairs(text: str, expected: list[tuple[str, str]]) -> None:
    value = parsed(text)
    assert value is not None
    assert pairs(value.get("slots")) == Counter(expected)


@pytest.mark.parametrize("text", ["", "x", "[1]", '"a"', "3", '{"a": 1', '{"a": NaN}', '{"a": 1} b', "[" * 100_000])
def test_what_is_no_object(text: str) -> None:
    assert parsed(text) is None


VALUES = st.sampled_from(["x", "y", 1, True, None, ["x"], ["x", "y"], {"n": 1}])
OBJECTS = st.fixed_dictionaries(
    {"intent": st.sampled_from("ab"), "slots": st.dictionaries(st.sampled_from("pqr"), VALUES)}
)


def f1_of_sets(answers: Sequence[Any], references: Sequence[Any]) -> float:
    """Precision and recall over (row, name, value, number among equals), as in a table of labelled spans."""

    def entries(values: Sequence[Any]) -> set[tuple[Any, ...]]:
        found = []
        for row, value in enumerate(values):
            for name, of_name in (value or {}).get("slots", {}).items():
                found += [(row, name, json.dumps(v)) for v in (of_name if isinstance(of_name, list) else [of_name])]
        return {(*entry, found[:i].count(entry)) for i, entry in enumerate(found)}

    given, wanted = entries(answers), entries(references)
    if not given & wanted:
        return 0.0
    precision, recall = len(given & wanted) / len(given), len(given & wanted) / len(wanted)
    return 2 * precision * recall / (precision + recall)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.none() | OBJECTS, OBJECTS), min_size=1, max_size=6))
def test_f1_is_that_of_precision_and_recall(both: list[tuple[Any, Any]]) -> None:
    answers, references = [one for one, _ in both], [other for _, other in both]
    found = structured_rows(answers, references, Structured())
    assert all(0 <= part <= whole for measured in found.values() for part, whole in measured["rows"])
    if sum(whole for _, whole in found["slot_f1"]["rows"]):
        assert ratio(found["slot_f1"]) == pytest.approx(f1_of_sets(answers, references))
    assert ratio(found["json_valid"]) == sum(one is not None for one in answers) / len(both)
    same = sum(one is not None and one["intent"] == other["intent"] for one, other in both)
    assert ratio(found["intent_accuracy"]) == same / len(both)
    if None not in answers:  # the other way round it is the same
        assert structured_rows(references, answers, Structured()) == found
    perfect = structured_rows(references, references, Structured())
    assert all(part == whole for measured in perfect.values() for part, whole in measured["rows"])


def test_labels_and_fields_under_other_names() -> None:
    references = [{"tool": 1, "arguments": {"a": 1}}, {"tool": "1", "arguments": {}}]
    answers = [{"tool": True, "arguments": {"a": 1}}, {"tool": "1"}]
    found = structured_rows(answers, references, Structured(label="tool", fields="arguments"))
    assert found["tool_accuracy"]["rows"] == [[0, 1], [1, 1]]
    assert found["slot_f1"]["rows"] == [[2, 2], [0, 0]]


REFERENCES = {
    "[1, 2]": r"rows.jsonl:2: the answer '\[1, 2\]' is not a JSON object",
    '{"intend": "a"}': r"rows.jsonl:2: the answer has no key 'intent' \(keys: 'intend'\): set structured.label",
    '{"intent": "a", "slots": [1]}': "rows.jsonl:2: 'slots' of the answer is not an object: set structured.fields",
    '{"intent": "a", "values": {}}': "no answer of the 2 measured rows has a value under 'slots'",
}


@pytest.mark.parametrize(("reference", "message"), REFERENCES.items(), ids=REFERENCES)
def test_references_without_what_is_compared(reference: str, message: str) -> None:
    examples = [chat("a", '{"intent": "a", "slots": {}}'), chat("b", reference, number=1)]
    with pytest.raises(ThriftyError, match=message):
        measure(subject(build("llama"), examples), {"structured": True})


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "measure": ({"exact_mach": 3}, "^here: unknown measure 'exact_mach'; did you mean 'exact_match'?"),
    "option": ({"structured": {"lable": "x"}}, "^here.structured: unknown option 'lable'; did you mean 'label'?"),
    "type": ({"exact_match": "200"}, "^here.exact_match must be an integer or true or false, not '200'"),
    "option's type": ({"structured": {"label": 3}}, "^here.structured.label must be a text, not 3"),
    "negative": ({"choice": -1}, "^here.choice is -1"),
    "negative rows": ({"structured": {"rows": -2}}, "^here.structured.rows is -2"),
    "a list": ({"harness": "arc_easy"}, "^here.harness must be a list of texts"),
    "choices": ({"choices": ["a"]}, "^here.choices is for `choice`, which is not measured"),
    "limit": ({"harness": ["arc_easy"], "harness_limit": 0}, "^here.harness_limit is 0"),
    "file": ({"forgetting": "none.txt"}, "^here.forgetting: none.txt: "),
    "variable": ({"forgetting": "$NOT_SET_HERE/a.txt"}, "^here.forgetting: .*NOT_SET_HERE is not set"),
    "folder": ({"harness": ["arc_easy"], "harness_path": "none"}, "^here.harness_path: there is no folder 'none'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_anything_runs(name: str) -> None:
    wanted, message = MISTAKES[name]
    with pytest.raises(ThriftyError, match=message):
        check(wanted, where="here")


def test_what_is_right_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "general.txt").write_text("words")
    monkeypatch.setenv("TEXTS", str(tmp_path))
    check({"loss": True, "exact_match": 200, "structured": {"rows": 200, "label": "intent", "fields": "slots"}})
    check({"choice": 300, "choices": ["a", "b"], "forgetting": "$TEXTS/general.txt", "structured": False})
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ThriftyError, match=r"measures\.harness needs lm_eval: pip install"):
        check({"harness": ["arc_easy"]})


def test_rows_are_needed() -> None:
    for wanted in ({"loss": True}, {"exact_match": 1}, {"structured": True}, {"choice": 1}):
        with pytest.raises(ThriftyError, match=f"^{next(iter(wanted))} needs evaluation rows"):
            measure(subject(build("llama"), []), wanted)
    assert measure(subject(build("llama"), []), {"loss": False, "exact_match": 0}) == {}


def test_which_way_is_better() -> None:
    lower = ["loss", "forgetting", "wikitext/word_perplexity", "a/byte_perplexity", "a/bits_per_byte", "a/perplexity"]
    higher = [
        "exact_match",
        "choice",
        "slot_f1",
        "json_valid",
        "intent_accuracy",
        "arc_easy/acc",
        "a/exact_match,strict",
    ]
    assert {better(name) for name in lower} == {"lower"}
    assert {better(name) for name in higher} == {"higher"}


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{target}"
{more}
target_delimiter: ""
metric_list:
  - {{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}
metadata: {{version: 1}}
"""


def test_harness_gives_documents_where_the_score_is_their_mean(tmp_path: Path) -> None:
    model, tokenizer = build("llama").eval(), character_tokenizer()
    asked = [
        {"prompt": f"q{i} is:", "completion": WORDS[i], "choices": [WORDS[i], "abc"], "label": 0} for i in range(6)
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    likelihood = {"kind": "loglikelihood", "target": "{{completion}}", "metric": "perplexity", "more": ""}
    choice = {"kind": "multiple_choice", "target": "label", "metric": "acc", "more": "doc_to_choice: choices"}
    for name, filled, mean in (("tiny_sums", likelihood, "perplexity"), ("tiny_choice", choice, "mean")):
        text = TASK.format(name=name, aggregation=mean, rows=tmp_path / "asked.jsonl", **filled)
        (tmp_path / f"{name}.yaml").write_text(text)

    def likelihood_of(row: Mapping[str, Any], answer: str) -> float:
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        own = tokenizer(answer, add_special_tokens=False).input_ids
        return -plain_sums(model, prompt + own, [-100] * len(prompt) + own)[0]

    sums = [likelihood_of(row, row["completion"]) for row in asked[:5]]
    right = [[float(total > likelihood_of(row, "abc")), 1] for total, row in zip(sums, asked)]
    tasks = {"harness": ["tiny_sums", "tiny_choice"], "harness_path": str(tmp_path), "harness_limit": 5}
    with pytest.raises(ThriftyError, match=r"^here\.harness: lm_eval knows no task .*; did you mean 'tiny_sums'"):
        check({**tasks, "harness": ["tiny_sumz"]}, where="here")
    model.train()
    found = measure(subject(model, []), tasks)
    assert found == {
        "tiny_sums/perplexity": {"score": pytest.approx(math.exp(-sum(sums) / 5), rel=1e-4)},
        "tiny_choice/acc": {"rows": right},
    }
    assert model.training
