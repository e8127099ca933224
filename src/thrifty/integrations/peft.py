"""Sparse Matrix Tuning as a method of PEFT. Importing this module registers it for PEFT, transformers and TRL.

    import thrifty.integrations.peft
    from thrifty.integrations.peft import SmtConfig

    model = peft.get_peft_model(model, SmtConfig(budget=0.01))

Unlike `thrifty.attach` the base stays as it is and the blocks are added in forward, as PEFT's methods do.
"""

from __future__ import annotations

from typing import Any

from ..core.errors import ThriftyError, unknown
from ..delta import Delta, Piece

try:
    from peft import PeftModel
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.utils import AuxiliaryTrainingWrapper, register_peft_method
except ImportError:
    raise ThriftyError("thrifty.integrations.peft needs the PEFT library: pip install 'thrifty[peft]'") from None

from .smt_config import SMT, SmtConfig
from .smt_layer import SmtLinear
from .smt_model import SmtModel, base_numbers

__all__ = ["SmtConfig", "SmtLinear", "SmtModel", "register", "to_delta"]


def register() -> None:
    """Make PEFT know `SmtConfig`; again is fine. ThriftyError where PEFT has another method of that name: it stays."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING.get(SMT)
    if config is SmtConfig:
        return
    if (
        config is not None
        or SMT in PEFT_TYPE_TO_TUNER_MAPPING
        or SmtModel.prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values()
    ):
        raise ThriftyError("PEFT has a method SMT already, which is not replaced: use it, or thrifty.attach")
    try:
        register_peft_method(name=SMT.lower(), config_cls=SmtConfig, model_cls=SmtModel, prefix=SmtModel.prefix)
    except ValueError:  # it takes members of PEFT's own enum only
        PEFT_TYPE_TO_CONFIG_MAPPING[SMT] = SmtConfig
        PEFT_TYPE_TO_TUNER_MAPPING[SMT] = SmtModel
        PEFT_TYPE_TO_PREFIX_MAPPING[SMT] = SmtModel.prefix


def to_delta(model: Any, *, adapter: str = "default") -> Delta:
    """What merging `adapter` would change in the base, as a delta: applied to the base it gives what `merge_and_unload`
    gives, bit for bit. ThriftyError where there is no such adapter, it is merged, or it trains more than blocks."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    pieces: dict[str, Piece] = {}
    known: set[str] = set()
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters:
            raise ThriftyError(
                f"{name} is trained beside the blocks, and a delta of an adapter holds blocks only: call "
                "merge_and_unload(), save the model, and take the difference to the base"
            )
        if isinstance(module, SmtLinear):
            known.update(module.smt_offsets)
            if adapter in module.smt_offsets:
                pieces[f"{name}.weight"] = module.piece(adapter)
    if not pieces:
        raise ThriftyError(unknown("SMT adapter", adapter, known))
    config = base.peft_config[adapter]
    method = {"peft_type": config.peft_type.value, "budget": config.budget, "block_size": config.block_size}
    return Delta(pieces, method={"peft": method}, total=base_numbers(base))


register()
