"""Whether a model keeps packed rows apart is proved on the model itself: no list of families.

A packed row is several rows one after another, `position_ids` starting at 0 in each, without an attention mask. From
such positions transformers makes a block-diagonal mask (`masking_utils.find_packed_sequence_indices`), provided that no
mask and no cache is given. Recurrent layers, ALiBi and models that count positions themselves do not, and would train
each row on the text before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thrifty.core.errors import ThriftyError
from thrifty.data import PackedRows, collate
from thrifty.kernels.label_loss import IGNORED
from thrifty.objective.heads import evaluation_mode, unwrapped
from thrifty.objective.next_token import installed_plan, loss_of, sum_loss
from thrifty.objective.proof import FOREIGN_ERRORS, difference

__all__ = ["check_packing"]

_PACKS = ((7, 12, 5), (9, 10))  # tokens of the rows in two packed rows of one batch; the second is padded
_WIDE, _NARROW = 1e-4, 5e-2  # float32 and float64; 16-bit types, whose sums round apart


def check_packing(model: nn.Module) -> None:
    """ThriftyError where a packed row is not to `model` what its rows are alone.

    Five random rows of 5 to 12 tokens, alone and in two packed rows of one batch, in evaluation mode:
    - the logits differ by rounding only, less than 1e-4 of the largest (5e-2 for 16-bit weights), and so does the loss;
    - the gradient of one row's loss is exactly 0 at the tokens of all others, in any dtype.

    Args:
        model: a causal language model or a PEFT wrapper around one, left as it was. Its loss plan is installed: a stock
            forward may keep a cache, and then transformers does not see that rows are packed.
    """
    assert installed_plan(model) is not None, "the loss that trains is the one to prove"
    config = unwrapped(model).config
    refused = f"packing: model type {config.model_type!r} cannot be trained on packed rows"
    try:
        with evaluation_mode(model), _frozen(model):
            found = _measure(model)
    except FOREIGN_ERRORS as error:
        said = str(error).splitlines()[0] if str(error) else ""
        raise ThriftyError(f"{refused} ({type(error).__name__}: {said}): set packing: false") from error
    wide = next(model.parameters()).dtype in (torch.float32, torch.float64)
    tolerance = _WIDE if wide else _NARROW
    # Written so that a NaN is refused.
    if not found.logits <= tolerance:
        raise ThriftyError(f"{refused} (logits change by up to {found.logits:.2%}): set packing: false")
    if not found.leak == 0.0:
        raise ThriftyError(f"{refused} (a row's loss depends on the rows beside it): set packing: false")
    if not found.loss <= tolerance:
        raise ThriftyError(f"{refused} (their loss changes by {found.loss:.2%}): set packing: false")


@dataclass(frozen=True, kw_only=True)
class _Found:
    """How packed rows differ from the rows alone: logits and summed loss, relative; the largest foreign gradient."""

    logits: float
    loss: float
    leak: float


def _measure(model: nn.Module) -> _Found:
    target = unwrapped(model)
    device = next(target.parameters()).device
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in [length for lengths in _PACKS for length in lengths]:
        ids = torch.randint(0, int(target.config.get_text_config().vocab_size), (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    first = len(_PACKS[0])
    together = list(PackedRows(rows, [range(first), range(first, len(rows))]))
    packed = {name: value.to(device) for name, value in collate(together, pad_token_id=0).items()}
    tokens = packed.pop("tokens").tolist()
    alone = [{name: value.to(device) for name, value in collate([row], pad_token_id=0).items()} for row in rows]
    with torch.no_grad():
        own_TV = torch.cat([_logits(model, {"input_ids": one["input_ids"]})[0] for one in alone])
        logits_BTV = _logits(model, {name: packed[name] for name in ("input_ids", "position_ids")})
        packed_TV = torch.cat([logits_TV[:count] for logits_TV, count in zip(logits_BTV, tokens)])
        losses, counts = zip(*(sum_loss(model, one) for one in alone))
        total, count = sum_loss(model, packed)
    assert count == sum(counts), "labels were lost in packing"
    own = float(torch.stack(losses).sum())
    return _Found(logits=difference(packed_TV, own_TV), loss=abs(float(total) - own) / own, leak=_leak(model, packed))


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[B, T, V]; a prompt's virtual tokens, which stand before, are left out."""
    logits_BTV: Tensor = model(**inputs, use_cache=False).logits
    return logits_BTV[:, -inputs["input_ids"].shape[1] :]


def _leak(model: nn.Module, packed: dict[str, Tensor]) -> float:
    """The largest gradient that the loss of the first packed row's last part leaves at tokens outside that part."""
    start, end = sum(_PACKS[0][:-1]), sum(_PACKS[0])
    labels_BT = torch.full_like(packed["labels"], IGNORED)
    labels_BT[0, start:end] = packed["labels"][0, start:end]
    embedded: list[Tensor] = []

    def watch(module: nn.Module, args: object, output: Tensor) -> None:
        embedded.append(output.requires_grad_())

    handle = unwrapped(model).get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            loss = loss_of(model, {**packed, "labels": labels_BT})
            (gradient_BTD,) = torch.autograd.grad(loss, embedded[0])
    finally:
        handle.remove()
    assert bool(gradient_BTD[0, start:end].any()), "the watched part has no gradient itself"
    gradient_BTD[0, start:end] = 0.0
    return float(gradient_BTD.abs().max())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, so that none is made for a whole head."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
