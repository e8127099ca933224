"""The command line: what it answers to mistakes, and one whole run in real processes, from data to checkpoint."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import configuration, prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

from thrifty import methods
from thrifty.cli.main import main
from thrifty.data import chat_prompt
from thrifty.delta import Delta

THRIFTY = [sys.executable, "-m", "thrifty"]


def thrifty(*words: str, cwd: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*THRIFTY, *words], cwd=cwd, input=text, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `run.yaml` and, from `thrifty train run.yaml ...`, the finished run `out`."""
    folder = prepare(tmp_path_factory.mktemp("run"))
    values = {key: value for key, value in configuration(folder).items() if key != "output_dir"}
    (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    done = thrifty("train", "run.yaml", "max_steps=4", "output_dir=out", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_train_leaves_a_run(run: Path) -> None:
    assert {"run.yaml", "metrics.jsonl", "delta", "summary.json"} <= {path.name for path in (run / "out").iterdir()}
    resolved = yaml.safe_load((run / "out/run.yaml").read_text(encoding="utf-8"))
    assert resolved["max_steps"] == 4
    assert resolved["output_dir"] == "out"
    assert resolved["method"] == {"smt": {"block_size": 8}}
    summary = json.loads((run / "out/summary.json").read_text(encoding="utf-8"))
    assert summary["trainable_parameters"] > 0


def test_eval_agrees_with_the_run_however_the_model_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "out/summary.json").read_text(encoding="utf-8"))
    done = thrifty("eval", "out", "--delta", "out/delta", "eval.exact_match=2", "eval.batch_size=4", cwd=run)
    assert done.returncode == 0, done.stderr
    scores = dict(line.split(": ") for line in done.stdout.splitlines())
    assert float(scores["loss"]) == pytest.approx(summary["evaluation"]["after"]["loss"], rel=1e-4)
    assert "exact_match" in scores
    files = [f"data.eval={run}/eval.jsonl", "max_length=48"]
    for words in ([f"{run}/model", *files, "--delta", f"{run}/out/delta"], [f"{run}/out/delta"]):
        assert main(["eval", *words]) == 0
        assert f"loss: {scores['loss']}" in capsys.readouterr().out
    assert main(["eval", f"{run}/model", *files]) == 0
    assert f"loss: {scores['loss']}" not in capsys.readouterr().out, "the base alone scores otherwise"


def test_export_is_what_transformers_alone_loads(run: Path) -> None:
    done = thrifty("export", "out", "--output", "plain", cwd=run)
    assert (done.returncode, done.stdout) == (0, "plain\n"), "the folder alone, for a script"
    assert done.stderr == "transformers loads it: largest logit difference 0\n"
    plain = AutoModelForCausalLM.from_pretrained(run / "plain", dtype=torch.float32).eval()
    trained = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    Delta.load(run / "out/delta").apply(trained)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, trained(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(run / "plain")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1="}], tokenize=False, add_generation_prompt=True
    )
    assert "1+1=" in text
    assert not list(run.glob(".partial*"))


