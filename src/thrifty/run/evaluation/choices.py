"""Multiple choice by likelihood: the option whose tokens, end of turn included, are the likeliest after the prompt.

Names: B rows (one per question and option), T tokens, D hidden size, N labelled tokens of one row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from thrifty.core.errors import ThriftyError
from thrifty.data import Encoded, Example, answer, collate, encode_options, options
from thrifty.kernels.label_loss import IGNORED, chunk_rows, label_loss
from thrifty.objective import installed_plan
from thrifty.objective.heads import own_logits, unwrapped

__all__ = ["choose", "option_lists", "row_losses"]

_MOST_ANSWERS = 10  # distinct answers of a data set that may stand for its options
_NO_CUT = 2**31  # options of a row that was cut could not be told apart


def option_lists(
    examples: Sequence[Example], *, given: Sequence[str] | None, among: Sequence[Example]
) -> list[list[str]]:
    """The options of each row: its own `choices`, else `given` (eval.choices), else the distinct answers of `among`.

    Raises `ThriftyError` where none of the three gives options, or where a row's answer is none of its options.
    """
    shared = [text.strip() for text in given] if given else None
    found = []
    for example in examples:
        own = options(example)
        if own is None and shared is None:
            shared = _distinct_answers(among, example)
        texts = [text.strip() for text in own] if own is not None else list(shared or ())
        reference = (answer(example) or "").strip()
        if reference not in texts:
            raise ThriftyError(
                f"{example.origin}: the answer {_short(reference)} is none of its options "
                f"({', '.join(map(_short, texts))}): write the answer as one of them, or set eval.choices"
            )
        found.append(texts)
    return found


def _distinct_answers(among: Sequence[Example], example: Example) -> list[str]:
    distinct = list(dict.fromkeys((answer(other) or "").strip() for other in among))
    if not 2 <= len(distinct) <= _MOST_ANSWERS:
        raise ThriftyError(
            f"{example.origin}: no options to choose from: the row has no `choices`, eval.choices is not set, and the "
            f"evaluation rows have {len(distinct)} distinct answers (2 to {_MOST_ANSWERS} would serve as options)"
        )
    return distinct


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def choose(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    option_texts: Sequence[Sequence[str]],
    *,
    batch_size: int,
) -> list[int]:
    """The index of the likeliest option of each row, the first of equals. Inside `evaluating`."""
    rows: list[Encoded] = []
    for example, texts in zip(examples, option_texts):
        rows += encode_options(example, texts, tokenizer, max_length=_NO_CUT)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    losses = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        batch = collate([{"input_ids": rows[i].input_ids, "labels": rows[i].labels} for i in picked], pad_token_id=0)
        for i, loss in zip(picked, row_losses(model, batch)):
            losses[i] = loss
    chosen, start = [], 0
    for texts in option_texts:
        own = losses[start : start + len(texts)]
        chosen.append(own.index(min(own)))
        start += len(texts)
    return chosen


def row_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> list[float]:
    """The summed loss over the labels of each row of `batch`: minus the log-likelihood of its option.

    The trunk runs once for all rows, through the model's own forward (and so through what wraps it); its output is
    kept, and the head sees labelled positions only. Inside `evaluating`.
    """
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    targets_BT = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    plan = installed_plan(model)
    assert plan is not None, "row_losses works inside `evaluating`"
    if plan.path == "own_loss":
        logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits_BTV = logits_BTV[:, -targets_BT.shape[1] :]
        return [
            float(F.cross_entropy(logits_TV[kept], targets_T[kept], reduction="sum"))
            for logits_TV, targets_T in zip(logits_BTV.float(), targets_BT)
            for kept in (targets_T != IGNORED,)
        ]
    target = unwrapped(model)
    trunk, head = target.get_submodule(plan.trunk), target.get_submodule(plan.head)
    outputs: list[Any] = []
    handle = trunk.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        model(**{**batch, "labels": torch.full_like(batch["labels"], IGNORED)})  # the head is run below, row by row
    finally:
        handle.remove()
    output = outputs[0]  # later calls are the stub that the head runs behind
    hidden_BTD = output.last_hidden_state[:, -targets_BT.shape[1] :]  # virtual prompt tokens stand before
    losses = []
    for hidden_TD, targets_T in zip(hidden_BTD, targets_BT):
        if plan.path == "plain_head":
            losses.append(float(label_loss(hidden_TD, head.weight, targets_T, bias=head.bias)))
        else:
            losses.append(_own_head_loss(target, trunk, type(output), hidden_TD, targets_T))
    return losses


def _own_head_loss(target: Any, trunk: nn.Module, output: type, hidden_TD: Tensor, targets_T: Tensor) -> float:
    kept = targets_T != IGNORED
    chunk = chunk_rows(int(target.config.get_text_config().vocab_size))
    total = 0.0
    for hidden_cD, targets_c in zip(hidden_TD[kept].split(chunk), targets_T[kept].split(chunk)):
        logits_cV = own_logits(target.forward, trunk, output, hidden_cD)
        total += float(F.cross_entropy(logits_cV.float(), targets_c, reduction="sum"))
    return total
