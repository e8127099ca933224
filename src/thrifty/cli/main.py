"""`thrifty <verb> ...`: the parser, and what errors look like. Only the chosen verb imports torch."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from thrifty import __version__
from thrifty.core.errors import ThriftyError, nearest

from . import verbs
from .completion import SHELLS
from .delta_verbs import add_delta_verbs
from .estimate_verb import add_estimate_options

__all__ = ["main", "parser"]

_OTHER_VERBS = {
    **dict.fromkeys(("finetune", "fine-tune", "fit", "tune", "sft", "run"), "train"),
    **dict.fromkeys(("evaluate", "test", "score"), "eval"),
    **dict.fromkeys(("merge", "save", "convert"), "export"),
    **dict.fromkeys(("study", "benchmark", "sweep", "report"), "compare"),
    **dict.fromkeys(("cost", "memory", "predict", "plan"), "estimate"),
    **dict.fromkeys(("generate", "ask", "inference"), "chat"),
    **dict.fromkeys(("list", "ls", "method"), "methods"),
    **dict.fromkeys(("version", "info", "doctor"), "env"),
    **dict.fromkeys(("new", "create"), "init"),
    **dict.fromkeys(("check", "lint", "verify", "inspect"), "validate"),
}
_SETTINGS = "settings over the run file: max_steps=50 method.smt.block_size=64 data.eval=held_out.jsonl"
# What the user can mend; any other OSError is a defect and keeps its traceback.
_MENDABLE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the disk is read-only",
    errno.ENOTDIR: "a part of this path is a file",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flags = [word for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized arguments: --"):
            name = flags[0].split("=")[0].lstrip("-").replace("-", "_")
            message += f" (settings are written without dashes: {name}=...)"
        raise ThriftyError(f"{message}; see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs. Each sets `call`, which takes the parsed arguments and returns the exit code."""
    top = _Parser(
        prog="thrifty",
        description="Fine-tune language models at the lowest cost.",
        epilog="`thrifty <verb> --help` says more. Start with `thrifty demo`, or `thrifty init`.",
    )
    top.add_argument("--version", action="version", version=f"thrifty {__version__}")
    all_verbs = top.add_subparsers(dest="verb", metavar="<verb>", parser_class=_Parser)

    def verb(name: str, summary: str, call: verbs.Verb) -> argparse.ArgumentParser:
        sub = all_verbs.add_parser(name, help=summary, description=f"{summary}.")
        sub.set_defaults(call=call)
        return sub

    demo = verb("demo", "Fine-tune the embedded model in a few minutes, and see that it learned", verbs.demo)
    demo.add_argument("settings", nargs="*", metavar="key=value", help="such as max_steps=100 output_dir=out/demo")

    init = verb("init", "Write a commented run file", verbs.init)
    init.add_argument("file", nargs="?", default="run.yaml", help="run.yaml unless given; never overwritten")
    init.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id")
    init.add_argument("--data", default="train.jsonl", help="the file to train on")
    init.add_argument("--eval", default=None, metavar="DATA", help="held-out rows")

    train = verb("train", "Fine-tune a model", verbs.train)
    _settings(train, f"a run file, and {_SETTINGS}")
    train.add_argument(
        "--from", dest="repeat", metavar="SUMMARY", help="repeat the run of this summary.json; give another output_dir"
    )

    validate = verb("validate", "Check everything that a run needs, without training", verbs.validate)
    _settings(validate, f"a run file, and {_SETTINGS}", count="+")
    validate.add_argument("--step", action="store_true", help="also take one step of the largest batch, and measure it")

    evaluate = verb("eval", "Measure a model, a model with a delta, or a finished run", verbs.evaluate)
    _model(evaluate)
    evaluate.add_argument(
        "settings", nargs="*", metavar="[run.yaml] key=value", help="what to measure: data.eval=... eval.*"
    )
    evaluate.add_argument(
        "--harness", metavar="TASKS", help="measure these tasks of lm_eval instead, parted by commas: arc_easy,piqa"
    )
    evaluate.add_argument("--harness-path", metavar="FOLDER", help="where more tasks lie, as YAML files for lm_eval")

    export = verb("export", "Write a plain checkpoint that transformers alone loads", verbs.export)
    export.add_argument("source", metavar="RUN|DELTA", help="the folder of a run, or of a delta")
    export.add_argument("--output", required=True, metavar="FOLDER", help="a new folder")
    export.add_argument(
        "--base", metavar="MODEL", help="the model that the delta belongs to, where its run does not say"
    )
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="the run's own unless given")
    export.add_argument("--to-hub", metavar="USER/NAME", help="upload the folder to the Hugging Face hub too")
    export.add_argument("--private", action="store_true", help="with --to-hub: not for everyone to see")

    compare = verb("compare", "Compare methods under equal conditions, and report which one pays", verbs.compare)
    _settings(compare, "a study file or the folder of a study, and settings over it: seeds=[0,1]")
    compare.add_argument("--report", action="store_true", help="run nothing: write the report of what is there")
    compare.add_argument("--png", action="store_true", help="write the plots as PNG files too")
    compare.add_argument("--workers", type=int, metavar="N", help="runs side by side (1; with --ray as many as fit)")
    compare.add_argument(
        "--threads", type=int, metavar="N", help="of each run (the processors, divided by the workers)"
    )
    compare.add_argument(
        "--ray", metavar="ADDRESS", help="make the runs on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or local"
    )
    compare.add_argument("--stop-after", type=float, metavar="MINUTES", help="begin no run after so many minutes")
    compare.add_argument("--only", metavar="A,B", help="only these methods of the study")
    compare.add_argument("--retry-failed", action="store_true", help="make failed runs again")

    estimate = verb("estimate", "Say what a run will cost before it starts: memory, time, money", verbs.estimate)
    _settings(estimate, _SETTINGS)
    add_estimate_options(estimate)

    chat = verb("chat", "Talk to a model, a model with a delta, or a finished run", verbs.chat)
    _model(chat)
    _settings(chat, "how it is loaded: dtype=bfloat16 tokenizer=...")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told first")

    deltas = all_verbs.add_parser("delta", help="Look into deltas, combine and convert them")
    add_delta_verbs(deltas, _Parser)

    methods = verb("methods", "List the methods, one name a line, or describe one", verbs.methods)
    methods.add_argument("method", nargs="*", metavar="[show] NAME", help="the method to describe")

    verb("env", "Report versions, devices and what each extra adds", verbs.env)
    completion = verb("completion", "Print what makes a shell complete thrifty's commands", verbs.completion)
    completion.add_argument("shell", choices=SHELLS, help='bash: eval "$(thrifty completion bash)"')
    return top


