"""What is compared with what: each suite is a list of groups, and a group is measured in interleaved rounds.

Every group holds its own reference, so that no ratio is taken between contenders of different groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .models import SHAPES

__all__ = ["EQUAL_LORA", "SUITES", "Group"]

EQUAL_LORA = "LoRA, as many numbers as SMT 5 %"

Spec = dict[str, Any]
Group = dict[str, Any]  # name, rounds, specs

_LORA = {"peft": {"peft_type": "LORA", "r": 16, "lora_alpha": 32}}
_EQUAL_RANK = {"smollm2": 17, "llama": 69, "qwen": 33}  # 5 % of the linear layers, over the sum of their in + out


_GLOBAL = {"smt": {"scope": "global"}}  # what the recorded tables have


def _smt(block: int | str | list[int], **options: Any) -> dict[str, Any]:
    return {"smt": {"scope": "per_matrix", "block_size": block, **options}}


def _step(name: str, kind: str, shape: str, **more: Any) -> Spec:
    _, rows, tokens = SHAPES[shape]
    return {"name": name, "kind": kind, "shape": shape, "rows": rows, "tokens": tokens, **more}


def _peer(name: str, shape: str, **config: Any) -> Spec:
    return _step(name, "method", shape, method={"peft": config})


def _equal_lora(shape: str) -> Spec:
    rank = _EQUAL_RANK[shape]
    return _peer(EQUAL_LORA, shape, peft_type="LORA", r=rank, lora_alpha=2 * rank)


def _smt_step(name: str, shape: str, share: float, *, block: Any = 64, **options: Any) -> Spec:
    return _step(name, "method", shape, method=_smt(block, **options), share=share)


_STRIP_FIRST = _smt_step("strip-first", "smollm2", 0.01, block=[64, 16], input_budget=0.2)


def _floor(shape: str, **more: Any) -> Spec:
    return _step("floor", "floor", shape) | more


def steps(*, rounds: int) -> list[Group]:
    """Steps of SMT, the peers and full fine-tuning."""
    shape = "smollm2"
    specs = [
        _floor(shape),
        _smt_step("SMT 1 %, 64", shape, 0.01),
        _smt_step("SMT 5 %, 64", shape, 0.05),
        _equal_lora(shape),
        _peer("DoRA r16", shape, peft_type="LORA", r=16, lora_alpha=32, use_dora=True),
        _peer("SHiRA r16", shape, peft_type="SHIRA", r=16),
        _step("full", "full", shape),
    ]
    return [{"name": "steps", "rounds": rounds, "specs": specs}]


def other_shape(shape: str, *, rounds: int) -> list[Group]:
    """A larger model: SMT and LoRA, and full fine-tuning in a group of its own, as all would not fit into memory."""
    smt, full = _smt_step("SMT 5 %, 64", shape, 0.05), _step("full", "full", shape)
    return [
        {"name": shape, "rounds": rounds, "specs": [_floor(shape), smt, _equal_lora(shape)]},
        {"name": f"{shape}: full", "rounds": 5, "specs": [_floor(shape), full]},
    ]


def selections(*, rounds: int) -> list[Group]:
    """Other ways to place 1 %, and what torch.compile makes of a step; 64-blocks per matrix are among `steps`."""
    shape = "smollm2"
    specs = [
        _floor(shape),
        _smt_step("per matrix, 128, 5 %", shape, 0.05, block=128),
        _smt_step("per matrix, columns", shape, 0.01, block="column"),
        _STRIP_FIRST,
        _step("global, 64", "method", shape, method={"smt": {"scope": "global", "block_size": 64}}, share=0.01),
        _floor(shape) | {"name": "floor, compiled", "compiled": True},
        _smt_step("per matrix, 64, compiled", shape, 0.01) | {"compiled": True},
    ]
    return [{"name": "where 1 % lies", "rounds": rounds, "specs": specs}]


def probe(*, rounds: int) -> list[Group]:
    """A probe of three batches against as many steps of full fine-tuning on them, and what inference alone takes."""
    specs = [_step(kind, kind, "smollm2", batches=3) for kind in ("inference", "probe", "full")]
    return [{"name": "probe", "rounds": rounds, "specs": specs}]


def _train(name: str, trainer: str, data: str, **more: Any) -> Spec:
    common = {"rows": 2000, "batch": 16, "bf16": True, "checkpointing": False}
    return {"name": name, "trainer": trainer, "data": data, **common, **more}


def _trainers(data: str) -> list[Spec]:
    return [
        _train("thrifty, SMT 1 %", "thrifty", data, method=_GLOBAL, budget="1%"),
        _train("thrifty, PEFT LoRA r16", "thrifty", data, method=_LORA),
        _train("TRL, PEFT LoRA r16", "trl", data),
        _train("TRL, PEFT LoRA r16, checkpointing", "trl", data, checkpointing=True),
    ]


def snips(*, rounds: int) -> list[Group]:
    """Whole trainers at batch 16, under bfloat16 autocast (TRL's default)."""
    return [{"name": "training on snips", "rounds": rounds, "specs": _trainers("snips")}]


def gsm8k(*, rounds: int) -> list[Group]:
    """The same on longer rows: each against SMT alone, as all would not fit into memory at once."""
    smt, *others = _trainers("gsm8k")
    return [{"name": "training on gsm8k", "rounds": rounds, "specs": [smt, other]} for other in others]


def study(*, rounds: int) -> list[Group]:
    """What the methods of docs/results take for a step, beside LoRA at 1 %; four at a time, for want of memory.

    Ranks are those that the studies' budgets buy. results/cost.py takes the names apart: `method budget`.
    """

    def one(name: str, method: Any, budget: str | None = None, **more: Any) -> Spec:
        return _train(name, "thrifty", "snips", method=method, budget=budget, **more)

    def lora(rank: int, **more: Any) -> dict[str, Any]:
        return {"peft": {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **more}}

    reference, block = one("lora 1%", lora(4)), {"smt": {"scope": "per_matrix"}}
    groups = [
        [
            one("smt_per_matrix 1%", block, "1%"),
            one("smt_per_matrix 8%", block, "8%"),
            one("muon_columns 8%", "muon_columns", "8%"),
        ],
        [one("lora 8%", lora(35)), one("dora 1%", lora(4, use_dora=True)), one("full own", "full")],
        [
            one("shira 1%", {"peft": {"peft_type": "SHIRA", "r": 4}}),
            one("random_blocks 1%", {"random_blocks": {"scope": "global"}}, "1%"),
            one("lift 1%", "lift", "1%"),
        ],
    ]
    return [{"name": f"study {i}", "rounds": rounds, "specs": [reference, *specs]} for i, specs in enumerate(groups, 1)]


def kept(*, rounds: int) -> list[Group]:
    """What the tuned layers keep for backward."""
    specs = [_STRIP_FIRST, _peer("LoRA r16", "smollm2", peft_type="LORA", r=16, lora_alpha=32)]
    return [{"name": "kept for backward", "rounds": rounds, "specs": specs}]


def memory(*, rounds: int) -> list[Group]:
    """Bytes: peaks with checkpointing on both sides."""
    checkpointed = [
        _train("thrifty, SMT 1 %", "thrifty", "snips", method=_GLOBAL, budget="1%", checkpointing=True),
        _train("thrifty, PEFT LoRA r16", "thrifty", "snips", method=_LORA, checkpointing=True),
        _train("TRL, PEFT LoRA r16", "trl", "snips", checkpointing=True),
    ]
    return [{"name": "trainers with checkpointing", "rounds": rounds, "specs": checkpointed}]


def growth_share(*, rounds: int) -> list[Group]:
    shares = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    specs = [_smt_step(f"{share:.1%}", "smollm2", share) for share in shares]
    return [{"name": "growth: share", "rounds": rounds, "specs": [_floor("smollm2"), *specs]}]


def growth_block(*, rounds: int) -> list[Group]:
    """At 20 %, where every matrix but keys and values holds blocks of 256."""
    specs = [_smt_step(f"block {block}", "smollm2", 0.2, block=block) for block in (16, 32, 64, 128, 256)]
    column = _smt_step("columns", "smollm2", 0.2, block="column")
    return [{"name": "growth: block", "rounds": rounds, "specs": [_floor("smollm2"), *specs, column]}]


def growth_tokens(*, rounds: int) -> list[Group]:
    groups = []
    for tokens in (256, 512, 1024, 2048, 4096):
        size = {"rows": max(1, tokens // 256), "tokens": min(256, tokens)}
        specs = [
            _floor("smollm2") | size,
            _smt_step("SMT 5 %", "smollm2", 0.05) | size,
            _peer("LoRA r17", "smollm2", peft_type="LORA", r=17, lora_alpha=34) | size,
        ]
        groups.append({"name": f"growth: {tokens} tokens", "rounds": rounds, "specs": specs})
    return groups


SUITES: Mapping[str, Callable[[], list[Group]]] = {
    "quick": lambda: [_quick()],
    "steps": lambda: steps(rounds=25),
    "selections": lambda: selections(rounds=25),
    "probe": lambda: probe(rounds=3),
    "snips": lambda: snips(rounds=5),
    "gsm8k": lambda: gsm8k(rounds=4),
    "study": lambda: study(rounds=7),
    "kept": lambda: kept(rounds=1),
    "memory": lambda: memory(rounds=1),
    "llama": lambda: other_shape("llama", rounds=25),
    "qwen": lambda: other_shape("qwen", rounds=25),
    "share": lambda: growth_share(rounds=5),
    "block": lambda: growth_block(rounds=5),
    "tokens": lambda: growth_tokens(rounds=5),
}


def _quick() -> Group:
    """The floor, SMT, LoRA and full fine-tuning at 4 x 64 tokens: three minutes, and only indicative."""
    first = steps(rounds=25)[0]
    specs = [spec | {"tokens": 64} for spec in first["specs"] if spec["name"] not in ("DoRA r16", "SHiRA r16")]
    return first | {"name": "quick", "specs": specs}
