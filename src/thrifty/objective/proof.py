"""Which way to make a model's loss is proved on the model itself: no list of families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from thrifty.kernels.label_loss import IGNORED
from thrifty.objective.heads import evaluation_mode, head_name, is_plain, own_logits, trunk_names, unwrapped
from thrifty.objective.next_token import LossPlan, install, installed_plan, label_count, uninstall

__all__ = ["FOREIGN_ERRORS", "difference", "label_only", "prepare"]

_ROWS, _LENGTH = 2, 64  # of the batch that is compared
_PROBE_LOGITS = 100.0  # standard deviation of the probe's logits: a soft cap cannot be seen at small ones
# What foreign code raises when it is called in a way that it does not know.
FOREIGN_ERRORS = (AttributeError, TypeError, ValueError, RuntimeError, LookupError, NotImplementedError)


@contextmanager
def label_only(model: nn.Module, *, sample_batch: Mapping[str, Tensor] | None = None) -> Iterator[LossPlan]:
    """Inside, `model(**batch)` makes the label-only loss; on leaving, the forward is what it was. May be nested."""
    plan = installed_plan(model)
    if plan is not None:
        yield plan
        return
    plan = prepare(model, sample_batch=sample_batch)
    install(model, plan)
    try:
        yield plan
    finally:
        uninstall(model)


def prepare(model: nn.Module, *, sample_batch: Mapping[str, Tensor] | None = None) -> LossPlan:
    """Choose how to make the loss of `model`, and prove on one small masked batch that it is the model's own.

    Args:
        model: a causal language model, or a PEFT wrapper around one. It is left as it was.
        sample_batch: a batch as in training; its first two rows and 64 positions are used. Random tokens otherwise.
    """
    assert installed_plan(model) is None, "prepare looks at the model's own loss: uninstall first"
    target = unwrapped(model)
    if not isinstance(target, PreTrainedModel):
        return LossPlan(path="own_loss", reason=f"{type(target).__name__} is not a transformers model")
    with evaluation_mode(model), torch.no_grad():
        return _prove(model, target, _probe_batch(target, sample_batch))


def _prove(model: nn.Module, target: PreTrainedModel, batch: Mapping[str, Tensor]) -> LossPlan:
    head = head_name(target)
    if head is None:
        return LossPlan(path="own_loss", reason="the model names no output embedding")
    own = model(**batch)
    if getattr(own, "aux_loss", None) is not None:
        return LossPlan(path="own_loss", reason="the model adds a router loss to the next-token loss")

    tolerance = 5e-5 if next(target.parameters()).dtype in (torch.float32, torch.float64) else 1e-2
    tried = []
    for trunk in trunk_names(target):
        try:
            plan = _candidate(target, trunk, head, batch, tolerance)
            install(model, plan)
            try:
                loss = model(**batch).loss
            finally:
                uninstall(model)
        except FOREIGN_ERRORS as error:
            tried.append(f"{trunk}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        if torch.allclose(loss.double(), own.loss.double(), rtol=tolerance, atol=0.0):
            return plan
        tried.append(f"{trunk}: loss {loss.item():.6g}, the model's own {own.loss.item():.6g}")
    return LossPlan(path="own_loss", reason=f"no trunk gives the model's own loss ({'; '.join(tried) or 'none found'})")


def _candidate(
    target: PreTrainedModel, trunk: str, head: str, batch: Mapping[str, Tensor], tolerance: float
) -> LossPlan:
    """The plan for one trunk. RuntimeError where its hidden states do not lead to the model's logits."""
    module, linear = target.get_submodule(trunk), target.get_submodule(head)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits_TV = target(**inputs).logits.flatten(0, 1)
    output = module(use_cache=False, **inputs)
    hidden_TD = output.last_hidden_state.flatten(0, 1)
    apart = difference(own_logits(target.forward, module, type(output), hidden_TD), logits_TV)
    if not apart <= 2 * tolerance:
        raise RuntimeError(f"its hidden states give other logits than the model (by up to {apart:.0%})")

    if not is_plain(linear):
        reason = f"the head is a {type(linear).__name__}, not a plain linear layer: it runs itself, in chunks"
        return LossPlan(path="own_head", reason=reason, trunk=trunk, head=head)
    weight_VD = linear.weight
    noise_TD = torch.randn(8, hidden_TD.shape[1], generator=torch.Generator().manual_seed(0)).to(weight_VD.device)
    large_TD = (noise_TD * _PROBE_LOGITS / weight_VD[:64].float().norm(dim=1).mean()).to(weight_VD.dtype)
    own_TV = own_logits(target.forward, module, type(output), large_TD)
    fits = large_TD.shape[1] == weight_VD.shape[1]
    apart = difference(F.linear(large_TD, weight_VD, linear.bias), own_TV) if fits else 1.0
    if apart <= 2 * tolerance:
        return LossPlan(path="plain_head", reason="the logits are the head's, unchanged", trunk=trunk, head=head)
    reason = f"the model changes its head's input or logits (by up to {apart:.0%}): its own head runs, in chunks"
    return LossPlan(path="own_head", reason=reason, trunk=trunk, head=head)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest value in them."""
    one, other = one.float(), other.float()
    return float((one - other).abs().max() / torch.maximum(one.abs(), other.abs()).max())


def _probe_batch(model: PreTrainedModel, sample: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A small batch with labels, on the model's device."""
    device = next(model.parameters()).device
    if sample is not None:
        shape = sample["input_ids"].shape
        batch = {
            name: (value[:_ROWS, :_LENGTH] if value.shape == shape else value[:_ROWS]).to(device)
            for name, value in sample.items()
        }
        if label_count(batch) == 0 and batch["labels"].dim() > 1:
            batch["labels"] = batch["input_ids"]
        return batch
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (_ROWS, 12), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids.clone()
    labels[0, :5] = IGNORED
    labels[1, 9:] = IGNORED
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
