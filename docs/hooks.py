"""Pages that are made from the code whenever the site is built, so that they cannot fall behind it.

`methods/`: each registered method's docstring, options and cost. `reference/`: keys of run files and study files from
their dataclasses, the fields of TrainingArguments, other tools' names, and what `--help` prints.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import os
import re
import textwrap
import tokenize
from collections.abc import Iterable
from io import StringIO
from typing import Any
from unittest import mock

from thrifty.cli.main import parser
from thrifty.core.registry import MethodRecord, records
from thrifty.data.source import Source
from thrifty.run import aliases, arguments
from thrifty.run.config import DataConfig, EvalConfig, RunConfig, training_fields
from thrifty.run.yaml_source import dump_yaml
from thrifty.study import config as study

__all__ = ["on_files", "pages"]

# Options without a default, and those without which a run file is refused.
_EXAMPLE: dict[str, dict[str, Any]] = {
    "custom": {"parts": [{"select": {"blocks": {"block_size": 64}}, "budget": "1%"}, {"select": "norms"}]},
    "loki": {"text": "general.txt"},
    "peft": {"r": 16, "lora_alpha": 32},
    "saved": {"plan": "out"},
    "senszo_mask": {"text": "general.txt"},
}
_TYPES = {  # what stands in a file for a type of the code
    "tuple[Source, ...]": "source | list of sources",
    "Sources": "source | list of sources",
    "list[StudyBudget]": "list of budgets",
    "Budget": "share | count",
    **dict.fromkeys(("DataConfig", "EvalConfig", "Search", "Curve"), "mapping"),
    **dict.fromkeys(("dict[str, Any]", "dict[str, str]", "Mapping[str, str]"), "mapping"),
    "dict[str, Task]": "mapping of tasks",
    "dict[str, Entry]": "mapping of methods",
    "Range": "range",
    "None": "null",
}


def on_files(files: Any, *, config: Any) -> Any:
    """MkDocs: add the pages, and the methods to the navigation."""
    from mkdocs.structure.files import File

    for uri, text in pages().items():
        files.append(File.generated(config, uri, content=text))
    (section,) = (item["Methods"] for item in config.nav if "Methods" in item)
    section += [{name: f"methods/{name}.md"} for name in records()]
    return files


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """MkDocs: nothing that a page shows may come from a network."""
    loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?https?:[^>]*>", output)
    assert not loaded, f"{page.file.src_uri}: {loaded[0]}"
    return output


def pages() -> dict[str, str]:
    """Every made page: its place below `docs/`, and its text in Markdown."""
    made = {"methods/index.md": _methods(records().values())}
    made |= {f"methods/{name}.md": _method(record) for name, record in records().items()}
    return made | {
        "reference/run-file.md": _run_file(),
        "reference/training-arguments.md": _training_arguments(),
        "reference/study-file.md": _study_file(),
        "reference/other-names.md": _other_names(),
        "reference/command-line.md": _command_line(),
    }


def _methods(known: Iterable[MethodRecord]) -> str:
    rows = []
    for r in sorted(known, key=lambda r: (r.family != "block-sparse", r.family, r.name)):
        probe, rate = "yes" if r.needs_probe else "", f"{r.learning_rate:g}"
        rows.append([f"[{r.name}]({r.name}.md)", r.family, probe, rate, _prose(r.summary)])
    return f"""# Methods

A method says where a model is trained and what is trained there. In a run file: `method: smt`, or with options
`method: {{smt: {{block_size: 64}}}}`; in Python `thrifty.attach(model, "smt", ...)`; on the command line
`thrifty methods smt` prints what its page says. Peers of the PEFT library run under [peft](peft.md), and
[custom](custom.md) puts several parts together. A probe looks at a few batches before training.

