"""What a user sees while training: one live line on a terminal, one plain line per logging step elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from transformers import TrainerCallback, TrainerState, TrainingArguments

__all__ = ["Display", "human_bytes", "human_time"]

_WIDE = 110  # columns in which there is room for a bar beside the figures
_RATES = ("speed", "memory")


def human_bytes(number: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def human_time(seconds: float) -> str:
    """`2:05` or `1:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display(TrainerCallback):
    """Loss, tokens per second, memory and time left. Only the main process shows anything."""

    def __init__(self, *, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: Any = None
        self._start = 0.0
        self._start_step = 0
        self._shown = 0.0
        self._last: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._start, self._start_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero and self._console.is_terminal:
            bar = [BarColumn(bar_width=24)] if self._console.width >= _WIDE else []
            self._progress = Progress(
                TextColumn("step", table_column=Column(min_width=4)),
                MofNCompleteColumn(table_column=Column(min_width=2 * len(str(state.max_steps)) + 1)),
                *bar,
                TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=self._console,
                auto_refresh=False,
            )
            self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step)
            self._progress.start()

    def _left(self, state: TrainerState) -> str:
        done = state.global_step - self._start_step
        if done <= 0:
            return ""
        seconds = (time.perf_counter() - self._start) / done * (state.max_steps - state.global_step)
        return f"{human_time(seconds)} left"

    def _described(self, parts: dict[str, str], state: TrainerState) -> str:
        """Losses and the time left first: what a narrow terminal cuts off is at the end."""
        rates = [parts[name] for name in _RATES if name in parts]
        losses = [text for name, text in parts.items() if name not in _RATES]
        return "  ".join(text for text in [*losses, self._left(state), *rates] if text)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self._progress is None or (now - self._shown < 0.25 and state.global_step < state.max_steps):
            return
        self._shown = now
        description = self._described(self._last, state)
        self._progress.update(self._task, completed=state.global_step, description=description)
        self._progress.refresh()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        shown = {}
        if "loss" in logs:
            shown["loss"] = f"loss {logs['loss']:.4f}"
            shown |= {name: f"{name} {logs[name]:.4f}" for name in ("rewards/margins", "reward") if name in logs}
            shown["speed"] = f"{logs['tokens_per_second']:,.0f} tokens/s"
            shown["memory"] = human_bytes(logs["memory_bytes"])
        if "eval_loss" in logs:
            shown["eval"] = f"eval loss {logs['eval_loss']:.4f}"
        self._last |= shown
        if self._progress is None and shown:
            self.line(f"step {state.global_step}/{state.max_steps}  {self._described(shown, state)}")

    def line(self, text: str) -> None:
        """Print one plain line (above the live one, where there is one)."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; also after an error or Ctrl-C."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
