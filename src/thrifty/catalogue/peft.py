"""Peers: any method of the PEFT library, through PEFT itself."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..core.errors import ThriftyError, unknown
from ..core.method import Method, Part
from ..core.registry import method
from ..update.peer import PeftAdapter

__all__ = ["peft"]


@method(
    family="peer",
    paper="PEFT: https://github.com/huggingface/peft; each peft_type names its own paper there",
    learning_rate=1e-3,
    cost="as PEFT's method: for LoRA 16 bytes per adapter number, 2 skinny products more in forward and 4 in backward",
)
def peft(*, peft_type: str = "LORA", **config: Any) -> Method:
    """Run any PEFT configuration as the peer it is: {peft: {peft_type: LORA, r: 16, lora_alpha: 32}}.

    All other keys go to PEFT's configuration class for that type (r, lora_alpha, use_dora, target_modules, ...).
    Unlike in PEFT, target_modules defaults to all-linear and task_type to CAUSAL_LM. The configuration fixes the size:
    a budget beside it is only checked. When not to use it: for an exact, removable delta (a merged adapter is rounded).
    """
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError:
        raise ThriftyError("method 'peft' needs the PEFT library: pip install 'thrifty[peft]'") from None
    known = {str(getattr(key, "value", key)): cls for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = str(peft_type).upper()
    if name not in known:
        raise ThriftyError(unknown("peft_type", str(peft_type), known))
    fields = {f.name for f in dataclasses.fields(known[name])} - {"peft_type"}
    for key in config:
        if key not in fields:
            raise ThriftyError(unknown(f"option of PEFT's {name}:", key, fields))
    defaults = {"task_type": "CAUSAL_LM"} | ({"target_modules": "all-linear"} if "target_modules" in fields else {})
    adapter = PeftAdapter(peft_type=name, config=defaults | config)
    try:
        adapter.build()
    except (ValueError, TypeError) as error:
        raise ThriftyError(f"PEFT refuses this {name} configuration: {error}") from None
    return Method(name="peft", parts=(Part(select=None, update=adapter),))
