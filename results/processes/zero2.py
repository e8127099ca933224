"""DeepSpeed's ZeRO-2 around an attached model, in a loop of one's own: two processes on the CPU against one without it.

    pip install deepspeed
    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 results/processes/zero2.py    # writes zero2.json

A tiny float32 Llama, SMT at 5 %, 20 steps of AdamW. ZeRO-2 steps on partitions of its own: nothing tells the trained
parts, so the values are written into the weights by the next forward, or by `tuning.sync()`.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import thrifty

STEPS, ROWS = 20, 4
CONFIG = {
    "train_micro_batch_size_per_gpu": ROWS // 2,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def rows(number: int) -> Tensor:
    return torch.randint(3, 90, (ROWS, 12), generator=torch.Generator().manual_seed(number))


def attached() -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    shape = {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, **shape))
    ids = rows(90)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return model, thrifty.attach(model, {"smt": {"block_size": 8}}, budget=0.05, batches=[batch])


def alone() -> tuple[list[float], dict[str, Tensor]]:
    model, tuning = attached()
    optimizer, losses = torch.optim.AdamW(tuning.parameters(), lr=1e-2), []
    for step in range(STEPS):
        loss = model(input_ids=rows(step), labels=rows(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in tuning.finish().named_parameters()}


def together() -> tuple[list[float], dict[str, Tensor], list[float]]:
    model, tuning = attached()
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    rank, half, losses, behind = torch.distributed.get_rank(), ROWS // 2, [], []
    for step in range(STEPS):
        mine = rows(step)[rank * half : (rank + 1) * half]
        loss = engine(input_ids=mine, labels=mine).loss
        engine.backward(loss)
        engine.step()
        behind.append(sum(part.dirty for part in tuning._parts.values()) / len(tuning._parts))
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / 2)
    return losses, {name: p.detach().clone() for name, p in tuning.finish().named_parameters()}, behind


def main() -> None:
    torch.set_num_threads(1)
    expected, were = alone()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: else a C++ extension is compiled first
    deepspeed.init_distributed(dist_backend="gloo")
    losses, now, behind = together()
    if torch.distributed.get_rank() == 0:
        found = {
            "deepspeed": version("deepspeed"),
            "torch": version("torch"),
            "largest_relative_loss_difference": max(abs(a / b - 1) for a, b in zip(losses, expected)),
            "largest_weight_difference": max(float((now[n] - were[n]).abs().max()) for n in were),
            "parts_that_wait_for_the_next_forward": behind[-1],
            "losses": losses,
        }
        Path(__file__).with_name("zero2.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({key: value for key, value in found.items() if key != "losses"}, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert "DS_ACCELERATOR" in os.environ, "DS_ACCELERATOR=cpu"
    main()
