"""Bad input through the command line: one line that says the fix, exit code 2, nothing half-written."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import configuration, prepare

from thrifty.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its data, and one finished run `out` with a checkpoint at step 2."""
    made = prepare(tmp_path_factory.mktemp("input"))
    (made / "run.yaml").write_text(yaml.safe_dump(configuration(made)), encoding="utf-8")
    assert main(["train", str(made / "run.yaml"), "max_steps=2"]) == 0
    return made


def rows(*lines: object) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


GOOD = {"prompt": "1+1=", "completion": "2"}
DATA = {
    "empty file": ("", "bad.jsonl", "empty"),
    "no answer": (rows(GOOD, {"prompt": "1+1="}), "bad.jsonl:2", "completion"),
    "empty answer": (rows(GOOD, {"prompt": "1+1=", "completion": ""}), "bad.jsonl:2", "completion"),
    "half a line": (rows(GOOD) + '{"prompt": "1', "bad.jsonl:2", "JSON"),
    "unknown shape": (rows(GOOD, {"question": "1+1="}), "bad.jsonl:2", "messages"),
    "all labels masked": (rows({"prompt": "1" * 60, "completion": "2"}), "masked", "max_length"),
}
SETTINGS = {
    "data.train={folder}/none.jsonl": ("none.jsonl", "no such file"),
    "model={folder}/none": ("none", "no such folder"),
    "tokenizer=smollm2": ("smollm2", "did you mean 'smollm2-135m'?"),
    "method.smt.target_modules=[nothing]": ("nothing", "q_proj"),
    "method.smt.score=abs_gard": ("command line", "did you mean 'abs_grad'?"),
    "budget=3": ("budget", "block"),
    "eval.forgetting={folder}/none.txt": ("none.txt", "no file"),
    "resume_from_checkpoint={folder}/none": ("none", "checkpoint"),
    "output_dir={folder}/train.jsonl": ("train.jsonl", ""),
}


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *parts: str) -> str:
    """`thrifty ...` exits with 2 and says `parts` in one line."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("thrifty: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    return error


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, *parts = DATA[name]
    (tmp_path / "bad.jsonl").write_text(text, encoding="utf-8")
    words = ["train", str(folder / "run.yaml"), f"data.train={tmp_path}/bad.jsonl", f"output_dir={tmp_path}/new"]
    refused(capsys, words, *parts)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(setting: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "train.jsonl").read_bytes()
    words = ["train", str(folder / "run.yaml"), f"output_dir={tmp_path}/new", setting.format(folder=folder)]
    refused(capsys, words, *SETTINGS[setting])
    assert not (tmp_path / "new").exists()
    assert (folder / "train.jsonl").read_bytes() == before


def test_a_damaged_delta(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("delta.safetensors", "delta.json"):
        damaged = tmp_path / name / "delta"
        shutil.copytree(folder / "out/delta", damaged)
        whole = (damaged / name).read_bytes()
        (damaged / name).write_bytes(whole[: len(whole) // 2])
        words = ["export", str(damaged), "--base", str(folder / "model"), "--output", str(tmp_path / "plain")]
        refused(capsys, words, str(damaged / name), "make or copy")
        assert not (tmp_path / "plain").exists()


def test_a_delta_of_another_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = prepare(tmp_path / "other", family="qwen2")
    capsys.readouterr()
    words = ["export", str(folder / "out/delta"), "--base", str(other / "model"), "--output", str(tmp_path / "plain")]
    refused(capsys, words, "model.layers.", "another")
    assert not (tmp_path / "plain").exists()


LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
from thrifty.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("limit", [4096])
def test_a_full_disk_while_exporting(limit: int, folder: Path, tmp_path: Path) -> None:
    """No file may grow beyond a limit, as on a full disk: the export leaves nothing."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    words = ["export", str(folder / "out"), "--output", str(tmp_path / "plain")]
    done = subprocess.run(
        [sys.executable, "-c", LIMIT.format(limit=limit), *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"thrifty: could not write the checkpoint {tmp_path}/plain: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
