"""The result of a PEFT method: PEFT's own adapter folder, wrapped. Merging it is not exact on stored weights, so the
largest logit difference between the adapter and its merge is measured each time."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.errors import ThriftyError
from ..core.files import new_folder
from ..core.quantized import QuantizedLinear, quantized_as
from .delta import APPLIED, Delta, _parameters
from .digest import fingerprint
from .files import FORMAT, JSON, refuse_other

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["PeerDelta", "beside_quantized", "logit_difference", "merge"]

_log = logging.getLogger("thrifty")
_ADAPTER = "adapter"


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 16), generator=generator).to(next(model.parameters()).device)
    training = model.training
    output = model.eval()(input_ids=ids)
    model.train(training)
    return (output.logits if hasattr(output, "logits") else output[0]).float()


def logit_difference(before: Tensor, after: Tensor) -> float:
    """The largest absolute difference."""
    return float((before - after).abs().max())


def beside_quantized(config: Any) -> None:
    """Have PEFT put its plain LoRA layer around a `QuantizedLinear`: its own for torchao knows int8 alone, and what it
    adds, merging into the quantized weight, is not done here."""
    if hasattr(config, "_register_custom_module"):
        from peft.tuners.lora.layer import Linear

        config._register_custom_module({QuantizedLinear: Linear})


def merge(peft_model: Any) -> tuple[nn.Module, float]:
    """Merge into the base model's weights; also the largest logit difference on 32 random tokens."""
    before = _logits(peft_model)
    merged = peft_model.merge_and_unload()
    difference = logit_difference(before, _logits(merged))
    _log.info("merged: largest logit difference %.2e", difference)
    return merged, difference


@dataclass
class PeerDelta(Delta):
    """PEFT's adapter: `state` and `config`. `difference` is what the last merge changed in the logits."""

    state: Mapping[str, Tensor] = field(default_factory=dict)
    config: PeftConfig | None = None
    base: Mapping[str, str] = field(default_factory=dict)  # fingerprints of the base tensors that the adapter sits on
    difference: float | None = None
    _originals: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def apply(self, model: nn.Module) -> nn.Module:
        """Put the adapter on `model` through PEFT and merge it. Returns `model`; the originals stay in memory for
        `remove`."""
        parameters = _parameters(model)
        for name, expected in self.base.items():
            if name not in parameters or fingerprint(parameters[name]) != expected:
                raise ThriftyError(f"{name} differs from the base of this delta: another base, or a changed one")
        assert self.config is not None
        if self.config.is_prompt_learning:
            raise ThriftyError(
                f"{self.config.peft_type.value} adds virtual tokens and cannot be merged into weights: "
                "load its adapter folder with peft.PeftModel.from_pretrained"
            )
        originals = {name: p.detach().clone() for name, p in parameters.items()}
        merged, self.difference = merge(self.wrap(model))
        now = dict(merged.named_parameters(remove_duplicate=False))
        self._originals = {n: t for n, t in originals.items() if n in now and not torch.equal(now[n].detach(), t)}
        setattr(merged, APPLIED, getattr(merged, APPLIED, 0) + 1)
        return merged

    def wrap(self, model: nn.Module) -> Any:
        """`model` under PEFT's wrapper with the adapter in it, not merged."""
        from peft import PeftModel, set_peft_model_state_dict

        assert self.config is not None
        if quantized_as(model) is not None:
            beside_quantized(self.config)
        wrapped = PeftModel(model, self.config)
        set_peft_model_state_dict(wrapped, dict(self.state))
        return wrapped

    @torch.no_grad()
    def remove(self, model: nn.Module) -> nn.Module:
        """Restore the originals that `apply` kept in this process; a merged adapter cannot be taken out otherwise."""
        if not self._originals:
            raise ThriftyError("a merged PEFT adapter cannot be removed exactly: load the base again")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, values in self._originals.items():
            parameters[name].copy_(values)
        self._originals = {}
        setattr(model, APPLIED, getattr(model, APPLIED, 0) - 1)
        return model

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `delta.json` and PEFT's adapter folder `adapter/`, whole or not at all."""
        refuse_other(Path(folder))
        head = {
            "format": FORMAT,
            "kind": "peft",
            "thrifty": version("thrifty"),
            "method": dict(self.method),
            "total": self.total,
            "base_sha256": dict(self.base),
            "info": self.info,
        }
        assert self.config is not None
        with new_folder(Path(folder)) as aside:
            (aside / _ADAPTER).mkdir()
            self.config.save_pretrained(str(aside / _ADAPTER))
            tensors = {name: t.detach().cpu().contiguous() for name, t in self.state.items()}
            save_file(tensors, aside / _ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
            (aside / JSON).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, head: Mapping[str, Any]) -> PeerDelta:
        """The delta in `folder`, whose `delta.json` is `head`."""
        try:
            from peft import PeftConfig
        except ImportError:
            raise ThriftyError(f"{folder} is a PEFT adapter: pip install 'thrifty[peft]' to read it") from None
        file = folder / _ADAPTER / "adapter_model.safetensors"
        try:
            state = load_file(file)
            config = PeftConfig.from_pretrained(str(folder / _ADAPTER))
        except (SafetensorError, OSError, ValueError) as error:
            raise ThriftyError(
                f"{file.parent} is damaged or incomplete ({error}): make or copy the delta again"
            ) from None
        return cls(
            {},
            method=head["method"],
            total=int(head["total"]),
            info=dict(head.get("info", {})),
            state=state,
            config=config,
            base=dict(head.get("base_sha256", {})),
        )
