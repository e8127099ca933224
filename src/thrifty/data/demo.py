"""The demonstration's task: spoken requests to a home assistant and the JSON calls they mean.

A small grammar. A phrasing is one line, `words with {slots} | fixed=argument`; a call is `{"name": ..., "arguments":
{...}}` with the arguments in the order of the function's signature. Both the phrasings and the open values (names,
titles, items, some numbers) of the test split occur nowhere in the training split, so that the test asks for the
grammar and not for memory.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from thrifty.data.demo_phrasings import FUNCTIONS
from thrifty.data.demo_values import FILLERS, VALUES, Fillers

__all__ = ["INSTRUCTION", "SPLITS", "Request", "requests"]

INSTRUCTION = "Answer with one JSON call."
SPLITS = ("train", "test")

_SLOT = re.compile(r"{(\w+)}")
_ONES = ["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_HELD_OUT_NUMBERS = frozenset(n for n in range(1, 100) if n % 7 == 3)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One spoken request and the call it means: `text` as a recognizer would write it, `call` as compact JSON."""

    text: str
    call: str
    function: str

    def row(self) -> dict[str, object]:
        """The row of a `messages` file."""
        turns = (("system", INSTRUCTION), ("user", self.text), ("assistant", self.call))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


def requests(split: str, *, count: int, seed: int) -> list[Request]:
    """`count` distinct requests of a split ("train" or "test"), the functions in equal shares, fixed by `seed`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    rng = random.Random(f"thrifty demo {split} {seed}")
    names = list(FUNCTIONS)
    seen: dict[str, Request] = {}
    while len(seen) < count:
        request = _draw(names[len(seen) % len(names)], split, rng)
        seen.setdefault(request.text, request)
    made = list(seen.values())
    rng.shuffle(made)
    return made


def _draw(name: str, split: str, rng: random.Random) -> Request:
    function = FUNCTIONS[name]
    phrasing = rng.choice(function.phrasings(split))
    values: dict[str, object] = dict(phrasing.fixed)
    words = phrasing.words
    for slot in _SLOT.findall(phrasing.words):
        spoken, values[slot] = _value(slot, split, rng)
        words = words.replace("{" + slot + "}", spoken, 1)
    arguments = {key: values[key] for key in function.arguments if key in values}
    assert len(arguments) == len(values), f"{name}: {set(values) - set(arguments)} is no argument"
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return Request(text=_spoken(words, rng, FILLERS[split]), call=call, function=name)


def _value(slot: str, split: str, rng: random.Random) -> tuple[str, object]:
    """How a slot's value is said and what the call holds."""
    if slot == "time":
        return _time(rng)
    values = VALUES[slot]
    if isinstance(values, range):
        held_out = rng.random() < 0.5 if split == "test" else False
        number = rng.choice([n for n in values if (n in _HELD_OUT_NUMBERS) == held_out])
        return number_words(number), number
    if isinstance(values, Mapping):
        text = rng.choice(values[split])
        return text, text
    text = rng.choice(values)
    return text, text


def number_words(number: int) -> str:
    """A whole number from 1 to 99 in words: 42 is "forty two"."""
    tens, ones = divmod(number, 10)
    return _TEENS[ones] if tens == 1 else f"{_TENS[tens]} {_ONES[ones]}".strip()


def _time(rng: random.Random) -> tuple[str, str]:
    """A time of day as people say it, and as `HH:MM` of 24 hours."""
    hour, minute = rng.randint(6, 21), rng.choice((0, 0, 15, 30, 30, 45, 10, 20))
    said = number_words((hour - 1) % 12 + 1)
    if minute == 30 and rng.random() < 0.5:
        said = f"half past {said}"
    elif minute == 15 and rng.random() < 0.5:
        said = f"quarter past {said}"
    elif minute:
        said = f"{said} {number_words(minute)}"
    part = "morning" if hour < 12 else "afternoon" if hour < 17 else "evening"
    half = "am" if hour < 12 else "pm"
    said += f" {half}" if rng.random() < 0.5 else f" in the {part}"
    return said, f"{hour:02d}:{minute:02d}"


def _spoken(words: str, rng: random.Random, fillers: Fillers) -> str:
    """The request with what people say around it: an opening, a hesitation somewhere inside, an ending."""
    parts = words.split()
    if rng.random() < 0.25:
        parts.insert(rng.randrange(1, max(2, len(parts) // 2)), rng.choice(fillers.hesitations))
    opening = rng.choice(fillers.openings) if rng.random() < 0.5 else ""
    ending = rng.choice(fillers.endings) if rng.random() < 0.3 else ""
    return " ".join(filter(None, (opening, *parts, ending)))
