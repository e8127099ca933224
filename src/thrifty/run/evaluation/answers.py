"""Greedy answers, generated in batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from thrifty.core.errors import ThriftyError
from thrifty.data import Example, prompt_and_reference, stop_ids
from thrifty.objective.heads import unwrapped

from .greedy import continued, greedy_only
from .quiet import check_ids

__all__ = ["Answered", "Question", "answer_all", "questions"]

_SLACK = 16  # tokens that an answer may be longer than the longest reference


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt as token ids and as readable text, its reference answer, and that answer's number of tokens."""

    prompt_ids: list[int]
    text: str
    reference: str
    reference_tokens: int
    origin: str


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What the model said to a question, stripped of white space and end tokens, as the reference is."""

    question: str
    answer: str
    reference: str

    @property
    def correct(self) -> bool:
        """Whether the answer is the reference, character by character."""
        return self.answer == self.reference


def questions(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """What each row asks, with its last answer as the reference."""
    made = []
    for example in examples:
        prompt_ids, reference = prompt_and_reference(example, tokenizer)
        tokens = len(tokenizer(reference, add_special_tokens=False).input_ids)
        made.append(
            Question(
                prompt_ids=prompt_ids,
                text=_asked(example),
                reference=reference,
                reference_tokens=tokens,
                origin=example.origin,
            )
        )
    return made


def _asked(example: Example) -> str:
    """What a reader needs to see of the prompt: the plain prompt, or the last turn before the answer."""
    if example.messages is None:
        return (example.prompt or "").strip()
    last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
    return str(example.messages[last - 1]["content"]).strip() if last else ""


def answer_all(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
) -> list[Answered]:
    """The model's greedy answers, in the order of `asked`. Inside `evaluating`.

    Args:
        model: a causal language model, or a PEFT wrapper around one.
        batch_size: rows that are answered together; the answers do not depend on it, up to rounding.
        max_new_tokens: by default as many as the longest reference has, and 16 more.
    """
    limit = max_new_tokens or max(question.reference_tokens for question in asked) + _SLACK
    check_ids(model, [{"input_ids": question.prompt_ids} for question in asked])
    _check_positions(model, asked, limit)
    # A batch is as slow as its longest row: in prompt, and in the answer that it is expected to give.
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i].prompt_ids) - asked[i].reference_tokens)
    stops = stop_ids(tokenizer)
    answers = [""] * len(asked)
    with greedy_only(model, stops=stops, pad=_pad_id(tokenizer, stops), limit=limit) as config:
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            for i, ids in zip(picked, continued(model, [asked[i].prompt_ids for i in picked], config)):
                answers[i] = _text(ids, tokenizer, stops)
    return [Answered(question=q.text, answer=a, reference=q.reference) for q, a in zip(asked, answers)]


def _pad_id(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> int:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return stops[0] if stops else 0


def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> str:
    """The answer up to where it stops; what follows in its row is padding."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()


def _check_positions(model: Any, asked: Sequence[Question], limit: int) -> None:
    positions = getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)
    longest = max(asked, key=lambda question: len(question.prompt_ids))
    if positions is not None and len(longest.prompt_ids) + limit > positions:
        raise ThriftyError(
            f"{longest.origin}: the prompt's {len(longest.prompt_ids)} tokens and an answer of {limit} do not fit the "
            f"model's {positions} positions: lower max_new_tokens, or leave the row out"
        )
