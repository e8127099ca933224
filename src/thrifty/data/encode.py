"""Examples to token ids and labels: loss on the answers only, each with the token that ends its turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from thrifty.core.errors import ThriftyError
from thrifty.data.shapes import Example, answer, with_answer
from thrifty.data.template import Renderer
from thrifty.data.tokens import Answers, tokenize, write
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
    "encoded_rows",
    "nothing_trained",
    "prompt_and_reference",
    "report_of",
    "stop_ids",
]

IGNORED = -100
_SOME_ANSWER = "Some answer"
_CHUNK = 512  # rows that are given to the tokenizer at once


@dataclass(frozen=True)
class Encoded:
    """One row: ids, and labels of the same length: the id where it is trained, else -100. labels[0] is always -100.

    tokens: how many there were before the cut; prompt: how many of them stand before the first answer.
    """

    input_ids: list[int]
    labels: list[int]
    tokens: int
    prompt: int = 0

    @property
    def truncated(self) -> bool:
        return self.tokens > len(self.input_ids)

    @property
    def trained(self) -> int:
        """How many labels are set."""
        return sum(label != IGNORED for label in self.labels)


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
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    origins: list[str] | None = None,
) -> tuple[list[dict[str, list[int]]], DataReport]:
    """All rows in their order, as {"input_ids", "labels"}, and the report. Text files become windows of `max_length`.

    `origins`: a list that gets each row's "file:line".

    Raises `ThriftyError` where no token of any row would be trained.
    """
    pairs = list(encoded_rows(examples, tokenizer, max_length=max_length))
    rows = [row for _, row in pairs]
    if origins is not None:
        origins += [example.origin for example, _ in pairs]
    report = report_of(rows)
    if text := nothing_trained(rows, max_length=max_length):
        raise ThriftyError(f"{f'{examples[0].origin}: ' if examples else ''}{text}")
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows], report


def encoded_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Iterator[tuple[Example, Encoded]]:
    """Each example with its row; a text file with each of its windows of `max_length`."""
    renderer = Renderer(tokenizer)
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        answers = iter(_answers_of([e for e in chunk if not e.whole_file], renderer))
        for example in chunk:
            if not example.whole_file:
                yield example, _labelled(next(answers), max_length)
                continue
            for ids in cut(example.text or "", renderer, length=max_length):
                yield example, Encoded(ids, [IGNORED, *ids[1:]], tokens=len(ids))


def report_of(rows: Sequence[Encoded]) -> DataReport:
    """What encoding gave, added up."""
    trained = [row.trained for row in rows]
    return DataReport(
        rows=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        supervised_tokens=sum(trained),
        truncated_rows=sum(row.truncated for row in rows),
        rows_without_labels=sum(count == 0 for count in trained),
    )


def nothing_trained(rows: Sequence[Encoded], *, max_length: int) -> str | None:
    """The sentence for rows of which no token would be trained, with the fix; None where some is."""
    if any(row.trained for row in rows):
        return None
    longest = max((row.prompt for row in rows), default=0)
    cuts = any(row.truncated for row in rows)
    fix = f"max_length={max_length} cuts every answer off (the longest prompt has {longest} tokens); raise it"
    fix = fix if cuts else "no row has an answer to train"
    return f"all labels of all {len(rows)} rows are masked, nothing would be trained: {fix}"


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
    renderer = Renderer(tokenizer)
    answers = _answers(example, renderer)
    start, stop = answers.spans[-1]
    if example.messages is not None and renderer.has_marks(example.tools):
        # Marks may take in what the generation prompt holds (the role's name); generation begins behind that.
        last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
        head = renderer.render(example.messages[:last], example.tools, prompt=True) if last else ""
        ids = tokenizer(head, add_special_tokens=False, verbose=False).input_ids
        start = len(ids) if start < len(ids) < stop and answers.ids[: len(ids)] == ids else start
    return answers.ids[:start], tokenizer.decode(answers.ids[start:stop], skip_special_tokens=True).strip()


def chat_prompt(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """The ids after which the model answers `messages`, as training wrote them (the plain form without a template).

    For most templates this is the generation prompt; where the template writes another prompt than history (an opened
    thought), it is what training had before its answers.
    """
    answered = [*messages, {"role": "assistant", "content": _SOME_ANSWER}]
    return prompt_and_reference(Example(messages=answered, tools=tools, origin="conversation"), tokenizer)[0]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the end-of-text token, and the control token by which the template ends a turn."""
    renderer = Renderer(tokenizer)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _SOME_ANSWER}]
    answers = _answers(Example(messages=messages, origin="conversation"), renderer)
    start, stop = answers.spans[-1]
    last = [token for token in answers.ids[start:stop] if token in renderer.special_ids][-1:]
    first = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return list(dict.fromkeys(first + last))


def check_vocabulary(rows: Sequence[dict[str, list[int]]], vocab_size: int) -> None:
    """Raise `ThriftyError` if some id is not below `vocab_size`, the number of rows of the model's embedding."""
    for number, row in enumerate(rows):
        if row["input_ids"] and (max(row["input_ids"]) >= vocab_size or min(row["input_ids"]) < 0):
            bad = next(i for i in row["input_ids"] if not 0 <= i < vocab_size)
            raise ThriftyError(
                f"row {number}: token id {bad} is outside the vocabulary of {vocab_size} entries that the model has: "
                "the tokenizer belongs to another model; set `tokenizer` to the model's own, or resize its embedding"
            )


def _answers(example: Example, renderer: Renderer) -> Answers:
    return _answers_of([example], renderer)[0]


def _answers_of(examples: Sequence[Example], renderer: Renderer) -> list[Answers]:
    """Ids and answer spans of each example. Errors name its origin."""
    texts = []
    for example in examples:
        try:
            texts.append(write(example, renderer))
        except ThriftyError as error:
            raise ThriftyError(f"{example.origin}: {error}") from error
    found = tokenize(texts, renderer)
    for example, written, answers in zip(examples, texts, found, strict=True):
        # Some templates write content only in a form that the row does not have (a list of parts), and say nothing.
        ending = (answer(example) or example.text or "").strip().split("\n")[-1].strip()
        if not answers.spans or ending not in written.text[written.spans[-1].start :]:
            raise ThriftyError(f"{example.origin}: the chat template does not write the text of the row's answer")
    return found


def _labelled(answers: Answers, max_length: int) -> Encoded:
    if max_length < 2:
        raise ThriftyError(f"max_length is {max_length}; it must be at least 2, a token and the one that it predicts")
    ids = answers.ids[:max_length]
    labels = [IGNORED] * len(ids)
    for start, stop in answers.spans:
        labels[start:stop] = ids[start:stop]
    if labels:
        labels[0] = IGNORED  # nothing predicts the first token, so that every label that is set is one term of the loss
    return Encoded(ids, labels, tokens=len(answers.ids), prompt=answers.spans[0][0] if answers.spans else 0)
