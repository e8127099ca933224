"""Keys that cannot be set: other tools' names for ours, and the TrainingArguments that thrifty owns."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from thrifty.core import registry
from thrifty.core.errors import nearest, unknown

__all__ = ["IN_DATA", "OTHER_NAMES", "OWNED", "why_unknown"]

_PEFT = "part of the method: method: {peft: {peft_type: LORA, %s: ...}}"

_BY_OURS = {
    "model": "base_model model_name model_name_or_path model_id model_path pretrained_model_name_or_path hf_model",
    "tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_config",
    "dtype": "torch_dtype precision load_dtype model_dtype weight_dtype",
    "quantize": "quantization quantization_method quantization_config bnb_4bit_quant_type quant_type",
    "learning_rate": "lr base_lr max_lr",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size per_device_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation grad_accumulation_steps accumulate_grad_batches",
    "max_length": "sequence_len sequence_length cutoff_len max_seq_length max_seq_len model_max_length seq_len "
    "context_length",
    "num_train_epochs": "epochs num_epochs n_epochs max_epochs",
    "max_steps": "steps num_steps iters num_iters max_iters train_steps",
    "data.train": "dataset datasets dataset_path dataset_name dataset_id train_file train_files train_dataset "
    "train_data data_path train_path dataset_dir train",
    "data.eval": "eval_dataset eval_file validation_file valid_file test_datasets val_dataset val_file eval_data "
    "validation_dataset eval_path test_file",
    "output_dir": "output output_path out_dir save_dir output_folder save_path adapter_path",
    "optim": "optimizer optimizer_name",
    "lr_scheduler_type": "scheduler lr_scheduler lr_schedule scheduler_type",
    "max_grad_norm": "gradient_clipping grad_clip clip_grad_norm gradient_clip_val",
    "eval_strategy": "evaluation_strategy",
    "seed": "random_seed random_state",
    "resume_from_checkpoint": "resume resume_from resume_checkpoint",
    "early_stopping_patience": "early_stopping patience",
    "eval.max_new_tokens": "max_new_tokens",
    "budget": "trainable_share trainable_fraction sparsity density num_trainable_parameters",
    "probe_rows": "probe_batch_size",
    "add_tokens": "new_tokens added_tokens extra_tokens additional_tokens add_special_tokens additional_special_tokens "
    "special_tokens",
    "packing": "sample_packing pack_dataset neat_packing pack_sequences packed use_packing",
}
_ADVICE = {
    "warmup_ratio": "called 'warmup_steps' here: below 1 it is a share of all steps",
    "group_by_length": "written train_sampling_strategy: group_by_length",
    "val_set_size": "not a setting: name the held-out rows in data.eval (a file, or {path, split})",
    "val_size": "not a setting: name the held-out rows in data.eval (a file, or {path, split})",
    "test_size": "not a setting: name the held-out rows in data.eval (a file, or {path, split})",
    "dataset_split": "part of the source: data: {train: [{path: ..., split: ...}]}",
    "adapter": "called 'method' here: smt, full, or {peft: {peft_type: LORA, r: 16}}",
    "finetuning_type": "called 'method' here: smt, full, or {peft: {peft_type: LORA, r: 16}}",
    "fine_tune_type": "called 'method' here: smt, full, or {peft: {peft_type: LORA, r: 16}}",
    "use_peft": "decided by method: {peft: {peft_type: LORA, r: 16}}",
    "peft_type": "part of the method: method: {peft: {peft_type: ...}}",
    "peft_config": "written method: {peft: {peft_type: LORA, r: 16}}",
    "lora_r": _PEFT % "r",
    "lora_rank": _PEFT % "r",
    "r": _PEFT % "r",
    "lora_alpha": _PEFT % "lora_alpha",
    "lora_dropout": _PEFT % "lora_dropout",
    "lora_target": _PEFT % "target_modules",
    "lora_target_modules": _PEFT % "target_modules",
    "lora_target_linear": _PEFT % "target_modules: all-linear",
    "use_dora": _PEFT % "use_dora",
    "use_rslora": _PEFT % "use_rslora",
    "load_in_4bit": "written quantize: nf4 (QLoRA's format), or quantize: int4",
    "load_in_8bit": "written quantize: int8",
    "quantization_bit": "written quantize: int8, or quantize: nf4 for 4 bits",
    "chat_template": "taken from the tokenizer: set it there and name that folder as tokenizer",
    "template": "taken from the tokenizer: set it there and name that folder as tokenizer",
    "wandb_project": "written project: ..., with report_to",
    "use_wandb": "called 'report_to' here",
}
OTHER_NAMES: dict[str, str] = {
    **{theirs: f"called {ours!r} here" for ours, names in _BY_OURS.items() for theirs in names.split()},
    **_ADVICE,
}
"""Another tool's key -> what it is here, as the end of "'lr' is ..."."""

