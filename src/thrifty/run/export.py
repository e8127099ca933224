"""A plain checkpoint that transformers alone loads: base and delta in one, with the tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from thrifty.core.errors import ThriftyError
from thrifty.core.files import disk_errors, new_folder, write_text
from thrifty.data import chat_template

from .card import check_hub_name, model_card, told, upload
from .embedded import no_progress_bars
from .folder import locate
from .model import apply_delta, base_and_deltas, load_model, load_tokenizer, resolve

__all__ = ["export"]

_log = logging.getLogger("thrifty")


def export(
    source: str,
    *,
    output: str,
    base: str | None = None,
    dtype: str | None = None,
    to_hub: str | None = None,
    private: bool = False,
) -> str:
    """Write base + delta into the new folder `output`, whole or not at all, with a model card, and return it.

    source: the folder of a run or of a delta. base: the model that the delta belongs to, where its run does not say.
    dtype: what the checkpoint is held in; the run's own unless given. The written folder is loaded again by
    transformers alone, and its logits compared with the model's. to_hub: `user/name`, where the folder is uploaded
    once it is whole; `private` makes the repository so. ThriftyError for an output folder that is in use.
    """
    if to_hub is not None:
        check_hub_name(to_hub)
    elif private:
        raise ThriftyError("--private says how a repository is made: give --to-hub user/name too")
    if base is None:
        place = locate(source)
    else:
        is_run = (Path(source) / "delta" / "delta.json").is_file()
        place = locate(base, delta=str(Path(source) / "delta") if is_run else source)
    config = place.config
    if place.delta is None:
        raise ThriftyError(f"{source} is no folder of a run or of a delta: there is nothing to export")
    target = Path(output)
    _refuse_used(target, base=base_and_deltas(config.model)[0])
    model = load_model(
        config.model, dtype=config.dtype, quantize=config.quantize, trust_remote_code=config.trust_remote_code
    )
    tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    about = told(place.delta, base=config.model, dtype=str(next(model.parameters()).dtype).removeprefix("torch."))
    model = apply_delta(place.delta, model=model, tokenizer=tokenizer, as_plain=True)
    if dtype is not None:
        for parameter in model.parameters():  # not `model.to`: it would round rotary tables, which loading keeps exact
            parameter.data = parameter.data.to(getattr(torch, dtype))
    if not tokenizer.chat_template:
        tokenizer.chat_template = chat_template(tokenizer)  # the form in which conversations were trained
    expected = _logits(model)
    kept, model_class = next(model.parameters()).dtype, type(model).__name__
    written = disk_errors(f"the checkpoint {target}", fix="free space and export again")
    with no_progress_bars(), written, new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_text(folder / "README.md", str(model_card(about, name=to_hub or target.name)))
        del model  # never two models in memory
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=kept, trust_remote_code=config.trust_remote_code)
        difference = float((_logits(again) - expected).abs().max())
        if not difference <= 1e-3 * float(expected.abs().max()):
            raise ThriftyError(
                f"{model_class}, written and loaded again by transformers, gives other logits (by {difference:.3g}): "
                "nothing was exported"
            )
    _log.info("transformers loads it: largest logit difference %.2g", difference)
    if to_hub is not None:
        _log.info("uploaded: %s", upload(target, repo=to_hub, private=private))
    return str(target)


def _refuse_used(target: Path, *, base: str) -> None:
    resolved = Path(resolve(base))
    if resolved.is_dir() and target.resolve() in (resolved.resolve(), *resolved.resolve().parents):
        raise ThriftyError(f"{target} holds the base model itself, which an export would destroy: name another folder")
    if target.is_dir() and any(target.iterdir()):
        raise ThriftyError(f"{target} exists and is not empty: name a new folder, or remove it first")
    if target.exists() and not target.is_dir():
        raise ThriftyError(f"{target} is a file: name a new folder")


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    """float32 [2, 16, V] of fixed random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_input_embeddings().num_embeddings, (2, 16), generator=generator)
    model.eval()
    return model(input_ids=ids.to(model.device)).logits.float().cpu()
