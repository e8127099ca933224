"""The card of an exported checkpoint: what it tells, that what it says works, and the way to the hub."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from tiny_run import configuration, prepare
from transformers import AutoModelForCausalLM

from thrifty.cli.main import main
from thrifty.core.errors import ThriftyError
from thrifty.run.card import check_hub_name, model_card, told, upload
from thrifty.run.export import export
from thrifty.run.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, the finished run `out`, and its export `my-model`."""
    folder = prepare(tmp_path_factory.mktemp("card"))
    train(configuration(folder, max_steps=4, eval={"loss": True, "before": True}))
    export(str(folder / "out"), output=str(folder / "my-model"))
    return folder


def cells(card: str) -> dict[str, str]:
    """The first column of every table row -> the rest."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", card, flags=re.MULTILINE)
    return dict(rows)


def test_the_card_tells_what_was_done(run: Path) -> None:
    text = (run / "my-model/README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.to_dict()["library_name"] == "transformers"
    assert card.data.tags == ["thrifty", "smt"]
    assert card.data.base_model is None, "a local folder is no hub id"
    assert card.data.model_name == "my-model"
    (result,) = card.data.eval_results
    summary = train_summary(run)
    assert result.metric_value == summary["evaluation"]["after"]["loss"]
    told_rows = cells(text)
    assert told_rows["base model"] == "`model`"
    assert told_rows["method"] == "`smt` (block_size: 8)"
    assert told_rows["budget"] == "5%"
    assert told_rows["data"].startswith("train.jsonl: 22 rows")
    assert told_rows["data, SHA-256 of its rows"] == f"`{summary['fingerprints']['data.train']}`"
    scores = summary["evaluation"]
    assert told_rows["loss per answer token"] == f"{scores['before']['loss']:.4f} | {scores['after']['loss']:.4f}"
    assert str(run) not in text, "no path of this machine"


def train_summary(run: Path) -> dict[str, Any]:

    return json.loads((run / "out/summary.json").read_text(encoding="utf-8"))


def test_what_the_card_says_works(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (run / "my-model/README.md").read_text(encoding="utf-8")
    plain, applied = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(run)
    loaded: dict[str, Any] = {}
    exec(plain, loaded)
    monkeypatch.chdir(run / "out")
    trained: dict[str, Any] = {}
    assert 'from_pretrained("path/to/model", dtype=torch.float32)' in applied
    exec(applied.replace("path/to/model", str(run / "model")), trained)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded["model"].eval()(ids).logits, trained["model"].eval()(ids).logits)
    assert loaded["tokenizer"]("1+1").input_ids


def test_a_hub_base_is_named_whole_and_a_delta_without_its_run_tells_less(run: Path, tmp_path: Path) -> None:
    about = told(str(run / "out/delta"), base="owner/base", dtype="bfloat16")
    card = model_card(about, name="user/tuned")
    assert card.data.base_model == "owner/base"
    assert card.data.model_name == "tuned"
    assert 'from_pretrained("user/tuned")' in card.content
    assert 'from_pretrained("owner/base", dtype=torch.bfloat16)' in card.content

    alone = shutil.copytree(run / "out/delta", tmp_path / "alone")
    card = model_card(told(str(alone), base="smollm2-135m", dtype="float32"), name="x")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "Evaluation" not in card.content
    assert cells(card.content)["method"] == "`smt` (block_size: 8)"


class Hub:
    """Stands in for HfApi: keeps what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.public = False

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append(("create", (repo, options["private"])))

    def repo_info(self, repo: str) -> Any:
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self.calls.append(("upload", (repo_id, sorted(path.name for path in Path(folder_path).iterdir()))))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return hub


def test_upload(run: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "tuned")
    assert main(["export", str(run / "out"), "--output", folder, "--to-hub", "user/tuned", "--private"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{folder}\n"
    assert "https://huggingface.co/user/tuned" in captured.err
    (created, uploaded) = hub.calls
    assert created == ("create", ("user/tuned", True))
    assert uploaded[1][0] == "user/tuned"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(uploaded[1][1])
    assert 'from_pretrained("user/tuned")' in Path(folder, "README.md").read_text(encoding="utf-8")
    assert AutoModelForCausalLM.from_pretrained(folder) is not None


def test_a_private_upload_never_goes_to_a_public_repository(run: Path, hub: Hub) -> None:
    hub.public = True
    with pytest.raises(ThriftyError, match="exists and is public"):
        upload(run / "my-model", repo="user/tuned", private=True)
    assert [name for name, _ in hub.calls] == ["create"]


def test_a_refusal_keeps_the_folder_and_says_what_to_do(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("401 no token")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(ThriftyError, match="my-model is written, but not uploaded to user/tuned: 401 no token"):
        upload(run / "my-model", repo="user/tuned", private=False)


MISTAKES = {
    ("--to-hub", "tuned"): "--to-hub tuned: write user/name",
    ("--to-hub", "user/my model"): "--to-hub user/my model:",
    ("--private",): "give --to-hub user/name too",
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.items(), ids=[" ".join(words) for words in MISTAKES])
def test_mistakes(
    words: tuple[str, ...], message: str, run: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run / "out"), "--output", str(tmp_path / "x"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert hub.calls == []


def test_offline_is_told_before_anything_is_computed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ThriftyError, match="HF_HUB_OFFLINE is set"):
        check_hub_name("user/tuned")
