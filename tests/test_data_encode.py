"""Labels: the answers and their end-of-turn tokens, all of them and nothing else, with every kind of template."""

from __future__ import annotations

import itertools
import signal

import data_tokenizers as kinds
import pytest
from data_tokenizers import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from thrifty.core.errors import ThriftyError
from thrifty.data import (
    Example,
    chat_prompt,
    chat_template,
    check_vocabulary,
    encode,
    encode_all,
    encode_options,
    prompt_and_reference,
    stop_ids,
    windows,
)

MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "and now"},
    {"role": "assistant", "content": "the answer e"},
]


def chat(messages=MESSAGES, **fields) -> Example:
    return Example(messages=messages, origin="rows.jsonl:1", **fields)


def trained(encoded, tokenizer) -> list[str]:
    """The decoded runs of labels."""
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    runs = itertools.groupby(pairs, key=lambda pair: pair[1] != -100)
    return [tokenizer.decode([token for token, _ in run]) for is_answer, run in runs if is_answer]


ANSWERS = ["a<|im_end|>", "the answer e<|im_end|>"]
SPANS = {
    "CHATML": ANSWERS,
    "CHATML_MARKED": ANSWERS,
    "CHATML_SHORT_MARKS": ANSWERS,
    "DEFAULT_SYSTEM": ANSWERS,
    "OPENED_THOUGHT": ANSWERS,
    "LAST_THOUGHT": [ANSWERS[0], "<think>\n\n</think>\n\n" + ANSWERS[1]],
    "INSTRUCT": ["a</s>", "the answer e</s>"],
    "CLOSED": ANSWERS,
    "OPEN_ENDED": ["a\n\n", "the answer e\n\n</s>"],
    "TWO_BREAKS": ANSWERS,
}


@pytest.mark.parametrize("kind", SPANS)
def test_every_answer_is_trained_with_its_end_and_nothing_else(kind):
    tokenizer = tiny_tokenizer(getattr(kinds, kind))
    encoded = encode(chat(), tokenizer, max_length=1000)
    assert trained(encoded, tokenizer) == SPANS[kind]
    assert all(label in (-100, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert not encoded.truncated
    prompt, reference = prompt_and_reference(chat(), tokenizer)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert reference.endswith("the answer e")
    assert chat_prompt(MESSAGES[:-1], tokenizer) == prompt
    assert set(stop_ids(tokenizer)) & set(encoded.labels)


@pytest.mark.parametrize("kind", ["CHATML", "CHATML_MARKED", "DEFAULT_SYSTEM", "TWO_BREAKS", "CLOSED", "LAST_THOUGHT"])
def test_prompt_is_what_the_template_asks_generation_to_start_from(kind):
    tokenizer = tiny_tokenizer(getattr(kinds, kind))
    prompt, _ = prompt_and_reference(chat(MESSAGES[:2]), tokenizer)
    assert prompt == tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)["input_ids"]


def test_two_line_breaks_are_tokenized_apart_from_the_answer():
    tokenizer = tiny_tokenizer(kinds.TWO_BREAKS)
    joined = tokenizer.apply_chat_template(MESSAGES[:2])["input_ids"]
    apart = encode(chat(MESSAGES[:2]), tokenizer, max_length=1000).input_ids
    assert joined != apart  # else this tokenizer shows nothing
    assert tokenizer.decode(joined) == tokenizer.decode(apart)


def test_tokenizer_with_a_space_before_every_text_keeps_its_tokens():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("▁[]/ISTabcdefghijklmnopqrstuvwxyz"))
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters, "▁th"])}
    backend = Tokenizer(
        models.BPE(vocab={**vocabulary, "th": len(vocabulary)}, merges=[("t", "h"), ("▁", "th")], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = kinds.INSTRUCT
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cat"}]
    encoded = encode(chat(messages), tokenizer, max_length=100)
    assert encoded.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert [span.strip() for span in trained(encoded, tokenizer)] == ["the cat</s>"]


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(str.strip)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    turns=TURNS, system=st.none() | TEXT, kind=st.sampled_from(["CHATML", "CHATML_MARKED", "DEFAULT_SYSTEM", "CLOSED"])
)
def test_trained_spans_are_exactly_the_answers(turns, system, kind):
    tokenizer = tiny_tokenizer(getattr(kinds, kind))
    messages = [{"role": "system", "content": system}] * (system is not None)
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    encoded = encode(chat(messages), tokenizer, max_length=10_000)
    assert trained(encoded, tokenizer) == [answered + "<|im_end|>" for _, answered in turns]
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    prompt, reference = prompt_and_reference(chat(messages), tokenizer)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[: len(prompt)].count(-100) == len(prompt) or len(turns) > 1
    assert reference == turns[-1][1].strip()
    for max_length in (2, len(prompt), len(encoded.input_ids) - 1):
        cut = encode(chat(messages), tokenizer, max_length=max_length)
        assert (cut.input_ids, cut.labels) == (encoded.input_ids[:max_length], encoded.labels[:max_length])
        assert cut.truncated


def test_marks_give_the_mask_of_transformers():
    tokenizer = tiny_tokenizer(kinds.CHATML_MARKED)
    encoded = encode(chat(), tokenizer, max_length=1000)
    theirs = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded.input_ids == theirs["input_ids"]
    assert [int(label != -100) for label in encoded.labels] == theirs["assistant_masks"]


@pytest.mark.parametrize("kind", ["CHATML", "CHATML_MARKED"])
def test_only_the_completion_of_messages_is_trained(kind):
    tokenizer = tiny_tokenizer(getattr(kinds, kind))
    encoded = encode(chat(answers_from=3), tokenizer, max_length=1000)
    assert trained(encoded, tokenizer) == ANSWERS[1:]


def test_tools_and_tool_calls_reach_the_template():
    tokenizer = tiny_tokenizer(kinds.TOOLS)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "It is sunny"},
    ]
    encoded = encode(chat(messages, tools=tools), tokenizer, max_length=1000)
    first, second = trained(encoded, tokenizer)
    assert "Bonn" in first
    assert first.endswith("]<|im_end|>")
    assert second == "It is sunny<|im_end|>"
    assert '"parameters"' in tokenizer.decode(encoded.input_ids)
    for fields, name in (({"tools": tools}, "tools"), ({"messages": messages}, "tool_calls")):
        with pytest.raises(ThriftyError, match=rf"rows.jsonl:1: the chat template does not write `{name}`"):
            encode(chat(**fields), tiny_tokenizer(), max_length=1000)


