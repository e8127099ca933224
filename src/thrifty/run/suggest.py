"""What a run file should say for the data and the model given: for `thrifty init`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thrifty.core.budget import distinct_parameters
from thrifty.core.errors import ThriftyError
from thrifty.core.memory import free_memory
from thrifty.data import CONVERTERS, Example, Judged, Source, answer, encoded_rows, examples_in, shape_of
from thrifty.data.readers import Row, read_rows

from .display import human_bytes
from .evaluation.choices import option_lists
from .model import empty_model, load_tokenizer
from .yaml_source import plain

__all__ = ["Suggestion", "suggest"]

_ROWS = 16  # of one step
_MEASURED = 1000  # rows, evenly over the data, whose tokens are counted
_SPLIT_FROM = 100  # rows; of fewer, none is held out
_ANSWERED = 100  # evaluation rows that are answered or chosen for
_FEW_OPTIONS, _OPTION_CHARACTERS = 8, 40
_SHORT_ANSWER = 200  # characters; longer ones are seldom right to the letter

# Our field -> what other files call it, the likeliest first.
_COLUMNS = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns", "messages_list"),
    "instruction": ("prompt", "question", "query", "input", "request", "problem", "source", "user", "context"),
    "output": ("completion", "answer", "response", "target", "reply", "solution", "assistant", "label", "summary"),
    "text": ("content", "document", "body", "story", "code"),
}


@dataclass(kw_only=True)
class Suggestion:
    """Values by dotted key, why each is what it is, what was looked at, and why something could not be."""

    values: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, why: str = "") -> None:
        self.values[key] = value
        if why:
            self.why[key] = why


def suggest(*, model: str, train: str, eval: str | None = None) -> Suggestion:
    """Look at the rows of `train`, then at the model's configuration and tokenizer. What cannot be read is told in
    `unseen`, and nothing is suggested for it."""
    made = Suggestion()
    try:
        source, examples = _read(made, train)
        held_out = examples_in(_source_like(source, eval), convert=_convert(made))[0] if eval is not None else []
    except ThriftyError as error:
        made.unseen.append(str(error))
        return made
    kept = examples if eval is not None else _split(made, source, examples)
    held_out = held_out or examples[len(kept) :]
    if eval is not None:
        made.put("eval", plain(_source_like(source, eval)))
    _measures(made, held_out)
    try:
        tokenizer = load_tokenizer(model)
        empty = empty_model(model)
        _lengths(made, examples, tokenizer, empty)
        _size(made, empty)
    except ThriftyError as error:
        made.unseen.append(str(error))
    if not examples[0].whole_file:
        _steps(made, rows=len(kept))
    return made


def _convert(made: Suggestion) -> Any:
    return CONVERTERS[made.values.get("objective", "sft")]


def _source_like(source: Source, path: str | None) -> Source:
    """The evaluation rows have the columns of the others."""
    assert path is not None
    return replace(source, path=path)


def _read(made: Suggestion, path: str) -> tuple[Source, list[Example]]:
    rows = read_rows(path)
    source = Source(path=path)
    if rows[0].whole_file:
        examples, _ = examples_in(source)
        made.seen.append(f"{path}: one text, cut into windows")
        return source, examples
    first = rows[0]
    if isinstance(first.value, Mapping) and {"chosen", "rejected"} <= first.value.keys():
        made.put("objective", "dpo", "the rows have a chosen and a rejected answer")
    else:
        columns = _columns(first)
        if columns:
            source = replace(source, columns=columns)
            made.put("train", plain(source), "columns: ours: theirs")
    examples, errors = examples_in(source, convert=_convert(made))
    if not examples:
        raise errors[0]
    good = examples[0]
    shape = " + ".join(good.columns) if isinstance(good, Judged) else shape_of(good.row, columns=source.columns)
    made.seen.append(f"{path}: {len(examples):,} rows, {shape}" + (f"; {len(errors)} are broken" if errors else ""))
    return source, examples


def _columns(row: Row) -> dict[str, str]:
    """What a file with other column names means; nothing where its own are understood, or cannot be guessed."""
    try:
        shape_of(row.value)
        return {}
    except ThriftyError:
        pass
    fields = row.value if isinstance(row.value, Mapping) else {}
    lower = {str(name).lower(): str(name) for name in fields}

    def found(ours: str, kind: type) -> str | None:
        names = (lower[name] for name in (ours, *_COLUMNS[ours]) if name in lower)
        return next((name for name in names if isinstance(fields[name], kind)), None)

    if turns := found("messages", list):
        return {"messages": turns}
    asked, answered = found("instruction", str), found("output", str)
    if asked and answered:
        return {ours: theirs for ours, theirs in (("instruction", asked), ("output", answered)) if ours != theirs}
    return {"text": text} if (text := found("text", str)) else {}


def _split(made: Suggestion, source: Source, examples: Sequence[Example]) -> Sequence[Example]:
    """Hold the last rows of a file out; those that are left to train on."""
    rows = len(examples)
    if examples[0].whole_file or rows < _SPLIT_FROM or not _is_file(source.path):
        return examples
    count = min(500, max(20, rows // 10))
    made.put("train", plain(replace(source, split=f"[:-{count}]")), f"all but the last {count} rows")
    made.put("eval", plain(replace(source, split=f"[-{count}:]")), f"the last {count}; shuffle a file in any order")
    return examples[:-count]


def _is_file(path: str) -> bool:
    return not read_rows(path)[0].split_taken


def _measures(made: Suggestion, held_out: Sequence[Example]) -> None:
    """What can be told of answers by more than their loss."""
    if not held_out or held_out[0].whole_file or isinstance(held_out[0], Judged):
        return
    asked = min(_ANSWERED, len(held_out))
    answers = [(answer(example) or "").strip() for example in held_out]
    distinct = sorted(set(answers))
    few = 2 <= len(distinct) <= _FEW_OPTIONS and len(answers) >= 5 * len(distinct)
    few = few and all(len(text) <= _OPTION_CHARACTERS and text.isprintable() for text in distinct)
    own = [example.choices for example in held_out]
    given = None if any(own) or not few else distinct
    if given or any(own):
        try:
            option_lists(held_out, given=given, among=held_out)
        except ThriftyError:
            return
        made.put("eval.choice", asked, f"the answer is one of {len(given)}" if given else "the rows name options")
        if given:
            made.put("eval.choices", given)
    elif all(answers) and statistics.median(map(len, answers)) <= _SHORT_ANSWER:
        made.put("eval.exact_match", asked)


def _lengths(
    made: Suggestion, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """The smallest multiple of 64 that holds 99 % of the rows, or all where that is little more."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20
    if examples[0].whole_file:
        made.put("max_length", min(1024, positions))
        return
    answered = [e for e in examples if not isinstance(e, Judged) or e.answered]
    rows = answered[:: max(1, -(-len(answered) // _MEASURED))]
    tokens = sorted(row.tokens for _, row in encoded_rows(rows, tokenizer, max_length=2**30))
    if not tokens:
        return
    most, longest = tokens[int(0.99 * (len(tokens) - 1))], tokens[-1]
    wanted = longest if longest <= 2 * most else most
    why = f"the longest of {len(rows):,} rows has {longest:,}"
    made.put("max_length", min(positions, 64 * math.ceil(wanted / 64)), why)


def _size(made: Suggestion, model: PreTrainedModel) -> None:
    """dtype and batch by a rule of thumb: weights in a quarter of the memory, activations in half of it."""
    numbers, free = distinct_parameters(model), free_memory("cuda" if torch.cuda.is_available() else "cpu")
    made.seen.append(f"{type(model).__name__}, {numbers:,} numbers; {human_bytes(free)} of memory free")
    half = 4 * numbers > free / 4
    if half:
        made.put("dtype", "bfloat16", f"float32 would take {human_bytes(4 * numbers)} of {human_bytes(free)}")
    config = model.config.get_text_config()
    hidden, layers = getattr(config, "hidden_size", 1024), getattr(config, "num_hidden_layers", 24)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    row = made.values.get("max_length", 1024) * layers * (8 * hidden + 3 * inner) * (2 if half else 4)
    batch = _ROWS
    while batch > 1 and batch * row > free / 2:
        batch //= 2
    if batch < _ROWS:
        made.put("per_device_train_batch_size", batch, "as many as memory is likely to hold")
        made.put("gradient_accumulation_steps", _ROWS // batch)
    if row > free / 2:
        made.put("gradient_checkpointing", True)


def _steps(made: Suggestion, *, rows: int) -> None:
    """Three passes, but no fewer than 50 steps as long as a row is seen at most 20 times, and no more than 2,000."""
    steps = max(1, min(max(math.ceil(3 * rows / _ROWS), 50), 20 * rows // _ROWS, 2000))
    made.put("max_steps", steps, f"each of {rows:,} rows is seen {_ROWS * steps / rows:.1f} times")
