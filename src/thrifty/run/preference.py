"""DPO, KTO and GRPO: TRL's own trainers, on a model that is its own reference.

The reference log-probabilities come from the same weights with the trained values taken out (`tuning.base()`), not from
a second model. Imported only where TRL is installed.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOTrainer, GRPOTrainer, KTOTrainer

from thrifty.core.errors import ThriftyError
from thrifty.data import chat_template
from thrifty.objective.heads import unwrapped
from thrifty.update.peer import PeerTuning
from thrifty.update.tuning import Tuning

from .checkpointing import settle_checkpointing
from .guards import Guards, refuse_lost_loss
from .memory import Clock, MemoryMeter
from .metrics import MetricsFile
from .nonfinite import FiniteSteps
from .objectives import Objective
from .rewards import reward_functions
from .stop import Stop

__all__ = ["Reference", "preference_trainer"]

_FORWARDS = ("forward", "_original_forward")


class Reference(nn.Module):
    """The base model under the trained values, without a weight of its own: each call takes those values out, in place,
    and puts them back. Dropout is off."""

    def __init__(self, tuning: Tuning | PeerTuning) -> None:
        super().__init__()
        self._tuning = tuning

    @property
    def config(self) -> Any:
        """The model's own."""
        return self._tuning.model.config

    def __call__(self, *args: Any, **inputs: Any) -> Any:  # not `forward`, which TRL and accelerate replace
        modes = [(module, module.training) for module in self._tuning.model.modules()]
        try:
            with self._tuning.base() as base:
                base.eval()
                return base(*args, **inputs)
        finally:
            for module, training in modes:
                module.training = training

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """As a call."""
        return self(*args, **inputs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's: what TRL names precomputed log-probabilities by."""
        return self._tuning.model.state_dict(*args, **kwargs)


class _Reported:
    """What a run needs of TRL's trainers beside training: its metrics, guards and figures. Nothing is sent anywhere."""

    in_epoch = save_at_epoch_end = is_over = must_stop = False  # what `Guards` asks of a trainer with checkpoints
    padding = None

    def __init__(
        self,
        *,
        tuning: Tuning | PeerTuning,
        metrics: MetricsFile | None,
        clock: Clock,
        meter: MemoryMeter,
        record: Mapping[str, Any],
        callbacks: Sequence[TrainerCallback],
        stop: Stop,
        skips: bool,
        **options: Any,
    ) -> None:
        self.stop, self.finite = stop, FiniteSteps(self, skips=skips)
        self.tuning, self.metrics, self.clock, self.meter, self.record = tuning, metrics, clock, meter, record
        self.used_cache = getattr(tuning.model.config, "use_cache", None)
        models = {id(model): model for model in (tuning.model, unwrapped(tuning.model))}.values()
        self._forwards = [(model, {k: vars(model)[k] for k in _FORWARDS if k in vars(model)}) for model in models]
        super().__init__(model=tuning.model, callbacks=[Guards(self, tuning), *callbacks], **options)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""

    def count_tokens(self) -> None:
        """Note the unpadded tokens of all steps so far."""
        self.state.num_input_tokens_seen = int(self._total_train_tokens)

    def try_evaluation(self) -> None:
        """Nothing is evaluated while it trains."""

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        settle_checkpointing(self.model, self.args, record=self.record)
        return super()._prepare_for_training(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.run()
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.finite.note(loss, [bool(loss.isfinite())])
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.finite.norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.finite.norm

    def rows_of_step(self, parts: Sequence[tuple[int, int]] | None) -> list[str]:
        """Not known: TRL orders the rows."""
        return []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().compute_loss(*args, **kwargs)
        except ValueError as error:
            if not str(error).startswith("Unknown"):  # loss types are looked at no earlier
                raise
            raise ThriftyError(f"objective: {' '.join(str(error).split())}") from error

    @property
    def tokens_per_second(self) -> float:
        """Unpadded tokens that the loss took in, over the seconds of the steps alone (no probe)."""
        seconds = self.clock.seconds - self.record["probe_seconds"]
        return self.state.num_input_tokens_seen / seconds if seconds > 0 else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL logs, and into `metrics.jsonl`."""
        if "train_runtime" in logs:  # the stock closing line; summary.json says it better
            return
        if "loss" in logs:
            refuse_lost_loss(logs["loss"], state=self.state, args=self.args)
            self.count_tokens()
            logs["tokens"] = self.state.num_input_tokens_seen
            logs["tokens_per_second"] = self.tokens_per_second
            logs["memory_bytes"] = self.meter.now()
        super().log(logs, start_time)
        if self.metrics is not None:
            self.metrics.append(self.state.log_history[-1])

    def note_result(self, *, best: bool) -> None:
        """After training: what the summary tells. The last values are the result."""
        assert not best
        self.clock.pause()
        self.count_tokens()
        self.peak_memory_bytes, self.result_step = self.meter.peak(), self.state.global_step

    def unwrap(self) -> None:
        """Put back the forward that TRL and accelerate replaced."""
        for model, forwards in self._forwards:
            for name in _FORWARDS:
                vars(model).pop(name, None)
            vars(model).update(forwards)


class _Dpo(_Reported, DPOTrainer):
    """Pairs: Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290)."""


class _Kto(_Reported, KTOTrainer):
    """Judged answers: Ethayarajh et al., "KTO" (arXiv 2402.01306)."""


class _Grpo(_Reported, GRPOTrainer):
    """Rewarded answers: Shao et al., "DeepSeekMath" (arXiv 2402.03300)."""

    def __init__(self, *, args: Any, tuning: Tuning | PeerTuning, **options: Any) -> None:
        beta, args.beta = args.beta, 0.0  # above 0, TRL would load the reference from the model's own folder
        super().__init__(args=args, tuning=tuning, **options)
        self.beta = args.beta = beta
        if beta != 0.0:
            self.ref_model = Reference(tuning)

    def count_tokens(self) -> None:
        """TRL notes them itself: those of prompts and completions."""


def preference_trainer(
    objective: Objective,
    *,
    tuning: Tuning | PeerTuning,
    args: TrainingArguments,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    **reported: Any,
) -> Any:
    """TRL's trainer for `objective` over `rows`, ready to train what `tuning` attached.

    `reported` is what `_Reported` takes. ThriftyError for what TRL refuses.
    """
    if args.world_size > 1:
        raise ThriftyError(
            f"objective {objective.name} trains in one process, not in {args.world_size}: start it without torchrun"
        )
    tokenizer = copy.deepcopy(tokenizer)  # the run measures with its own
    if not tokenizer.chat_template:
        tokenizer.chat_template = chat_template(tokenizer)  # the form in which conversations are written here
    rows = list(rows)
    if objective.name == "kto":
        random.Random(args.seed).shuffle(rows)  # TRL takes them in their order, and files often group the labels
    options: dict[str, Any] = {"args": args, "processing_class": tokenizer, "train_dataset": Dataset.from_list(rows)}
    try:
        with _no_bars():
            if objective.name == "grpo":
                _check_prompts(rows, tokenizer, tuning=tuning, args=args)
                rewards = reward_functions(objective.options["reward_funcs"])
                return _Grpo(tuning=tuning, reward_funcs=rewards, **options, **reported)
            kind = {"dpo": _Dpo, "kto": _Kto}[objective.name]
            return kind(tuning=tuning, ref_model=Reference(tuning), **options, **reported)
    except ThriftyError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise ThriftyError(f"objective {objective.name}: TRL refuses: {' '.join(str(error).split())}") from error


def _check_prompts(rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, tuning: Any, args: Any) -> None:
    """ThriftyError where a prompt and its completion would not fit in the model; TRL cuts no prompt."""
    positions = getattr(tuning.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return
    for row in rows:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        length = len(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)
        if length + args.max_completion_length > positions:
            raise ThriftyError(
                f"objective grpo: a prompt of {length} tokens and max_completion_length={args.max_completion_length} "
                f"do not fit in the model's {positions} positions: lower it, or leave the row out"
            )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Inside, `datasets` draws no progress bars."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