def _model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL|RUN", help="smollm2-135m, a folder, a hub id, or the folder of a run")
    sub.add_argument("--delta", metavar="FOLDER", help="a delta to apply to the model")


def _settings(sub: argparse.ArgumentParser, summary: str, *, count: str = "*") -> None:
    sub.add_argument("settings", nargs=count, metavar="[run.yaml] key=value", help=summary)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 2 where the user must mend something (one line on stderr); 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # of libraries, to whoever writes code; `python -W` shows them
    notes = logging.StreamHandler()  # standard error, so that what a verb prints can be piped
    logging.getLogger("thrifty").setLevel(logging.INFO)
    logging.getLogger("thrifty").addHandler(notes)
    try:
        top = parser()
        _check_verb(words, top)
        try:
            parsed, rest = top.parse_known_args(words)
        except SystemExit:  # after --help and --version
            sys.stdout.flush()
            raise
        # argparse fills `key=value ...` at the first place it meets only; those behind an option come here.
        more = [word for word in rest if not word.startswith("-")] if hasattr(parsed, "settings") else []
        if unknown := [word for word in rest if word not in more]:
            top.error(f"unrecognized arguments: {' '.join(unknown)}")
        if more:
            parsed.settings += more
        code = parsed.call(parsed)
        sys.stdout.flush()
        return code
    except ThriftyError as error:
        return _say(str(error), 2)
    except KeyboardInterrupt:
        return _say("stopped", 130)
    except BrokenPipeError:
        _drop_output()  # its reader has gone (`thrifty methods | head -1`): there is nobody to tell
        return 141
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        if error.filename is None:
            _drop_output()
        return _say(f"{error.filename or 'output'}: {_MENDABLE[error.errno]}", 2)
    finally:
        logging.getLogger("thrifty").removeHandler(notes)


def _drop_output() -> None:
    """Python flushes standard output once more at exit, and would complain again about what cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_verb(words: list[str], top: argparse.ArgumentParser) -> None:
    (choices,) = (action.choices for action in top._actions if isinstance(action, argparse._SubParsersAction))
    names = list(choices or ())
    word = next((word for word in words if not word.startswith("-")), None)
    if word is None:
        if not words:
            raise ThriftyError(f"no verb given: one of {', '.join(names)}; see `thrifty --help`")
        return
    if word in names or words[0].startswith("-"):
        return
    if word.endswith((".yaml", ".yml")) or "=" in word:
        raise ThriftyError(f"no verb given; did you mean `thrifty train {' '.join(words)}`?")
    close = _OTHER_VERBS.get(word.lower()) or nearest(word, [*names, *_OTHER_VERBS])
    close = _OTHER_VERBS.get(close or "", close)
    hint = f"; did you mean `thrifty {close}`?" if close else ""
    raise ThriftyError(f"unknown verb {word!r}{hint} (known: {', '.join(names)})")


def _say(text: str, code: int) -> int:
    print(f"thrifty: {' '.join(text.split())}", file=sys.stderr)
    return code
