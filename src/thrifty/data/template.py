"""Conversations to text: the tokenizer's chat template, the plain form where there is none, and where answers stand.

Only positions in the text are found here; `encode` turns them into tokens.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from thrifty.core.errors import ThriftyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PLAIN_TEMPLATE", "Renderer", "Span", "chat_template"]

# For tokenizers without a chat template (behind the start token, where the tokenizer puts one before every text):
#     <system text>
#
#     User: <request>
#     Assistant: <answer><end-of-text token>
#     User: ...
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role in ('system', 'developer') %}{{ m.content + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token + '\n' }}"
    "{% else %}{{ m.role | capitalize + ': ' + m.content + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Unlikely in any text, without white space that a template could trim, and unchanged by upper and lower case.
_PLACEHOLDER = "\ue000\ue001\ue000"


# A template is a program of its author's: what Jinja or Python raise while they read or run it.
_RAISED = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TimeoutError,
    TypeError,
    ValueError,
)
_SECONDS, _CHARACTERS = 10.0, 20_000_000  # at most, of one conversation


@contextmanager
def _time_limit() -> Iterator[None]:
    """TimeoutError in what takes longer inside; in the main thread, where the system has timers."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _too_long)
    left = signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"it takes longer than {_SECONDS:.0f} s for one row")


@dataclass(frozen=True)
class Span:
    """Where an answer stands in a text, in characters.

    start: where the model begins to write. content_end: the end of the answer's own text, behind which its end-of-turn
    token is looked for; None where that text was not found. end: the end of the turn.
    """

    start: int
    content_end: int | None
    end: int


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template by which conversations without tools are written: the tokenizer's own, or the plain form.

    Set it on a tokenizer without one before saving that, so that others write what was trained.
    """
    return Renderer(tokenizer).source(None)


@dataclass
class Renderer:
    """A tokenizer's way of writing conversations, with what is asked of it for each row worked out once."""

    tokenizer: PreTrainedTokenizerBase
    _sources: dict[bool, str] = field(default_factory=dict)

    @cached_property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, those that may end a turn among them."""
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset({*added, *self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id})

    @cached_property
    def ending_ids(self) -> frozenset[int]:
        """Control tokens that may end a turn: all but the one that starts a text."""
        return self.special_ids - {self.tokenizer.bos_token_id}

    @cached_property
    def prefix(self) -> list[int]:
        """The ids that the tokenizer puts before a plain text by itself (usually nothing or its start token)."""
        with_special, bare = self.tokenizer("a").input_ids, self.tokenizer("a", add_special_tokens=False).input_ids
        for start in range(len(with_special)):
            if bare and with_special[start : start + len(bare)] == bare:
                return list(with_special[:start])
        return []

    @property
    def end_id(self) -> int:
        """The end-of-text token. Raises `ThriftyError` where the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise ThriftyError(
                "the tokenizer has no eos_token, so the model cannot learn to stop; set one in the tokenizer"
            )
        return int(self.tokenizer.eos_token_id)

    def source(self, tools: list[Any] | None) -> str:
        """The template's text."""
        key = bool(tools)
        if not self.has_template and key not in self._sources:
            assert self.end_id >= 0
            start = json.dumps(self.tokenizer.decode(self.prefix), ensure_ascii=False)
            self._sources[key] = f"{{{{ {start} }}}}{PLAIN_TEMPLATE}" if self.prefix else PLAIN_TEMPLATE
        if key not in self._sources:
            self._sources[key] = self.tokenizer.get_chat_template(None, tools or None)
        return self._sources[key]

    def has_marks(self, tools: list[Any] | None) -> bool:
        """Whether the template says itself, with {% generation %}, what the assistant writes."""
        return bool(_MARKS.search(self.source(tools)))

    def check(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
        """Raise `ThriftyError` where the template would leave out tools or tool calls without a word."""
        source = self.source(tools)
        template = "chat template" if self.has_template else "plain form (the tokenizer has no chat template)"
        calls = any(m.get("tool_calls") for m in messages)
        for given, name in ((bool(tools), "tools"), (calls, "tool_calls")):
            if given and name not in source:
                raise ThriftyError(
                    f"the {template} does not write `{name}`; take them out, or a tokenizer that knows them"
                )

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False) -> str:
        """The conversation as text; with `prompt`, up to where the model begins to write its answer."""
        try:
            with _time_limit():
                text: str = self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools or None,
                    chat_template=self.source(tools),
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
        except _RAISED as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ThriftyError(f"the chat template refuses the conversation: {reason}") from error
        if len(text) > _CHARACTERS:
            raise ThriftyError(f"the chat template makes {len(text):,} characters of a row, more than {_CHARACTERS:,}")
        return text

    def answers(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, first: int = 0
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans of the answers from message `first` on."""
        whole = self.render(messages, tools)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        return whole, [self._span(messages, tools, whole, i) for i in turns]

    def _span(self, messages: list[dict[str, Any]], tools: list[Any] | None, whole: str, i: int) -> Span:
        """Answer `i`: from the generation prompt of what is before it to the text of the conversation up to it.

        Each is used only where it is a prefix of the whole text. Where one is not (templates that leave out earlier
        thoughts, that write another prompt than history, that know no generation prompt) a placeholder is put in the
        answer's place, and what stands before and behind it shows where the answer begins and ends.
        """
        content = messages[i]["content"].strip()
        start = self._prefix(messages[:i], tools, whole, prompt=True)
        end = len(whole) if i == len(messages) - 1 else self._prefix(messages[: i + 1], tools, whole)
        knows_prompt = "add_generation_prompt" in self.source(tools)
        if start is not None and end is not None and knows_prompt and content and whole.count(content, start, end) == 1:
            return Span(start, whole.index(content, start) + len(content), end)
        around = self._around(messages, tools, whole, i)
        if around is not None:
            start = start if start is not None and start <= around[0] and knows_prompt else around[0]
            return Span(start, around[1], len(whole) if end is None else end)
        if start is not None and end is not None:
            return Span(start, None, end)
        raise ThriftyError(
            f"the chat template writes messages[{i}] otherwise once others follow, so the answer cannot be told from "
            "its prompt; mark it in the template with {% generation %} ... {% endgeneration %}"
        )

    def _prefix(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, whole: str, *, prompt: bool = False
    ) -> int | None:
        """The length of the text of `messages`, where it is a prefix of `whole`."""
        if not messages:
            return None
        try:
            text = self.render(messages, tools, prompt=prompt)
        except ThriftyError:  # a part of a conversation may be refused (an order of roles) where the whole is not
            return None
        return len(text) if whole.startswith(text) else None

    def _around(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, whole: str, i: int
    ) -> tuple[int, int] | None:
        """Start and end of the content of answer `i` in `whole`, found with a placeholder; None where that fails."""
        if not messages[i]["content"].strip():
            return None
        replaced = [*messages[:i], {**messages[i], "content": _PLACEHOLDER}, *messages[i + 1 :]]
        before, *rest = self.render(replaced, tools).split(_PLACEHOLDER)
        if len(rest) != 1 or not whole.startswith(before) or not whole.endswith(rest[0]):
            return None
        end = len(whole) - len(rest[0])
        return (len(before), end) if len(before) < end else None
