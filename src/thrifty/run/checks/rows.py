"""The data: what is read, how long it is, how much of it is trained, and what is there twice."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from thrifty.core.errors import ThriftyError
from thrifty.data import (
    CONVERTERS,
    Encoded,
    Example,
    Judged,
    Source,
    encoded_rows,
    examples_in,
    nothing_trained,
    one_form,
    report_of,
    shape_of,
)

from ..config import RunConfig
from ..evaluate import first_of
from ..evaluation.answers import questions
from ..evaluation.choices import option_lists
from ..objectives import parse_objective
from ..rows import answered, check_answers, comparable
from .report import Report
from .samples import sample

__all__ = ["Data", "check_rows"]

_LISTED = 5  # broken rows named one by one
_CUT_SHARE = 0.2  # above it, cutting is no longer a few odd rows
_SAMPLES = 3
_LONGEST = 3

Found = list[tuple[Example, Encoded]]


@dataclass
class Data:
    """The rows that can be encoded, each once, whatever a source's weight."""

    train: Found = field(default_factory=list)
    eval: Found = field(default_factory=list)
    rejected: Found = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)  # of the evaluation

    def every(self) -> Found:
        return [*self.train, *self.rejected, *self.eval]


def check_rows(
    report: Report, config: RunConfig, tokenizer: PreTrainedTokenizerBase | None, *, console_marks: bool
) -> Data:
    """Read and encode `data.train` and `data.eval`, and look at both; without a tokenizer they are only read.
    `console_marks`: samples are coloured."""
    data = Data()
    read = _read(report, config, config.data.train)
    data.judged = [example for example in read if isinstance(example, Judged)]
    good = answered(read)
    with report.attempt():
        if data.judged:
            one_form(data.judged)
            check_answers(config, good, data.judged)
    data.train = _encoded(report, good, tokenizer, max_length=config.max_length)
    bad = [example.rejected for example in data.judged if example.rejected is not None]
    data.rejected = _encoded(report, bad, tokenizer, max_length=config.max_length)
    if data.train:
        _describe(report, config, data.train, name="data.train")
    if config.data.eval:
        read = _read(report, config, config.data.eval)
        with report.attempt():
            data.examples = comparable(read) if read else []
        data.eval = _encoded(report, data.examples, tokenizer, max_length=config.max_length)
        if data.eval:
            _describe(report, config, data.eval, name="data.eval")
    if tokenizer is not None and data.eval:
        with report.attempt():
            _check_measures(config, data.examples, tokenizer)
    _check_doubles(report, good, data.examples)
    if tokenizer is not None and data.train:
        report.say("longest rows: " + ", ".join(_longest(data.train)))
        how = "what is trained is green" if console_marks else "what is trained stands in [[ ]]"
        report.say(f"{min(_SAMPLES, len(data.train))} rows as the model sees them; {how}:")
        for example, row in data.train[:: max(1, -(-len(data.train) // _SAMPLES))][:_SAMPLES]:
            report.say(Text(f"- {example.origin}  "))
            report.say(sample(row, tokenizer, coloured=console_marks))
    return data


def _read(report: Report, config: RunConfig, sources: Sequence[Source]) -> list[Example]:
    convert = CONVERTERS[parse_objective(config.objective).name]
    every: list[Example] = []
    for source in sources:
        with report.attempt():
            examples, errors = examples_in(source, convert=convert)
            for error in errors[:_LISTED]:
                report.problem(str(error))
            if len(errors) > _LISTED:
                report.problem(
                    f"{source.path}: {len(errors)} of {len(errors) + len(examples)} rows are broken; the first "
                    f"{_LISTED} are named here: mend them all, or leave them out"
                )
            part = "" if source.split is None else f" {source.split}"
            weight = "" if source.weight == 1 else f", weight {source.weight:g}"
            shapes = Counter(_shape(example, source) for example in examples).most_common()
            kinds = "; ".join(f"{count:,} {shape}" if len(shapes) > 1 else shape for shape, count in shapes)
            report.say(f"{source.path}{part}: {len(examples):,} rows{weight}: {kinds}")
            every += examples
    return every


def _shape(example: Example, source: Source) -> str:
    if example.whole_file:
        return "one text, cut into windows"
    if isinstance(example, Judged):
        return " + ".join(example.columns)
    return shape_of(example.row, columns=source.columns)


def _encoded(
    report: Report, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase | None, *, max_length: int
) -> Found:
    """All rows; those that the template or the tokenizer refuses are problems."""
    if tokenizer is None:
        return []
    try:
        return list(encoded_rows(examples, tokenizer, max_length=max_length))
    except ThriftyError:
        pass
    found: Found = []
    errors = []
    for example in examples:  # one by one, to tell which
        try:
            found += encoded_rows([example], tokenizer, max_length=max_length)
        except ThriftyError as error:
            errors.append(str(error))
    for text in errors[:_LISTED]:
        report.problem(text)
    if len(errors) > _LISTED:
        report.problem(
            f"{len(errors)} of {len(examples)} rows cannot be written as tokens; the first {_LISTED} are named"
        )
    return found


def _describe(report: Report, config: RunConfig, found: Found, *, name: str) -> None:
    rows = [row for _, row in found]
    summed, lengths = report_of(rows), [row.tokens for row in rows]
    cut, empty = summed.truncated_rows, summed.rows_without_labels
    report.say(
        f"{name}: {summed.tokens:,} tokens, {summed.supervised_tokens / max(1, summed.tokens):.0%} of them trained; "
        f"rows of {min(lengths)} to {max(lengths)} tokens, half of them up to {statistics.median_high(lengths)}; "
        + (f"{cut:,} ({cut / len(rows):.0%}) longer than max_length {config.max_length}" if cut else "none is cut")
    )
    if text := nothing_trained(rows, max_length=config.max_length):
        report.problem(f"{name}: {text}")
        return
    if cut > _CUT_SHARE * len(rows):
        whole = sorted(lengths)[int(0.99 * (len(lengths) - 1))]
        report.warn(
            f"{name}: {cut:,} of {len(rows):,} rows ({cut / len(rows):.0%}) are cut at max_length {config.max_length}: "
            f"max_length={whole} would keep 99 % of them whole"
        )
    if empty:
        origin = next(example.origin for example, row in found if not row.trained)
        report.warn(
            f"{name}: of {empty:,} rows nothing is trained, first {origin}: the cut at max_length {config.max_length} "
            "leaves no answer; raise it, or leave them out"
        )


def _check_measures(config: RunConfig, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """What `eval` asks of the rows."""
    if config.eval.exact_match:
        questions(first_of(examples, config.eval.exact_match, "exact_match"), tokenizer)
    if config.eval.choice:
        picked = first_of(examples, config.eval.choice, "choice")
        option_lists(picked, given=config.eval.choices, among=examples)


def _content(example: Example) -> str:
    """What the row says, white space at the ends of lines and between words aside."""
    if isinstance(example, Judged):
        said: Any = dict(example.columns)
    else:
        said = [example.messages, example.prompt, example.completion, example.text, example.tools]
    return " ".join(json.dumps(said, sort_keys=True, ensure_ascii=False, default=str).replace("\\n", " ").split())


def _check_doubles(report: Report, train: Sequence[Example], held_out: Sequence[Example]) -> None:
    first: dict[str, str] = {}
    doubles, shared = [], []
    for example in train:
        content = _content(example)
        if content in first:
            doubles.append((example.origin, first[content]))
        first.setdefault(content, example.origin)
    for example in held_out:
        if (origin := first.get(_content(example))) is not None:
            shared.append((example.origin, origin))
    if doubles:
        report.warn(
            f"data.train: {len(doubles):,} of {len(train):,} rows repeat another one, first {doubles[0][0]} "
            f"(= {doubles[0][1]}): leave them out, unless they are to count more"
        )
    if shared:
        report.warn(
            f"data.eval: {len(shared):,} of {len(held_out):,} rows are in data.train too, first {shared[0][0]} "
            f"(= {shared[0][1]}): the evaluation will look better than it is; leave them out of one of both"
        )


def _longest(found: Found) -> list[str]:
    rows = sorted(found, key=lambda pair: -pair[1].tokens)[:_LONGEST]
    return [f"{example.origin} ({row.tokens:,} tokens)" for example, row in rows]
