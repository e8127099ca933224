"""PEFT's tuner for SMT: finds the targets, draws blocks where none are given, and puts the layers in place."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs
from torch import Tensor, nn

from ..core.errors import ThriftyError, nearest
from ..core.quantized import QuantizedLinear, dequantized, give_gradients
from ..select.targets import Target
from ..update.base import Originals
from ..update.quantized import checked
from .smt_config import SmtConfig
from .smt_layer import SmtLinear, target_of

__all__ = ["SmtModel", "base_numbers"]

_log = logging.getLogger("thrifty")


def base_numbers(model: nn.Module) -> int:
    """How many numbers the base holds, without what PEFT put in; tied tensors count once."""
    kept = {BaseTunerLayer: "base_layer", AuxiliaryTrainingWrapper: "original_module"}
    added = {
        id(p)
        for module in model.modules()
        for kind, own in kept.items()
        if isinstance(module, kind)
        for name, child in module.named_children()
        if name != own
        for p in child.parameters()
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in added)


class SmtModel(BaseTuner):
    """A model with SMT's layers in place of its linear ones, the base frozen. Each adapter has its own blocks."""

    prefix = "smt_"
    tuner_layer_cls = SmtLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT reads it from the class

    def _prepare_adapter_config(self, peft_config: SmtConfig, model_config: dict[str, Any]) -> SmtConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = set(peft_config.selection or ()) or "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: SmtConfig, model: nn.Module) -> None:
        give_gradients(model)
        names = dict(model.named_modules())
        for name in peft_config.selection or ():
            if name not in names:
                close = nearest(name, names)
                hint = f" (nearest: {close})" if close else ""
                raise ThriftyError(f"selection: the model has no module {name}{hint}: it is of another model")
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        inside = tuple(f"{name}." for name, module in names.items() if isinstance(module, BaseTunerLayer))
        targets = {}
        for name, module in names.items():
            if name and not name.startswith(inside) and self._check_target_module_exists(peft_config, name):
                base = module.get_base_layer() if isinstance(module, SmtLinear) else module
                if (target := target_of(name, base)) is not None:
                    targets[name] = target
        if targets:  # else PEFT says what did not match
            peft_config.choose(targets, total=base_numbers(model))

    def _create_and_replace(
        self,
        peft_config: SmtConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, SmtLinear) else self._layer(target, current_key)
        if current_key not in (peft_config.selection or ()):  # PEFT took the targets from a state dict
            peft_config.choose({current_key: layer.target}, total=base_numbers(self.model))
        region = peft_config.region(current_key, layer.target.shape)
        layer.update_layer(
            adapter_name,
            region,
            init_weights=peft_config.init_weights,
            inference_mode=peft_config.inference_mode,
            original=self._original(layer, f"{current_key}.weight") if not peft_config.inference_mode else None,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    @cached_property
    def _originals(self) -> Originals | None:
        """The weights before they were quantized; None where they cannot be read, which is said once."""
        try:
            return Originals(self.model)
        except ThriftyError as error:
            _log.warning("blocks of quantized weights start from quantized values (%s)", error)
            return None

    def _original(self, layer: SmtLinear, name: str) -> Tensor | None:
        """What a quantized weight was before; None for one that is not, or where that cannot be read."""
        base = layer.get_base_layer()
        if not isinstance(base, QuantizedLinear) or self._originals is None:
            return None
        try:
            read = self._originals[name]
        except ThriftyError as error:
            _log.warning("%s: its blocks start from quantized values (%s)", name, error)
            return None
        return checked(name, base, read, dequantized(base.weight))

    def _layer(self, module: nn.Module, name: str) -> SmtLinear:
        target: Target | None = target_of(name, module)
        if target is None:
            raise ThriftyError(
                f"target_modules: {name} is a {type(module).__name__}, and PEFT's SMT trains blocks of torch.nn.Linear "
                "and transformers' Conv1D: leave it out"
            )
        layer = SmtLinear(module, target=target, **get_quantization_kwargs(self))
        layer.set_adapter(self.active_adapters)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # unloaded: PEFT would set its weight again, no parameter
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for module in self.model.modules():
            if isinstance(module, SmtLinear):
                dtype = module.get_base_layer().weight.dtype
                half = not autocast_adapter_dtype and dtype.is_floating_point
                module.cast(adapter_name, dtype if half else torch.float32)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ThriftyError(
                "adapter_names: SMT cannot mix adapters within a batch: call set_adapter and one batch each"
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SmtConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, module in model.named_modules():
            saved = state.get(f"{name}.smt_blocks.{adapter_name}")
            if saved is None or not isinstance(module, SmtLinear):
                continue
            region = module.smt_regions[adapter_name]
            if not torch.equal(saved.cpu().long(), region.index):
                raise ThriftyError(
                    f"{module.target.name}: the file's values are of other blocks than adapter {adapter_name!r} has "
                    "here: make the model with the SmtConfig saved beside them (PeftModel.from_pretrained does)"
                )
        return state
