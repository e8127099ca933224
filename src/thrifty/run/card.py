"""The model card of an exported checkpoint, and the checkpoint's way to the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from thrifty.core.errors import ThriftyError
from thrifty.delta import Delta

from .config import RunConfig, load_config
from .embedded import EMBEDDED
from .model import ModelName, base_and_deltas, delta_folder
from .yaml_source import plain

__all__ = ["Told", "check_hub_name", "model_card", "told", "upload"]

_MEASURES = {
    "loss": "loss per answer token",
    "exact_match": "exact match of greedy answers",
    "choice": "likeliest option is the reference",
    "forgetting": "loss per token of a general text",
}
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_USE = """\
## How to use it

As any checkpoint; nothing of thrifty is needed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""
_APART = """\
What changed can also be kept apart from the base, as a delta (the folder `delta` of the run, {size}). It is applied to
exactly this base, `{base}` in {dtype}:

```python
import torch
from thrifty import Delta
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{path}", dtype=torch.{dtype})
model = Delta.load("delta").apply(model)  # {back}
```

or, on the command line, `thrifty chat {path} --delta delta`."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a card tells of: the base model, and the delta's run where its folder is at hand."""

    base: str
    dtype: str
    delta: Delta
    delta_bytes: int
    below: int = 0  # deltas that were applied to the base before this one was trained
    config: RunConfig | None = None
    summary: Mapping[str, Any] | None = None


def told(delta: str, *, base: ModelName, dtype: str) -> Told:
    """Read what there is in the folder `delta` and beside it."""
    folder = delta_folder(delta)
    run = folder.resolve().parent
    found: dict[str, Any] = {}
    if (run / "run.yaml").is_file() and (run / "summary.json").is_file():
        found["config"] = load_config(run / "run.yaml", needs_training_data=False)
        found["summary"] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    name, below = base_and_deltas(base)
    return Told(base=name, dtype=dtype, delta=Delta.load(folder), delta_bytes=size, below=len(below), **found)


def model_card(about: Told, *, name: str) -> ModelCard:
    """The card of the checkpoint that is called `name`: a hub id, or a folder's name.

    No path of this machine is told: files and folders by their own names, hub ids whole.
    """
    base_id = EMBEDDED[about.base].hub_id if about.base in EMBEDDED else _hub_id(about.base)
    base = about.base if about.base in EMBEDDED else base_id or Path(about.base).name
    (method,) = about.delta.method
    data = ModelCardData(
        base_model=base_id,
        datasets=_data_ids(about) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["thrifty", method],
        model_name=name.rpartition("/")[2],
        eval_results=_results(about) or None,
    )
    trained = f"`{base}`, fine-tuned with thrifty by the method `{method}`."
    if about.summary is not None:
        share, count = about.summary["trainable_share"], about.summary["trainable_parameters"]
        trained += f" {share:.3%} of its parameters were trained ({count:,})."
    use = (_USE if about.below else f"{_USE}\n\n{_APART}").format(
        name=name,
        size=f"{about.delta_bytes / 1e6:,.1f} MB",
        base=base,
        path=base if base == about.base else f"path/to/{base}",
        dtype=about.dtype,
        back="`.remove(model)` takes it off again" if about.delta.pieces else "PEFT's own adapter, merged",
    )
    parts = [f"# {data.model_name}", trained, _table("## Training", _training(about, base=base)), _evaluation(about)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, [*parts, use])) + "\n")


