"""Examples to token ids and labels: loss on the answers only, each with the token that ends its turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from thrifty.core.errors import ThriftyError
from thrifty.data.shapes import Example, with_answer
from thrifty.data.template import Renderer
from thrifty.data.tokens import Answers, marked, plain, tokenize, written
from thrifty.data.windows import cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "DataReport",
    "Encoded",
    "chat_prompt",
    "check_vocabulary",
    "encode",
    "encode_all",
    "encode_options",
    "prompt_and_reference",
    "stop_ids",
]

IGNORED = -100
_CHUNK = 512  # rows that are given to the tokenizer at once


@dataclass(frozen=True)
class Encoded:
    """One row: ids, and labels of the same length: the id where it is trained, else -100. labels[0] is always -100."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


@dataclass(frozen=True)
class DataReport:
    """What encoding did: rows (windows of a text file are rows), their tokens after truncation, those with a loss,
    rows cut at `max_length`, and rows of which the cut left no answer (they stay, and train nothing)."""

    rows: int
    tokens: int
    supervised_tokens: int
    truncated_rows: int
    rows_without_labels: int


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Encoded:
    """The row as at most `max_length` tokens, cut at the end.

    Trained are: of messages, every answer (of prompt/completion only the completion's) with its end-of-turn token; of a
    plain prompt/completion, the completion and the end-of-text token; of a text, all of it and the end-of-text token.
    """
    return _labelled(_answers(example, Renderer(tokenizer)), max_length)


def encode_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[list[dict[str, list[int]]], DataReport]:
    """All rows in their order, as {"input_ids", "labels"}, and the report. Text files become windows of `max_length`.

    Raises `ThriftyError` where no token of any row would be trained.
    """
    renderer = Renderer(tokenizer)
    rows: list[Encoded] = []
    longest_prompt = 0
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        files = {id(e): cut(e.text or "", renderer, length=max_length) for e in chunk if e.whole_file}
        answers = iter(_answers_of([e for e in chunk if not e.whole_file], renderer))
        for example in chunk:
            if example.whole_file:
                rows += [Encoded(ids, [IGNORED, *ids[1:]], truncated=False) for ids in files[id(example)]]
                continue
            found = next(answers)
            longest_prompt = max(longest_prompt, found.spans[0][0] if found.spans else 0)
            rows.append(_labelled(found, max_length))
    trained = [sum(label != IGNORED for label in row.labels) for row in rows]
    report = DataReport(
        rows=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        supervised_tokens=sum(trained),
        truncated_rows=sum(row.truncated for row in rows),
        rows_without_labels=sum(count == 0 for count in trained),
    )
    if report.supervised_tokens == 0:
        fix = (
            f"max_length={max_length} cuts every answer off (the longest prompt has {longest_prompt} tokens); raise it"
            if report.truncated_rows
            else "no row has an answer to train"
        )
        where = f"{examples[0].origin}: " if examples else ""
        raise ThriftyError(f"{where}all labels of all {report.rows} rows are masked, nothing would be trained: {fix}")
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows], report


def encode_options(
    example: Example, options: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[Encoded]:
    """The row once per option, with the option as its last answer and only that answer labelled (its end included)."""
    found = _answers_of([with_answer(example, option) for option in options], Renderer(tokenizer))
    return [_labelled(replace(answers, spans=answers.spans[-1:]), max_length) for answers in found]


def prompt_and_reference(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """The ids before the row's last answer, exactly as in training, and that answer as decoding gives it, stripped."""
    if example.messages is None and example.completion is None:
        raise ThriftyError(
            f"{example.origin}: a plain text row has no answer to generate; leave out exact_match and choice"
        )
    answers = _answers(example, Renderer(tokenizer))
    start, stop = answers.spans[-1]
    reference = tokenizer.decode(answers.ids[start:stop], skip_special_tokens=True)
    return answers.ids[:start], reference.strip()


def chat_prompt(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """The ids after which the model answers `messages`, as training wrote them (the plain form without a template)."""
    renderer = Renderer(tokenizer)
    text = renderer.render(list(messages), tools, prompt=True)
    prefix = [] if renderer.has_template else renderer.prefix
    return prefix + list(tokenizer(text, add_special_tokens=False).input_ids)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the end-of-text token, and what the chat template writes behind an answer."""
    ids = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    renderer = Renderer(tokenizer)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    answers = _answers(Example(messages=messages, origin="stop_ids"), renderer)
    last = answers.ids[answers.spans[-1][1] - 1]
    return ids + [last] * (last in renderer.special_ids and last not in ids)


def check_vocabulary(rows: Sequence[dict[str, list[int]]], vocab_size: int) -> None:
    """Raise `ThriftyError` if some id is not below `vocab_size`, the number of rows of the model's embedding."""
    for number, row in enumerate(rows):
        if row["input_ids"] and (max(row["input_ids"]) >= vocab_size or min(row["input_ids"]) < 0):
            bad = next(i for i in row["input_ids"] if not 0 <= i < vocab_size)
            raise ThriftyError(
                f"row {number}: token id {bad} is outside the vocabulary of {vocab_size} entries that the model has: "
                "the tokenizer belongs to another model; set `tokenizer` to the model's own, or resize the model's embedding"
            )


def _answers(example: Example, renderer: Renderer) -> Answers:
    return _answers_of([example], renderer)[0]


def _answers_of(examples: Sequence[Example], renderer: Renderer) -> list[Answers]:
    """Ids and answer spans of each example; texts without {% generation %} marks go to the tokenizer together."""
    found: list[Answers | None] = [None] * len(examples)
    texts = []
    for i, example in enumerate(examples):
        try:
            if example.messages is None:
                texts.append((i, plain(example, renderer)))
                continue
            renderer.check(example.messages, example.tools)
            found[i] = marked(example, renderer)
            if found[i] is None:
                texts.append((i, written(example, renderer)))
        except ThriftyError as error:
            raise ThriftyError(f"{example.origin}: {error}") from error
    for (i, _), tokens in zip(texts, tokenize([text for _, text in texts], renderer), strict=True):
        found[i] = tokens
    complete = [answers for answers in found if answers is not None]
    for example, answers in zip(examples, complete, strict=True):
        if not answers.spans or any(start >= stop for start, stop in answers.spans):
            raise ThriftyError(f"{example.origin}: the chat template writes nothing for an answer of this row")
    return complete


def _labelled(answers: Answers, max_length: int) -> Encoded:
    if max_length < 2:
        raise ThriftyError(f"max_length is {max_length}; it must be at least 2, a token and the one that it predicts")
    ids = answers.ids[:max_length]
    labels = [IGNORED] * len(ids)
    for start, stop in answers.spans:
        labels[start:stop] = ids[start:stop]
    if labels:
        labels[0] = IGNORED  # nothing predicts the first token, so that every label that is set is one term of the loss
    return Encoded(ids, labels, truncated=len(answers.ids) > max_length)
