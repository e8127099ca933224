"""A method written in YAML alone: what it refuses, and a whole run of it with the real command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batches, build
from test_resume import result
from tiny_run import configuration, prepare
from transformers import AutoModelForCausalLM

from thrifty import attach
from thrifty.cli.main import main
from thrifty.core.errors import ThriftyError
from thrifty.delta import Delta
from thrifty.run.yaml_source import dump_yaml

THRIFTY = [sys.executable, "-m", "thrifty"]
PARTS = """
  - select: {blocks: {block_size: 8, target_modules: [q_proj, k_proj, v_proj, o_proj]}}
  - select: {rows: {target_modules: '.*mlp.*'}}
    budget: 2%
  - select: biases
"""


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "parts must be a list such as"),
        (["norms"], "part 1 must be a mapping with 'select', such as"),
        ([{"select": "norms"}, {"budget": 1}], "part 2 must be a mapping with 'select'"),
        ([{"select": "norm"}], "part 1: unknown selector 'norm'; did you mean 'norms'"),
        ([{"select": "norms", "budgte": 1}], "part 1: unknown key 'budgte'; did you mean 'budget'"),
        (
            [{"select": {"blocks": {"block_sise": 4}}}],
            "unknown option of blocks: 'block_sise'; did you mean 'block_size'",
        ),
        ([{"select": {"rows": {"block_size": 4}}}], "part 1: unknown option of rows: 'block_size'"),
        ([{"select": {"blocks": [4]}}], r"part 1: options of blocks must be a mapping, not \[4\]"),
        ([{"select": {"blocks": {}, "rows": {}}}], "part 1: select must be a name or one mapping like"),
        ([{"select": {"blocks": {"block_size": 0}}}], "block_size 0 is not valid"),
        ([{"select": {"entries": {"score": "magnitud"}}}], "unknown score 'magnitud'; did you mean 'magnitude'"),
        ([{"select": {"rows": {"target_modules": ["up_porj"]}}}], "unknown module 'up_porj'; did you mean 'up_proj'"),
        ([{"select": "norms", "budget": 0}], "budget 0 is neither a share"),
        ([{"select": "norms", "update": "in-place"}], "part 1: unknown update 'in-place'; did you mean 'in_place'"),
        ([{"select": "norms", "update": {"in_place": 1}}], "part 1: options of in_place must be a mapping, not 1"),
    ],
)
def test_a_wrong_part_is_named_with_the_nearest_key(parts: Any, message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        attach(build("llama", layers=1), parts, budget=0.1, batches=batches(1, 2, 8))
    assert "\n" not in str(error.value)


def thrifty(*words: str, cwd: Path, answer: int = 0) -> str:
    done = subprocess.run(
        [*THRIFTY, *words], cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False
    )
    assert done.returncode == answer, done.stderr
    return done.stdout + done.stderr


def test_a_custom_method_trains_saves_resumes_and_exports(tmp_path: Path) -> None:
    prepare(tmp_path, family="qwen2")
    config = configuration(tmp_path, save_steps=2)
    del config["method"], config["output_dir"]
    (tmp_path / "run.yaml").write_text(dump_yaml(config) + "method:" + PARTS, encoding="utf-8")
    train = ("train", "run.yaml", "max_steps=6")
    text = thrifty(*train, "output_dir=whole", cwd=tmp_path)
    assert "custom: " in text
    thrifty("train", "run.yaml", "max_steps=4", "lr_scheduler_type=constant", "output_dir=part", cwd=tmp_path)
    thrifty(*train, "lr_scheduler_type=constant", "output_dir=long", cwd=tmp_path)
    resumed = thrifty(
        *train, "lr_scheduler_type=constant", "output_dir=part", "resume_from_checkpoint=auto", cwd=tmp_path
    )
    assert "resuming at step 4" in resumed
    assert result(tmp_path / "part") == result(tmp_path / "long")

    plan = Delta.load(tmp_path / "whole" / "delta").plan
    kinds = {name: plan[name].kind for name in plan}
    biases = {name for name in kinds if name.endswith(".bias")}
    assert len(biases) == 6  # of q, k and v in two layers
    assert {name for name, kind in kinds.items() if kind == "whole"} == biases
    assert all(kind == "blocks" for name, kind in kinds.items() if name not in biases)
    shapes = {name: plan[name].to_files()[0]["shape"] for name in plan if name not in biases}
    assert {tuple(shape) for name, shape in shapes.items() if "attn" in name} == {(8, 8)}
    assert {tuple(shape) for name, shape in shapes.items() if "mlp" in name} <= {(1, 40), (1, 72)}
    assert {"attn" in name for name in shapes} == {True, False}
    assert all("attn" in name or "mlp" in name for name in shapes)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert plan.trainable_share <= 0.05
    assert summary["steps"] == 6

    thrifty("export", "whole", "--output", "exported", cwd=tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    start = {name: p.detach().clone() for name, p in base.named_parameters()}
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "exported").named_parameters())
    Delta.load(tmp_path / "whole" / "delta").apply(base)
    for name, p in base.named_parameters():
        assert torch.equal(p, exported[name]), name
        moved = p != start[name]
        assert moved.any() == (name in plan), name
        assert not moved[~plan[name].mask(p.shape)].any() if name in plan else True


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("rows:", "row:", "part 2: unknown selector 'row'; did you mean 'rows'"),
        (".*mlp.*", ".*mpl.*", "unknown module '.*mpl.*'"),
        ("budget: 2%", "budget: 2", "budget 2 numbers (2 numbers) buys no block"),
    ],
)
def test_a_custom_method_with_a_mistake_answers_2(
    right: str, wrong: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path, family="qwen2")
    config = configuration(tmp_path)
    del config["method"]
    parts = PARTS.replace(right, wrong)
    (tmp_path / "run.yaml").write_text(dump_yaml(config) + "method:" + parts, encoding="utf-8")
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
