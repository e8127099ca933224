"""How many bytes two processes exchange in one step, of DDP and of FSDP2, for SMT and for full fine-tuning.

    torchrun --standalone --nproc-per-node 2 results/processes/sent.py    # writes sent.json and prints the table

A float32 Llama of 5 layers and 4.9 million numbers, no downloads. The bytes are those of what each collective exchanges
(the gathered, scattered or reduced tensor), so they do not depend on how a backend sends it; of two processes each
sends half of a gathered or scattered tensor, and all of a reduced one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import thrifty

SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5, "num_attention_heads": 8}
METHODS: dict[str, tuple[Any, float | None]] = {"smt 1 %": ({"smt": {"block_size": 16}}, 0.01), "full": ("full", None)}


class Sent(TorchDispatchMode):
    """Counts the bytes of the collectives inside, by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor takes it apart, and what it calls comes here
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith(("c10d", "_c10d")) and not {"wait", "wrap"} & set(name.replace("::", "_").split("_")):
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.bytes[name.split("::")[1].strip("_")] += max((x.nbytes for x in tensors), default=0)
        return result


def _hook(sent, bucket):  # type: ignore[no-untyped-def]  # DDP refuses an annotation that is text
    sent["allreduce"] += bucket.buffer().nbytes
    done = distributed.all_reduce(bucket.buffer().div_(distributed.get_world_size()), async_op=True).get_future()
    return done.then(lambda future: future.value()[0])


def step_bytes(method: Any, budget: float | None, *, how: str, checkpointing: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_key_value_heads=8, **SHAPE)).train()
    ids = torch.randint(3, 2048, (2, 32), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    size = sum(p.nbytes for p in model.parameters())
    tuning = thrifty.attach(model, method, budget=budget, batches=[batch])
    run, hooked = model, Counter[str]()
    if how == "ddp":
        run = DistributedDataParallel(model)
        run.register_comm_hook(hooked, _hook)
    else:
        _shard(model)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-3)
    for _ in range(2):  # the first one sets up
        hooked.clear()
        with Sent() as sent:
            run(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found = hooked if how == "ddp" else sent.bytes
    return {"bytes": dict(found), "models": round(sum(found.values()) / size, 4)}


def _shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {
        f"{name}, {how}{', checkpointing' if checkpointing else ''}": step_bytes(
            method, budget, how=how, checkpointing=checkpointing
        )
        for name, (method, budget) in METHODS.items()
        for how, checkpointing in (("ddp", False), ("fsdp2", False), ("fsdp2", True))
    }
    if distributed.get_rank() == 0:
        Path(__file__).with_name("sent.json").write_text(json.dumps(found, indent=1) + "\n")
        for name, record in found.items():
            print(f"{name:30} {record['models']:7.4f} x the model: {record['bytes']}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
