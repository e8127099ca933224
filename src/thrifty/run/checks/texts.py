"""The tokenizer and its template: does what is written come back, and do the labels hold the answer and its end?"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from thrifty.data import Example, answer
from thrifty.data.template import Renderer
from thrifty.data.tokens import Answers, Written, ends_turn, tokenize, write

from .report import Report

__all__ = ["check_texts", "describe_tokenizer"]

_SAMPLED = 200  # rows, evenly over the data


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Its size, and how it writes conversations."""
    template = "its own chat template" if tokenizer.chat_template else "no chat template: the plain form, User: ... "
    template += "" if tokenizer.chat_template else "Assistant: ..."
    return f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens, {template}"


def check_texts(report: Report, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write, encode and decode up to 200 of the rows, which `encode` accepts. Tokenizers may rewrite white space."""
    rows = [example for example in examples if not example.whole_file]
    rows = rows[:: -(-len(rows) // _SAMPLED)] if rows else []
    renderer = Renderer(tokenizer)
    texts = [write(example, renderer) for example in rows]
    unknown, changed, lost, endless = [], [], [], []
    for example, written, answers in zip(rows, texts, tokenize(texts, renderer), strict=True):
        ids = _without_prefix(written, answers, renderer)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            unknown.append((example, _unknown_part(written.text, tokenizer)))
        elif (difference := _difference(written.text, tokenizer.decode(ids))) is not None:
            changed.append((example, difference))
        elif not _holds_answer(example, answers, tokenizer):
            lost.append(example)
        if not all(ends_turn(answers.ids[start:stop], renderer) for start, stop in answers.spans):
            endless.append(example)
    sampled = f"of {len(rows)} rows looked at"
    if unknown:
        report.warn(
            f"{unknown[0][0].origin}: the tokenizer does not know {unknown[0][1]}, and writes "
            f"{tokenizer.unk_token} for it ({len(unknown)} {sampled}): add it with add_tokens, or change the text"
        )
    if changed:
        report.warn(
            f"{changed[0][0].origin}: the tokenizer does not give the text back: {changed[0][1]} "
            f"({len(changed)} {sampled}); if that matters, take the tokenizer that belongs to the model"
        )
    if lost:
        report.problem(
            f"{lost[0].origin}: the labels do not hold the row's answer ({len(lost)} {sampled}): the chat template "
            "writes it elsewhere; mark it in the template with {% generation %} ... {% endgeneration %}"
        )
    if endless:
        report.warn(
            f"{endless[0].origin}: an answer ends without a token that ends its turn ({len(endless)} {sampled}), so "
            "the model does not learn to stop there: let the template write one behind each answer"
        )
    if rows and not (unknown or changed or lost or endless):
        report.say(f"{len(rows)} rows written, encoded and decoded: text, answers and their ends come back")


def _without_prefix(written: Written, answers: Answers, renderer: Renderer) -> list[int]:
    return answers.ids[len(renderer.prefix) :] if written.automatic else answers.ids


def _bare(text: str) -> str:
    return "".join(text.split())


def _difference(text: str, decoded: str) -> str | None:
    """Where `decoded` leaves `text`, white space aside; what encoding put behind it (an end of text) may stay."""
    wanted, found = _bare(text), _bare(decoded)
    if found.startswith(wanted):
        return None
    at = next((k for k, (a, b) in enumerate(zip(wanted, found)) if a != b), min(len(wanted), len(found)))
    return f"{wanted[at : at + 20]!r} became {found[at : at + 20]!r}"


def _unknown_part(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    for word in text.split():
        for part in (word, *word):
            if tokenizer.unk_token_id in tokenizer(part, add_special_tokens=False).input_ids and len(part) == 1:
                return repr(part)
    return "a part of it"


def _holds_answer(example: Example, answers: Answers, tokenizer: PreTrainedTokenizerBase) -> bool:
    expected = answer(example) or example.text or ""
    start, stop = answers.spans[-1]
    return _bare(expected) in _bare(tokenizer.decode(answers.ids[start:stop]))
