"""Run files and settings: what loads, what it becomes, and the one line that a mistake gets."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError
from thrifty.data import Source
from thrifty.run.aliases import OTHER_NAMES, OWNED
from thrifty.run.config import EvalConfig, RunConfig, load_config, training_fields
from thrifty.run.init import init, run_file

BASE = "model: tiny\ndata: {train: rows.jsonl, eval: held_out.jsonl}\n"


def load(tmp_path: Path, text: str, *settings: str) -> RunConfig:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, settings)


def test_the_run_file_of_the_documentation(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
model: smollm2-135m
dtype: float32                 # what the weights are held in; bf16: true is autocast over it
data: {train: requests.jsonl, eval: held_out.jsonl}
method: smt
budget: 1%
max_steps: 300
per_device_train_batch_size: 16
learning_rate: 1.0e-3
eval: {loss: true, exact_match: 200, choice: 200, forgetting: general.txt, before: true}
output_dir: out/first
""",
    )
    assert config.data.train == (Source("requests.jsonl"),)
    assert config.budget == Budget(fraction=0.01)
    assert config.training == {"max_steps": 300, "per_device_train_batch_size": 16, "learning_rate": 1e-3}
    assert config.eval == EvalConfig(exact_match=200, choice=200, forgetting="general.txt", before=True)
    assert config.output_dir == "out/first"
    assert config.seed == 42


def test_everything_else_is_resolved(tmp_path: Path) -> None:
    config = load(tmp_path, BASE)
    assert config.method == "smt"
    assert config.training == {"learning_rate": 1e-3}, "the method's own default"
    assert load(tmp_path, BASE + "method: full\n").training == {"learning_rate": 2e-5}
    assert load(tmp_path, BASE + "seed: 7\n").seed == 7


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("1E-3", 1e-3), (".5", 0.5), ("1", 1.0), ("1_0", 10.0)],
)
def test_numbers(tmp_path: Path, written: str, value: float) -> None:
    for config in (
        load(tmp_path, BASE + f"learning_rate: {written}\n"),
        load(tmp_path, BASE, f"learning_rate={written}"),
    ):
        assert config.training["learning_rate"] == value
        assert isinstance(config.training["learning_rate"], float)


def test_words_stay_words(tmp_path: Path) -> None:
    config = load(tmp_path, BASE + "eval_strategy: no\nrun_name: 2024-01-01\n", "report_to=none", "output_dir=12:30")
    assert config.training["eval_strategy"] == "no"
    assert config.training["run_name"] == "2024-01-01"
    assert config.output_dir == "12:30"
    assert load(tmp_path, BASE, "run_name=#5").training["run_name"] == "#5"
    assert load(tmp_path, BASE, "output_dir=2024").output_dir == "2024"


def test_settings_go_over_the_file_in_order(tmp_path: Path) -> None:
    config = load(
        tmp_path, BASE + "method: smt\nmax_steps: 3\n", "method.smt.block_size=64", "max_steps=4", "max_steps=1e2"
    )
    assert config.method == {"smt": {"block_size": 64}}
    assert config.training["max_steps"] == 100
    assert isinstance(config.training["max_steps"], int)
    assert load(tmp_path, BASE + "method: smt\n", "method.random_blocks.block_size=8").method == {
        "random_blocks": {"block_size": 8}
    }
    assert load(tmp_path, BASE + "method: {smt: {score: abs_grad}}\n", "method.smt.block_size=8").method == {
        "smt": {"score": "abs_grad", "block_size": 8}
    }
    assert load(tmp_path, BASE, "method={peft: {peft_type: LORA, r: 2}}").method == {
        "peft": {"peft_type": "LORA", "r": 2}
    }
    assert load(tmp_path, BASE, "eval.exact_match=5").eval.exact_match == 5
    listed = BASE.replace("rows.jsonl", "[{path: a}, b]")
    assert load(tmp_path, listed, "data.train.0.split=train").data.train == (Source("a", split="train"), Source("b"))


