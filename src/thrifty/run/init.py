"""`thrifty init`: a run file with every key and what it means, ready to run."""

from __future__ import annotations

from pathlib import Path

from thrifty.core.errors import ThriftyError

from .yaml_source import dump_yaml

__all__ = ["init", "run_file"]

_TEMPLATE = """\
# A run of thrifty: `thrifty train {file}`. Keys can be given there too: `thrifty train {file} max_steps=50`.
# Relative paths start from the directory in which the command is run.

model: {model}           # smollm2-135m (embedded), a folder, or a hub id of a causal language model
tokenizer: null          # null: the model's own; otherwise what `model` takes
dtype: float32           # what the weights are held in: float32, bfloat16 or float16
trust_remote_code: false # true runs Python code that comes with the model
add_tokens: null         # new tokens, such as ['<tool>']: their rows are trained too, on top of the budget

data:                    # .jsonl, .json, .csv, .parquet, .txt, or a hub id
  train: {train}         # a path, or a list of {{path: ..., split: ..., weight: ..., columns: ...}}
  eval: {eval}           # held-out rows, in the same form; null: none

method: smt              # `thrifty methods` lists all; {{smt: {{block_size: 64}}}}, {{peft: {{peft_type: LORA, r: 8}}}}
objective: sft           # the next-token loss on answers; or dpo, kto, {{grpo: {{reward_funcs: [exact_match]}}}} (TRL)
budget: 1%               # at most this share of the model's parameters is trained; an integer is a count
probe_rows: 4            # rows in one unit of the probe that chooses what to train
probe_units: 16          # units of the probe

max_steps: 300           # optimizer steps; instead: num_train_epochs
per_device_train_batch_size: 16   # rows in one step (with gradient_accumulation_steps: in one part of a step)
gradient_accumulation_steps: 1    # parts of one step
# learning_rate: 1.0e-3           # left out: the default of the method
lr_scheduler_type: linear         # how the learning rate falls: linear, cosine, constant, ...
warmup_steps: 0.03       # steps in which the learning rate rises; below 1 a share of all steps
max_length: 1024         # tokens of a row; longer rows are cut, and counted
packing: false           # true: several rows in one of max_length tokens; batch sizes then count those
seed: 42                 # of everything random
train_sampling_strategy: random   # group_by_length: batches of rows of like length, for less padding
bf16: false              # true: compute in bfloat16 over weights in `dtype`
gradient_checkpointing: false     # true: less memory, more time

eval:                    # each is optional; numbers are rows
  loss: true             # loss on data.eval
  exact_match: 0         # rows of data.eval answered greedily and compared with the reference; true: all
  choice: 0              # rows of data.eval for which the likeliest option is chosen; true: all
  choices: null          # the options, where rows name none: [yes, no]
  forgetting: null       # a plain text file: the loss on it tells what was unlearned
  before: false          # true: measure before training too
  batch_size: 16         # rows at a time
  max_new_tokens: null   # null: the longest reference and 16 more

output_dir: out          # where everything of this run is written
# save_steps: 100        # steps between checkpoints, of which the newest two are kept (save_total_limit)
resume_from_checkpoint: null      # auto: the newest whole checkpoint in output_dir; or the folder of one
allow_changed_data: false         # true: go on with a stopped run although its data have changed since
early_stopping_patience: null     # stop after so many evaluations without improvement (needs eval_strategy)
eval_strategy: 'no'      # when to measure the loss on data.eval during training: 'no', steps, epoch
nonfinite: stop          # a loss or gradient that is not finite: stop, or skip such steps and count them
report_to: none          # none, tensorboard or trackio
# Every other field of transformers.TrainingArguments can be given here too, under its own name.
"""


def run_file(*, model: str, train: str, eval: str | None = None, file: str = "run.yaml") -> str:
    """The text of a commented run file."""

    def scalar(value: str | None) -> str:
        return dump_yaml({"x": value}).removeprefix("x:").strip()

    return _TEMPLATE.format(file=file, model=scalar(model), train=scalar(train), eval=scalar(eval))


def init(file: str, *, model: str, train: str, eval: str | None = None) -> Path:
    """Write a run file. ThriftyError where there is one already."""
    path = Path(file)
    try:
        with path.open("x", encoding="utf-8") as out:
            out.write(run_file(model=model, train=train, eval=eval, file=file))
    except FileExistsError:
        raise ThriftyError(f"{path} exists already: name another file, or remove it first") from None
    except FileNotFoundError:
        raise ThriftyError(f"{path}: the folder {path.parent} does not exist") from None
    return path