def test_export_of_a_delta_alone_and_to_another_dtype(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "export",
        f"{run}/out/delta",
        "--base",
        f"{run}/model",
        "--output",
        f"{tmp_path}/half",
        "--dtype",
        "bfloat16",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{tmp_path}/half\n"
    tensors = load_file(tmp_path / "half/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half/config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_export_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (run / "model").iterdir())
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    (tmp_path / "file").touch()
    mistakes = {
        ("out", str(run / "model")): "holds the base model itself",
        ("out", str(run)): "holds the base model itself",
        ("out", str(tmp_path / "used")): "exists and is not empty",
        ("out", str(tmp_path / "file")): "is a file",
        ("model", str(tmp_path / "new")): "is no folder of a run or of a delta",
    }
    for (source, output), message in mistakes.items():
        assert main(["export", str(run / source), "--output", output]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in (run / "model").iterdir())
    assert not (tmp_path / "new").exists()


def test_chat_answers_each_line_of_a_pipe(run: Path) -> None:
    done = thrifty("chat", "out", "--system", "add", cwd=run, text="1+1=\n\n2+2=\n")
    assert (done.returncode, done.stderr) == (0, "")
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    Delta.load(run / "out/delta").apply(model)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    asked: list[dict[str, str]] = [{"role": "system", "content": "add"}]
    answers = []
    for line in ("1+1=", "2+2="):
        asked.append({"role": "user", "content": line})
        ids = torch.tensor([chat_prompt(asked, tokenizer)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_length=64)
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
        asked = asked[:1]  # two turns do not fit in the 64 positions of this model: the first is left out
    assert done.stdout.split() == " ".join(answers).split()


def test_ctrl_c_stops_training_with_one_line(run: Path) -> None:
    words = [
        *THRIFTY,
        "train",
        "run.yaml",
        "max_steps=1000000",
        "output_dir=long",
        "save_strategy=no",
        "logging_steps=1",
    ]
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    with subprocess.Popen(
        words, cwd=run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        error = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert error == "thrifty: stopped\n"


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    for words in (["init", "new.yaml"], ["train", "--help"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([*THRIFTY, *words], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, check=False)
        os.close(write)
        assert done.stderr == b""
        assert done.returncode in (0, 141), "0 where argparse itself passes over it"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*THRIFTY, "init"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (2, "thrifty: output: the disk is full: free some space\n")


def test_init_writes_a_file_that_trains(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "new.yaml")
    assert (
        main(["init", file, "--model", f"{run}/model", "--data", f"{run}/train.jsonl", "--eval", f"{run}/eval.jsonl"])
        == 0
    )
    wrote = f"wrote {file}; now: thrifty validate {file}, then thrifty train {file}\n"
    assert capsys.readouterr().out.endswith(wrote)
    assert main(["train", file, "max_steps=2", "budget=5%", "max_length=48", f"output_dir={tmp_path}/out"]) == 0
    assert (tmp_path / "out/summary.json").is_file()
    capsys.readouterr()
    assert main(["init", file]) == 2
    assert capsys.readouterr().err == f"thrifty: {file} exists already: name another file, or remove it first\n"


def test_methods_and_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    assert capsys.readouterr().out.split() == sorted(methods())
    assert main(["methods", "random-blocks"]) == 0
    described = capsys.readouterr().out
    assert described.startswith("random_blocks\n")
    assert "block_size" in described
    assert main(["methods", "smtt"]) == 2
    assert "did you mean 'smt'?" in capsys.readouterr().err
    assert main(["env"]) == 0
    report = capsys.readouterr().out
    for word in ("thrifty ", "python ", f"torch {torch.__version__}", "cpu: ", "cache: ", "extra peft: "):
        assert word in report


MISTAKES = {
    (): "no verb given: one of demo, init, train, validate, eval, export, compare, estimate, chat, delta, methods, env",
    ("trian",): "unknown verb 'trian'; did you mean `thrifty train`?",
    ("finetune",): "did you mean `thrifty train`?",
    ("merge",): "did you mean `thrifty export`?",
    ("run.yaml", "max_steps=3"): "did you mean `thrifty train run.yaml max_steps=3`?",
    ("train",): "name a run file, or give settings",
    ("train", "--max-steps=3", "run.yaml"): "settings are written without dashes: max_steps=...",
    ("train", "a.yaml", "b.yaml"): "one run file at a time: 'a.yaml' and 'b.yaml'",
    ("train", "none.yaml"): "none.yaml: no such file; `thrifty init` writes a run file",
    ("train", "model=m"): "data.train is missing",
    ("train", "model=m", "data.train=none.jsonl", "lr=1"): "command line: 'lr' is called 'learning_rate' here",
    ("train", "model=./none", "data.train=none.jsonl"): "'./none': no such folder",
    ("eval", "./none", "data.eval=none.jsonl"): "none.jsonl: no such file",
    ("export", "./none", "--output", "new"): "./none is no folder of a run or of a delta",
    ("export", "out"): "--output",
    ("chat", "./none"): "'./none': no such folder",
    ("methods", "a", "b"): "name one method",
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.items(), ids=[" ".join(words) for words in MISTAKES])
def test_mistakes_are_one_line_and_exit_2(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("thrifty: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_run_that_is_not_finished_has_no_delta(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text((run / "run.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["chat", str(tmp_path)]) == 2
    assert "holds no delta yet: finish the run with `thrifty train" in capsys.readouterr().err


def test_methods_show_is_methods(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for words in (["methods", "show", "smt"], ["methods", "smt"]):
        assert main(words) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    for part in ("Paper: He, Li, Jiang, Miller", "mean |dL/dW|", "When not to use it", "Cost: 16 bytes per trained"):
        assert part in shown[0]
    for words in (["methods", "show"], ["methods", "smt", "full"], ["methods", "show", "smt", "full"]):
        assert main(words) == 2
        assert "name one method: thrifty methods show NAME" in capsys.readouterr().err


def test_env_says_what_each_extra_adds(capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    import thrifty

    root = Path(thrifty.__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert main(["env"]) == 0
    extras = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("extra ")]
    assert sorted(extras) == sorted(
        f"extra {name}" for name in project["optional-dependencies"] if name not in ("dev", "docs")
    )