def test_without_a_file_and_from_python(tmp_path: Path) -> None:
    config = load_config(None, ["model=tiny", f"data.train={tmp_path}/x.jsonl"])
    assert config.data.train == (Source(f"{tmp_path}/x.jsonl"),)
    assert config == load_config({"model": "tiny", "data": {"train": tmp_path / "x.jsonl"}})
    assert config == load_config({"model": "other"}, {"model": "tiny", "data": {"train": [tmp_path / "x.jsonl"]}})
    assert load_config({"model": "tiny"}, needs_training_data=False).data.train == ()


def test_sources(tmp_path: Path) -> None:
    config = load(
        tmp_path, "model: m\ndata:\n  train:\n  - {path: a, split: train, weight: 2, columns: {prompt: q}}\n  - b\n"
    )
    assert config.data.train == (Source("a", split="train", weight=2.0, columns={"prompt": "q"}), Source("b"))
    assert config.data.eval == ()


def test_every_field_of_training_arguments_is_ours_or_accepted_or_refused_with_a_reason() -> None:
    import dataclasses

    from transformers import TrainingArguments

    names = {item.name for item in dataclasses.fields(TrainingArguments)}
    ours = {item.name for item in dataclasses.fields(RunConfig)}
    assert names == set(training_fields()) | (names & ours) | set(OWNED)
    assert not set(OTHER_NAMES) & (names | ours), "a name that is valid here cannot be another tool's"
    for name in OWNED:
        with pytest.raises(ThriftyError, match=rf"^arguments: {name} is not to be set: \w"):
            load_config({"model": "m", name: 1})


def test_names_of_other_tools() -> None:
    common = {
        **dict.fromkeys(("lr",), "learning_rate"),
        **dict.fromkeys(("base_model", "model_name_or_path"), "model"),
        **dict.fromkeys(("micro_batch_size", "batch_size"), "per_device_train_batch_size"),
        **dict.fromkeys(("sequence_len", "cutoff_len", "max_seq_length"), "max_length"),
        **dict.fromkeys(("epochs", "num_epochs"), "num_train_epochs"),
        **dict.fromkeys(("dataset", "datasets", "dataset_path"), "data.train"),
        **dict.fromkeys(("val_set_size",), "data.eval"),
        **dict.fromkeys(("output",), "output_dir"),
        **dict.fromkeys(("adapter",), "method"),
        **dict.fromkeys(("lora_target", "lora_r"), "peft"),
        **dict.fromkeys(("warmup_ratio",), "warmup_steps"),
    }
    for theirs, ours in common.items():
        with pytest.raises(ThriftyError, match=rf"^command line: '{theirs}' is .*{ours}"):
            load_config(None, [f"{theirs}=1"])