IN_DATA: dict[str, str] = {
    **dict.fromkeys(("validation", "valid", "val", "test", "dev", "held_out"), "eval"),
    **dict.fromkeys(("path", "paths", "file", "files", "training"), "train"),
}
"""Other names inside `data:` -> ours."""

_HUB = "a run stays on this machine: `thrifty export` writes a checkpoint that `hf upload` takes"
_VERBS = "the verb decides: `thrifty train` trains, `thrifty eval` evaluates"
_NO_LOGITS = "evaluation never keeps logits, so that it needs no more memory than training; see eval:"
_SHARDED = "a run shards by fsdp: true (PyTorch's FSDP2) or by deepspeed, started with torchrun"
_LOSS = "the loss is computed in chunks without a full table of logits, and this option needs that table"
_LIGER = "Liger's fused loss is taken on CUDA devices where liger-kernel is installed (pip install 'thrifty[liger]')"
OWNED: dict[str, str] = {
    "eval_on_start": "eval.before measures the model before training",
    "remove_unused_columns": "batches hold exactly what the model reads; other columns of the data are left alone",
    "label_names": "the labels are always `labels`, made from the answers in the data",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _VERBS),
    **dict.fromkeys(
        (
            "prediction_loss_only",
            "include_for_metrics",
            "batch_eval_metrics",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
        ),
        _NO_LOGITS,
    ),
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        _HUB,
    ),
    "parallelism_config": _SHARDED,
    "label_smoothing_factor": _LOSS,
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _LIGER),
    **dict.fromkeys(
        ("metric_for_best_model", "greater_is_better"), "the best checkpoint is the one with the lowest evaluation loss"
    ),
    "save_only_model": "checkpoints hold what a resumed run needs; the trained values alone are in delta/",
    "ignore_data_skip": "a resumed run meets the rows that the uninterrupted one would have met",
    "restore_callback_states_from_checkpoint": "a checkpoint restores all there is to restore",
    "include_num_input_tokens_seen": "unpadded tokens are always counted",
    "auto_find_batch_size": "set per_device_train_batch_size and gradient_accumulation_steps yourself",
    "enable_jit_checkpoint": "stop the run at any moment and go on with resume_from_checkpoint=auto",
    "save_on_each_node": "checkpoints are written once",
    "torch_compile": "training does not compile the model yet",
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), "training does not compile the model yet"),
    "disable_tqdm": "the display is quiet where there is no terminal",
    "local_rank": "the launcher sets it",
    "length_column_name": "the length of a row is that of its tokens",
}
"""A field of TrainingArguments that thrifty sets itself -> why."""


def why_unknown(key: str, names: Iterable[str], *, method: Any) -> str:
    """The sentence for a key that is none of `names`: whose it is, where it belongs, or the nearest one. `method`: what
    the run file says under that name."""
    names = list(names)
    if key in OWNED:
        return f"{key} is not to be set: {OWNED[key]}"
    if key in OTHER_NAMES:
        return f"{key!r} is {OTHER_NAMES[key]}"
    known = registry.records()
    mentioned = [method] if isinstance(method, str) else list(method) if isinstance(method, dict) else []
    for record in [known[name] for name in [*mentioned, "smt", *known] if name in known]:
        if key in inspect.signature(record.build).parameters:
            return f"{key!r} is part of the method: method: {{{record.name}: {{{key}: ...}}}}"
    close = nearest(key, [*names, *OTHER_NAMES])
    if close in OTHER_NAMES:
        return f"unknown key {key!r}; {close!r} is {OTHER_NAMES[close]}"
    return unknown("key", key, names)
