"""`fsdp: true` in a run file: several processes, each of which holds a part of the model, train what one does."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import configuration, prepare, save_checkpoint, start, write_rows
from transformers import AutoModelForCausalLM, MixtralConfig

from thrifty.core.errors import ThriftyError
from thrifty.delta import Delta
from thrifty.objective.proof import prepare as loss_plan
from thrifty.run.arguments import training_arguments, with_defaults
from thrifty.run.checkpoint import checkpoints
from thrifty.run.config import load_config
from thrifty.run.metrics import read_metrics
from thrifty.run.train import train

ROWS = 8  # of a step, in any number of processes
LORA = {"peft": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}}
CASES: dict[str, dict[str, Any]] = {
    "smt": {"max_steps": 6, "load_best_model_at_end": True, "eval_steps": 3, "save_steps": 3, "learning_rate": 0.03},
    "full": {"method": "full", "budget": None, "learning_rate": 1e-3, "eval_steps": 4, "gradient_checkpointing": False},
    "axes": {"method": "gradient_axes"},
    "tokens": {"add_tokens": ["<a>", "<b>"], "fsdp": "shard_grad_op auto_wrap"},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"method": LORA, "budget": None, "eval_steps": 5},
    "own_head": {"eval_steps": 3},
    "own_loss": {},
}
MODELS = {"own_head": "gemma2", "own_loss": "mixtral"}  # whose loss is not made from the head's weight alone

NEAR = {"bfloat16": 0.02, "axes": 0.005}  # weights, and Muon's orthogonal matrices, are rounded to bfloat16


def config_of(folder: Path, name: str, *, world: int, fsdp: bool = True, **more: Any) -> dict[str, Any]:
    """A run of `ROWS` rows a step; with several processes in two micro-batches."""
    parts = 1 if world == 1 else 2
    if name == "own_loss":  # a router loss is one of a whole micro-batch: as many rows in each
        parts = ROWS // world // 2
    changes = {
        "model": str(folder / MODELS.get(name, "model")),
        "max_steps": 6,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": ROWS // world // parts,
        "gradient_accumulation_steps": parts,
        "per_device_eval_batch_size": ROWS // world,
        "output_dir": str(folder / f"{name}-{world}"),
        "eval": {"loss": True, "exact_match": 2, "max_new_tokens": 2},
        **({"fsdp": True} if fsdp and world > 1 else {}),
        **({"data": {"train": f"{folder}/train.jsonl", "eval": f"{folder}/other.jsonl"}} if name == "smt" else {}),
        **({"data": {"train": f"{folder}/even.jsonl", "eval": f"{folder}/eval.jsonl"}} if name == "own_loss" else {}),
        **CASES.get(name, {}),
        **more,
    }
    return configuration(folder, **changes)


def _rank(rank: int, world: int, port: int, configs: list[dict[str, Any]]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    for config in configs:
        train(config)
    torch.distributed.destroy_process_group()


def trained_together(world: int, configs: list[dict[str, Any]], *, rank: Callable[..., None] = _rank) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(rank, number, world, port, configs) for number in range(world)]
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0] * world


def compare(one: Path, other: Path, *, near: float) -> None:
    """Plan, losses, values, delta and evaluation."""
    expected, found = read_metrics(one / "metrics.jsonl"), read_metrics(other / "metrics.jsonl")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for name in ("loss", "eval_loss", "grad_norm"):
        were = [line[name] for line in expected if name in line]
        assert [line[name] for line in found if name in line] == pytest.approx(were, rel=near), name
    last = [checkpoints(folder)[-1] for folder in (one, other)]
    assert last[0].plan().digest() == last[1].plan().digest()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    assert summaries[0]["result_step"] == summaries[1]["result_step"]
    after = [summary["evaluation"]["after"] for summary in summaries]
    assert after[1] == pytest.approx(after[0], rel=near)
    values, were = last[1].values(), last[0].values()
    for name, value in were.items():
        torch.testing.assert_close(values[name], value, rtol=near, atol=50 * near * float(value.abs().max()), msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one plain process makes of each case."""
    torch.set_num_threads(1)
    folder = prepare(tmp_path_factory.mktemp("sharded"))
    lines = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    other = [json.dumps(line | {"completion": "zzz"}) for line in lines]  # what training makes less likely
    (folder / "other.jsonl").write_text("\n".join(other))
    write_rows(folder / "even.jsonl", rows=3 * ROWS)  # rows that only fill up a step would add a router loss
    for family in MODELS.values():
        save_checkpoint(folder / family, family=family)
    router = MixtralConfig.from_pretrained(folder / "mixtral")
    router.output_router_logits = True
    router.save_pretrained(folder / "mixtral")
    for name in [*CASES, "chain"]:
        model = train(config_of(folder, name, world=1)).model
        save_file({n: p.detach().clone() for n, p in model.named_parameters()}, folder / f"{name}.safetensors")
    return folder


