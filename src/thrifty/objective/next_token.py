"""The next-token loss of any causal language model, with logits only where there are labels, in chunks.

`prepare` proves once, on the model itself, which of three ways gives the model's own loss; `install` puts it inside the
model's forward, so that DDP, FSDP, PEFT wrappers, hooks and autocast around the model keep their meaning.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from thrifty.kernels.label_loss import IGNORED, chunk_rows
from thrifty.objective.head_loss import head_loss
from thrifty.objective.heads import is_plain, own_logits, unwrapped

__all__ = [
    "LossPlan",
    "install",
    "installed_plan",
    "label_count",
    "loss_of",
    "sum_loss",
    "take_autocast_off",
    "uninstall",
]

_RECORD = "_thrifty_loss"
_WANTS_LOGITS = {"logits_to_keep", "output_attentions", "output_hidden_states", "output_router_logits"}


@dataclass(frozen=True, kw_only=True)
class LossPlan:
    """How a model's loss is made.

    Attributes:
        path: `plain_head`: the trunk, then `head_loss` with the head's weight. `own_head`: the trunk, then the model's
            own head and what it does to its logits, chunk by chunk, recomputed in backward. `own_loss`: the model's own
            forward, all logits at once.
        reason: why, in one sentence.
        trunk: dotted name of the module that makes the hidden states; empty for `own_loss`.
        head: dotted name of the head; empty for `own_loss`.
    """

    path: Literal["plain_head", "own_head", "own_loss"]
    reason: str
    trunk: str = ""
    head: str = ""


@dataclass
class _Record:
    """What `install` leaves on the model: the plan, and the forward it found (bound to this model)."""

    plan: LossPlan
    forward: Callable[..., Any]
    own_attribute: bool


def install(model: nn.Module, plan: LossPlan) -> None:
    """Make `model(**batch)` with labels return the loss of `plan`, with `logits` None except on the path `own_loss`.

    The loss is the sum over labels divided by `num_items_in_batch` where that is given, else by the number of labels; a
    batch without a label gives 0, and zero gradients. Calls without labels, or that ask for more than the loss, are the
    model's own. Under a PEFT wrapper the wrapped model is changed. A pickled or deep-copied model stays usable.
    """
    target = unwrapped(model)
    assert installed_plan(model) is None, "a loss plan is installed already"

    @functools.wraps(type(target).forward)  # Trainer and generate read the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    forward._thrifty_loss = True  # type: ignore[attr-defined]
    record = _Record(plan=plan, forward=target.forward, own_attribute="forward" in target.__dict__)
    target.__dict__[_RECORD] = record
    target.forward = MethodType(forward, target)


def uninstall(model: nn.Module) -> None:
    """Give `model` back the forward that `install` found. Nothing happens where nothing is installed."""
    target = unwrapped(model)
    if installed_plan(model) is not None:
        record: _Record = target.__dict__[_RECORD]
        if record.own_attribute:
            target.forward = record.forward
        else:
            del target.__dict__["forward"]
        # accelerate keeps the forward that it wrapped in autocast, which was ours.
        if _is_ours(target.__dict__.get("_original_forward")):
            del target.__dict__["_original_forward"]
    target.__dict__.pop(_RECORD, None)


def take_autocast_off(model: nn.Module) -> None:
    """Take the forward that accelerate put on a wrapper (PEFT's) off, where our loss is installed inside."""
    if installed_plan(model) is not None and "forward" in vars(model) and model is not unwrapped(model):
        del model.__dict__["forward"]
        model.__dict__.pop("_original_forward", None)


def installed_plan(model: nn.Module) -> LossPlan | None:
    """The plan that is at work in `model`, or None."""
    target = unwrapped(model)
    if _RECORD not in target.__dict__ or not _is_ours(target.__dict__.get("forward")):
        return None
    plan: LossPlan = target.__dict__[_RECORD].plan
    return plan


def _is_ours(forward: Any) -> bool:
    while forward is not None:
        if getattr(forward, "_thrifty_loss", False):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    record: _Record = self.__dict__[_RECORD]
    named = dict(zip(inspect.signature(record.forward).parameters, args)) if args else {}
    given = {name: value for name, value in {**named, **kwargs}.items() if value is not None}
    labels = given.get("labels")
    if labels is None or _WANTS_LOGITS & given.keys() or given.get("return_dict") is False:
        return record.forward(*args, **kwargs)
    if record.plan.path == "own_loss":
        return _own_loss(record.forward, given)

    inputs = {
        k: v for k, v in given.items() if k not in {"labels", "num_items_in_batch", "shift_labels", "return_dict"}
    }
    output = self.get_submodule(record.plan.trunk)(**{"use_cache": False, **inputs})
    targets = _targets(given).to(output.last_hidden_state.device)
    total = _summed_loss(self, record, output, targets)
    items = given.get("num_items_in_batch")
    if items is None:
        items = (targets != IGNORED).sum().clamp(min=1)
    return CausalLMOutputWithPast(loss=total / (items.to(total.device) if torch.is_tensor(items) else items))


def _targets(given: Mapping[str, Any]) -> Tensor:
    """What each position predicts: the next label, as in transformers' `ForCausalLMLoss`."""
    shifted: Tensor | None = given.get("shift_labels")
    return F.pad(given["labels"], (0, 1), value=IGNORED)[..., 1:] if shifted is None else shifted


def _summed_loss(self: PreTrainedModel, record: _Record, output: Any, targets: Tensor) -> Tensor:
    head = self.get_submodule(record.plan.head)
    hidden = output.last_hidden_state
    # Looked at again: an adapter put on the head after `prepare` must be trained.
    if record.plan.path == "plain_head" and is_plain(head):
        return head_loss(hidden, head.weight, targets, bias=head.bias)

    trunk = self.get_submodule(record.plan.trunk)

    def chunk_loss(hidden_cD: Tensor, labels_c: Tensor) -> Tensor:
        logits_cV = own_logits(record.forward, trunk, type(output), hidden_cD)
        logits_cV = logits_cV.to(torch.promote_types(logits_cV.dtype, torch.float32))
        return F.cross_entropy(logits_cV, labels_c, ignore_index=IGNORED, reduction="sum")

    hidden_TD, labels_T = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    kept_N = (labels_T != IGNORED).nonzero().squeeze(1)
    if kept_N.numel() == 0:
        kept_N = kept_N.new_zeros(1)  # a row without a label: the loss is 0, and the head still gets its zero gradient
    hidden_ND, labels_N = hidden_TD.index_select(0, kept_N), labels_T.index_select(0, kept_N)
    chunk = chunk_rows(int(self.config.get_text_config().vocab_size))
    losses = [
        checkpoint(chunk_loss, h_cD, labels_c, use_reentrant=False)
        for h_cD, labels_c in zip(hidden_ND.split(chunk), labels_N.split(chunk))
    ]
    return torch.stack(losses).sum()


def _own_loss(forward: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    if "position_ids" in given:
        given = {"use_cache": False, **given}  # with a cache, transformers does not see that rows are packed
    output = forward(**given)
    labels = given["labels"]
    predicted = _targets(given) if labels.dim() > 1 else labels
    if given.get("num_items_in_batch") is None and not (predicted != IGNORED).any():
        output.loss = output.logits.float().sum() * 0.0  # 0 / 0 otherwise
    return output


def label_count(batch: Mapping[str, Tensor]) -> int:
    """How many tokens of `batch` are predicted: labels other than -100, the first of each row left out by the shift."""
    labels = batch["labels"]
    return int((labels[..., 1:] if labels.dim() > 1 else labels).ne(IGNORED).sum())


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean loss over the labels of `batch`: a scalar that can be differentiated."""
    loss: Tensor = model(**batch).loss
    return loss


def sum_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The summed loss over the labels of `batch` (a scalar), and their number."""
    count = label_count(batch)
    return loss_of(model, batch) * count, count
