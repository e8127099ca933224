"""One small function a verb: arguments in, one call, print, exit code out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from thrifty.core.errors import ThriftyError

__all__ = [
    "Verb",
    "chat",
    "compare",
    "completion",
    "demo",
    "env",
    "estimate",
    "evaluate",
    "export",
    "init",
    "methods",
    "train",
    "validate",
]

Verb = Callable[[argparse.Namespace], int]


def demo(arguments: argparse.Namespace) -> int:
    from thrifty.run.demo import demo

    _, settings = _split(arguments.settings)
    folders = [text.partition("=")[2] for text in settings if text.startswith("output_dir=")]
    overrides = [text for text in settings if not text.startswith("output_dir=")]
    return demo(output_dir=folders[-1] if folders else "out/demo", overrides=overrides)


def init(arguments: argparse.Namespace) -> int:
    from thrifty.run.init import init

    path, notes = init(arguments.file, model=arguments.model, train=arguments.data, eval=arguments.eval)
    for text in notes:
        print(text)
    print(f"wrote {path}; now: thrifty validate {path}, then thrifty train {path}")
    return 0


def train(arguments: argparse.Namespace) -> int:
    from thrifty.run.config import load_config
    from thrifty.run.train import run_training

    file, settings = _split(arguments.settings)
    if arguments.repeat is not None:
        from thrifty.run.repeat import read_summary, repeated_config

        if file is not None:
            raise ThriftyError(f"--from {arguments.repeat} holds the whole configuration: leave out {file}")
        summary = read_summary(arguments.repeat)
        run_training(repeated_config(summary, settings), repeats=summary)
        return 0
    if not arguments.settings:
        raise ThriftyError("name a run file, or give settings: thrifty train run.yaml; `thrifty init` writes one")
    run_training(load_config(file, settings))
    return 0


def validate(arguments: argparse.Namespace) -> int:
    from thrifty.run.validate import validate

    file, settings = _split(arguments.settings)
    return 0 if validate(file, settings, step=arguments.step).is_clean else 2


def evaluate(arguments: argparse.Namespace) -> int:
    from thrifty.run.evaluate import run_eval
    from thrifty.run.folder import locate

    file, settings = _split(arguments.settings)
    place = locate(arguments.model, delta=arguments.delta, file=file, settings=settings)
    if arguments.harness is not None:
        from thrifty.run.harness import run_harness

        _refuse_measures(settings)
        tasks = [name.strip() for name in arguments.harness.split(",") if name.strip()]
        scores = run_harness(place, tasks=tasks, folder=arguments.harness_path)
    elif arguments.harness_path is not None:
        raise ThriftyError("--harness-path holds tasks: name those to measure with --harness")
    else:
        scores = run_eval(place.config.model, delta=place.delta, config=place.config)
    for name, value in scores.items():
        print(f"{name}: {value:.6g}")
    return 0


def _refuse_measures(settings: list[str]) -> None:
    for key in (text.partition("=")[0] for text in settings):
        if key.startswith(("data.", "eval.")) and key != "eval.batch_size":
            raise ThriftyError(f"{key} does not go with --harness, whose tasks have their own data and measures")


def export(arguments: argparse.Namespace) -> int:
    from thrifty.run.export import export

    folder = export(
        arguments.source,
        output=arguments.output,
        base=arguments.base,
        dtype=arguments.dtype,
        to_hub=arguments.to_hub,
        private=arguments.private,
    )
    print(folder)
    return 0


def compare(arguments: argparse.Namespace) -> int:
    from thrifty.study.compare import write_evidence
    from thrifty.study.config import load_study
    from thrifty.study.engine import run_study

    file, settings = _split(arguments.settings)
    if file is None:
        raise ThriftyError("name a study file, or the folder of a study: thrifty compare study.yaml")
    study = load_study(file, settings)
    complete = True
    if not arguments.report:
        complete = run_study(
            study,
            workers=arguments.workers,
            threads=arguments.threads,
            ray=arguments.ray,
            stop_after=arguments.stop_after,
            only=tuple(name for name in (arguments.only or "").split(",") if name),
            retry_failed=arguments.retry_failed,
        )
    write_evidence(study, png=arguments.png)
    if not complete:
        print(f"runs are left to make: `thrifty compare {file}` goes on")
    return 0


def estimate(arguments: argparse.Namespace) -> int:
    from .estimate_verb import run_estimate

    file, settings = _split(arguments.settings)
    return run_estimate(arguments, file, settings)


def chat(arguments: argparse.Namespace) -> int:
    from thrifty.run.chat import chat
    from thrifty.run.folder import locate

    file, settings = _split(arguments.settings)
    chat(locate(arguments.model, delta=arguments.delta, file=file, settings=settings), system=arguments.system)
    return 0


def methods(arguments: argparse.Namespace) -> int:
    from thrifty.core.registry import get, records
    from thrifty.run.about import describe

    names = arguments.method[1:] if arguments.method[:1] == ["show"] else arguments.method
    if len(names) > 1 or (arguments.method and not names):
        raise ThriftyError("name one method: thrifty methods show NAME; without a name all are listed")
    if names:
        print(describe(get(names[0])))
        return 0
    known = records()
    width = max(map(len, known), default=0)
    for name, record in known.items():
        print(f"{name:{width}}  {record.summary}" if sys.stdout.isatty() else name)
    return 0


def env(arguments: argparse.Namespace) -> int:
    from thrifty.run.about import environment

    print(environment())
    return 0


def completion(arguments: argparse.Namespace) -> int:
    from .completion import completion_script

    print(completion_script(arguments.shell), end="")
    return 0


def _split(items: list[str]) -> tuple[str | None, list[str]]:
    """The run file, if one is named, and the settings."""
    files = [item for item in items if "=" not in item or _is_file(item)]
    if len(files) > 1:
        raise ThriftyError(f"one run file at a time: {files[0]!r} and {files[1]!r}; settings are written key=value")
    return (files[0] if files else None), [item for item in items if item not in files]


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # longer than a name may be
        return False
