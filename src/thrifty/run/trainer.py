"""A small subclass of transformers' Trainer: the same steps, delta-only checkpoints, evaluation without logits."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from thrifty.objective.heads import unwrapped
from thrifty.objective.next_token import installed_plan
from thrifty.update.peer import PeerTuning
from thrifty.update.tuning import Tuning

from .checkpoint import Checkpoint, remove_old, write_checkpoint
from .eval_loss import EvalLoss
from .guards import Guards, refuse_lost_loss
from .memory import Clock, MemoryMeter
from .metrics import MetricsFile
from .order import RowOrder
from .schedule import restore, schedule_state
from .state import load_optimizer_state, load_scheduler_state, optimizer_state, random_state, set_random_state

__all__ = ["Row", "ThriftyTrainer"]

Row = dict[str, list[int]]  # input_ids and labels; position_ids where several rows are packed into one


class ThriftyTrainer(Trainer):
    """Trains what `tuning` attached. The loss is the model's own, installed by `objective.next_token.install`.

    `record` goes into every checkpoint beside the clock and the evaluations; `patience` is how many evaluations without
    a lower loss end the run.
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
        self.tuning = tuning
        self.metrics = metrics
        self.clock = clock
        self.meter = meter
        self.record = record
        self.patience = patience
        self.save_at_epoch_end = False
        self.in_epoch = False
        self.slots_seen = record.get("slots", 0)
        self._eval_loss = None if eval_rows is None else EvalLoss(eval_rows, trainer=self)

    # Rows and steps

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        return self.order

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted: the stock estimate walks all parameters at every micro-batch, and is wrong here."""
        return 0

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name != "tokens"})

    def _track_num_input_tokens(self, inputs: Mapping[str, Tensor]) -> None:
        tokens = inputs["tokens" if "tokens" in inputs else "attention_mask"].sum()
        counts = torch.stack([tokens, torch.full_like(tokens, inputs["input_ids"].numel())]).to(self.args.device)
        seen, slots = self.accelerator.gather(counts).reshape(-1, 2).sum(0).tolist()
        self.state.num_input_tokens_seen += seen
        self.slots_seen += slots

    @property
    def padding(self) -> float:
        """The share of padding in all that the steps so far computed."""
        return 1.0 - self.state.num_input_tokens_seen / max(self.slots_seen, 1)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        began = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # the intervals of this configuration, not the checkpoint's
        return began

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.activation_checkpointing:
            # Switching it on made the embeddings' output require a gradient: all layers would be differentiated.
            self.model.disable_input_require_grads()
        return super()._prepare_for_training(*args, **kwargs)

    def _run_epoch(self, **epoch: Any) -> None:
        resumed = epoch["resume_from_checkpoint"]
        if resumed is not None and epoch["epoch"] == epoch["epochs_trained"]:
            running = Checkpoint(Path(resumed)).record()["running"]
            self._tr_loss += running["loss"]
            self._globalstep_last_logged = running["last_logged"]
        if self.is_over:
            self.control.should_training_stop = True  # the stock loop would take one step more
            return
        self.order.set_epoch(epoch["epoch"])
        self.clock.run()
        super()._run_epoch(**epoch)
        self.clock.pause()

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
            metrics = {f"{metric_key_prefix}_loss": self._eval_loss.mean(), "seconds": time.perf_counter() - start}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

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
        if self.in_epoch and float(self.state.epoch or 0).is_integer():
            # A run resumed here starts with the next epoch: what the epoch's end logs and evaluates comes first.
            self.save_at_epoch_end = True
            return
        with self.clock.paused():
            states = {
                "optimizer": optimizer_state(self.optimizer, self.tuning.named_leaves()),
                "scheduler": self.lr_scheduler.state_dict(),
                "random": gather_object([random_state()]),
                **schedule_state(self.tuning),
            }
            if self.accelerator.scaler is not None:
                states["scaler"] = self.accelerator.scaler.state_dict()
            values = self.tuning.state()
            if self.metrics is not None:
                self.metrics.sync()
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                write_checkpoint(
                    folder,
                    values=values,
                    plan=self.tuning.plan,
                    states=states,
                    trainer_state=self._state_json(),
                    record={**self.record, **self.measured()},
                )
                keep = self.args.save_total_limit or 1
                remove_old(folder.parent, keep=keep, best_step=self.state.best_global_step)
            self.accelerator.wait_for_everyone()

    def measured(self) -> dict[str, Any]:
        """What a resumed run carries on: seconds, peak memory, padded positions and the loss not logged yet."""
        return {
            "slots": self.slots_seen,
            "train_seconds": self.clock.seconds,
            "peak_memory_bytes": max(self.meter.peak(), self.record.get("peak_memory_bytes", 0)),
            "running": {"loss": float(self._tr_loss), "last_logged": self._globalstep_last_logged},
        }

    def _state_json(self) -> str:
        state = dataclasses.asdict(self.state)
        # metrics.jsonl keeps the rest; the intervals come from the configuration that resumes.
        state["log_history"] = [entry for entry in self.state.log_history if "eval_loss" in entry]
        return json.dumps(state | {"logging_steps": None, "eval_steps": None, "save_steps": None})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self.tuning.delta().save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.tuning, Checkpoint(Path(resume_from_checkpoint)))

    def note_result(self, *, best: bool) -> None:
        """After training: put back the best values if they are the result, and note which step's values are left."""
        self.clock.pause()
        self.peak_memory_bytes = max(self.meter.peak(), self.record.get("peak_memory_bytes", 0))
        self.result_step = self.state.global_step
        if best and self.state.best_global_step not in (None, self.state.global_step):
            self.result_step = self.state.best_global_step
            self._load_from_checkpoint(str(Path(self.args.output_dir) / f"checkpoint-{self.result_step}"))

    def unwrap(self) -> None:
        """Take accelerate's autocast off the model's forward."""
        own = self.model.__dict__
        if installed_plan(self.model) is not None and "forward" in own and self.model is not unwrapped(self.model):
            own.pop("forward")
            own.pop("_original_forward", None)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            saved = Checkpoint(Path(checkpoint))
            load_optimizer_state(self.optimizer, saved.state("optimizer"), self.tuning.named_leaves())
            load_scheduler_state(self.lr_scheduler, saved.state("scheduler"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(Checkpoint(Path(checkpoint)).state("scaler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = Checkpoint(Path(checkpoint)).state("random")
            set_random_state(states[self.args.process_index % len(states)])