@pytest.mark.parametrize("adds_start", [False, True])
def test_plain_form_without_a_template(adds_start):
    tokenizer = tiny_tokenizer(None, adds_start=adds_start)
    messages = [{"role": "system", "content": "Be kind"}, *MESSAGES]
    encoded = encode(chat(messages), tokenizer, max_length=1000)
    text = "Be kind\n\nUser: hello\nAssistant: a</s>\nUser: and now\nAssistant: the answer e</s>\n"
    assert tokenizer.decode(encoded.input_ids) == "<s>" * adds_start + text
    assert trained(encoded, tokenizer) == [" a</s>", " the answer e</s>"]
    assert tokenizer.decode(chat_prompt(messages[:-1], tokenizer)) == "<s>" * adds_start + text[: text.rindex(" the")]
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]
    # Saved with the tokenizer, the plain form gives others the same ids.
    tokenizer.chat_template = chat_template(tokenizer)
    assert tokenizer.apply_chat_template(messages)["input_ids"] == encoded.input_ids
    assert encode(chat(messages), tokenizer, max_length=1000) == encoded


@pytest.mark.parametrize("adds_start", [False, True])
def test_plain_pairs_and_texts(adds_start):
    tokenizer, start = tiny_tokenizer(adds_start=adds_start), "<s>" * adds_start
    pair = Example(prompt="Q: 6 * 7?\n\nA:", completion=" 42", origin="x")
    encoded = encode(pair, tokenizer, max_length=100)
    assert trained(encoded, tokenizer) == [" 42</s>"]
    assert tokenizer.decode(encoded.input_ids) == start + "Q: 6 * 7?\n\nA: 42</s>"
    prompt, reference = prompt_and_reference(pair, tokenizer)
    assert (prompt, reference) == (tokenizer(pair.prompt).input_ids, "42")
    text = encode(Example(text="the answer", origin="x"), tokenizer, max_length=100)
    assert tokenizer.decode(text.input_ids) == start + "the answer</s>"
    assert text.labels == [-100, *text.input_ids[1:]]
    written = encode(Example(text="<s>the answer</s>", origin="x"), tokenizer, max_length=100)
    assert tokenizer.decode(written.input_ids) == "<s>the answer</s>"


def test_tokenizer_without_offsets():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = kinds.OPEN_ENDED
    messages = [{"role": "user", "content": "größe?"}, {"role": "assistant", "content": "übel 日本"}]
    encoded = encode(chat(messages), tokenizer, max_length=1000)
    assert trained(encoded, tokenizer) == ["übel 日本\n\n</s>"]


def test_options_differ_only_in_the_last_answer():
    tokenizer = tiny_tokenizer()
    encoded = encode_options(chat(), ["yes", "no"], tokenizer, max_length=1000)
    assert [trained(row, tokenizer) for row in encoded] == [["yes<|im_end|>"], ["no<|im_end|>"]]
    pair = Example(prompt="Q:", completion=" maybe", origin="x")
    assert [trained(row, tokenizer) for row in encode_options(pair, ["yes"], tokenizer, max_length=99)] == [
        [" yes</s>"]
    ]