MISTAKES = {
    "learning_rat: 1": "run.yaml:3: unknown key 'learning_rat'; did you mean 'learning_rate'?",
    "budgt: 1%": "run.yaml:3: unknown key 'budgt'; did you mean 'budget'?",
    "micro_batch_siz: 1": "'micro_batch_siz'; 'micro_batch_size' is called 'per_device_train_batch_size' here",
    "block_size: 1": "run.yaml:3: 'block_size' is part of the method: method: {smt: {block_size: ...}}",
    "method: random_blocks\nscope: global": "run.yaml:4: 'scope' is part of the method: method: {random_blocks: {scope",
    "method:\n  smt:\n    block_siz: 1": "run.yaml:5: unknown option of method 'smt': 'block_siz'; did you mean 'bl",
    "method: smtt": "run.yaml:3: unknown method 'smtt'; did you mean 'smt'?",
    "method: [smt]": "run.yaml:3: part 1 must be a mapping with 'select'",
    "method: {smt: {}, full: {}}": "run.yaml:3: method must be a name or one mapping",
    "budget: 150%": "run.yaml:3: budget '150%' is neither a share",
    "max_steps: 3.5": "run.yaml:3: max_steps must be an integer, not 3.5",
    "max_steps: many": "run.yaml:3: max_steps must be an integer, not 'many'",
    "bf16: yes": "run.yaml:3: bf16 must be true or false, not 'yes'; write true or false",
    "learning_rate: .inf": "run.yaml:3: learning_rate must be a number, not inf",
    "learning_rate: -1": "run.yaml:3: learning_rate must be 0 or more, not -1",
    "per_device_train_batch_size: 0": "run.yaml:3: per_device_train_batch_size must be 1 or more, not 0",
    "lr_scheduler_type: cosin": "not 'cosin'; did you mean 'cosine'?",
    "dtype: fp32": "run.yaml:3: dtype must be 'float32' or 'bfloat16' or 'float16', not 'fp32'",
    "output_dir: 2024": "run.yaml:3: output_dir must be a text, not 2024; put it in quotes: '2024'",
    "output_dir: [a]": "run.yaml:3: output_dir must be a text, not ['a']",
    "eval:\n  exact_mach: 3": "run.yaml:4: unknown key 'eval.exact_mach'; did you mean 'eval.exact_match'?",
    "eval:\n  exact_match: all": "run.yaml:4: eval.exact_match must be an integer or true or false, not 'all'",
    "eval: {choices: [a, a]}": "run.yaml:3: eval.choices must name at least two different options",
    "eval: true": "run.yaml:3: eval must be a mapping such as {loss: true, exact_match: 200}, not True",
    "model: other": "run.yaml:3: 'model' is given twice (first at",
    "seed: 1\n\tbf16: true": "run.yaml:4: not valid YAML: found character '\\t' that cannot start any token; in",
    "run_name: @x": "run.yaml:3: not valid YAML",
    "lr_scheduler_kwargs: &a [*a]": "run.yaml:3: a YAML alias that contains itself",
    "? [a]\n: b": "run.yaml:3: a key must be one word",
    "seed: !!python/object:os.system x": "run.yaml:3: 'x' is no python/object:os.system that is read here",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=range(len(MISTAKES)))
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ThriftyError) as caught:
        load(tmp_path, BASE + text + "\n")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/run.yaml:")
    assert "\n" not in str(caught.value)


WHOLE = {
    "": "run.yaml: the file is empty",
    "- a": "run.yaml:1: a run file is a mapping",
    "model: m": "run.yaml: data.train is missing",
    "data: {train: a}": "run.yaml: model is missing",
    "model: m\ndata: rows.jsonl": "run.yaml:2: data must be a mapping",
    "model: m\ndata: {train: []}": "run.yaml:2: data.train is an empty list",
    "model: m\ndata:\n  test: a": "run.yaml:3: 'data.test' is called 'data.eval' here",
    "model: m\ndata:\n  train:\n  - path: x\n    splt: 3": "run.yaml:5: unknown key 'data.train.0.splt'; did you mean",
    "model: m\ndata:\n  train:\n  - path: x\n    split: 3": "run.yaml:5: data.train.0.split must be a text or null",
    "model: m\ndata:\n  train:\n  - split: a": "run.yaml:4: data.train.0.path is missing",
    "model: m\ndata:\n  train:\n  - {path: a, weight: 0}": "run.yaml:4: a: weight is 0",
    "model: m\ndata: {train: a}\neval:\n  exact_match: 5": "run.yaml:4: eval.exact_match needs data.eval",
    "model: m\ndata: {train: a}\neval_strategy: steps": "run.yaml:3: eval_strategy needs data.eval",
    "model: m\ndata: {train: a}\nearly_stopping_patience: 3": "run.yaml:3: early_stopping_patience needs data.eval",
}


@pytest.mark.parametrize(("text", "message"), WHOLE.items(), ids=range(len(WHOLE)))
def test_mistakes_in_a_whole_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ThriftyError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


SETTINGS = {
    "max_steps": "'max_steps' is not key=value",
    "--max-steps=3": "write max_steps=3 without dashes",
    "=3": "'=3' is not key=value",
    "eval..x=3": "'eval..x' is not a key",
    "method=x: y": "unknown method 'x'",
    "method=x: y: z": "command line: method: not valid YAML",
    "data.train.path=x": "cannot set data.train.path: data.train is 'rows.jsonl', not a mapping",
    "maxsteps=3": "command line: unknown key 'maxsteps'; did you mean 'max_steps'?",
}