{_table(["method", "family", "probe", "learning rate", "what is trained"], rows)}
The learning rate is the default with AdamW; the best one differs, and [`thrifty compare`](../compare.md) searches it.
"""


def _method(record: MethodRecord) -> str:
    what, _, never = (inspect.getdoc(record.build) or "").partition("When not to use it:")
    summary, _, body = what.partition("\n")
    facts = [
        ["Family", record.family],
        ["Paper", re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", _prose(record.paper))],
        ["Cost", _prose(record.cost)],
        ["Needs", _needs(record)],
        ["Learning rate", f"{record.learning_rate:g} unless given"],
    ]
    out = [f"# {record.name}", f"**{_prose(summary)}**", _table(["", ""], facts), _prose(body.strip())]
    if never:
        never = _prose(never.strip())
        out.append(f'!!! warning "When not to use it"\n\n{textwrap.indent(never[0].upper() + never[1:], "    ")}')
    signature = inspect.signature(record.build, eval_str=True).parameters.values()
    rows = [
        [f"`{p.name}`", _code(_type(p.annotation)), "required" if p.default is p.empty else _code(_yaml(p.default))]
        for p in signature
        if p.kind is not p.VAR_KEYWORD
    ]
    rows += [["any other", "", "that of PEFT"] for p in signature if p.kind is p.VAR_KEYWORD]
    given = {p.name: p.default for p in signature if p.default not in (None, p.empty)} | _EXAMPLE.get(record.name, {})
    example = dump_yaml({"method": {record.name: given} if given else record.name})
    out += ["## Options", _table(["option", "type", "default"], rows) if rows else "None."]
    out += ["In a run file, where what is left out has its default:", f"```yaml\n{example}```"]
    return "\n\n".join(part for part in out if part) + "\n"


def _needs(record: MethodRecord) -> str:
    if not record.needs_probe:
        return "no probe"
    general = "text" in inspect.signature(record.build).parameters
    return f"a probe: a few batches {'of general text' if general else 'of the task'} before training"


def _run_file() -> str:
    return f"""# Run file

What `thrifty train` reads. `thrifty init` writes one with a comment on every key. Any key can be given on the command
line too, nested ones with dots: `thrifty train run.yaml max_steps=50 method.smt.block_size=64`. A key that does not
exist, or has the wrong type, is an error that names file, line and the nearest key. Beside the keys below stand the
fields of [TrainingArguments](training-arguments.md). Relative paths start from the directory of the command.

{_fields(RunConfig, leave=("training",))}
## data

{_fields(DataConfig, prefix="data.")}
A source is a path, or a mapping:

