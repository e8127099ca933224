"""A small subclass of transformers' Trainer: the same steps, delta-only checkpoints, evaluation without logits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from thrifty.objective.next_token import take_autocast_off
from thrifty.update.peer import PeerTuning
from thrifty.update.tuning import Tuning

from .checkpoint import Checkpoint
from .checkpointing import settle_checkpointing
from .eval_loss import EvalLoss
from .guards import Guards, refuse_lost_loss
from .memory import Clock, MemoryMeter
from .metrics import MetricsFile
from .nonfinite import FiniteSteps
from .order import RowOrder, rows_of_step
from .saving import load_optimizer_and_scheduler, load_random, load_running, note_result, save_checkpoint
from .schedule import restore
from .stop import Stop

__all__ = ["Row", "ThriftyTrainer"]

Row = dict[str, list[int]]  # input_ids and labels; position_ids where several rows are packed into one


class ThriftyTrainer(Trainer):
    """Trains what `tuning` attached. The loss is the model's own, installed by `objective.next_token.install`.

    `record` goes into every checkpoint beside the clock and the evaluations; `patience`: how many evaluations without
    a lower loss end the run; `origins`: where row n comes from; `skips`: pass over steps that are not finite.
    """

    control: TrainerControl

    def __init__(
        self,
        *,
        tuning: Tuning | PeerTuning,
        args: TrainingArguments,
        rows: Sequence[Row],
        eval_rows: Sequence[Row] | None,
        collate: Callable[[Sequence[Row]], dict[str, Tensor]],
        metrics: MetricsFile | None,
        clock: Clock,
        meter: MemoryMeter,
        record: Mapping[str, Any],
        order: RowOrder,
        stop: Stop,
        origins: Callable[[int], Sequence[str]] = lambda row: [],
        skips: bool = False,
        patience: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[torch.optim.Optimizer | None, None] = (None, None),
    ) -> None:
        self.order = order
        filler = {name: [-100 if name == "labels" else 0] for name in rows[0]}  # taken only where `order` names it
        self.used_cache = getattr(tuning.model.config, "use_cache", None)  # the stock trainer switches it off
        super().__init__(
            model=tuning.model,
            args=args,
            data_collator=collate,
            train_dataset=ConcatDataset([rows, [filler]]),
            eval_dataset=eval_rows,
            callbacks=[Guards(self, tuning), *callbacks],
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # The installed loss takes `num_items_in_batch`, and predicts label t from hidden state t - 1.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.tuning, self.metrics, self.clock, self.meter, self.record = tuning, metrics, clock, meter, record
        self.patience = patience
        self.save_at_epoch_end = False
        self.in_epoch = False
        self.slots_seen = record.get("slots", 0)
        self.owes_evaluation = False  # of this step, which was broken off
        self.origins = origins
        self.finite = FiniteSteps(self, skips=skips, skipped=record.get("skipped_steps", 0))
        self.stop = stop
        self._told_to_stop = False  # any process, as all know since the last micro-batch
        self._eval_loss = None if eval_rows is None else EvalLoss(eval_rows, trainer=self)

    # Rows and steps

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        return self.order

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted: the stock estimate walks all parameters at every micro-batch, and is wrong here."""
        return 0

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name != "tokens"})

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._loss: Tensor = super().training_step(*args, **kwargs)
        return self._loss

    def _track_num_input_tokens(self, inputs: Mapping[str, Tensor]) -> None:
        """Count a micro-batch's tokens; in the same exchange all processes learn of each other's losses and signals."""
        tokens = inputs["tokens" if "tokens" in inputs else "attention_mask"].sum().to(self.args.device)
        slots, stopped = inputs["input_ids"].numel(), self.stop.number is not None
        counts = torch.stack(
            [tokens, *tokens.new_tensor([slots, stopped]), torch.isfinite(self._loss).to(tokens.dtype)]
        )
        each = self.accelerator.gather(counts).reshape(-1, 4).tolist()
        self.state.num_input_tokens_seen += sum(count[0] for count in each)
        self.slots_seen += sum(count[1] for count in each)
        self._told_to_stop = any(count[2] for count in each)
        self.finite.note(self._loss, [bool(count[3]) for count in each])

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.finite.norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.finite.norm

    def rows_of_step(self, parts: Sequence[tuple[int, int]] | None) -> list[str]:
        """Where the rows of the step under way come from; `parts`: of these (micro-batch, process) only."""
        numbers = rows_of_step(self.order, args=self.args, step=self.state.global_step, parts=parts)
        return list(dict.fromkeys(origin for row in numbers for origin in self.origins(row)))

    @property
    def must_stop(self) -> bool:
        """Whether a signal asks to save and leave; the same in all processes."""
        return self._told_to_stop if self.args.world_size > 1 else self.stop.number is not None

    @property
    def padding(self) -> float:
        """The share of padding in all that the steps so far computed."""
        return 1.0 - self.state.num_input_tokens_seen / max(self.slots_seen, 1)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        resumed = next((value for value in args if isinstance(value, str)), None)
        with Checkpoint(Path(resumed)).reading() if resumed is not None else nullcontext():
            began = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # the intervals of this configuration, not the checkpoint's
        return began

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        settle_checkpointing(self.model, self.args, record=self.record)
        return super()._prepare_for_training(*args, **kwargs)

    def _run_epoch(self, **epoch: Any) -> None:
        resumed = epoch["resume_from_checkpoint"]
        first = resumed is not None and epoch["epoch"] == epoch["epochs_trained"]
        if first and load_running(self, Checkpoint(Path(resumed))) and self._eval_loss is not None:
            self._load_rng_state(resumed)  # for it is saved again, now that its evaluation is made
            self.control.should_evaluate = self.control.should_save = True
            rest = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
            self._maybe_log_save_evaluate(self._tr_loss, None, *(epoch[name] for name in rest))
        if self.is_over:
            self.control.should_training_stop = True  # the stock loop would take one step more
            return
        self.order.set_epoch(epoch["epoch"])
        self.clock.run()
        super()._run_epoch(**epoch)
        self.clock.pause()

    @property
    def _at_end_of_epoch(self) -> bool:
        return self.in_epoch and float(self.state.epoch or 0).is_integer()

    @property
    def is_over(self) -> bool:
        """Whether there is no step left: all were made, or early stopping ended the run."""
        return self.state.global_step >= self.state.max_steps or self._out_of_patience()

    # Evaluation

    def try_evaluation(self) -> None:
        """Run the largest evaluation batch, so that what does not fit fails before the first step."""
        if self._eval_loss is not None and self.args.eval_strategy != "no":
            self._eval_loss.mean(first_batch_only=True)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per label over the evaluation rows."""
        assert self._eval_loss is not None
        assert eval_dataset is None
        start = time.perf_counter()
        with self.clock.paused():
            mean = self._eval_loss.mean(broken_off=self._may_break_off)
        if mean is None:  # broken off: the run is left here
            self.owes_evaluation = True
            self._save_checkpoint(self.model, None)
            self.stop.leave()
        metrics = {f"{metric_key_prefix}_loss": mean, "seconds": time.perf_counter() - start}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _may_break_off(self) -> bool:
        """Whether an evaluation may end early: the only process was told to stop, and can save as things are."""
        return self.args.world_size == 1 and self.must_stop and not self._at_end_of_epoch

    def _determine_best_metric(self, metrics: Mapping[str, float], trial: Any) -> bool:
        best = self.state.best_metric if self.state.best_metric is not None else math.inf
        better = metrics["eval_loss"] < best
        if better:
            self.state.best_metric = metrics["eval_loss"]
            self.state.best_global_step = self.state.global_step
        if self._out_of_patience():
            self.control.should_training_stop = True
        if (better or self.control.should_training_stop) and self.args.save_strategy != SaveStrategy.NO:
            self.control.should_save = True  # whatever save_steps says: the best and the last are always kept
        return better

    def _out_of_patience(self) -> bool:
        if self.patience is None:
            return False
        best = self.state.best_global_step or 0
        since = [entry for entry in self.state.log_history if "eval_loss" in entry and entry["step"] > best]
        return len(since) >= self.patience

    # Reports

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was measured, keep it in `metrics.jsonl`, and tell the display and the trackers."""
        if "train_runtime" in logs:  # the stock closing line; summary.json says it better
            return
        if "loss" in logs:
            refuse_lost_loss(logs["loss"], state=self.state, args=self.args)
            logs["tokens"] = self.state.num_input_tokens_seen
            logs["padding"] = self.padding
            logs["tokens_per_second"] = self.tokens_per_second
            logs["memory_bytes"] = self.meter.now()
            if self.finite.skipped:
                logs["skipped_steps"] = self.finite.skipped
                logs = {name: value for name, value in logs.items() if math.isfinite(value)}  # the norm of a lost step
        logs["train_seconds"] = self.clock.seconds
        logs["epoch"] = round(self.state.epoch or 0.0, 6)
        entry = {"step": self.state.global_step, **logs}
        self.state.log_history.append(entry)
        if self.metrics is not None:
            self.metrics.append(entry)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    @property
    def tokens_per_second(self) -> float:
        """Unpadded tokens over the seconds of the steps alone (no probe, evaluation or saving)."""
        seconds = self.clock.seconds - self.record["probe_seconds"]
        return self.state.num_input_tokens_seen / seconds if seconds > 0 else 0.0

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._at_end_of_epoch:
            # A run resumed here starts with the next epoch: what the epoch's end logs and evaluates comes first.
            self.save_at_epoch_end = True
            return
        with self.clock.paused():
            save_checkpoint(self)
        self.owes_evaluation = False
        if self.must_stop:
            self.stop.leave()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self.tuning.delta().save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with (saved := Checkpoint(Path(resume_from_checkpoint))).reading():
            restore(self.tuning, saved)

    def note_result(self, *, best: bool) -> None:
        """After training: put back the best values if they are the result, and note which step's values are left."""
        note_result(self, best=best)

    def unwrap(self) -> None:
        """Take accelerate's autocast off the model's forward."""
        take_autocast_off(self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer_and_scheduler(self, Checkpoint(Path(checkpoint)))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Loaded with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random(self, Checkpoint(Path(checkpoint)))