def test_report_counts_truncation_and_rows_without_labels():
    tokenizer = tiny_tokenizer()
    long = [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}]
    rows, report = encode_all([chat(), chat(long)], tokenizer, max_length=80)
    labels = [row["labels"] for row in rows]
    assert len(rows[1]["input_ids"]) == 80
    assert (report.rows, report.truncated_rows, report.rows_without_labels) == (2, 1, 1)
    assert report.tokens == sum(len(row["input_ids"]) for row in rows)
    assert report.supervised_tokens == sum(label != -100 for row in labels for label in row)
    with pytest.raises(ThriftyError, match=r"^rows.jsonl:1: all labels of all 1 rows are.*longest prompt has 1\d\d"):
        encode_all([chat(long)], tokenizer, max_length=80)
    with pytest.raises(ThriftyError, match="at least 2"):
        encode_all([chat()], tokenizer, max_length=1)


def test_encode_all_equals_encode():
    tokenizer = tiny_tokenizer()
    examples = [chat(MESSAGES[: 2 * k]) for k in (1, 2, 1)] + [Example(text="the answer", origin="x")]
    rows, _ = encode_all(examples, tokenizer, max_length=30)
    single = [encode(example, tokenizer, max_length=30) for example in examples]
    assert rows == [{"input_ids": row.input_ids, "labels": row.labels} for row in single]


def test_refusals_name_the_row():
    with pytest.raises(ThriftyError, match=r"^rows.jsonl:1: the chat template refuses.*roles must alternate$"):
        encode(chat([{"role": "assistant", "content": "a"}]), tiny_tokenizer(kinds.INSTRUCT), max_length=99)
    with pytest.raises(ThriftyError, match=r"^rows.jsonl:1: the chat template does not write the text"):
        encode(chat(), tiny_tokenizer(kinds.PARTS_ONLY), max_length=99)
    with pytest.raises(ThriftyError, match="no answer to generate"):
        prompt_and_reference(Example(text="a", origin="x"), tiny_tokenizer())
    endless = tiny_tokenizer(None)
    endless.eos_token = None
    with pytest.raises(ThriftyError, match="no eos_token"):
        encode(Example(prompt="a", completion="b", origin="x"), endless, max_length=99)


def test_vocabulary_mismatch():
    rows = [{"input_ids": [1, 2]}, {"input_ids": [3, 9]}]
    check_vocabulary(rows, 10)
    with pytest.raises(ThriftyError, match=r"row 1: token id 9 is outside the vocabulary of 9"):
        check_vocabulary(rows, 9)


@settings(max_examples=30, deadline=None)
@given(text=TEXT, length=st.integers(2, 9), adds_start=st.booleans())
def test_windows_hold_the_text_once(tmp_path_factory, text, length, adds_start):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    tokenizer = tiny_tokenizer(adds_start=adds_start)
    found = windows(str(path), tokenizer, length=length)
    ids = tokenizer(text.removeprefix("\ufeff"), add_special_tokens=False).input_ids
    assert all(
        (2 <= len(window) <= length and window[0] == tokenizer.bos_token_id) or not adds_start for window in found
    )
    joined = [token for window in found for token in window[adds_start:]]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) <= (not adds_start)
    example = Example(text=text.removeprefix("\ufeff"), origin=str(path), whole_file=True)
    if found:
        rows, report = encode_all([example], tokenizer, max_length=length)
        assert [row["input_ids"] for row in rows] == found
        assert report.rows == len(found)
        assert report.supervised_tokens == report.tokens - report.rows


def test_a_template_without_end_is_refused(monkeypatch):
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    example = Example(messages=messages, origin="a:1")
    loop = "{% for i in range(99999) %}"
    tokenizer.chat_template = loop * 3 + "{% endfor %}" * 3
    monkeypatch.setattr("thrifty.data.template._SECONDS", 0.2)
    mine, timer = signal.signal(signal.SIGALRM, signal.SIG_IGN), signal.getitimer(signal.ITIMER_REAL)
    try:
        with pytest.raises(ThriftyError, match="takes longer than 0 s for one row"):
            encode(example, tokenizer, max_length=50)
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_IGN  # as it was
        assert signal.getitimer(signal.ITIMER_REAL) == pytest.approx(timer, abs=5)
    finally:
        signal.signal(signal.SIGALRM, mine)
    monkeypatch.setattr("thrifty.data.template._SECONDS", 100.0)
    tokenizer.chat_template = "{{ 'a' * 20000001 }}"
    with pytest.raises(ThriftyError, match=r"20,000,001 characters of a row"):
        encode(example, tokenizer, max_length=50)