def _training(about: Told, *, base: str) -> list[tuple[str, str]]:
    ((method, options),) = about.delta.method.items()
    if isinstance(options, Mapping):
        shown = ", ".join(f"{key}: {_own_name(value)}" for key, value in plain(options).items())
    else:  # of several deltas: their own methods
        shown = json.dumps(plain(options))
    below = f" with {about.below} deltas applied before" if about.below else ""
    rows = [("base model", f"`{base}`{below}"), ("method", f"`{method}`" + (f" ({shown})" if shown else ""))]
    if about.config is None or about.summary is None:
        return rows
    config, summary = about.config, about.summary
    prints = summary.get("fingerprints", {})
    tokens = summary["data"]["tokens"]
    return [
        *rows,
        ("objective", f"`{json.dumps(plain(config.objective))}`"),
        ("budget", "none" if config.budget is None else str(config.budget)),
        ("trained numbers", f"{summary['trainable_parameters']:,} ({summary['trainable_share']:.3%} of all)"),
        ("steps", f"{summary['steps']:,} ({summary['epochs'] or 0:.2f} epochs, {summary['tokens']:,} tokens)"),
        ("learning rate, seed", f"{summary['learning_rate']:g}, {summary['seed']}"),
        ("data", f"{_data(about)}: {summary['data']['rows']:,} rows, {tokens:,} tokens"),
        ("data, SHA-256 of its rows", f"`{prints.get('data.train', 'not recorded')}`"),
        ("base, SHA-256 of its parameters", f"`{prints.get('model', 'not recorded')}`"),
        ("versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())),
    ]


def _evaluation(about: Told) -> str:
    if about.summary is None or not about.summary["evaluation"]["after"]:
        return ""
    before, after = about.summary["evaluation"]["before"], about.summary["evaluation"]["after"]

    def shown(scores: Mapping[str, float], name: str) -> str:
        return f"{scores[name]:.4f}" if name in scores else "not measured"

    rows = [(_MEASURES.get(name, name), f"{shown(before, name)} | {shown(after, name)}") for name in after]
    return _table("## Evaluation", rows, head=("measure", "before | after"))


def _results(about: Told) -> list[EvalResult]:
    if about.summary is None or about.config is None:
        return []
    ids = _names(about.config.data.eval)
    data = ids[0] if ids else "none"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_hub_id(data) or "custom",
            dataset_name=data,
            metric_type=name,
            metric_name=_MEASURES.get(name, name),
            metric_value=value,
        )
        for name, value in about.summary["evaluation"]["after"].items()
    ]


def _table(title: str, rows: Iterable[tuple[str, str]], *, head: tuple[str, str] = ("", "")) -> str:
    columns = " | ".join(head).count("|") + 1
    lines = [f"| {' | '.join(head)} |", "|---" * columns + "|", *(f"| {left} | {right} |" for left, right in rows)]
    return f"{title}\n\n" + "\n".join(lines)


def _hub_id(name: str) -> str | None:
    """`name` where it can only be a hub id."""
    return name if _HUB_ID.match(name) and not Path(name).exists() and not Path(name).suffix else None


def _own_name(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and "/" in value and _hub_id(value) is None else value


def _names(sources: Sequence[Any]) -> list[str]:
    return [str(_own_name(source.path.partition(":")[0])) for source in sources]


def _data_ids(about: Told) -> list[str]:
    return [name for name in _names(about.config.data.train) if _hub_id(name)] if about.config else []


def _data(about: Told) -> str:
    assert about.config is not None
    return ", ".join(_names(about.config.data.train)) or "not named"


def check_hub_name(repo: str) -> None:
    """ThriftyError where `repo` is no `user/name`, or the hub is switched off: before anything is computed."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ThriftyError(f"--to-hub {repo}: {' '.join(str(error).split())}") from error
    if repo.count("/") != 1:
        raise ThriftyError(f"--to-hub {repo}: write user/name")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ThriftyError("--to-hub: HF_HUB_OFFLINE is set; unset it, or leave --to-hub out")


def upload(folder: str | Path, *, repo: str, private: bool) -> str:
    """Upload `folder` as the model `repo`, which is made if it does not exist, and return its address.

    ThriftyError where the hub refuses, or where a private repository is asked for and a public one of that name exists.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise ThriftyError(f"--private: {repo} exists and is public: name another one, or make it private first")
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Export by thrifty")
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ThriftyError(
            f"{folder} is written, but not uploaded to {repo}: {reason}; "
            f"`hf auth login`, then `hf upload {repo} {folder}`"
        ) from error
    return f"https://huggingface.co/{repo}"
