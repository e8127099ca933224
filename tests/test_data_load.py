"""Files to examples: every kind of file, every shape, and one clear sentence for every broken row."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from thrifty.core.errors import ThriftyError
from thrifty.data import Example, Source, answer, load, with_answer

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SHAPES = {
    "messages": {"messages": [USER, ASSISTANT]},
    "conversations": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    "prompt_messages": {"prompt": [USER], "completion": [ASSISTANT]},
    "mixed_prompt": {"prompt": [USER], "completion": "hello"},
    "instruction": {"instruction": "hi", "input": "", "output": "hello"},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ASSISTANT]},
    "json_text": {"messages": json.dumps([USER, ASSISTANT])},
}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def one(tmp_path, row, **fields) -> Example:
    (example,) = load(Source(write(tmp_path / "rows.jsonl", [row]), **fields), seed=0)
    return example


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_conversations(tmp_path, shape):
    example = one(tmp_path, SHAPES[shape] | {"an extra column": 3})
    assert example.messages == [USER, ASSISTANT]
    assert example.answers_from == ("prompt" in shape)
    assert example.origin == f"{tmp_path / 'rows.jsonl'}:1"
    assert answer(example) == "hello"
    assert answer(with_answer(example, "no")) == "no"


def test_other_shapes(tmp_path):
    pair = one(tmp_path, {"prompt": "Q:", "completion": " A", "choices": ["A", "B"]})
    assert (pair.prompt, pair.completion, pair.messages, pair.choices) == ("Q:", " A", None, ["A", "B"])
    assert with_answer(pair, "B").completion == " B"
    assert one(tmp_path, {"text": "a document"}).text == "a document"
    full = one(tmp_path, {"instruction": "add", "input": "1 2", "output": "3", "system": "Be brief"})
    assert full.messages[0] == {"role": "system", "content": "Be brief"}
    assert full.messages[1]["content"] == "add\n\n1 2"
    arc = one(tmp_path, {"prompt": "Q", "completion": "x", "choices": {"text": ["x", "y"], "label": ["A", "B"]}})
    assert arc.choices == ["x", "y"]


def test_tool_calls_and_tools(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": json.dumps(tools)}
    example = one(tmp_path, row)
    assert example.messages[1]["content"] == ""
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert example.tools == tools
    assert answer(example) is None


def test_columns_rename(tmp_path):
    row = {"question": "Q", "answer": "A", "text": "not meant"}
    example = one(tmp_path, row, columns={"prompt": "question", "completion": "answer"})
    assert (example.prompt, example.completion, example.text) == ("Q", "A", None)
    swapped = one(
        tmp_path,
        {"instruction": "i", "input": "the answer", "output": "extra"},
        columns={"output": "input", "input": "output"},
    )
    assert (swapped.messages[0]["content"], answer(swapped)) == ("i\n\nextra", "the answer")
    with pytest.raises(ThriftyError, match=r"rows.jsonl:1: no column 'qestion'.*did you mean 'question'"):
        one(tmp_path, row, columns={"prompt": "qestion"})
    with pytest.raises(ThriftyError, match=r"unknown field 'promt'; did you mean 'prompt'"):
        Source("x.jsonl", columns={"promt": "question"})


ANSWER = {"completion": "A"}
BROKEN = {
    "no answer": ({"prompt": "Q"}, r"a row without an answer: no field 'completion'; accepted: messages \| prompt"),
    "null": ({"prompt": "Q", "completion": None}, "field 'completion' is null; accepted"),
    "empty": ({"prompt": "Q", "completion": " "}, "field 'completion' is empty"),
    "number": ({"prompt": 3, **ANSWER}, "field 'prompt' is a number, not a list"),
    "output object": ({"instruction": "i", "output": {}}, "field 'output' is an object, not text"),
    "input": ({"instruction": "i", "input": 3, "output": "o"}, "field 'input' is a number, not text"),
    "no shape": ({"question": "Q"}, "the row has question; accepted"),
    "nothing": ({}, "the row has nothing; accepted"),
    "list": ([1], "the row is a list, not an object"),
    "no assistant": ({"messages": [USER]}, "without an answer: no assistant message in 'messages'"),
    "no messages": ({"messages": []}, "field 'messages' is an empty list"),
    "text messages": ({"messages": "hi"}, "field 'messages' is text that is not JSON"),
    "no message": ({"messages": ["hi"]}, r"field 'messages\[0\]' is a text, not a"),
    "role": ({"messages": [{**USER, "role": "asistant"}]}, r"field 'messages\[0\].role': unknown role.*'assistant'"),
    "no role": ({"messages": [{"content": "x"}]}, r"'messages\[0\].role': 'role' is null"),
    "content": ({"messages": [{**USER, "content": 3}, ASSISTANT]}, r"field 'messages\[0\].content' is a number"),
    "null value": (
        {"conversations": [{"from": "human", "value": None}]},
        r"field 'conversations\[0\].value' is null",
    ),
    "image": ({"messages": [{**USER, "content": [{"type": "image"}]}, ASSISTANT]}, "content' is a list, not text"),
    "empty answer": (
        {"messages": [USER, {**ASSISTANT, "content": ""}]},
        r"answer: field 'messages\[1\].content' is empty",
    ),
    "half character": ({"prompt": "\ud83d", **ANSWER}, "field 'prompt' holds half a character"),
    "tools": ({"messages": [USER, ASSISTANT], "tools": [3]}, "field 'tools' is not a list of JSON schemas"),
    "tools of text": ({"prompt": "Q", **ANSWER, "tools": [{}]}, "need messages"),
    "choices": ({"prompt": "Q", **ANSWER, "choices": ["A"]}, "field 'choices' is not a list of at least two texts"),
    "two systems": (
        {"messages": [{**USER, "role": "system"}, USER, ASSISTANT], "system": "x"},
        "both a field 'system'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_name_file_line_and_field(tmp_path, case):
    row, sentence = BROKEN[case]
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Q", **ANSWER}, row])
    with pytest.raises(ThriftyError, match=rf"rows\.jsonl:2: .*{sentence}") as caught:
        load(Source(path), seed=0)
    assert "\n" not in str(caught.value)


def test_number_of_broken_rows_is_told(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Q"}, {"prompt": "Q", **ANSWER}, {}])
    with pytest.raises(ThriftyError, match=r":1: .*\(2 of 3 rows are broken"):
        load(Source(path), seed=0)


FILES = {
    "empty.jsonl": (b"", r"empty.jsonl: no rows; the file is empty"),
    "blank.jsonl": (b"\n \n", r"blank.jsonl: no rows"),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": }\n', r"bad.jsonl:3: invalid JSON at column 10"),
    "whole.jsonl": (b'[\n{"text": "a"}\n]', r"whole.jsonl:1: invalid JSON.*name it .json"),
    "latin.jsonl": ('{"text": "a"}\n{"text": "é"}'.encode("latin1"), r"latin.jsonl:2: not UTF-8 \(byte 0xe9\)"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), r"utf16.jsonl: this is UTF-16"),
    "bad.json": (b'[{"text": "a"},\n{"text" "b"}]', r"bad.json:2: invalid JSON at column 9"),
    "number.json": (b"3", r"number.json: holds a JSON int"),
    "empty.json": (b"[]", r"empty.json: no rows"),
    "rows.csv": (b"prompt,completion\na,b\nc\n", r"rows.csv:3: 1 values for 2 columns"),
    "open.csv": (b'prompt,completion\na,"b\n', r"open.csv:2: .*is a quote left open"),
    "doubled.csv": (b"text,text\na,b\n", r"doubled.csv:1: the header has an empty or doubled"),
    "head.csv": (b"text\n", r"head.csv: no rows"),
    "not.parquet": (b"PAR1 but no parquet", r"not.parquet: not a readable parquet file"),
    "empty.txt": (b" \n", r"empty.txt: no rows"),
    "rows.xlsx": (b"x", r"unknown kind of file '.xlsx'; known: .jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_broken_files(tmp_path, name):
    content, sentence = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ThriftyError, match=sentence) as caught:
        load(Source(str(tmp_path / name)), seed=0)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path, monkeypatch):
    write(tmp_path / "requests.jsonl", [{"text": "a"}])
    with pytest.raises(ThriftyError, match=r"request.jsonl: no such file; did you mean .*requests.jsonl\?"):
        load(Source(str(tmp_path / "request.jsonl")), seed=0)
    with pytest.raises(ThriftyError, match=r"the folder .*nowhere does not exist"):
        load(Source(str(tmp_path / "nowhere" / "a.jsonl")), seed=0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ThriftyError, match=r"as a hub id it cannot be loaded.*did you mean the file requests.jsonl\?"):
        load(Source("requests"), seed=0)
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ThriftyError, match="the environment variable NOT_SET is not set"):
        load(Source("$NOT_SET/a.jsonl"), seed=0)
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    assert len(load(Source("$SOME_DATA/requests.jsonl"), seed=0)) == 1
    with pytest.raises(ThriftyError, match="no data"):
        load([], seed=0)


def test_byte_order_mark_blank_lines_and_odd_separators(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n\r\n{"text": "c"}'.encode())
    first, second = load(Source(str(path)), seed=0)
    assert (first.text, second.text, second.origin) == ("a\u2028b", "c", f"{path}:3")


def test_other_kinds_of_files(tmp_path):
    rows = [{"prompt": "Q1", "completion": "A\n1"}, {"prompt": "Q2", "completion": "A2"}]
    wanted = [("Q1", "A\n1"), ("Q2", "A2")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": rows}))
    write(tmp_path / "c.json", rows)
    write(tmp_path / "d.ndjson", rows)
    (tmp_path / "e.csv").write_bytes(b'\xef\xbb\xbfprompt,completion\r\nQ1,"A\n1"\r\n\r\nQ2,A2\r\n')
    (tmp_path / "f.tsv").write_bytes(b'prompt\tcompletion\nQ1\t"A\n1"\nQ2\tA2\n')
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "g.parquet")
    for path in sorted(tmp_path.iterdir()):
        found = load(Source(str(path)), seed=0)
        assert [(e.prompt, e.completion) for e in found] == [tuple(map(str, pair)) for pair in wanted], path
    assert load(Source(str(tmp_path / "e.csv")), seed=0)[1].origin.endswith("e.csv:5")
    assert load(Source(str(tmp_path / "g.parquet")), seed=0)[1].origin.endswith("g.parquet: row 2")


def test_parquet_structs_lose_the_nulls_that_arrow_adds(tmp_path):
    import pyarrow
    import pyarrow.parquet

    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    rows = [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [USER, ASSISTANT]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = load(Source(str(tmp_path / "a.parquet")), seed=0)
    assert first.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert second.messages == [USER, ASSISTANT]


def test_folder_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    assert [e.text for e in load(Source(str(folder), split="train[1:]"), seed=0)] == ["b"]
    with pytest.raises(ThriftyError, match=r"this folder cannot be loaded \(.*valid"):
        load(Source(str(folder), split="valid"), seed=0)


def texts(sources, seed=0) -> list[str]:
    return [example.text for example in load(sources, seed=seed)]


def test_weights_and_order(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(10)])
    other = write(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(4)])
    assert texts(Source(path)) == [f"a{i}" for i in range(10)]
    assert Counter(texts(Source(path, weight=2))) == {f"a{i}": 2 for i in range(10)}
    part = texts(Source(path, weight=0.3))
    assert len(set(part)) == len(part) == 3
    assert part == sorted(part) == texts(Source(path, weight=0.3))
    assert len({tuple(texts(Source(path, weight=0.3), seed=seed)) for seed in range(8)}) > 1
    more = Counter(texts(Source(path, weight=2.5)))
    assert sorted(more.values()) == [2] * 5 + [3] * 5
    assert len(texts(Source(path, weight=0.001))) == 1
    mixed = texts([Source(path), Source(other, weight=0.5)])
    assert mixed == texts([Source(path), Source(other, weight=0.5)])
    assert mixed != sorted(mixed)
    assert len([text for text in mixed if text.startswith("b")]) == 2
    assert mixed != texts([Source(path), Source(other, weight=0.5)], seed=1)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ThriftyError, match="must be a number above 0"):
            Source(path, weight=weight)


def test_slices_of_files(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(10)])
    assert texts(Source(path, split="[:90%]")) + texts(Source(path, split="train[90%:]")) == [str(i) for i in range(10)]
    assert texts(Source(path, split="[-2:]")) == ["8", "9"]
    with pytest.raises(ThriftyError, match=r"split 'valid' names a part of a hub data set"):
        load(Source(path, split="valid"), seed=0)
    with pytest.raises(ThriftyError, match=r"leaves none of its 10 rows"):
        load(Source(path, split="[10:]"), seed=0)


def test_plain_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone two three four five six\n".encode())
    (example,) = load(Source(str(path)), seed=0)
    assert example.whole_file
    assert example.text == "one two three four five six\n"
    whole, part = load(Source(str(path), weight=1.5), seed=3)
    assert part.text in whole.text
    assert len(part.text) == len(whole.text) // 2
    with pytest.raises(ThriftyError, match="a plain text has no columns"):
        load(Source(str(path), columns={"text": "x"}), seed=0)
    with pytest.raises(ThriftyError, match="only a slice"):
        load(Source(str(path), split="[:3]"), seed=0)
