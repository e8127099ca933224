"""Every reader of what comes from outside: whatever it is given, it reads or says in one line what is wrong."""

from __future__ import annotations

import io
import json
import string
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from fuzzing import VALUES, Outcomes, changed, damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import character_tokenizer

from thrifty.core.errors import ThriftyError
from thrifty.data import CONVERTERS, Source, encode_all, load
from thrifty.data.shapes import Example
from thrifty.run.config import load_config
from thrifty.run.metrics import read_metrics
from thrifty.run.repeat import read_summary, repeated_config
from thrifty.study.config import load_study
from thrifty.study.records import read_records

RUN: dict[str, Any] = {
    "model": "smollm2-135m",
    "data": {
        "train": [{"path": "a.jsonl", "split": "[:9]", "weight": 2.0, "columns": {"prompt": "q"}}],
        "eval": "b.csv",
    },
    "method": {"smt": {"block_size": 16, "target_modules": ["q_proj"], "score": "abs_grad"}},
    "budget": "1%",
    "objective": {"dpo": {"beta": 0.1}},
    "add_tokens": ["<a>"],
    "eval": {"loss": True, "exact_match": 3, "choices": ["a", "b"]},
    "max_length": 64,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "report_to": ["none"],
    "early_stopping_patience": 2,
    "eval_steps": 3,
    "eval_strategy": "steps",
}
METHODS = ["custom", "peft", "spafit", "lisa", "lift", "gps", "hft", "greentrainer", "composable_sft", "random_entries"]
PARTS = {"custom": {"parts": [{"select": {"blocks": {"score": "abs_grad"}}, "update": "in_place", "budget": 0.5}]}}
STUDY: dict[str, Any] = {
    "run": {"model": "smollm2-135m", "max_steps": 3},
    "tasks": {"sums": {"train": "a.jsonl", "eval": "b.jsonl", "measures": {"loss": True, "exact_match": 9}}},
    "methods": {"smt": "smt", "lora": {"method": {"peft": {"peft_type": "LORA", "r": "fit"}}, "budgets": ["1%"]}},
    "budgets": ["1%", 2000],
    "seeds": [0, 1],
    "search": {"learning_rate": {"low": 1e-4, "high": 1e-1}, "trials": 4, "budget": {"low": "0.1%", "high": "5%"}},
    "curve": {"every": 5},
    "baseline": "smt",
    "measure": "loss",
}


def text_of(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True).encode(errors="replace")


def test_run_files(tmp_path: Path) -> None:
    counts, file = Outcomes(), tmp_path / "run.yaml"

    @fuzz(150)
    @given(damaged([text_of(RUN), json.dumps(RUN).encode()]))
    def texts(data: bytes) -> None:
        file.write_bytes(data)
        counts.of(lambda: load_config(file))

    @fuzz(150)
    @given(changed({**RUN, "objective": "sft"}) | changed(RUN))
    def values(value: Any) -> None:
        counts.of(lambda: load_config(value))

    @fuzz(100)
    @given(st.sampled_from(METHODS), st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=2), changed(PARTS))
    def methods(name: str, options: Any, parts: Any) -> None:
        counts.of(lambda: load_config(RUN | {"objective": "sft", "method": {name: options}}))
        counts.of(lambda: load_config(RUN | {"objective": "sft", "method": parts}))

    texts()
    values()
    methods()
    counts.tell("run files")


