"""One linear layer under PEFT's SMT: the frozen layer, and each adapter's offsets of its blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..core.errors import ThriftyError
from ..core.quantized import QuantizedLinear, dequantized
from ..core.region import Blocks
from ..delta import Piece, fingerprint
from ..select.targets import Target
from ..update.additive import Additive

__all__ = ["Offsets", "SmtLinear", "target_of"]

_HALF = (torch.bfloat16, torch.float16)


def target_of(name: str, module: nn.Module) -> Target | None:
    """The matrix of a layer that SMT can train beside, as it is stored; None for any other module. The weight itself
    may be quantized."""
    if isinstance(module, Conv1D):
        return Target(name, tuple(module.weight.shape), transposed=True)
    # MultiheadAttention reads the weight of its output layer, whose forward never runs
    if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
        return Target(name, (module.out_features, module.in_features))
    return None


class Offset(nn.Parameter):
    """A trained leaf. A float32 one is not rounded by being cast (`model.to(bfloat16)`, `p.data = p.data.to(bfloat16)`
    as TRL does under a quantized base): steps smaller than half precision resolves would be lost."""

    @property
    def data(self) -> Tensor:
        out: Tensor = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return out

    @data.setter
    def data(self, value: Tensor) -> None:
        if self.dtype == torch.float32 and value.dtype in _HALF:
            now = self.data
            cast = value.shape == now.shape and value.device == now.device
            value = now if cast and torch.equal(now.to(value.dtype), value) else value.float()
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


class Offsets(nn.ParameterDict):
    """Adapter name -> its leaf; whatever loads or moves one, it stays an `Offset`."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not isinstance(param, Offset):
            leaf = Offset(param.detach(), requires_grad=param.requires_grad)
            leaf.__dict__.update(param.__dict__)
            param = leaf
        super().register_parameter(name, param)


class SmtLinear(nn.Module, BaseTunerLayer):
    """`base_layer(x)` plus what the active adapters' blocks make of `x`."""

    adapter_layer_names = ("smt_offsets",)
    other_param_names = ("smt_blocks", "smt_regions")

    def __init__(self, base_layer: nn.Module, *, target: Target, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.target = target
        self.out_features, self.in_features = target.out_in
        if isinstance(base_layer, QuantizedLinear) and quantization.get("get_apply_tensor_subclass") is None:
            self.quantization_backend = ForwardOnlyQuantizationBackend("torchao")  # nobody says how to quantize again
        else:
            self.quantization_backend = resolve_quantization_backend(base_layer, **quantization)
        self.smt_offsets = Offsets({})
        self.smt_blocks = BufferDict(persistent=True)  # int32 [n, 2]: values must not be loaded into other blocks
        self.smt_regions: dict[str, Blocks] = {}
        self._additive: dict[str, Additive] = {}  # made when first needed
        self._originals: dict[str, Tensor] = {}  # of merged adapters, packed
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_additive": {}}  # it holds weak references

    def update_layer(
        self,
        adapter_name: str,
        region: Blocks,
        *,
        init_weights: bool,
        inference_mode: bool,
        original: Tensor | None = None,
    ) -> None:
        """Add or replace an adapter. `original`: of a quantized weight what it was before: the blocks then start there,
        without quantization error."""
        shape = region.packed_shape(self.target.shape)
        values = torch.zeros(shape) if init_weights else torch.randn(shape)
        if original is not None:
            values += region.gather(original).float() - region.gather(dequantized(self.get_base_layer().weight)).float()
        self.smt_offsets[adapter_name] = Offset(values)
        self.smt_blocks[adapter_name] = region.index.to(torch.int32)
        self.smt_regions[adapter_name] = region
        self._additive.pop(adapter_name, None)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """The device only: the leaf's dtype is not the base's."""
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if adapter_name not in self.smt_offsets or device is None or device.type == "meta":
            return
        leaf = self.smt_offsets[adapter_name]
        if not leaf.is_meta:
            leaf.data = leaf.data.to(device)
            self.smt_blocks[adapter_name] = self.smt_blocks[adapter_name].to(device)

    def cast(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Make the leaf anew in `dtype`, half precision too."""
        if adapter_name in self.smt_offsets and self.smt_offsets[adapter_name].dtype != dtype:
            leaf = self.smt_offsets[adapter_name]
            self.smt_offsets[adapter_name] = Offset(leaf.detach().to(dtype), requires_grad=leaf.requires_grad)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.smt_offsets:
                y = y + self._beside(name)(x, self.smt_offsets[name], dtype=y.dtype)
        return y

    def _beside(self, name: str) -> Additive:
        if name not in self._additive:
            region, transposed = self.smt_regions[name], self.target.transposed
            self._additive[name] = Additive(region, self.target.shape, transposed=transposed)
        return self._additive[name]

    def delete_adapter(self, adapter_name: str) -> None:
        self._additive.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the offsets to the base's blocks, rounded once to its dtype. `safe_merge`: ValueError, and no change,
        where the result is not finite."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.smt_offsets:
                continue
            region = self.smt_regions[name]
            with self._weight() as weight:
                original, merged = self._values(name, weight)
                if safe_merge and not bool(torch.isfinite(merged).all()):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                region.scatter_(weight, merged)
            self._originals[name] = original
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's own values back, bit for bit."""
        if not self.merged:
            warnings.warn("unmerge: no adapter is merged here, nothing changes", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()  # the last first: their blocks may overlap
            with self._weight() as weight:
                self.smt_regions[name].scatter_(weight, self._originals.pop(name))

    @contextmanager
    def _weight(self) -> Iterator[Tensor]:
        """The base's weight, dequantized if need be, to be changed in place; it is set afterwards."""
        weight = self.get_base_weight()
        yield weight
        self.set_base_weight(weight)

    def _values(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The region's packed values in `weight`, and those with the offsets added, in its dtype."""
        original, offset = self.smt_regions[name].gather(weight), self.smt_offsets[name].detach()
        dtype = torch.promote_types(weight.dtype, offset.dtype)
        return original, (original.to(dtype) + offset.to(device=original.device, dtype=dtype)).to(weight.dtype)

    def piece(self, name: str) -> Piece:
        """What merging adapter `name` changes in the weight, for a delta."""
        if self.merged or self.quantization_backend is not None:
            why = (
                "is merged: call unmerge_adapter() first"
                if self.merged
                else "is quantized: a delta is of plain weights"
            )
            raise ThriftyError(f"the base of {self.target.name} {why}")
        weight, region = self.get_base_weight(), self.smt_regions[name]
        original, values = self._values(name, weight)
        return Piece(region, tuple(weight.shape), values.cpu(), original.cpu(), fingerprint(weight))

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The offsets in a dense tensor of the weight's own orientation; PEFT's conversion to LoRA asks for it."""
        leaf = self.smt_offsets[adapter_name].detach()
        dense = torch.zeros(self.target.shape, dtype=leaf.dtype, device=leaf.device)
        self.smt_regions[adapter_name].scatter_(dense, leaf)
        return dense

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "smt." + super().__repr__()
