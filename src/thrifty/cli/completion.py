"""`thrifty completion SHELL`: a script with which a shell completes verbs, options, methods, files and keys (shtab)."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from thrifty.core.errors import ThriftyError

__all__ = ["SHELLS", "completion_script"]

SHELLS = ("bash", "zsh", "fish")
_FOLDERS = ("delta", "deltas", "output", "harness_path")
_FILES = ("file", "data", "eval", "source", "model", "base", "tuned")
_SETTINGS = "_thrifty_settings"
# `key=` is followed by its value, not by a space; and shtab's own entry point cannot say so from where it is called.
_BASH_TAIL = """
_thrifty_complete() {{
  {entry} "$@"
  [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
  return 0
}}
complete -o filenames -F _thrifty_complete thrifty
"""


def completion_script(shell: str) -> str:
    """The script for one of `SHELLS`. ThriftyError where shtab is not installed."""
    try:
        import shtab
    except ImportError:
        raise ThriftyError("completion needs shtab: pip install 'thrifty[completion]'") from None
    from thrifty.core.registry import records

    from .main import parser

    top = parser()
    settings = _settings(sorted(_keys()))
    for action in _actions(top):
        if action.dest == "settings":
            action.complete = settings  # type: ignore[attr-defined]
        elif action.dest == "method":
            action.choices = ["show", *records()]
        elif action.dest in (*_FOLDERS, *_FILES) and action.choices is None:
            action.complete = shtab.DIRECTORY if action.dest in _FOLDERS else shtab.FILE  # type: ignore[attr-defined]
    script: str = shtab.complete(top, shell)
    return script + _BASH_TAIL.format(entry="_shtab_thrifty") if shell == "bash" else script


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of all verbs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _actions(sub)
        else:
            yield action


def _keys() -> Iterable[str]:
    """The keys of a run file, those inside `data` and `eval` dotted."""
    from thrifty.run.config import DataConfig, EvalConfig, RunConfig, training_fields

    groups: dict[str, Any] = {"data": DataConfig, "eval": EvalConfig}
    for item in dataclasses.fields(RunConfig):
        if item.name in groups:
            yield from (f"{item.name}.{inner.name}" for inner in dataclasses.fields(groups[item.name]))
        elif item.name != "training":
            yield item.name
    yield from training_fields()


def _settings(keys: list[str]) -> dict[str, Any]:
    """Keys, each with its `=`, and files, in the three shells' own words."""
    words = " ".join(f"{key}=" for key in keys)
    return {
        "bash": _SETTINGS,
        "zsh": _SETTINGS,
        "fish": f"({_SETTINGS})",
        "preamble": {
            "bash": f'{_SETTINGS}() {{\n  compgen -W "{words}" -- "$1"\n  compgen -f -- "$1"\n}}\n',
            "zsh": f"{_SETTINGS}() {{\n  compadd -S '' -- {words}\n  _files\n}}\n",
            "fish": f"function {_SETTINGS}\n  printf '%s\\n' {words}\n  __fish_complete_path (commandline -ct)\nend\n",
        },
    }
