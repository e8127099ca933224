"""What users build on: names, verbs, options and keys. A change here changes them for everyone, on purpose."""

import argparse
import dataclasses
import subprocess
import sys

import pytest

import thrifty
from thrifty.cli.main import parser
from thrifty.core.registry import get
from thrifty.run.about import describe
from thrifty.run.config import DataConfig, EvalConfig, RunConfig

NAMES = [
    "Budget",
    "Delta",
    "Deltas",
    "Method",
    "Plan",
    "add_tokens",
    "attach",
    "compare",
    "estimate",
    "methods",
    "train",
]
METHODS = [
    "bitfit",
    "composable_sft",
    "custom",
    "diablo",
    "full",
    "gps",
    "gradient_axes",
    "greentrainer",
    "hft",
    "lift",
    "lisa",
    "locft_bf",
    "loki",
    "magnitude",
    "muon_columns",
    "peft",
    "random_blocks",
    "random_columns",
    "random_entries",
    "random_rows",
    "saved",
    "senszo_mask",
    "smt",
    "spafit",
    "sparsegrad",
    "spt_sensitivity",
    "telly",
]
VERBS = {
    "demo": ["settings"],
    "init": ["--data", "--eval", "--model", "file"],
    "train": ["--from", "settings"],
    "validate": ["--step", "settings"],
    "eval": ["--delta", "--harness", "--harness-path", "model", "settings"],
    "estimate": [
        "--compare",
        "--fit",
        "--hardware",
        "--json",
        "--max-cost",
        "--max-hours",
        "--measure",
        "--price",
        "--watts",
        "settings",
    ],
    "export": ["--base", "--dtype", "--output", "--private", "--to-hub", "source"],
    "compare": [
        "--only",
        "--png",
        "--ray",
        "--report",
        "--retry-failed",
        "--stop-after",
        "--threads",
        "--workers",
        "settings",
    ],
    "chat": ["--delta", "--system", "model", "settings"],
    "delta": ["delta_verb"],
    "methods": ["method"],
    "env": [],
    "completion": ["shell"],
}
DELTA_VERBS = {
    "show": ["--plot", "--rank", "--tensors", "delta"],
    "verify": ["--base", "delta"],
    "apply": ["--base", "--dtype", "--gguf", "--output", "delta"],
    "remove": ["--output", "delta", "model"],
    "convert": ["--base", "--error", "--output", "--rank", "--to", "source"],
    "diff": ["--dtype", "--error", "--output", "base", "tuned"],
    "add": ["--base", "--output", "--weights", "deltas"],
    "average": ["--base", "--output", "--weights", "deltas"],
    "stock": ["--base", "--output", "deltas"],
    "stack": ["--base", "--output", "deltas"],
    "scale": ["--base", "--output", "delta", "weight"],
    "compress": ["--base", "--output", "--tensors", "delta", "how"],
    "interpolate": ["--base", "--weights", "delta", "settings"],
    "transfer": ["--base", "--output", "delta"],
}
KEYS = [
    "model",
    "tokenizer",
    "dtype",
    "quantize",
    "trust_remote_code",
    "add_tokens",
    "data",
    "method",
    "objective",
    "budget",
    "probe_rows",
    "probe_units",
    "eval",
    "output_dir",
    "max_length",
    "packing",
    "checkpoint_layers",
    "resume_from_checkpoint",
    "allow_changed_data",
    "early_stopping_patience",
    "nonfinite",
    "report_to",
    "training",
]
EVAL_KEYS = ["loss", "exact_match", "choice", "choices", "forgetting", "before", "batch_size", "max_new_tokens"]


def test_public_names() -> None:
    assert thrifty.__all__ == NAMES
    assert len(NAMES) <= 12
    for name in NAMES:
        assert callable(getattr(thrifty, name))
        assert (getattr(thrifty, name).__doc__ or "").strip(), name
    assert sorted(thrifty.methods()) == METHODS
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = thrifty.trian


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices


def options(verbs: dict[str, argparse.ArgumentParser]) -> dict[str, list[str]]:
    return {
        verb: sorted(a.option_strings[-1] if a.option_strings else a.dest for a in sub._actions if a.dest != "help")
        for verb, sub in verbs.items()
    }


def test_verbs_and_options() -> None:
    verbs = verbs_of(parser())
    assert options(verbs) == VERBS
    assert options(verbs_of(verbs["delta"])) == DELTA_VERBS


def test_keys_of_a_run_file() -> None:
    assert [item.name for item in dataclasses.fields(RunConfig)] == KEYS
    assert [item.name for item in dataclasses.fields(EvalConfig)] == EVAL_KEYS
    assert [item.name for item in dataclasses.fields(DataConfig)] == ["train", "eval"]


def test_a_description_says_what_the_probe_looks_at() -> None:
    for name, text in (("loki", "of general text before"), ("smt", "of the task before"), ("bitfit", "not needed")):
        (line,) = (line for line in describe(get(name)).splitlines() if line.startswith("Probe: "))
        assert text in line


LIGHT = """
import sys
import thrifty, thrifty.cli.main
dir(thrifty)
for words in (["--help"], ["train", "--help"], ["--version"]):
    try:
        thrifty.cli.main.main(words)
    except SystemExit as end:
        assert end.code == 0, end.code
assert thrifty.cli.main.main(["trian"]) == 2
heavy = {"torch", "transformers", "numpy", "yaml", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_and_help_are_light() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: thrifty" in done.stdout
