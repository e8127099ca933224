"""`thrifty delta ...` in real processes, on two runs of one tiny model; and models made of a base and deltas."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import configuration, prepare

import thrifty
from thrifty.cli.main import main
from thrifty.delta import Delta
from thrifty.delta.algebra import transfer
from thrifty.run.model import load_model


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def command(*words: str, cwd: Path) -> Done:
    """The command line in this process: importing takes longer than the work."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, and the finished runs `one` and `other` (of other rows in another order)."""
    folder = prepare(tmp_path_factory.mktemp("runs"))
    for name, seed in (("one", 7), ("other", 8)):
        thrifty.train(configuration(folder, output_dir=str(folder / name), max_steps=3, seed=seed))
    return folder


def parameters(model: object) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}  # type: ignore[attr-defined]


def test_show_says_what_a_delta_holds(runs: Path) -> None:
    words = [sys.executable, "-m", "thrifty", "delta", "show", "one", "--plot", "touched.png"]
    done = subprocess.run(words, cwd=runs, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    plan = Delta.load(runs / "one/delta").plan
    assert f"{plan.trainable_parameters:,} of {plan.total:,} numbers trained" in done.stdout
    assert "on disk: " in done.stdout
    assert "run: objective sft, budget 5%, steps 3, learning_rate 0.01, seed 7" in done.stdout
    record = json.loads((runs / "one/delta/delta.json").read_text(encoding="utf-8"))
    summary = json.loads((runs / "one/summary.json").read_text(encoding="utf-8"))
    assert record["info"]["fingerprints"] == summary["fingerprints"]
    assert str(runs) not in json.dumps(record)
    assert "layer  kind" in done.stdout
    assert (runs / "touched.png").read_bytes().startswith(b"\x89PNG")
    each = command("delta", "show", "one/delta", "--rank", cwd=runs).stdout
    assert all(name in each for name in plan)


def test_verify_knows_the_base_and_the_trained_model(runs: Path) -> None:
    assert "base: all " in command("delta", "verify", "one", cwd=runs).stdout
    assert command("export", "one", "--output", "exported", cwd=runs).returncode == 0
    assert "applied: all " in command("delta", "verify", "one", "--base", "exported", cwd=runs).stdout
    wrong = command("delta", "verify", "other", "--base", "exported", cwd=runs)
    assert wrong.returncode == 2
    assert "another base, or a changed one" in wrong.stdout
    Delta.load(runs / "one/delta").apply(trained := load_model(runs / "model"))
    name = next(iter(Delta.load(runs / "one/delta").plan))
    place = Delta.load(runs / "one/delta").plan[name]
    place.scatter_(trained.get_parameter(name).data, place.gather(trained.get_parameter(name)) + 1)  # trained further
    trained.save_pretrained(runs / "further")
    further = command("delta", "verify", "one", "--base", "further", cwd=runs)
    assert further.returncode == 2
    assert f"{name}: another base, or a changed one" in further.stdout
    assert "changed since" in command("delta", "remove", "one", "further", "--output", "lost", cwd=runs).stderr
    assert "is the base already" in command("delta", "remove", "one", "model", "--output", "lost", cwd=runs).stderr
    assert not (runs / "lost").exists()
    assert "thrifty: exported is neither the delta's base nor the base with exactly this delta" in wrong.stderr


def test_the_algebra_from_the_command_line(runs: Path) -> None:
    for words in (
        ("add", "one", "other", "--output", "sum"),
        ("scale", "sum", "0.5", "--output", "half"),
        ("average", "one", "other", "--output", "mean"),
        ("stock", "one", "other", "--output", "stock"),
        ("transfer", "one", "--base", "model", "--output", "moved"),
    ):
        done = command("delta", *words, cwd=runs)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"wrote {words[-1]}: ")
    exported = command("export", "sum", "--base", "model", "--output", "summed", cwd=runs)
    assert exported.returncode == 0, exported.stderr
    assert "| method | `sum` ([{" in (runs / "summed/README.md").read_text(encoding="utf-8")
    half, mean = (Delta.load(runs / name).apply(load_model(runs / "model")) for name in ("half", "mean"))
    for name, value in parameters(half).items():
        torch.testing.assert_close(parameters(mean)[name], value, rtol=1e-6, atol=1e-7)
    one, moved = (Delta.load(runs / name).apply(load_model(runs / "model")) for name in ("one/delta", "moved"))
    assert all(torch.equal(value, parameters(moved)[name]) for name, value in parameters(one).items())


