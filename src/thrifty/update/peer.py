"""Peers: any PEFT method, run through PEFT itself, with the same handle as the in-place methods."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.budget import Budget, distinct_parameters
from ..core.errors import ThriftyError
from ..core.method import Method, Selector
from ..core.plan import Plan
from ..core.quantized import QuantizedLinear, dequantized, give_gradients, is_quantized
from ..core.region import Whole
from ..delta import fingerprint
from ..delta.peer import PeerDelta, beside_quantized, merge
from .sharded import copy_whole, let_go, whole

__all__ = ["NO_NEW_TOKENS", "PeerTuning", "PeftAdapter", "attach_peer", "may_rewrite_base"]

NO_NEW_TOKENS = (
    "tokens cannot be added beside a PEFT method, whose adapter holds no rows of the embedding: "
    "take one of thrifty's own methods, such as smt, or leave the tokens out"
)
"""Why a peer refuses new tokens."""


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """A part that PEFT places: `config` holds the arguments of PEFT's configuration class for `peft_type`."""

    peft_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "peft"

    def selector(self, select: Selector) -> Selector:
        """PEFT places its own parts."""
        return select

    def build(self) -> Any:
        """PEFT's configuration object, fresh."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        return PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type](**copy.deepcopy(dict(self.config)))


def may_rewrite_base(config: Any) -> bool:
    """May this configuration change base weights when it starts (PiSSA, OLoRA, ...)? Only where an init is not the
    default."""
    inits = [f for f in dataclasses.fields(config) if f.name.startswith("init_")]
    return any(getattr(config, f.name) not in (f.default, False, "gaussian") for f in inits)


def _unwrap(model: nn.Module, *, required: Mapping[str, bool], kept: Mapping[str, Tensor]) -> None:
    """Take PEFT's layers off a model on which it failed half-way; `kept` holds weights that it may have rewritten."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, key, child.get_base_layer())
    model.__dict__.pop("peft_config", None)
    for name, p in model.named_parameters():
        p.requires_grad_(required.get(name, p.requires_grad))
        if name in kept:
            p.data.copy_(kept[name])


def _fingerprint(layer: nn.Module | None, weight: Tensor) -> str:
    """Of what a quantized `weight` was before, where its layer knows; of what it stands for; of any other weight."""
    if isinstance(layer, QuantizedLinear) and layer.base_sha256 is not None:
        return layer.base_sha256
    return fingerprint(dequantized(weight))


def attach_peer(model: nn.Module, method: Method, *, budget: Budget | None, seed: int) -> PeerTuning:
    """Put the method's adapter on `model`. A budget is only checked: more than 5 % over is a ThriftyError."""
    from peft import get_peft_model

    adapter = method.parts[0].update
    assert isinstance(adapter, PeftAdapter)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    total = distinct_parameters(model)
    layers = give_gradients(model)
    base = {name: _fingerprint(layers.get(name), p) for name, p in model.named_parameters()}
    config = adapter.build()
    if layers:
        beside_quantized(config)
    if layers and may_rewrite_base(config):
        raise ThriftyError(
            "this PEFT configuration changes base weights when it starts, which a quantized base does not take: leave "
            "its init_* option at the default, or quantize out"
        )
    kept = {n: p.detach().clone() for n, p in model.named_parameters()} if may_rewrite_base(config) else {}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
        tuning = PeerTuning(wrapped, model, method, config=config, total=total, base=base, required=required)
        tuning.check(budget)
    except Exception as error:
        _unwrap(model, required=required, kept=kept)
        if isinstance(error, ThriftyError) or not isinstance(error, ValueError | TypeError):
            raise
        raise ThriftyError(f"PEFT refuses this {adapter.peft_type} configuration: {error}") from error
    return tuning


