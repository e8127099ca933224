"""`thrifty validate`: everything that can be wrong with a run, told before it starts."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thrifty.core.budget import distinct_parameters
from thrifty.data import check_vocabulary
from thrifty.delta.vocabulary import extend

from .checks.machine import check_disk, check_memory, check_output
from .checks.places import check_places
from .checks.report import Report
from .checks.rows import Data, check_rows
from .checks.settings import Settings, check_settings
from .checks.step import try_step
from .checks.texts import check_texts, describe_tokenizer
from .config import RunConfig
from .display import human_bytes
from .model import check_weights, empty_model, load_tokenizer
from .rows import check_positions

__all__ = ["validate"]

_MANY_PASSES = 20


def validate(
    source: str | os.PathLike[str] | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    *,
    step: bool = False,
    console: Console | None = None,
) -> Report:
    """Resolve a run without training: its configuration, model, tokenizer, data, what is trained, and the machine.

    Nothing is raised for what the user can mend: it is in `problems`, each with its fix; what is odd but allowed is in
    `warnings`. `step` also loads the weights, where nothing is wrong so far, and takes one step of the largest batch.
    Prints to `console` (standard output).
    """
    report = Report(Console() if console is None else console)
    settings = check_settings(report, source, overrides)
    if settings is not None:
        _look(report, settings, step=step)
    file = [str(source)] if isinstance(source, str | os.PathLike) else []
    report.close(ready=f"start with `{shlex.join(['thrifty', 'train', *file, *overrides])}`")
    return report


def _look(report: Report, settings: Settings, *, step: bool) -> None:
    config, broken = settings.config, settings.broken
    report.section("model and tokenizer")
    model = tokenizer = None
    ids: dict[str, int] = {}
    if not broken & {"model", "dtype", "trust_remote_code"}:
        with report.attempt():
            model = empty_model(config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
            report.say(_describe_model(model))
            check_weights(config.model)
    if not broken & {"model", "tokenizer", "trust_remote_code"}:
        with report.attempt():
            tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
            report.say(describe_tokenizer(tokenizer))
            ids = extend(tokenizer, config.add_tokens) if config.add_tokens else {}
    data = None
    if not broken & {"objective", "max_length"}:
        report.section("data")
        data = _look_at_data(report, settings, tokenizer, model, ids=ids)
    trained = None
    if model is not None and not broken & {"method", "budget"}:
        report.section("what is trained")
        trained = check_places(report, config, model)
    report.section("machine")
    if "output_dir" not in broken:
        check_output(report, config)
    if model is not None and trained is not None:
        device = "cpu" if settings.args is None else settings.args.device.type
        rows = [row for _, row in data.train] if data is not None else []
        check_memory(report, config, model, trained=trained, device=device, rows=rows)
        check_disk(report, config, model, trained=trained)
    if step:
        report.section("one step")
        if report.is_clean and data is not None and tokenizer is not None:
            try_step(report, config, data, tokenizer, ids=ids)
        else:
            report.say("not tried: mend what is listed first")


def _describe_model(model: PreTrainedModel) -> str:
    numbers = distinct_parameters(model)
    weight = next(model.parameters())
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    text = f"{type(model).__name__}, {numbers:,} numbers, {str(weight.dtype).removeprefix('torch.')} "
    text += f"({human_bytes(numbers * weight.element_size())})"
    return text if positions is None else f"{text}, {positions:,} positions"


def _look_at_data(
    report: Report,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel | None,
    *,
    ids: Mapping[str, int],
) -> Data:
    config = settings.config
    data = check_rows(report, config, tokenizer, console_marks=report.console.is_terminal)
    if tokenizer is not None:
        check_texts(report, [example for example, _ in data.train], tokenizer)
    if model is not None:
        rows = [{"input_ids": row.input_ids, "labels": row.labels} for _, row in data.every()]
        embedded = model.get_input_embeddings().num_embeddings
        with report.attempt():
            check_vocabulary(rows, max(embedded, 1 + max(ids.values(), default=0)))
        with report.attempt():
            check_positions(max((len(row["input_ids"]) for row in rows), default=0), model)
    if data.train and settings.args is not None:
        _say_passes(report, config, settings, rows=len(data.train))
    return data


def _say_passes(report: Report, config: RunConfig, settings: Settings, *, rows: int) -> None:
    """How often each row is seen, where that can be told."""
    args = settings.args
    assert args is not None
    if args.max_steps <= 0 or config.packing or any(source.weight != 1 for source in config.data.train):
        return
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    passes = args.max_steps * batch / rows
    report.say(f"{args.max_steps:,} steps of {batch} rows: each of the {rows:,} rows is seen {passes:.1f} times")
    if passes > _MANY_PASSES:
        report.warn(
            f"max_steps: each of the {rows:,} rows would be seen {passes:.0f} times, and learned by heart: lower "
            f"max_steps (max_steps={max(1, round(3 * rows / batch))} sees each three times), or give more rows"
        )
