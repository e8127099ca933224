"""`quantize` in a run file: trained, resumed, evaluated, exported, validated and estimated; LoRA on the same base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_run import configuration, prepare
from transformers import AutoModelForCausalLM

import thrifty
from thrifty.core.errors import ThriftyError
from thrifty.core.quantized import is_quantized, quantized_as
from thrifty.run.config import load_config
from thrifty.run.evaluate import run_eval
from thrifty.run.export import export
from thrifty.run.model import apply_delta, load_model, load_tokenizer
from thrifty.run.validate import validate

pytest.importorskip("torchao")

LORA = {"peft": {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("run"))


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=ids).logits
    return out


def run(folder: Path, name: str, **changes: Any) -> Any:
    settings = {"quantize": "int8", "save_strategy": "no", **changes}
    return thrifty.train(configuration(folder, output_dir=str(folder / name), **settings))


@pytest.mark.parametrize(("form", "method"), [("int8", "smt"), ("nf4", "smt"), ("int8", "lora"), ("nf4", "lora")])
@pytest.mark.filterwarnings("error::UserWarning:peft")
def test_a_run_is_evaluated_loaded_and_exported_as_it_was_trained(folder: Path, form: str, method: str) -> None:
    name = f"{form}-{method}"
    changes = {"quantize": form} | ({"method": LORA, "budget": None} if method == "lora" else {})
    done = run(folder, name, **changes)
    trained = logits(done.model)
    assert any(is_quantized(p) for p in done.model.parameters())
    info = json.loads((folder / name / "delta" / "delta.json").read_text())["info"]
    assert info["quantize"] == form
    config = load_config(folder / name / "run.yaml")
    assert config.quantize == form
    found = run_eval(config.model, delta=str(folder / name), config=config)
    assert found["loss"] == pytest.approx(done.summary["evaluation"]["after"]["loss"], rel=1e-5)

    model = load_model(config.model, quantize=form)
    base = logits(model)
    again = apply_delta(folder / name, model=model, tokenizer=load_tokenizer(config.model))
    torch.testing.assert_close(logits(again), trained, rtol=1e-5, atol=1e-5)
    assert (trained - base).abs().max() > 1e-3

    plain = AutoModelForCausalLM.from_pretrained(export(str(folder / name), output=str(folder / f"{name}-plain")))
    torch.testing.assert_close(logits(plain), trained, rtol=1e-3, atol=1e-3)


def test_a_stopped_run_goes_on_to_the_same_values(folder: Path) -> None:
    whole = run(folder, "whole", max_steps=6)
    run(folder, "parts", max_steps=6, save_strategy="steps", save_steps=3)
    (folder / "parts" / "summary.json").unlink()
    for left in (folder / "parts").glob("checkpoint-6"):
        left.rename(folder / "parts-last")
    again = run(folder, "parts", max_steps=6, resume_from_checkpoint=str(folder / "parts" / "checkpoint-3"))
    assert again.delta.plan.digest() == whole.delta.plan.digest()
    for name, piece in whole.delta.pieces.items():
        assert torch.equal(piece.values, again.delta.pieces[name].values)


def test_resume_refuses_another_quantization(folder: Path) -> None:
    run(folder, "other", max_steps=3, save_strategy="steps", save_steps=3)
    with pytest.raises(ThriftyError, match="quantize"):
        run(folder, "other", max_steps=4, quantize="nf4", resume_from_checkpoint="auto")


def test_a_delta_says_what_base_it_wants(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(folder, "mixed", max_steps=2)
    model, tokenizer = str(folder / "model"), load_tokenizer(str(folder / "model"))
    with pytest.raises(ThriftyError, match="quantize=int8"):
        apply_delta(folder / "mixed", model=load_model(model, quantize="nf4"), tokenizer=tokenizer)
    with caplog.at_level("WARNING", logger="thrifty"):
        plain = apply_delta(folder / "mixed", model=load_model(model), tokenizer=tokenizer)
    assert quantized_as(plain) is None
    assert "quantized to int8" in caplog.text


def test_validate_and_estimate_count_packed_weights(folder: Path) -> None:
    settings = configuration(folder, output_dir=str(folder / "never"))
    packed = thrifty.estimate({**settings, "quantize": "int8"}, hardware="cpu")
    model = load_model(str(folder / "model"))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    saved = 3 * sum(p.numel() for p in matrices) - 5 * sum(p.shape[0] for p in matrices)
    whole = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert packed.memory["weights"] == whole - saved
    assert any(note.startswith("quantize:") for note in packed.notes)
    report = validate({**settings, "quantize": "int8"}, step=True, console=Console(quiet=True))
    assert report.is_clean, report.problems


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "full", "budget": None}, "full' reads or trains more of a weight"),
        ({"method": {"smt": {"reselect_every": 3}}}, "changes its plan"),
        ({"quantize": "int4", "model": {"base": "missing", "deltas": ["x"]}}, "thrifty export"),
        ({"load_in_8bit": True}, "quantize: int8"),
        ({"load_in_4bit": True}, "quantize: nf4"),
        ({"quantize": "int3"}, "quantize"),
    ],
)
def test_what_does_not_go_is_told_by_train(folder: Path, changes: dict[str, Any], words: str) -> None:
    settings = configuration(folder, output_dir=str(folder / "bad"), **({"quantize": "int8"} | changes))
    with pytest.raises(ThriftyError, match=words):
        thrifty.train(settings)


def test_validate_tells_it_too(folder: Path) -> None:
    settings = configuration(folder, output_dir=str(folder / "bad"), method="full", budget=None, quantize="int4")
    problems = " ".join(validate(settings, console=Console(quiet=True)).problems)
    assert "full' reads or trains more of a weight" in problems
    assert "fits int4" in problems


def test_a_base_with_deltas_is_exported_first(folder: Path) -> None:
    run(folder, "first", max_steps=2, quantize=None)
    with pytest.raises(ThriftyError, match="thrifty export"):
        run(folder, "second", model={"base": str(folder / "model"), "deltas": [str(folder / "first")]})
