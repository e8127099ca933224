"""One training step of a model without values: its memory by segment, and its work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import masking_utils

from ..kernels.label_loss import chunk_rows
from ..objective.heads import head_name, trunk_names, unwrapped
from ..objective.next_token import LossPlan, install
from ..select.recompute import recomputed_layers
from ..update.strips import merge_pending
from .job import Job
from .ledger import Ledger, Segment
from .skeleton import cut, fake, layers_of, quiet
from .unroll import Allocation

__all__ = ["Trace", "fused_dropout", "loss_plan", "trace"]

_OWN_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # configuration keys


@dataclass
class Trace:
    """What one step did. Bytes exclude the weights; `saved` is what autograd holds when the loss is computed."""

    peaks: dict[Segment, Counter[str]] = field(default_factory=dict)
    work: Counter[str] = field(default_factory=Counter)
    saved: int = 0
    events: list[Allocation] = field(default_factory=list, repr=False)
    gradient_bytes: int = 0


def loss_plan(model: nn.Module) -> LossPlan:
    """How a run would compute the loss, told from the configuration; a run proves it on the weights."""
    inner = unwrapped(model)
    trunks, head = trunk_names(inner), head_name(inner)
    config: Any = inner.config.get_text_config()
    if not trunks or head is None:
        return LossPlan(path="own_loss", reason="no trunk and head were found")
    own = any(getattr(config, key, None) not in (None, 0, 1, 1.0) for key in _OWN_LOGITS)
    return LossPlan(path="own_head" if own else "plain_head", reason="by the configuration", trunk=trunks[0], head=head)


def trace(job: Job, model: nn.Module, numbers: Sequence[int], *, probe: bool = False) -> Trace:
    """A step of the attached `model` (meta device, left as it is) with the layers `numbers` alone; of the probe if
    `probe`."""
    copied = cut(model, numbers)
    inner = unwrapped(copied)
    plan = loss_plan(copied)
    if job.checkpointing and inner.supports_gradient_checkpointing:
        inner.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        inner.disable_input_require_grads()
        parent, name = layers_of(inner)
        for number, layer in zip(numbers, getattr(parent, name), strict=True):
            layer.gradient_checkpointing = probe or job.recomputes(number)
    rows = job.probe_rows if probe else job.rows
    tokens = rows * job.length
    wanted = max(1, round(job.labels * tokens))
    chunk = chunk_rows(int(inner.config.get_text_config().vocab_size))
    labels = wanted if plan.path == "own_loss" else min(wanted, chunk)
    result, mode = Trace(), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        held = fake(copied)
    if probe:
        copied.eval()
    leaves = [p for p in copied.parameters() if p.requires_grad]
    install(copied, plan)
    batch = _batch(rows, job, mode)
    with quiet(), _unpacked():
        _share_strips(copied, batch, mode)
        ledger = Ledger(held, labels=labels)
        _watch(copied, plan, ledger)
        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(_drop if probe else _marking(ledger))
        cast = nullcontext() if job.autocast is None else torch.autocast("cpu", job.autocast)
        recomputed = recomputed_layers(copied) if probe else nullcontext()
        with mode, recomputed, ledger:
            with cast:
                loss = copied(**batch).loss
            result.saved = ledger.live["activations"] + ledger.live["head"]
            ledger.enter(("head", 0), kind="working")
            if loss.requires_grad:
                loss.backward()
        result.events = list(ledger.events)
    result.gradient_bytes = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    result.peaks = {segment: Counter(kinds) for segment, (_, kinds) in ledger.peaks.items()}
    factor = wanted / labels
    for segment, work in ledger.work.items():
        scale = factor if segment[0] == "loss" else 1.0  # chunk after chunk in one table
        result.work.update({sort: amount * (1.0 if sort == "mapped" else scale) for sort, amount in work.items()})
    _more_labels(result, copied, job, labels=wanted - labels)
    return result


def _batch(rows: int, job: Job, mode: FakeTensorMode) -> dict[str, Tensor]:
    with mode:
        ids = torch.zeros((rows, job.length), dtype=torch.int64)
        batch = {"input_ids": ids, "labels": torch.zeros_like(ids)}
        return batch | ({"attention_mask": torch.ones_like(ids)} if job.padded else {})


@contextmanager
def _unpacked() -> Iterator[None]:
    """transformers looks at positions for rows that are packed into one, and without values takes them for such."""
    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


@contextmanager
def fused_dropout() -> Iterator[None]:
    """Dropout as on a GPU: one operation, whose mask has a byte a number. On a processor it is three, with a mask as
    large as the input."""
    found = functional.dropout

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and 0 < p < 1 else found(input, p, training, inplace)

    functional.dropout = dropout
    try:
        yield
    finally:
        functional.dropout = found


def _share_strips(model: nn.Module, batch: dict[str, Tensor], mode: FakeTensorMode) -> None:
    """Matrices that read the same input share a strip from the second step on: see who does, and let them."""
    if any(hasattr(module, "_thrifty") for module in model.modules()):
        with mode, Ledger([], labels=1):  # which knows shapes that depend on values
            trunk = unwrapped(model).base_model
            trunk(**{name: tensor[:1, :8] for name, tensor in batch.items() if name != "labels"})
        merge_pending()


def _drop(p: Tensor) -> None:
    p.grad = None


def _marking(ledger: Ledger) -> Callable[[Tensor], None]:
    return lambda p: ledger.mark(p.grad, "gradients")


def _watch(model: nn.Module, plan: LossPlan, ledger: Ledger) -> None:
    """Tell `ledger` which layer runs, forward and backward."""
    inner = unwrapped(model)
    parent, name = layers_of(inner)

    def begins(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if ledger.kind == "activations":  # not where a layer is computed again in backward
                ledger.enter(("forward", number))

        return hook

    def ends(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if ledger.kind == "activations" and isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _: ledger.enter(("backward", number)))

        return hook

    for number, layer in enumerate(getattr(parent, name)):
        layer.register_forward_pre_hook(begins(number))
        layer.register_forward_hook(ends(number))
    if plan.trunk:
        inner.get_submodule(plan.trunk).register_forward_hook(lambda *_: ledger.enter(("loss", 0), kind="head"))


def _more_labels(result: Trace, model: nn.Module, job: Job, *, labels: int) -> None:
    """Rows of the label-only loss beyond those traced: their hidden states and gradients (`kernels/label_loss.py`)."""
    width = int(unwrapped(model).config.get_text_config().hidden_size)
    size = (job.autocast or job.dtype).itemsize
    row = width * size
    for segment, copies in ((("loss", 0), 2), (("head", 0), 3)):
        if segment in result.peaks and labels:
            result.peaks[segment]["head"] += labels * row * copies
    result.saved += labels * row
