"""Rendered texts to token ids, and the character spans of their answers to ranges of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.core.errors import ThriftyError
from thrifty.data.shapes import Example
from thrifty.data.template import Renderer, Span

__all__ = ["Answers", "Written", "marked", "plain", "tokenize", "written"]

_Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class Written:
    """A text with its answers. automatic: put what the tokenizer puts before a text by itself. ends: the last answer
    gets the end-of-text token, wherever the text itself has none behind it. origin: for messages."""

    text: str
    spans: list[Span]
    automatic: bool
    origin: str


@dataclass(frozen=True)
class Answers:
    """Token ids, and the ranges [start, stop) of the answers in them, end-of-turn tokens included."""

    ids: list[int]
    spans: list[tuple[int, int]]


def plain(example: Example, renderer: Renderer) -> Written:
    """A text, or a prompt and a completion joined as they are."""
    prompt = example.prompt or ""
    text = example.text if example.text is not None else prompt + (example.completion or "")
    # Texts that carry their own start token (a template written out beforehand) must not get a second one.
    start = renderer.tokenizer.bos_token
    automatic = not (start and text.startswith(start))
    return Written(text, [Span(len(prompt), len(text), len(text))], automatic, example.origin)


def written(example: Example, renderer: Renderer) -> Written:
    """A conversation through the template."""
    assert example.messages is not None
    text, spans = renderer.answers(example.messages, example.tools, first=example.answers_from)
    return Written(text, spans, not renderer.has_template, example.origin)


def tokenize(texts: Sequence[Written], renderer: Renderer) -> list[Answers]:
    """Ids and answers of each text."""
    if not texts:
        return []
    encoded = _with_offsets([written.text for written in texts], renderer)
    return [_answers(text, ids, offsets, renderer) for text, (ids, offsets) in zip(texts, encoded, strict=True)]


def marked(example: Example, renderer: Renderer) -> Answers | None:
    """The answers that the template marks with {% generation %}; None where it marks none in this conversation.

    A mark that stops before the end-of-turn token is stretched by it, so that the model learns to stop.
    """
    messages, tokenizer = example.messages, renderer.tokenizer
    assert messages is not None
    if not tokenizer.is_fast or not renderer.has_marks(example.tools):
        return None
    whole = renderer.render(messages, example.tools)  # refuses what the template refuses, with our sentence
    encoded = tokenizer.apply_chat_template(
        messages,
        tools=example.tools or None,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
    )
    ids, mask, offsets = list(encoded["input_ids"]), encoded["assistant_masks"], encoded["offset_mapping"]
    edges = [i for i in range(len(ids) + 1) if (0 < i < len(ids) and mask[i] != mask[i - 1])]
    edges = [0] * bool(mask and mask[0]) + edges + [len(ids)] * bool(mask and mask[-1])
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    if not spans:
        return None
    if any(m["role"] == "assistant" for m in messages[: example.answers_from]):
        head = renderer.render(messages[: example.answers_from], example.tools, prompt=True)
        if not whole.startswith(head):
            raise ThriftyError(
                "the chat template writes the prompt otherwise once its answer follows; give it as `messages`"
            )
        spans = [(start, stop) for start, stop in spans if offsets[start][0] >= len(head)]
    ending = renderer.special_ids - {tokenizer.bos_token_id}
    stretched = []
    for start, stop in spans:
        more = stop < len(ids) and ids[stop] in ending and not _ends(ids[start:stop], renderer)
        stretched.append((start, stop + more))
    return _ended(ids, stretched, renderer)


def _ends(ids: Sequence[int], renderer: Renderer) -> bool:
    """Whether a control token closes `ids`, white space behind it aside."""
    for token in reversed(ids):
        if token in renderer.special_ids:
            return True
        if renderer.tokenizer.decode([token]).strip():
            return False
    return False


def _ended(ids: list[int], spans: list[tuple[int, int]], renderer: Renderer) -> Answers:
    """Add the end-of-text token where the last answer closes the text and has no end of its own."""
    if spans and spans[-1][1] == len(ids) and not _ends(ids[slice(*spans[-1])], renderer):
        return Answers([*ids, renderer.end_id], [*spans[:-1], (spans[-1][0], len(ids) + 1)])
    return Answers(ids, spans)


def _answers(written: Written, ids: list[int], offsets: _Offsets, renderer: Renderer) -> Answers:
    ids, offsets = _cut_at_answers(written, ids, offsets, renderer)
    prefix = renderer.prefix if written.automatic else []
    spans = []
    for span in written.spans:
        start, stop = _tokens_of(span, ids, offsets, renderer)
        spans.append((start + len(prefix), stop + len(prefix)))
    return _ended(prefix + ids, spans, renderer)


def _tokens_of(span: Span, ids: list[int], offsets: _Offsets, renderer: Renderer) -> tuple[int, int]:
    """The tokens of an answer up to its end-of-turn token: the first control token behind its content.

    Without such a token the whole turn is the answer, with whatever text the template ends it by.
    """
    start = next((k for k, (_, b) in enumerate(offsets) if b > span.start), len(ids))
    stop = next((k for k, (a, _) in enumerate(offsets) if a >= span.end and k >= start), len(ids))
    if span.content_end is not None:
        behind = [k for k in range(start, stop) if offsets[k][0] >= span.content_end and ids[k] in renderer.special_ids]
        return start, behind[0] + 1 if behind else stop
    last = stop
    while last > start and ids[last - 1] not in renderer.special_ids:
        if renderer.tokenizer.decode([ids[last - 1]]).strip():
            return start, stop
        last -= 1
    return start, last if last > start else stop


def _cut_at_answers(
    written: Written, ids: list[int], offsets: _Offsets, renderer: Renderer
) -> tuple[list[int], _Offsets]:
    """Where one token holds the end of a prompt and the start of its answer, tokenize the two apart.

    Generation does: it tokenizes the prompt alone. Tokenizers whose pieces do not join to the same text (those that put
    a space before every text) keep the one token, which then counts as the answer's.
    """
    starts = {span.start for span in written.spans}
    cuts = sorted({s for a, b in offsets for s in starts if a < s < b})
    if not cuts:
        return ids, offsets
    edges = [0, *cuts, len(written.text)]
    pieces = [written.text[a:b] for a, b in itertools.pairwise(edges)]
    apart_ids: list[int] = []
    apart_offsets: _Offsets = []
    for at, (piece_ids, piece_offsets) in zip(edges, _with_offsets(pieces, renderer)):
        apart_ids += piece_ids
        apart_offsets += [(a + at, b + at) for a, b in piece_offsets]
    same = renderer.tokenizer.decode(apart_ids) == renderer.tokenizer.decode(ids)
    return (apart_ids, apart_offsets) if same else (ids, offsets)


def _with_offsets(texts: list[str], renderer: Renderer) -> list[tuple[list[int], _Offsets]]:
    """Ids of each text and the characters that each id stands for."""
    tokenizer: Any = renderer.tokenizer
    if tokenizer.is_fast:
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    return [_slow_offsets(text, tokenizer) for text in texts]


def _slow_offsets(text: str, tokenizer: Any) -> tuple[list[int], _Offsets]:
    """Offsets of a tokenizer written in Python, which gives none: from the lengths of its decoded prefixes."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    ends = [len(tokenizer.decode(ids[: k + 1], clean_up_tokenization_spaces=False)) for k in range(len(ids))]
    if ids and (tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text or sorted(ends) != ends):
        raise ThriftyError(
            "this tokenizer gives no character offsets, and its decoding does not give the text back, so answers "
            "cannot be told from prompts; use a fast tokenizer"
        )
    return ids, list(zip([0, *ends[:-1]], ends))
