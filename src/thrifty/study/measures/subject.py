"""What is measured: a model with a task's evaluation rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from thrifty.core.errors import ThriftyError
from thrifty.data import Example
from thrifty.run.evaluation import Answered, answer_all, questions

__all__ = ["Found", "Subject"]

# By name: {"rows": [[numerator, denominator], ...]}, or {"score": x} where there are no rows.
Found = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and the rows that it is measured on.

    Attributes:
        model: a causal language model, on its device.
        tokenizer: the model's.
        examples: the task's evaluation rows; measures of n rows take the first n.
        max_length: tokens at which rows and windows are cut where their loss is measured.
        batch_size: rows at once.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Example]
    max_length: int
    batch_size: int = 16
    _answered: list[Answered] = field(default_factory=list, init=False, repr=False, compare=False)

    def first(self, rows: int | bool, *, name: str) -> Sequence[Example]:
        """The first `rows` examples; all of them for True. ThriftyError where there are none."""
        if not self.examples:
            raise ThriftyError(f"{name} needs evaluation rows: give the task an `eval` file")
        return self.examples if rows is True else self.examples[:rows]

    def answers(self, rows: int | bool, *, name: str = "answers") -> list[Answered]:
        """The greedy answers to the first `rows` examples (True: all), generated once. Inside `evaluating`.

        They are as many tokens at most as the longest reference among those that are generated together, and 16 more.
        Ask for the largest number first: for more rows than before, all are generated again.
        """
        asked = self.first(rows, name=name)
        if len(self._answered) < len(asked):
            found = questions(asked, self.tokenizer)
            self._answered[:] = answer_all(self.model, self.tokenizer, found, batch_size=self.batch_size)
        return self._answered[: len(asked)]
