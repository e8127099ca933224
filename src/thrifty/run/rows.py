"""What a run trains on and measures: examples and token rows, checked against the model, packed, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from thrifty.core.errors import ThriftyError
from thrifty.core.method import parse_method
from thrifty.data import (
    CONVERTERS,
    DataReport,
    Example,
    Judged,
    PackedRows,
    Source,
    check_vocabulary,
    encode_all,
    load,
    one_form,
    pack,
)
from thrifty.objective.isolation import check_packing
from thrifty.select.compose import check as check_method

from .config import RunConfig
from .objectives import parse_objective
from .order import RowOrder
from .probe_batches import general_rows
from .trainer import Row

__all__ = [
    "Rows",
    "answered",
    "answered_examples",
    "check_answers",
    "check_fits",
    "check_positions",
    "comparable",
    "load_rows",
    "order_of",
    "origins_of",
    "packed_rows",
]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is trained on and what is measured."""

    train: Sequence[Row]  # as they were read: the probe takes them, packed or not
    eval: Sequence[Row] | None
    examples: Sequence[Example]  # of the evaluation
    report: DataReport
    general: Sequence[Row] | None  # what the probe takes instead, for methods that must not see the task
    judged: Sequence[Mapping[str, Any]] = ()  # what TRL's trainer reads, where it trains
    rejected: Sequence[Row] = ()
    origins: Sequence[str] = ()  # of `train`: "file:line"


def load_rows(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """All rows of `config`, as tokens. With another objective than sft, those of `train` are the answers to follow."""
    found = _load(config, config.data.train)
    judged: list[Any] = [example for example in found if isinstance(example, Judged)]
    good = answered(found)
    if judged:
        one_form(judged)
        check_answers(config, good, judged)
    origins: list[str] = []
    if good:
        train, report = encode_all(good, tokenizer, max_length=config.max_length, origins=origins)
    else:
        train, report = [], DataReport(len(found), 0, 0, 0, len(found))
    bad = [example.rejected for example in judged if example.rejected is not None]
    examples = answered_examples(config)
    eval_rows = encode_all(examples, tokenizer, max_length=config.max_length)[0] if examples else None
    return Rows(
        train=train,
        eval=eval_rows,
        examples=examples,
        report=report,
        general=general_rows(config, tokenizer),
        judged=[example.columns for example in judged],
        rejected=encode_all(bad, tokenizer, max_length=config.max_length)[0] if bad else (),
        origins=origins,
    )


def answered_examples(config: RunConfig) -> list[Example]:
    """Those of `data.eval` that have an answer to compare with; none where it is not given."""
    return comparable(_load(config, config.data.eval)) if config.data.eval else []


def comparable(examples: Sequence[Example]) -> list[Example]:
    """Those of the evaluation rows that have an answer. ThriftyError where none has."""
    found = answered(examples)
    if not found:
        raise ThriftyError("data.eval: no row has an answer to compare with; give `completion` beside the prompt")
    return found


def _load(config: RunConfig, sources: Sequence[Source]) -> list[Example]:
    return load(sources, seed=config.seed, convert=CONVERTERS[parse_objective(config.objective).name])


def answered(examples: Sequence[Example]) -> list[Example]:
    """Those that have an answer to learn from."""
    return [example for example in examples if not isinstance(example, Judged) or example.answered]


def check_answers(config: RunConfig, good: Sequence[Example], judged: Sequence[Judged]) -> None:
    """ThriftyError where what looks at answers has none."""
    objective, method = parse_objective(config.objective), parse_method(config.method)
    if not good and method.needs_probe and not method.general:
        fix = "label some rows true" if objective.name == "kto" else "give rows a `completion`"
        raise ThriftyError(
            f"method {method.name!r} chooses by the loss on answers, and no row of data.train has one to follow: "
            f"{fix}, or take a method that does not look, such as random_blocks"
        )
    if "exact_match" in objective.options.get("reward_funcs", ()) and "reference" not in judged[0].columns:
        raise ThriftyError(
            f"{judged[0].origin}: no field 'completion', which the reward exact_match compares with: "
            "give it in all rows"
        )


def check_fits(config: RunConfig, model: PreTrainedModel, rows: Rows) -> None:
    """ThriftyError where a row holds a token or a position that the model does not have, or nothing can be selected."""
    check_method(parse_method(config.method), model, config.budget)
    every = [*rows.train, *rows.rejected, *(rows.eval or ()), *(rows.general or ())]
    check_vocabulary(every, model.get_input_embeddings().num_embeddings)
    check_positions(max((len(row["input_ids"]) for row in every), default=0), model)


def check_positions(longest: int, model: PreTrainedModel) -> None:
    """ThriftyError where a row of `longest` tokens has more than the model has positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ThriftyError(
            f"max_length: the longest row has {longest} tokens, the model {positions} positions: lower it"
        )


def packed_rows(config: RunConfig, rows: Rows, *, model: PreTrainedModel, seed: int, console: Console) -> PackedRows:
    """The training rows, packed. ThriftyError where `model` would let them see each other."""
    check_packing(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    capacity = min(config.max_length, positions or config.max_length)
    packed = PackedRows(rows.train, pack([len(row["input_ids"]) for row in rows.train], capacity=capacity, seed=seed))
    text = f"packing: {len(rows.train):,} rows in {len(packed):,} of at most {capacity:,} tokens"
    console.print(text, highlight=False, soft_wrap=True)
    return packed


def origins_of(rows: Rows, number: int) -> Sequence[str]:
    """Where row `number` of those that are trained comes from; of a packed one, all that are in it."""
    packs = rows.train.packs[number] if isinstance(rows.train, PackedRows) else [number]
    return [rows.origins[row] for row in packs]


def order_of(args: TrainingArguments, rows: Sequence[Row], *, seed: int) -> RowOrder:
    """The order in which a run meets `rows`."""
    lengths = rows.lengths if isinstance(rows, PackedRows) else [len(row["input_ids"]) for row in rows]
    part = args.per_device_train_batch_size * args.world_size
    return RowOrder(
        lengths,
        batch=part * args.gradient_accumulation_steps,
        strategy=args.train_sampling_strategy,
        seed=seed,
        multiple=part if args.world_size > 1 and not args.dataloader_drop_last else 1,
    )