class PeerTuning:
    """A model under a PEFT method. Train `model`, PEFT's wrapper; everything else as for `Tuning`."""

    probe_seconds = 0.0

    def __init__(
        self,
        wrapped: Any,
        inner: nn.Module,
        method: Method,
        *,
        config: Any,
        total: int,
        base: Mapping[str, str],
        required: Mapping[str, bool],
    ) -> None:
        self.model, self.method, self._inner, self._config, self._total = wrapped, method, inner, config, total
        self._required = required
        leaves = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
        self.plan = Plan(
            dict.fromkeys(leaves, Whole()), shapes={n: tuple(p.shape) for n, p in leaves.items()}, total=total
        )
        self._start = {n: p.detach().clone() for n, p in leaves.items()}
        self._base = self._touched(base)

    @property
    def _leaves(self) -> dict[str, nn.Parameter]:
        """Looked up each time: sharding the model puts other tensors in their places."""
        let_go(self.model)
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.plan}

    def _touched(self, base: Mapping[str, str]) -> dict[str, str]:
        """Fingerprints of the base weights under PEFT's layers."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        touched = {}
        for name, module in self._inner.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            # stacked experts are wrapped tensor by tensor, one wrapper around the other
            key = getattr(module, "parameter_name", "weight")
            weight = f"{name.replace('.base_layer', '')}.{key}"
            if weight in base:
                layer = module.get_base_layer()
                if _fingerprint(layer, getattr(layer, key)) != base[weight]:
                    raise ThriftyError(
                        f"this PEFT configuration changes the base weight {weight} when it starts: its adapter alone "
                        "would not hold the result: leave its init_* option at the default"
                    )
                touched[weight] = base[weight]
        return touched

    def check(self, budget: Budget | None) -> None:
        """The configuration fixes the size; ThriftyError where it is more than 5 % over the budget."""
        trained = self.trainable_parameters
        if budget is None:
            return
        limit = budget.count if budget.count is not None else int((budget.fraction or 0) * self._total)
        if trained > 1.05 * limit:
            raise ThriftyError(
                f"the PEFT configuration trains {trained:,} numbers, more than budget {budget} ({limit:,}) allows: "
                "lower its rank, or remove budget"
            )

    def parameters(self) -> list[nn.Parameter]:
        """PEFT's trainable tensors."""
        return list(self._leaves.values())

    def named_leaves(self) -> dict[str, nn.Parameter]:
        """Name in the wrapper -> tensor."""
        return self._leaves

    def optimizer(self, *, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """AdamW over all leaves."""
        return self.method.optimizer(self.named_leaves(), learning_rate=learning_rate, weight_decay=weight_decay)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return self.plan.trainable_parameters

    @property
    def trainable_share(self) -> float:
        """Trained numbers over the base model's distinct parameters."""
        return self.plan.trainable_share

    def sync(self) -> None:
        """Nothing to write: PEFT adds its parts in forward."""

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """The untouched model, for a reference pass, without gradients."""
        with self.model.disable_adapter(), torch.no_grad():
            yield self.model

    def delta(self) -> PeerDelta:
        """PEFT's adapter as it stands."""
        from peft import get_peft_model_state_dict

        let_go(self.model)
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        config = copy.deepcopy(self.model.peft_config["default"])
        config.inference_mode = True
        return PeerDelta(
            {},
            method=self.method.to_dict(),
            total=self._total,
            state={n: whole(t.detach()).cpu().clone() for n, t in state.items()},
            config=config,
            base=dict(self._base),
        )

    def finish(self) -> nn.Module:
        """The base model object with the adapter merged in; PEFT's wrapper where the method has nothing to merge, and
        on a quantized base, which a merge would round again."""
        if self._config.is_prompt_learning or any(is_quantized(p) for p in self._inner.parameters()):
            self.model.requires_grad_(False)
            return self.model
        merged, self.difference = merge(self.model)
        for name, p in merged.named_parameters():
            p.requires_grad_(self._required.get(name, True))
        return merged

    def state(self) -> dict[str, Tensor]:
        """The trainable tensors, for a checkpoint."""
        return {name: whole(p.detach()) for name, p in self._leaves.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state()` back in place."""
        leaves = self._leaves
        for name in leaves.keys() ^ state.keys():
            raise ThriftyError(
                f"the checkpoint and the adapter differ in {name}: resume with the run's own configuration"
            )
        for name, p in leaves.items():
            copy_whole(state[name], p)

    def check_gradients(self) -> None:
        """After the first backward: ThriftyError names tensors without a gradient."""
        leaves = self._leaves
        without = [name for name, p in leaves.items() if p.grad is None]
        if without:
            raise ThriftyError(
                f"{len(without)} of {len(leaves)} trained tensors got no gradient in the first step, "
                f"first {without[0]}: leave its module out of target_modules"
            )

    def check_changed(self) -> None:
        """After the first step: ThriftyError where no trained value moved."""
        if all(torch.equal(whole(p.detach()), self._start[name]) for name, p in self._leaves.items()):
            raise ThriftyError("no trained value moved in the first step: check the learning rate and the labels")
        self._start = {}