@pytest.mark.parametrize(("text", "message"), SETTINGS.items())
def test_mistakes_on_the_command_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ThriftyError, match=r"^command line: ") as caught:
        load(tmp_path, BASE, text)
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ThriftyError, match="no such file; `thrifty init` writes"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(ThriftyError, match="not a text file in UTF-8"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(ThriftyError, match=r"is a folder, not a run file; did you mean .*run.yaml\?"):
        load_config(tmp_path)


def test_a_budget_and_a_list_index_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ThriftyError, match=r"data.train is a list of one entry: no data.train.3 \(the first is 0\)"):
        load(tmp_path, BASE.replace("rows.jsonl", "[a]"), "data.train.3=x")


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
tricky = st.sampled_from(
    ["no", "1e-3", "12:30", "null", "true", "~", "1_000", "#x", "a: b", " x ", "2024-01-01", "é", "- x"]
)
counts = st.integers(1, 10**9)
configs = st.fixed_dictionaries(
    {
        "model": names | tricky,
        "data": st.fixed_dictionaries({"train": names | st.lists(names, min_size=1, max_size=2)}),
    },
    optional={
        "budget": st.floats(1e-6, 1.0) | st.integers(2, 10**9) | st.just("1%"),
        "method": st.sampled_from(
            ["full", {"smt": {"block_size": [64, 16]}}, {"peft": {"r": 4, "lora_dropout": 1e-5}}]
        ),
        "learning_rate": st.floats(0, 1),
        "max_steps": counts,
        "run_name": names | tricky,
        "output_dir": names | tricky,
        "report_to": st.just("none") | st.lists(tricky, max_size=2),
        "eval": st.fixed_dictionaries({"loss": st.booleans(), "choices": st.none() | st.just(["yes", "no"])}),
        "resume_from_checkpoint": st.none() | names,
        "lr_scheduler_kwargs": st.dictionaries(names, st.floats(0, 1) | names, max_size=2),
    },
)


@settings(max_examples=150, deadline=None)
@given(values=configs)
def test_a_resolved_file_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> None:
    config = load_config(values)
    file = tmp_path_factory.getbasetemp() / "resolved.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(file) == config


def test_a_resolved_file_reads_the_same_in_any_yaml(tmp_path: Path) -> None:
    import yaml

    config = load(tmp_path, BASE, "eval_strategy=no", "run_name=1e-3", "output_dir=on", "learning_rate=1e-5")
    assert yaml.safe_load(config.to_yaml()) == config.to_dict()


def test_init_writes_every_key_with_a_comment(tmp_path: Path) -> None:
    import dataclasses

    file, _ = init(str(tmp_path / "run.yaml"), model="smollm2-135m", train="my rows: 1.jsonl", eval="no")
    config = load_config(file)
    assert config.data.train == (Source("my rows: 1.jsonl"),)
    assert config.data.eval == (Source("no"),)
    given_keys = config.to_dict()
    lines = file.read_text(encoding="utf-8").splitlines()
    for name in [item.name for item in dataclasses.fields(RunConfig) if item.name != "training"] + list(
        given_keys["eval"]
    ):
        assert any(line.lstrip("# ").startswith(f"{name}:") for line in lines), name
    for line in lines:
        assert not line or "# " in line, f"no comment: {line}"
    with pytest.raises(ThriftyError, match=r"run.yaml exists already"):
        init(str(file), model="m", train="x")
    with pytest.raises(ThriftyError, match=r"the folder .* does not exist"):
        init(str(tmp_path / "none" / "run.yaml"), model="m", train="x")


def test_the_defaults_of_init_are_the_defaults(tmp_path: Path) -> None:
    """What `thrifty init` writes for a key of ours is what leaving it out means, but for the budget."""
    file = tmp_path / "run.yaml"
    file.write_text(run_file(model="m", train="x"), encoding="utf-8")
    written, bare = load_config(file), load_config({"model": "m", "data": {"train": "x"}})
    assert written.eval == bare.eval
    assert {k: v for k, v in written.to_dict().items() if k in bare.to_dict()} == bare.to_dict() | {"budget": 0.01}
