"""From a configuration to a finished run: a folder that can be resumed, audited and reproduced."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from thrifty.core.files import disk_errors, write_json
from thrifty.data import collate
from thrifty.delta import Delta, NewTokens
from thrifty.delta.vocabulary import extend
from thrifty.objective.isolation import check_packing
from thrifty.objective.next_token import install
from thrifty.objective.proof import prepare
from thrifty.update.peer import PeerTuning
from thrifty.update.tuning import Tuning, attach_with

from .arguments import keeps_best, steps_of, training_arguments, with_defaults
from .checkpoint import Checkpoint, claim, find_checkpoint
from .checkpointing import switch_on_checkpointing
from .config import RunConfig, load_config
from .display import Display
from .embedded import no_progress_bars
from .evaluate import evaluate, first_row
from .folder_state import begin_folder, stopped
from .lock import locked
from .lost import lost_processes, warn_of_old_addresses
from .memory import Clock, MemoryMeter
from .model import load_model, load_tokenizer
from .new_tokens import grow, save_tokenizer
from .objectives import parse_objective, refuse_unsupported
from .order import row_order
from .out_of_memory import memory_errors
from .probe_batches import check_text, probe_batches, probe_loss
from .provenance import record_of
from .quantized import quantize_base, refuse_quantized, whole_on
from .repeat import differences
from .result import finished
from .resumed import refuse_changes, warn_of_processes
from .rows import Rows, check_fits, load_rows, order_of, origins_of, packed_rows
from .sharding import parse_sharding, shard, takes_sharded
from .stop import Stop
from .summary import delta_info, describe_data, make_summary, print_result
from .trainer import Row, ThriftyTrainer
from .zero_trainer import ZeroTrainer

__all__ = ["Run", "run_training", "train", "train_rows"]

_GO_ON = "free space and go on with resume_from_checkpoint=auto"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run. `model` is plain: the trained weights in the base model's own modules."""

    summary: dict[str, Any]
    delta: Delta
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    output_dir: Path


def train(source: str | os.PathLike[str] | Mapping[str, Any] | None = None, **overrides: Any) -> Run:
    """Train as a run file or a mapping says; `overrides` are its keys (`train("run.yaml", max_steps=100)`).

    Leaves in `output_dir`: `run.yaml`, `metrics.jsonl`, checkpoints, `delta/` and, last, `summary.json`.
    ThriftyError for whatever the user can mend.
    """
    return run_training(load_config(source, overrides))


def run_training(config: RunConfig, *, console: Console | None = None, repeats: Mapping[str, Any] | None = None) -> Run:
    """`train` for a configuration already read. Prints to `console` (standard output).

    `repeats`: the summary of the run that this is to be again; what differs from it is printed before training.
    SIGTERM and SIGINT save a checkpoint and raise SystemExit(143) or KeyboardInterrupt, in the main thread.
    """
    refuse_unsupported(config)
    config = with_defaults(config)
    args = training_arguments(config)
    refuse_quantized(config, processes=args.world_size)
    console = Console() if console is None else console
    console.quiet = console.quiet or not args.should_save
    output = Path(args.output_dir)
    check_text(config)
    warn_of_old_addresses()
    saves = args.save_strategy != SaveStrategy.NO
    try:
        with (
            Stop() as stop,
            memory_errors(config),
            locked(output) if args.should_save else nullcontext(),
            lost_processes(output, saves=saves),
        ):
            return _run(config, args, console=console, stop=stop, repeats=repeats)
    except (KeyboardInterrupt, SystemExit):
        console.print(stopped(output, saves=saves), highlight=False, soft_wrap=True)
        raise


def _run(
    config: RunConfig, args: TrainingArguments, *, console: Console, stop: Stop, repeats: Mapping[str, Any] | None
) -> Run:
    output = Path(args.output_dir)
    checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir=output)
    claim(output, resume=checkpoint)
    if checkpoint is not None:
        with checkpoint.reading():
            refuse_changes(checkpoint, config=config.to_dict(), processes=args.world_size)

    tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    ids = extend(tokenizer, config.add_tokens) if config.add_tokens else {}
    rows = load_rows(config, tokenizer)
    console.print(describe_data(rows.report, max_length=config.max_length), highlight=False, soft_wrap=True)
    device = whole_on(config, args.device)
    model = load_model(config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code, device=device)
    new_tokens = grow(model, ids, rows=rows.train, console=console)
    check_fits(config, model, rows)
    record = record_of(config, model=model, rows=rows, processes=args.world_size)
    quantize_base(config, model, device=args.device)
    if repeats is not None:
        found = differences(repeats, config, record)
        text = "repeating a run: " + ("; ".join(found) if found else "versions, machine, model and data are the same")
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if checkpoint is not None:
        with checkpoint.reading():
            now = {name: record[name] for name in ("fingerprints", "files", "processes")}
            refuse_changes(checkpoint, config=config.to_dict(), **now)
        warn_of_processes(checkpoint, processes=args.world_size)
        record |= checkpoint.carried()
        console.print(f"resuming at step {checkpoint.step} from {checkpoint.folder}", highlight=False, soft_wrap=True)
    measure = partial(evaluate, tokenizer=tokenizer, examples=rows.examples, max_length=config.max_length)
    if checkpoint is None and config.eval.before:
        record["before"] = measure(model, config=config.eval)
    else:
        measure(model, config=first_row(config.eval))

    tuning, trainer = train_rows(
        config,
        args,
        model=model,
        rows=rows,
        tokenizer=tokenizer,
        new_tokens=new_tokens,
        record=record,
        checkpoint=checkpoint,
        console=console,
        stop=stop,
    )
    with no_progress_bars():  # whole tensors are read from the base once more
        delta = tuning.delta()
    delta.info = delta_info(config, trainer=trainer)
    if args.should_save:
        with disk_errors(str(output / "delta"), fix=_GO_ON):
            delta.save(output / "delta")
            if new_tokens is not None:
                save_tokenizer(tokenizer, output / "tokenizer")
    model = finished(tuning, trainer, config=config, delta=delta)
    answers = output / "answers.jsonl" if args.should_save else None
    with disk_errors(str(answers), fix=_GO_ON):
        after = measure(model, config=config.eval, answers_file=answers)
    summary = make_summary(config, tuning=tuning, trainer=trainer, report=rows.report, after=after)
    if args.should_save:
        with disk_errors(str(output / "summary.json"), fix=_GO_ON):
            write_json(output / "summary.json", summary)
    print_result(summary, output=output, console=console)
    return Run(summary=summary, delta=delta, model=model, tokenizer=tokenizer, output_dir=output)