OPTIONS = [
    "block_size",
    "target_modules",
    "score",
    "period",
    "layers",
    "rho",
    "refresh",
    "phase1",
    "parts",
    "peft_type",
]
OPTIONS += ["r", "budget", "select", "update", "text", "statistic"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "[" * 50 + "]" * 50, "nested more than 40 deep"),
        ("a: " + "[" * 9000, "nested too deeply"),
        (
            "\n".join(["a: &a [x]"] + [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdef", "bcdefg")]),
            "more",
        ),
        ("seed: " + "9" * 5000, "is no int that is read here"),
        ("seed: !!timestamp x", "is no timestamp that is read here"),
        ("# " + "x" * 2**20, "more than a run file can"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_what_would_take_all_memory_or_time_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ThriftyError, match=said):
        load_config(tmp_path / "run.yaml")


def test_settings() -> None:
    counts = Outcomes()
    names = st.sampled_from(
        ["data.train", "data.train.0.weight", "data.train.²", "method.smt.score", "seed", "eval.loss"]
    )
    words = names | names | names | st.text(string.ascii_lowercase + "._=-0²", max_size=12)
    values = (
        st.text(max_size=12)
        | st.sampled_from(["1", "true", "0.5", "a.jsonl", "abs_grad"])
        | st.sampled_from(["[1", "9" * 5000, "{a: 1}", "#x", "!!int x", "*a", "\udcff", "[" * 2000])
    )

    @fuzz(300)
    @given(st.lists(st.builds("{}={}".format, words, values), min_size=1, max_size=3))
    def settings(texts: list[str]) -> None:
        counts.of(lambda: load_config(RUN, texts))

    settings()
    counts.tell("key=value")


ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1=", "completion": "2", "system": None},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "tools": []},
    {"instruction": "add", "input": "1 1", "output": "2", "choices": ["1", "2"]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    {"prompt": "a", "chosen": "b", "rejected": "c", "label": True, "text": "d"},
    {
        "messages": [
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
        ]
    },
]
FLAT = [{"prompt": "1+1=", "completion": "2, 3"}, {"prompt": 'a "quoted"\nline', "completion": "x"}]


def flat(separator: str) -> bytes:
    lines = [separator.join(f'"{str(v).replace(chr(34), chr(34) * 2)}"' for v in row.values()) for row in FLAT]
    return "\n".join([separator.join(FLAT[0]), *lines]).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


FILES: dict[str, list[bytes]] = {
    "jsonl": ["\n".join(map(json.dumps, FLAT)).encode(), *(json.dumps(row).encode() for row in ROWS)],
    "json": [json.dumps(FLAT).encode(), json.dumps(ROWS[:4]).encode(), json.dumps({"rows": ROWS[:2], "n": 1}).encode()],
    "csv": [flat(",")],
    "tsv": [flat("\t")],
    "txt": [b"some text\nof two lines"],
    "parquet": [parquet(FLAT), parquet([{"messages": ROWS[1]["messages"]}])],
}


@pytest.mark.parametrize("suffix", FILES)
def test_data_files(suffix: str, tmp_path: Path) -> None:
    counts, file = Outcomes(), tmp_path / f"rows.{suffix}"

    @fuzz(150)
    @given(
        damaged(FILES[suffix]), st.sampled_from(["sft", *CONVERTERS]), st.sampled_from([None, None, "[:1]", "train"])
    )
    def files(data: bytes, objective: str, split: str | None) -> None:
        file.write_bytes(data)
        counts.of(lambda: load(Source(str(file), split=split), seed=0, convert=CONVERTERS[objective]))

    files()
    counts.tell(f".{suffix}")


def test_rows_of_any_shape(tmp_path: Path) -> None:
    """Also through the tokenizer, with and without a chat template."""
    counts, file = Outcomes(), tmp_path / "rows.jsonl"
    tokenizers = [character_tokenizer(), character_tokenizer(chat_template=None)]

    @fuzz(300)
    @given(st.one_of(*map(changed, ROWS)), st.sampled_from(sorted(CONVERTERS)), st.sampled_from(tokenizers))
    def rows(row: Any, objective: str, tokenizer: Any) -> None:
        file.write_text(json.dumps(row))

        def read() -> None:
            encode_all(load(Source(str(file)), seed=0, convert=CONVERTERS[objective]), tokenizer, max_length=30)

        counts.of(read)

    rows()
    counts.tell("rows")


def test_parquet_of_any_type(tmp_path: Path) -> None:
    counts, file = Outcomes(), tmp_path / "rows.parquet"
    ends = pyarrow.array([2**62], type=pyarrow.int64())
    odd = [ends.cast(pyarrow.timestamp("us")), ends.cast(pyarrow.duration("us")), pyarrow.array([b"\xff"])]
    odd += [pyarrow.array([b"\xff"]).cast(pyarrow.large_binary()), pyarrow.array([[1]]), pyarrow.array([None])]
    odd += [pyarrow.array([{"a": None}]), pyarrow.DictionaryArray.from_arrays([0], ["x"]), pyarrow.array([1.5])]

    @fuzz(60)
    @given(st.sampled_from(odd), st.sampled_from(["prompt", "completion", "messages", "text", ""]), st.booleans())
    def tables(column: Any, name: str, alone: bool) -> None:
        table = (
            {name: column}
            if alone
            else {"prompt": pyarrow.array(["a"]), "completion": pyarrow.array(["b"]), name: column}
        )
        pyarrow.parquet.write_table(pyarrow.table(table), file)
        counts.of(lambda: load(Source(str(file)), seed=0))

    tables()
    counts.tell("parquet types")


PIECES = ["{{ m.content }}", "{{ m['role'] }}", "{% for m in messages %}", "{% endfor %}", "{% if x %}", "{% endif %}"]
PIECES += [
    "{{ 1 / 0 }}",
    "{{ messages[9].content }}",
    "{{ messages[9] }}",
    "{{ 'a' * 99 }}",
    "{% set x = 1 %}",
    "{{ raise }}",
]
PIECES += [
    "{{ raise_exception('no') }}",
    "{{ range(10**9) }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ eos_token }}",
]
PIECES += [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ '%d' % 'x' }}",
    "{{ '{0.a}'.format(1) }}",
    "{% include 'a' %}",
]
PIECES += [
    "{{ messages | tojson }}",
    "{{ 9 ** 999 }}",
    "{{ m | nothing }}",
    "{{ m() }}",
    "{{ ''[1] }}",
    "{% macro f() %}{{ f() }}{% endmacro %}",
]
PIECES += [
    "{{ f() }}",
    "{{ strftime_now('%') }}",
    "{% raw %}",
    "{{ lipsum(9999) }}",
    "{{ cycler }}",
    "{% block a %}",
    "{{",
    "{% break %}",
]


