"""Rendered texts to token ids, and the character spans of their answers to ranges of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.core.errors import ThriftyError
from thrifty.data.shapes import Example
from thrifty.data.template import Renderer, Span

__all__ = ["Answers", "Written", "ends_turn", "tokenize", "write"]

_Tokens = tuple[list[int], list[tuple[int, int]]]  # ids, and the characters [start, end) that each stands for


@dataclass(frozen=True)
class Written:
    """A text with its answers. automatic: put before it what the tokenizer puts before a text by itself. marked: the
    template itself says where the answers end."""

    text: str
    spans: list[Span]
    automatic: bool
    marked: bool = False


@dataclass(frozen=True)
class Answers:
    """Token ids, and the ranges [start, stop) of the answers in them, end-of-turn tokens included."""

    ids: list[int]
    spans: list[tuple[int, int]]


def write(example: Example, renderer: Renderer) -> Written:
    """The example as text: a conversation through the template, plain texts as they are."""
    if example.messages is not None:
        renderer.check(example.messages, example.tools)
        marked = _marked(example, renderer)
        if marked is not None:
            return marked
        text, spans = renderer.answers(example.messages, example.tools, first=example.answers_from)
        return Written(text, spans, automatic=False)
    prompt = example.prompt or ""
    text = example.text if example.text is not None else prompt + (example.completion or "")
    # Texts that carry their own start token (a template written out beforehand) must not get a second one.
    start = renderer.tokenizer.bos_token
    return Written(text, [Span(len(prompt), len(text), len(text))], automatic=not (start and text.startswith(start)))


def tokenize(texts: Sequence[Written], renderer: Renderer) -> list[Answers]:
    """Ids and answers of each text.

    The text before an answer is tokenized apart from the answer, as in generation, which tokenizes the prompt alone:
    two line breaks at a prompt's end may be one token, and two with an answer behind them. Tokenizers whose pieces do
    not join to the same text (those that put a space before every text) keep the tokens of the whole.
    """
    if not texts:
        return []
    edges = [sorted({0, *(span.start for span in written.spans), len(written.text)}) for written in texts]
    whole = renderer.tokenizer([w.text for w in texts], add_special_tokens=False, verbose=False).input_ids
    pieces = iter(
        _with_offsets([w.text[a:b] for w, cuts in zip(texts, edges) for a, b in itertools.pairwise(cuts)], renderer)
    )
    found = []
    for written, cuts, whole_ids in zip(texts, edges, whole):
        apart = [(next(pieces), at) for at in cuts[:-1]]
        ids = [token for (piece, _), _ in apart for token in piece]
        offsets = [(a + at, b + at) for (_, piece), at in apart for a, b in piece]
        if ids != whole_ids and renderer.tokenizer.decode(ids) != renderer.tokenizer.decode(whole_ids):
            ids, offsets = _with_offsets([written.text], renderer)[0]
        found.append(_answers(written, ids, offsets, renderer))
    return found


def _marked(example: Example, renderer: Renderer) -> Written | None:
    """The answers that the template marks with {% generation %}; None where it marks none in this conversation."""
    messages, tokenizer = example.messages, renderer.tokenizer
    assert messages is not None
    if not tokenizer.is_fast or not renderer.has_marks(example.tools):
        return None
    text = renderer.render(messages, example.tools)
    encoded = tokenizer.apply_chat_template(
        messages,
        tools=example.tools or None,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
    )
    spans: list[Span] = []
    for is_answer, run in itertools.groupby(
        zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True), key=lambda pair: bool(pair[0])
    ):
        if is_answer:
            offsets = [offset for _, offset in run]
            spans.append(Span(offsets[0][0], None, offsets[-1][1]))
    if any(m["role"] == "assistant" for m in messages[: example.answers_from]):
        head = renderer.render(messages[: example.answers_from], example.tools, prompt=True)
        if not text.startswith(head):
            raise ThriftyError("the chat template writes the prompt otherwise once an answer follows; use `messages`")
        spans = [span for span in spans if span.end > len(head)]
    return Written(text, spans, automatic=False, marked=True) if spans else None


def _answers(written: Written, ids: list[int], offsets: list[tuple[int, int]], renderer: Renderer) -> Answers:
    spans = []
    for span in written.spans:
        start = next((k for k, (_, b) in enumerate(offsets) if b > span.start), len(ids))
        stop = next((k for k in range(start, len(ids)) if offsets[k][0] >= span.end), len(ids))
        if not written.marked:
            stop = _end_of_turn(span, start, stop, ids, offsets, renderer)
        # A turn without an end of its own is ended by the control token that follows (as GLM's are, by the next role).
        if stop < len(ids) and ids[stop] in renderer.ending_ids and not ends_turn(ids[start:stop], renderer):
            stop += 1
        spans.append((start, stop))
    if spans and spans[-1][1] == len(ids) and not ends_turn(ids[spans[-1][0] :], renderer):
        ids = [*ids, renderer.end_id]
        spans[-1] = (spans[-1][0], len(ids))
    prefix = renderer.prefix if written.automatic else []
    return Answers(prefix + ids, [(start + len(prefix), stop + len(prefix)) for start, stop in spans])


def _end_of_turn(
    span: Span, start: int, stop: int, ids: list[int], offsets: list[tuple[int, int]], renderer: Renderer
) -> int:
    """Where the answer stops: behind the first control token behind its content, or else the last one of its turn.

    Without such a token the whole turn is the answer, with whatever text the template ends it by.
    """
    special = [k for k in range(start, stop) if ids[k] in renderer.special_ids]
    if span.content_end is not None:
        special = [k for k in special if offsets[k][0] >= span.content_end][:1]
    elif not ends_turn(ids[start:stop], renderer):
        special = []
    return special[-1] + 1 if special else stop


def ends_turn(ids: Sequence[int], renderer: Renderer) -> bool:
    """Whether a control token closes `ids`, white space behind it aside."""
    for token in reversed(ids):
        if token in renderer.special_ids:
            return True
        if renderer.tokenizer.decode([token]).strip():
            return False
    return False


def _with_offsets(texts: list[str], renderer: Renderer) -> list[_Tokens]:
    tokenizer: Any = renderer.tokenizer
    if not texts:
        return []
    if tokenizer.is_fast:
        encoded = tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    return [_slow_offsets(text, tokenizer) for text in texts]


def _slow_offsets(text: str, tokenizer: Any) -> _Tokens:
    """Offsets of a tokenizer written in Python, which gives none: from the lengths of its decoded prefixes."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    decoded = [tokenizer.decode(ids[: k + 1], clean_up_tokenization_spaces=False) for k in range(len(ids))]
    if ids and decoded[-1] != text:
        raise ThriftyError(
            "this tokenizer gives no character offsets, and its decoding does not give the text back, so answers "
            "cannot be told from prompts; use a fast tokenizer"
        )
    # What a character's first tokens decode to is not in the text until its last one comes: all of them stand for it.
    ends = [len(_common(part, text)) for part in decoded]
    offsets = list(zip([0, *ends[:-1]], ends))
    for k in range(len(offsets) - 2, -1, -1):
        if offsets[k][0] == offsets[k][1]:
            offsets[k] = (offsets[k][0], offsets[k + 1][1])
    return ids, offsets


def _common(part: str, text: str) -> str:
    return part if text.startswith(part) else text[: next(k for k, (a, b) in enumerate(zip(part, text)) if a != b)]