def train_rows(
    config: RunConfig,
    args: TrainingArguments,
    *,
    model: PreTrainedModel,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: NewTokens | None,
    record: dict[str, Any],
    checkpoint: Checkpoint | None,
    console: Console,
    stop: Stop,
) -> tuple[Tuning | PeerTuning, ThriftyTrainer]:
    """Attach, train to the end, and leave the values that are the run's result."""
    collator = partial(collate, pad_token_id=tokenizer.pad_token_id)  # which `load_tokenizer` sees to
    seed = args.data_seed if args.data_seed is not None else args.seed
    meter = MemoryMeter(model)
    display = Display(console=console)
    set_seed(args.seed)
    _put_loss(model, rows.train, collator=collator, seed=seed)
    switch_on_checkpointing(model, args, layers=config.checkpoint_layers)
    try:
        trained = packed_rows(config, rows, model=model, seed=seed, console=console) if config.packing else rows.train
        tuning = attach_with(
            model,
            config.method,
            budget=config.budget,
            batches=probe_batches(config, rows.general or rows.train, collate=collator, seed=seed),
            seed=args.seed,
            loss=probe_loss(args),
            plan=None if checkpoint is None else checkpoint.plan(),
            probe_rows=config.probe_rows,
            new_tokens=new_tokens,
        )
        console.print(f"{tuning.method.name}: {tuning.plan}", highlight=False, markup=False, soft_wrap=True)
        if config.packing and tuning.model is not model:
            check_packing(tuning.model)  # a wrapper may drop the positions
        record.setdefault("probe_seconds", tuning.probe_seconds)
        sharding = parse_sharding(config.training)
        sharded = sharding is not None and shard(tuning, sharding)
        trainer = _trainer(
            config,
            replace(rows, train=trained),
            tokenizer=tokenizer,
            args=args,
            seed=seed,
            tuning=tuning,
            metrics=begin_folder(config, args, checkpoint=checkpoint, record=record),
            stop=stop,
            clock=Clock(tuning.probe_seconds if checkpoint is None else checkpoint.record()["train_seconds"]),
            meter=meter,
            record=record,
            callbacks=[display],
            optimizers=(_own_optimizer(config, args, tuning), None),
        )
        if sharded:
            takes_sharded(trainer)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
        trainer.note_result(best=keeps_best(config))
    finally:
        display.close()
        meter.close()
    return tuning, trainer


def _own_optimizer(
    config: RunConfig, args: TrainingArguments, tuning: Tuning | PeerTuning
) -> torch.optim.Optimizer | None:
    """Thrifty's own, where the run or the method asks for it; None for what `args` say."""
    steps = steps_of(config, tuning.method)
    if steps is None:
        return None
    leaves = tuning.named_leaves()
    return steps.optimizer(leaves, learning_rate=args.learning_rate, weight_decay=args.weight_decay)


def _put_loss(model: PreTrainedModel, rows: Sequence[Row], *, collator: Callable[..., Any], seed: int) -> None:
    """The loss, proved on two of `rows`: the trainer would come too late for the probe."""
    if rows:
        first = row_order(len(rows), seed=seed, epoch=0)
        install(model, prepare(model, sample_batch=collator([rows[i] for i in first[:2]])))


def _trainer(
    config: RunConfig,
    rows: Rows,
    *,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    seed: int,
    **shared: Any,
) -> ThriftyTrainer:
    """What trains: thrifty's own trainer, or TRL's behind the same face. `shared` is what both take."""
    objective = parse_objective(config.objective)
    if objective.uses_trl:
        from .preference import preference_trainer  # TRL is an extra

        return preference_trainer(
            objective, args=args, rows=rows.judged, tokenizer=tokenizer, skips=config.nonfinite == "skip", **shared
        )
    kind = ZeroTrainer if args.deepspeed else ThriftyTrainer
    return kind(
        args=args,
        rows=rows.train,
        eval_rows=rows.eval,
        collate=partial(collate, pad_token_id=tokenizer.pad_token_id),
        order=order_of(args, rows.train, seed=seed),
        origins=partial(origins_of, rows),
        skips=config.nonfinite == "skip",
        patience=config.early_stopping_patience,
        **shared,
    )