def test_chat_templates() -> None:
    counts, tokenizer = Outcomes(), character_tokenizer()
    deep = [
        "{% for m in messages %}" * 25 + "{% endfor %}" * 25,
        "{{ " + "(" * 500 + ")" * 500 + " }}",
        "{{" + "[" * 200 + "]" * 200 + "}}",
    ]
    whole = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    sources = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=6).map("".join) | st.sampled_from(deep)
    sources |= damaged([whole.encode()]).map(lambda data: data.decode(errors="replace"))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]

    @fuzz(300)
    @given(sources, st.booleans())
    def templates(source: str, around: bool) -> None:
        tokenizer.chat_template = whole.replace("{{ m.role }}", source) if around else source
        counts.of(lambda: encode_all([Example(messages=messages, origin="a:1")], tokenizer, max_length=50))

    templates()
    counts.tell("chat templates")


def test_studies(tmp_path: Path) -> None:
    counts, file = Outcomes(), tmp_path / "study.yaml"
    grid = STUDY | {"search": {"learning_rate": [1e-3], "widen": 1, "run": {"max_steps": 2}}}

    @fuzz(150)
    @given(damaged([text_of(STUDY)]))
    def texts(data: bytes) -> None:
        file.write_bytes(data)
        counts.of(lambda: load_study(file))

    @fuzz(300)
    @given(changed(STUDY) | changed(grid))
    def values(value: Any) -> None:
        counts.of(lambda: load_study(value))

    texts()
    values()
    counts.tell("study files")


RECORD = {"run_info": {"stage": "final", "spec_sha256": "x"}, "train_info": {"status": "success"}, "meta_info": {}}
SUMMARY = {
    "config": {**RUN, "objective": "sft"},
    "versions": {"torch": "1"},
    "fingerprints": {"model": "x"},
    "files": {"data.train": {"a": "b"}},
    "machine": {"threads": 1},
}


def test_records_summaries_and_metrics(tmp_path: Path) -> None:
    counts, runs = Outcomes(), tmp_path / "runs"
    runs.mkdir()

    @fuzz(150)
    @given(damaged([json.dumps(RECORD).encode()]) | changed(RECORD).map(lambda value: json.dumps(value).encode()))
    def records(data: bytes) -> None:
        (runs / "a.json").write_bytes(data)
        counts.of(lambda: read_records(tmp_path))

    @fuzz(150)
    @given(damaged([json.dumps(SUMMARY).encode()]) | changed(SUMMARY).map(lambda value: json.dumps(value).encode()))
    def summaries(data: bytes) -> None:
        (tmp_path / "summary.json").write_bytes(data)
        counts.of(lambda: repeated_config(read_summary(tmp_path), []))

    @fuzz(100)
    @given(damaged([b'{"step": 1, "loss": 2.0}\n{"step": 2}\n']))
    def metrics(data: bytes) -> None:
        (tmp_path / "metrics.jsonl").write_bytes(data)
        counts.of(lambda: read_metrics(tmp_path / "metrics.jsonl"))

    records()
    summaries()
    metrics()
    counts.tell("records, summaries and metrics")
