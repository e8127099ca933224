"""A small module with linear layers of both kinds, and SMT on it through PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thrifty.integrations.peft import SmtConfig, SmtLinear

__all__ = ["CASES", "Small", "X", "base", "layers", "train", "tuned"]


class Small(nn.Module):
    """Linear and Conv1D layers of 10 x 20 and less; nothing in it is ever exactly flat."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.mid = nn.ModuleList([Conv1D(15, 20), Conv1D(20, 15)])
        self.lin1 = nn.Linear(20, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.lin0(x))
        for layer in self.mid:
            x = torch.tanh(layer(x))
        return self.lin1(x)


X = torch.randn(9, 10, generator=torch.Generator().manual_seed(1))
CASES: dict[str, dict[str, Any]] = {
    "one": {"target_modules": "lin0"},
    "list": {"target_modules": ["lin0", "lin1"], "budget": 60, "block_size": [3, 4]},
    "every": {"budget": "30%", "block_size": 4, "block_pattern": {"mid.0": "column", "lin1": [1, 5]}},
    "conv1d": {"target_modules": ["mid.0", "mid.1"], "block_size": "row", "budget": 80},
    "modules_to_save": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
}


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Small().to(dtype)


def tuned(case: str = "every", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return get_peft_model(base(dtype), SmtConfig(**{"init_weights": False} | CASES[case] | options))


def layers(model: nn.Module) -> list[SmtLinear]:
    return [module for module in model.modules() if isinstance(module, SmtLinear)]


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