def test_two_and_four_processes_train_what_one_does(folder: Path) -> None:
    """And a run goes on from DDP to FSDP2, in four processes, and at last in one."""
    chain = {"output_dir": str(folder / "chain"), "resume_from_checkpoint": "auto"}
    trained_together(
        2,
        [
            *(config_of(folder, name, world=2) for name in CASES),
            config_of(folder, "chain", world=2, fsdp=False, **chain, max_steps=2),
            config_of(folder, "chain", world=2, **chain, max_steps=3),
        ],
    )
    four = config_of(folder, "chain", world=4, **chain, max_steps=5)
    trained_together(4, [*(config_of(folder, name, world=4) for name in ("smt", "full")), four])
    assert train(config_of(folder, "chain", world=1, **chain)).summary["steps"] == 6
    for name in CASES:
        compare(folder / f"{name}-1", folder / f"{name}-2", near=NEAR.get(name, 1e-4))
    assert json.loads((folder / "smt-2" / "summary.json").read_text())["result_step"] == 3
    for name in ("smt", "full"):
        compare(folder / f"{name}-1", folder / f"{name}-4", near=1e-4)
    compare(folder / "chain-1", folder / "chain", near=1e-4)
    for name in ("full", "smt", "bfloat16", "own_head"):
        delta_gives_the_model(folder, name)


def delta_gives_the_model(folder: Path, name: str) -> None:
    """The folder that a sharded run saved, on the base, is the model that one plain process left."""
    near = NEAR.get(name, 1e-4)
    dtype = getattr(torch, CASES[name].get("dtype", "float32"))
    base = AutoModelForCausalLM.from_pretrained(config_of(folder, name, world=1)["model"], dtype=dtype)
    found = dict(Delta.load(folder / f"{name}-2" / "delta").apply(base).named_parameters())
    for key, value in load_file(folder / f"{name}.safetensors").items():
        torch.testing.assert_close(found[key], value, rtol=near, atol=50 * near * float(value.abs().max()), msg=key)


def test_the_cases_take_every_path_of_the_loss(folder: Path) -> None:
    for name in ("smt", *MODELS):
        model = AutoModelForCausalLM.from_pretrained(config_of(folder, name, world=1)["model"])
        assert loss_plan(model).path == (name if name in MODELS else "plain_head")


def test_one_process_trains_as_without(folder: Path) -> None:
    """A plain one, and one that torchrun started."""
    torchrun = config_of(folder, "smt", world=1) | {"fsdp": True, "output_dir": str(folder / "torchrun")}
    trained_together(1, [torchrun])
    train(torchrun | {"output_dir": str(folder / "plain")})
    for how in ("torchrun", "plain"):
        compare(folder / "smt-1", folder / how, near=1e-6)


def refused(changes: dict[str, Any], said: str) -> None:
    """A run file with `changes` is refused in one line that holds `said`."""
    config = with_defaults(load_config({"model": "m", "method": "smt", "data": {"train": "x.jsonl"}, **changes}))
    with pytest.raises(ThriftyError) as caught:
        training_arguments(config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"fsdp": "full_shart"}, "fsdp: unknown word 'full_shart'; did you mean 'full_shard'"),
    ({"fsdp_config": {"version": 2}}, "fsdp_config: it needs fsdp: true"),
    ({"fsdp": True, "fsdp_config": {"version": 1}}, "fsdp_config.version must be 2"),
    ({"fsdp": True, "fsdp_config": {"reshard_after": True}}, "did you mean 'fsdp_config.reshard_after_forward'"),
    ({"fsdp": True, "fsdp_config": {"fsdp_cpu_ram_efficient_loading": True}}, "each process reads the model itself"),
    ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "what a process holds stays on its device"),
    ({"fsdp": True, "fsdp_config": {"reshard_after_forward": "no"}}, "must be true or false, not 'no'"),
    ({"fsdp": True, "method": "lisa", "budget": None}, "method 'lisa' changes what is trained"),
    ({"fsdp": True, "fp16": True}, "fp16 has a loss scale"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_cannot_be_had_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    refused(changes, said)


def test_accelerates_own_sharding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ThriftyError, match=r"ACCELERATE_USE_FSDP is set.*write fsdp: true into the run file"):
        training_arguments(load_config({"model": "m", "data": {"train": "x.jsonl"}}))