def test_a_merged_checkpoint_and_the_way_back(runs: Path) -> None:
    done = command("delta", "apply", "one", "--output", "merged", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert "wrote merged\nas GGUF, with llama.cpp: python convert_hf_to_gguf.py merged" in done.stdout
    trained = Delta.load(runs / "one/delta").apply(load_model(runs / "model"))
    merged = parameters(load_model(runs / "merged"))
    assert all(torch.equal(value, merged[name]) for name, value in parameters(trained).items())
    assert command("delta", "remove", "one", "merged", "--output", "again", cwd=runs).returncode == 0
    base, again = parameters(load_model(runs / "model")), parameters(load_model(runs / "again"))
    assert all(torch.equal(value, again[name]) for name, value in base.items())
    wrong = command("delta", "remove", "other", "merged", "--output", "x", cwd=runs)
    assert wrong.returncode == 2
    assert "is not this delta on its base" in wrong.stderr
    assert not (runs / "x").exists()


def test_conversions_print_the_largest_logit_difference(runs: Path) -> None:
    done = command("delta", "convert", "one", "--to", "lora", "--rank", "4", "--output", "adapter", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert re.search(r"wrote adapter: LoRA, \d+\.\d+% of the change lost\nlargest logit difference: ", done.stdout)
    back = command("delta", "convert", "adapter", "--to", "delta", "--base", "model", "--output", "pairs", cwd=runs)
    assert back.returncode == 0, back.stderr
    assert "largest logit difference: " in back.stdout
    assert command("eval", "model", "--delta", "pairs", "data.eval=eval.jsonl", cwd=runs).returncode == 0
    exact = command("delta", "convert", "one", "--to", "lora", "--error", "0", "--output", "full-rank", cwd=runs)
    assert float(exact.stdout.split()[-1]) < 1e-3
    for words, message in (
        (("adapter", "--to", "delta"), "adapter is a PEFT adapter without its run: name its base model with --base"),
        (("one", "--to", "shira", "--rank", "4"), "--rank and --error are for --to lora"),
        (("one", "--to", "lora"), "give either a rank, such as 16, or an error"),
    ):
        assert message in command("delta", "convert", *words, "--output", "x", cwd=runs).stderr


def test_compression_prints_what_it_cost(runs: Path) -> None:
    done = command("delta", "compress", "one", "int8", "--output", "small", "--tensors", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert re.match(r"in all: [\d,]+ -> [\d,]+ bytes, 0\.\d+% of the change lost\n", done.stdout)
    small, given = Delta.load(runs / "small"), Delta.load(runs / "one/delta")
    assert all(f"{name}: " in done.stdout for name in given.plan)
    size = [(runs / name / "delta.safetensors").stat().st_size for name in ("small", "one/delta")]
    assert size[0] < 0.5 * size[1]
    assert command("eval", "model", "--delta", "small", "data.eval=eval.jsonl", cwd=runs).returncode == 0
    wrong = command("delta", "compress", "one", "int3", "--output", "x", cwd=runs)
    assert "did you mean 'int8'" in wrong.stderr or "int4" in wrong.stderr
    assert small.plan.trainable_parameters == given.plan.trainable_parameters


def test_diff_of_base_and_export_is_the_delta(runs: Path) -> None:
    assert command("export", "one", "--output", "tuned", cwd=runs).returncode == 0
    done = command("delta", "diff", "model", "tuned", "--output", "found", cwd=runs)
    assert done.returncode == 0, done.stderr
    found, given = Delta.load(runs / "found"), Delta.load(runs / "one/delta")
    assert found.plan.trainable_parameters == given.plan.trainable_parameters
    tuned = parameters(load_model(runs / "tuned"))
    for name, region in given.plan.items():
        assert torch.equal(found.plan[name].mask(tuned[name].shape), region.mask(tuned[name].shape))
    changed = parameters(found.apply(load_model(runs / "model")))
    assert all(torch.equal(value, tuned[name]) for name, value in changed.items())


def test_interpolation_runs_from_the_base_to_the_result(runs: Path) -> None:
    done = command("delta", "interpolate", "one", "--weights", "0,0.5,1", "data.eval=eval.jsonl", cwd=runs)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["weight", "loss"]
    losses = {float(line.split()[0]): float(line.split()[1]) for line in lines}
    assert list(losses) == [0, 0.5, 1]
    for model, weight in ((["model"], 0), (["one"], 1)):
        scored = command("eval", *model, "data.eval=eval.jsonl", "max_length=48", cwd=runs).stdout
        assert float(scored.split()[1]) == pytest.approx(losses[weight], abs=1e-4)
    assert losses[0] != losses[1]


def test_a_delta_without_its_run_is_interpolated_and_a_weight_of_one_alone_verified(runs: Path) -> None:
    assert command("delta", "add", "one", "other", "--weights", "1,0", "--output", "only", cwd=runs).returncode == 0
    words = ("--base", "model", "--weights", "0,1", "data.eval=eval.jsonl")
    done = command("delta", "interpolate", "only", *words, cwd=runs)
    assert done.returncode == 0, done.stderr
    assert command("delta", "apply", "only", "--base", "model", "--output", "onlied", cwd=runs).returncode == 0
    assert "applied: all" in command("delta", "verify", "only", "--base", "onlied", cwd=runs).stdout
    assert "base: all" in command("delta", "verify", "only", "--base", "model", cwd=runs).stdout


def test_training_on_top_of_deltas_and_flattening(runs: Path) -> None:
    values = configuration(runs, model={"base": str(runs / "model"), "deltas": [str(runs / "one")]}, max_steps=2)
    values |= {"method": "random_blocks", "output_dir": "top"}
    (runs / "top.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    done = command("train", "top.yaml", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert command("delta", "verify", "top", cwd=runs).stdout.startswith("base: all ")
    assert command("eval", "top", "data.eval=eval.jsonl", cwd=runs).returncode == 0
    assert command("export", "top", "--output", "topped", cwd=runs).returncode == 0
    card = (runs / "topped/README.md").read_text(encoding="utf-8")
    assert "| base model | `model` with 1 deltas applied before |" in card
    assert command("delta", "stack", "one", "top", "--output", "flat", cwd=runs).returncode == 0
    flat = Delta.load(runs / "flat").apply(load_model(runs / "model"))
    exported = parameters(load_model(runs / "topped"))
    assert all(torch.equal(value, exported[name]) for name, value in parameters(flat).items())


@pytest.mark.parametrize("method", ["full", {"smt": {"block_size": 8}}])
def test_full_training_on_top_of_deltas_gives_an_exact_delta(runs: Path, tmp_path: Path, method: object) -> None:
    model = {"base": str(runs / "model"), "deltas": [str(runs / "one"), str(runs / "half-way")]}
    Delta.load(runs / "one/delta").apply(base := load_model(runs / "model"))
    transfer(Delta.load(runs / "one/delta"), parameters(base)).save(runs / "half-way")
    settings = {"model": model, "max_steps": 2, "method": method, "output_dir": str(tmp_path / "out")}
    settings["budget"] = None if method == "full" else 0.05
    run = thrifty.train(configuration(runs, **settings))
    fresh = load_model(model)
    Delta.load(tmp_path / "out/delta").apply(fresh)
    assert all(torch.equal(p, parameters(run.model)[name]) for name, p in parameters(fresh).items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("delta",), "arguments are required: <verb>"),
        (("delta", "shw", "one"), "invalid choice: 'shw'"),
        (("delta", "show", "on"), "on: no such folder (did you mean 'one'?)"),
        (("delta", "show", "model"), "model is no folder of a delta or of a finished run"),
        (("delta", "add", "one", "--weights", "1,2", "--output", "x"), "--weights has 2 numbers for 1 deltas"),
        (("delta", "add", "one", "--weights", "a", "--output", "x"), "argument --weights: invalid"),
        (("delta", "scale", "one", "nan", "--output", "x"), "weight nan is not valid: give a finite number"),
        (("delta", "add", "one", "other", "--output", "other/delta"), "other/delta exists: name a new folder"),
        (("train", "add_tokens=[" + "x" * 300 + "]", "nothing.yaml"), "nothing.yaml"),
        (("delta", "stack", "one", "--output", "x"), "thrifty delta stack takes two deltas, not 1"),
        (("delta", "diff", "model", "model", "--output", "x"), "the two models are equal"),
        (("delta", "scale", "one", "2", "--output", "model"), "model exists: name a new folder, or remove it first"),
        (("train", "model={bas: x}"), "unknown key 'model.bas'; did you mean 'model.base'?"),
        (("train", "model={base: model, deltas: one}", "data.train=train.jsonl"), "model.deltas must be a list"),
        (
            ("train", "model={base: model, deltas: [nowhere]}", "data.train=train.jsonl", "output_dir=x"),
            "nowhere: no such folder",
        ),
    ],
)
def test_mistakes_are_one_line(runs: Path, words: tuple[str, ...], message: str) -> None:
    done = command(*words, cwd=runs)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