{_source()}
Rows are `messages`, `prompt` + `completion`, `instruction` [+ `input`] + `output`, ShareGPT `conversations`, or `text`;
[preferences](../objectives.md#rows) have fields of their own. The loss is taken on answers only, with the token that
ends each; of `text`, on everything.

## eval

{inspect.getdoc(EvalConfig)}

{_fields(EvalConfig, prefix="eval.")}"""


def _source() -> str:
    told = dict(re.findall(r"^(\w+): (.*(?:\n    .*)*)", inspect.getdoc(Source) or "", re.MULTILINE))
    rows = [[_code(word) for word in words] + [_prose(told[words[0]])] for *words, _ in _parsed(Source)]
    return _table(["key", "type", "default", ""], rows)


def _training_arguments() -> str:
    from transformers import TrainingArguments

    stock: dict[str, Any] = dict.fromkeys(training_fields())
    stock |= {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.default is not dataclasses.MISSING}
    stock |= arguments._DEFAULTS | {"learning_rate": "the method's", "logging_nan_inf_filter": False}
    rows = [[_code(name), _code(_type(kind)), _code(_yaml(stock[name]))] for name, kind in training_fields().items()]
    refused = [[_code(name), _prose(why)] for name, why in sorted(aliases.OWNED.items())]
    return f"""# TrainingArguments

Every field of `transformers.TrainingArguments` may stand at the top level of a run file under its own name, with the
meaning that [transformers' documentation](https://huggingface.co/docs/transformers/main_classes/trainer) gives it, but
for the few below that thrifty owns. The list is that of the transformers that this site was built with.

## Accepted

{_table(["field", "type", "default"], sorted(rows))}
## Refused, and why

{_table(["field", "because"], refused)}"""


def _study_file() -> str:
    least = study.load_study({"tasks": {"t": {"train": "t.jsonl", "eval": "t.jsonl"}}, "methods": {"smt": "smt"}})
    defaults = {"output_dir": "studies/<name of the file>", "budgets": _yaml([b.label for b in least.budgets])}
    defaults |= dict.fromkeys(("tasks", "methods"), "required") | dict.fromkeys(("search", "curve"), "below")
    defaults |= {name: _yaml(getattr(least, name)) for name in ("run", "seeds", "baseline", "measure", "seconds")}
    parts = {"A task": study.Task, "A method": study.Entry, "search": study.Search, "A range": study.Range}
    out = [
        "# Study file",
        "What `thrifty compare` reads; [Which method pays here?](../compare.md) tells what it does with it.",
        _fields(study.Study, leave=study._NO_KEYS, defaults=defaults),
    ]
    for title, kind in (parts | {"curve": study.Curve}).items():
        out += [f"## {title}", _prose(inspect.getdoc(kind) or ""), _fields(kind)]
    return "\n\n".join(out)


def _other_names() -> str:
    names = sorted(aliases.OTHER_NAMES.items())
    rows = [[_code(name), _prose(re.sub("'(.+?)'", r"`\1`", ours))] for name, ours in names]
    rows += [[_code(f"data.{name}"), f"called `data.{ours}` here"] for name, ours in sorted(aliases.IN_DATA.items())]
    return f"""# Other tools' names

A key of another tool in a run file is an error that says what to write instead. These are known:

{_table(["key", "is"], rows)}"""


def _command_line() -> str:
    with mock.patch.dict(os.environ, COLUMNS="100"):  # what argparse wraps at
        parts = list(_help(parser(), "thrifty"))
    return "# Command line\n\nWhat `--help` prints; `python -m thrifty` is the same command.\n\n" + "\n".join(parts)


def _help(command: argparse.ArgumentParser, name: str) -> Iterable[str]:
    yield f"## {name}\n\n```text\n{command.format_help()}```\n"
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from _help(below, f"{name} {word}")


def _fields(kind: type, *, prefix: str = "", leave: Iterable[str] = (), defaults: dict[str, str] | None = None) -> str:
    """A table of a dataclass: its fields' names, types, defaults, and the comments beside them."""
    rows = []
    for name, annotation, default, comment in _parsed(kind):
        if name not in leave:
            default = (defaults or {}).get(name, default)
            shown = default if default in ("required", "below") else _code(default)
            rows.append([_code(prefix + name), _code(annotation), shown, _prose(comment)])
    return _table(["key", "type", "default", ""], rows)


def _parsed(kind: type) -> Iterable[tuple[str, str, str, str]]:
    """Name, type, default and comment of each field, from the source."""
    source = textwrap.dedent(inspect.getsource(kind))
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            comment = comments.get(node.end_lineno or 0, "")
            yield node.target.id, _type(ast.unparse(node.annotation)), _default(node.value), comment


def _default(node: ast.expr | None) -> str:
    if node is None:
        return "required"
    if isinstance(node, ast.Call):  # field(default_factory=...)
        (factory,) = (keyword.value for keyword in node.keywords)
        if not isinstance(factory, ast.Lambda):
            return {"dict": "{}", "list": "[]"}.get(ast.unparse(factory), "below")
        node = factory.body
    return _yaml(ast.literal_eval(node))


def _yaml(value: Any) -> str:
    """A default as a run file writes it, on one line."""
    value = getattr(value, "value", value)  # of an enumeration
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:typing|collections\.abc|[a-z_]+(?:\.[a-z_]+)+)\.", "", text).replace("Sequence", "list")
    text = re.sub(r"\bOptional\[([^\[\]]*)\]", r"\1 | None", text).replace("NoneType", "None")
    text = re.sub(r"Literal\[([^\]]*)\]", lambda found: found[1].replace("'", "").replace(",", " |"), text)
    names = "|".join(map(re.escape, _TYPES))
    return re.sub(rf"(?<!\w)({names})(?!\w)", lambda found: _TYPES[found[1]], text).replace(" | ", " or ")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _prose(text: str) -> str:
    """Plain text as Markdown: outside of `code`, nothing is markup."""
    parts = re.split(r"(`[^`]*`)", text.replace("None:", "null:"))
    return "".join(part if part.startswith("`") else re.sub(r"([*<\[\]|])", r"\\\1", part) for part in parts)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(' '.join(cell.split()) for cell in row)} |\n" for row in lines)
