"""`deepspeed` in a run file: two processes under ZeRO train what one does without."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run_sharded import LORA, compare, config_of, refused, trained_together
from tiny_run import prepare
from transformers import AutoModelForCausalLM

from thrifty.core.errors import ThriftyError
from thrifty.delta import Delta
from thrifty.run.arguments import training_arguments, with_defaults
from thrifty.run.config import load_config
from thrifty.run.train import train
from thrifty.run.zero_trainer import ZeroTrainer

STEPS = 12
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # the stage, and what else the run file says
    "smt": (2, {"eval_steps": 6, "load_best_model_at_end": True, "weight_decay": 0.1}),
    "full": (2, {"method": "full", "budget": None, "learning_rate": 1e-3, "gradient_checkpointing": False}),
    "bfloat16": (2, {"dtype": "bfloat16"}),
    "lora": (2, {"method": LORA, "budget": None}),
    "stage 1": (1, {"max_grad_norm": 0.1}),
    "stage 0": (0, {}),
}
NEAR = {"bfloat16": 0.02}  # weights are rounded


def zero(stage: int) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": {"stage": stage}, "gradient_clipping": "auto"}}


def run_of(folder: Path, name: str, *, world: int, **more: Any) -> dict[str, Any]:
    stage, changes = CASES.get(name, (2, {}))
    shards = zero(stage) if world > 1 else {}
    return config_of(folder, name, world=world, fsdp=False, **{"max_steps": STEPS, **changes, **shards, **more})


def _rank(rank: int, world: int, port: int, configs: list[dict[str, Any]]) -> None:
    import deepspeed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ extension is compiled first
    trainers, prepare_one = list[ZeroTrainer](), ZeroTrainer._prepare_for_training

    def noted(trainer: ZeroTrainer, *arguments: Any) -> Any:
        trainers.append(trainer)
        prepared = prepare_one(trainer, *arguments)
        mine = sum(part.numel() for part in trainer.optimizer.optimizer.single_partition_of_fp32_groups)
        assert mine < 0.6 * sum(leaf.numel() for leaf in trainer.tuning.parameters())
        return prepared

    ZeroTrainer._prepare_for_training = noted  # type: ignore[method-assign]
    *whole, lost = configs
    for config in whole:
        run = train(config)
        assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
        base = AutoModelForCausalLM.from_pretrained(config["model"], dtype=config.get("dtype", "float32"))
        for name, value in run.delta.apply(base).named_parameters():
            torch.testing.assert_close(run.model.get_parameter(name), value)
    with pytest.raises(ThriftyError, match=r"at step 2, in rows .*no value was changed by it"):
        train(lost)
    assert all(bool(leaf.isfinite().all()) for leaf in trainers[-1].tuning.parameters())
    asked = [config["deepspeed"]["zero_optimization"]["stage"] for config in configs if "deepspeed" in config]
    stages = [trainer.deepspeed.zero_optimization_stage() for trainer in trainers]
    assert stages == [stage for stage in asked if stage > 0]  # 0 is DDP
    torch.distributed.destroy_process_group()


def test_two_processes_train_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run goes on from one process to ZeRO, there again, to FSDP2, and at last in one."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    folder = prepare(tmp_path)
    (folder / "other.jsonl").write_bytes((folder / "eval.jsonl").read_bytes())
    for name in [*CASES, "chain"]:
        train(run_of(folder, name, world=1))
    chain = {"output_dir": str(folder / "chain"), "resume_from_checkpoint": "auto", "lr_scheduler_type": "constant"}
    train(run_of(folder, "chain", world=1, **chain | {"max_steps": 3}))
    on = [run_of(folder, "chain", world=2, **chain | {"max_steps": steps}) for steps in (5, 8)]
    fsdp = config_of(folder, "chain", world=2, **chain | {"max_steps": 10})
    lost = run_of(folder, "lost", world=2, learning_rate=1e30)
    trained_together(2, [*(run_of(folder, name, world=2) for name in CASES), *on, fsdp, lost], rank=_rank)
    assert train(run_of(folder, "chain", world=1, **chain)).summary["steps"] == STEPS
    for name in CASES:
        compare(folder / f"{name}-1", folder / f"{name}-2", near=NEAR.get(name, 1e-4))
    compare(folder / "chain-1", folder / "chain", near=1e-4)
    for name in ("smt", "full"):
        models = [AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2)]
        one, two = (Delta.load(folder / f"{name}-{world}" / "delta").apply(models[world - 1]) for world in (1, 2))
        for key, value in one.named_parameters():
            near = 1e-4 * float(value.detach().abs().max())
            torch.testing.assert_close(two.get_parameter(key), value, rtol=1e-4, atol=near, msg=key)


def test_one_process_trains_without_it() -> None:
    config = load_config({"model": "m", "method": "smt", "data": {"train": "x.jsonl"}, **zero(2)})
    assert training_arguments(with_defaults(config)).deepspeed is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    (zero(3), "deepspeed.zero_optimization.stage 3 cannot train in place: stage 2; or fsdp: true shards"),
    (zero(7), "deepspeed.zero_optimization must be a mapping with a stage of 0, 1 or 2"),
    ({"deepspeed": {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}}, "offload_param is not"),
    ({"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}, "offload_optimizer is not"),
    ({"deepspeed": {"optimizer": {"type": "Adam"}}}, "deepspeed.optimizer is not to be set: optim, learning_rate"),
    ({"deepspeed": {"scheduler": {"type": "WarmupLR"}}}, "deepspeed.scheduler is not to be set: lr_scheduler_type"),
    ({"deepspeed": {"bf16": {"enabled": True}}}, "deepspeed.bf16 is not supported: leave it out; dtype: bfloat16"),
    ({"deepspeed": {"gradient_clipping": 0.5}}, "deepspeed.gradient_clipping is set by max_grad_norm"),
    ({"deepspeed": "nowhere.json"}, "deepspeed: 'nowhere.json' is no JSON file that can be read (FileNotFoundError)"),
    (zero(2) | {"fsdp": True}, "deepspeed and fsdp exclude each other"),
    (zero(2) | {"bf16": True}, "bf16: DeepSpeed would round the trained values themselves: dtype: bfloat16"),
    (zero(2) | {"nonfinite": "skip"}, "nonfinite=skip: DeepSpeed takes its step before"),
    (zero(2) | {"method": "lisa", "budget": None}, "method 'lisa' changes what is trained"),
    (zero(2) | {"method": "gradient_axes"}, "method 'gradient_axes' has steps of its own, which ZeRO would cut up"),
    (zero(2) | {"optim": "muon"}, "optim 'muon' looks at whole tensors, which ZeRO cuts up: adamw_torch"),
    (zero(2) | {"optim": "adafactor"}, "optim 'adafactor' looks at whole tensors, which ZeRO cuts up: adamw_torch"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_cannot_be_had_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    refused(changes, said)


def test_a_file_is_read_and_the_package_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zero.json").write_text(json.dumps(zero(3)["deepspeed"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("thrifty.run.zero.find_spec", lambda name: None)
    base = {"model": "m", "method": "smt", "data": {"train": "x.jsonl"}}
    with pytest.raises(ThriftyError, match="stage 3 cannot train in place"):
        training_arguments(load_config(base | {"deepspeed": str(tmp_path / "zero.json")}))
    with pytest.raises(ThriftyError, match="deepspeed: it is not installed: pip install deepspeed"):
        training_arguments(load_config(base | zero(2)))
