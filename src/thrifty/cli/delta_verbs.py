"""`thrifty delta <verb> ...`: one small function a verb, and its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.core.errors import ThriftyError

if TYPE_CHECKING:
    from thrifty.delta import Delta

__all__ = ["add_delta_verbs"]

_DTYPES = ["float32", "bfloat16", "float16"]
_DELTA = "the folder of a delta, or of a run"


def add_delta_verbs(group: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    """Put the verbs below the parser `group`."""
    below = group.add_subparsers(dest="delta_verb", metavar="<verb>", required=True, parser_class=parser_class)

    def verb(name: str, summary: str, call: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = below.add_parser(name, help=summary, description=f"{summary}.")
        sub.set_defaults(call=call)
        return sub

    show = verb("show", "Print what a delta holds", _show)
    show.add_argument("delta", help=_DELTA)
    show.add_argument("--tensors", action="store_true", help="one line a tensor instead of one a layer and kind")
    show.add_argument("--rank", action="store_true", help="effective ranks too (singular values: takes a while)")
    show.add_argument("--plot", metavar="FILE.png", help="draw where it lies")

    verify = verb("verify", "Say whether a model is the delta's base, or has it applied", _verify)
    verify.add_argument("delta", help=_DELTA)
    verify.add_argument("--base", metavar="MODEL", help="the model to look at; the run's own unless given")

    apply = verb("apply", "Write the base with the delta in it, shard by shard, without loading the model", _apply)
    apply.add_argument("delta", help=_DELTA)
    apply.add_argument("--base", metavar="MODEL", help="the delta's base; the run's own unless given")
    apply.add_argument("--dtype", choices=_DTYPES, help="of the checkpoint; the delta's own unless given")
    apply.add_argument("--gguf", metavar="FILE", help="write a GGUF file of it too (llama-like models)")
    _output(apply)

    remove = verb("remove", "Write the base again from a checkpoint with the delta in it, bit for bit", _remove)
    remove.add_argument("delta", help=_DELTA)
    remove.add_argument("model", help="the folder of the checkpoint with the delta in it")
    _output(remove)

    convert = verb("convert", "Make a PEFT adapter of a delta, or a delta of a PEFT adapter", _convert)
    convert.add_argument("source", help="the folder of a delta, of a run, or of a PEFT adapter")
    convert.add_argument("--to", choices=["lora", "shira", "delta"], required=True)
    convert.add_argument("--rank", type=int, help="lora: one rank for all modules (what vLLM reads)")
    convert.add_argument("--error", type=float, metavar="SHARE", help="lora: of each change that may be lost, instead")
    convert.add_argument("--base", metavar="MODEL", help="the base; the run's own unless given")
    _output(convert)

    diff = verb("diff", "Write the difference of two models of one architecture as a delta", _diff)
    diff.add_argument("base", help="a model: an embedded name, a folder or a hub id")
    diff.add_argument("tuned", help="the fine-tuned model")
    diff.add_argument("--error", type=float, default=0.0, metavar="SHARE", help="of a change that low rank may lose")
    diff.add_argument("--dtype", choices=_DTYPES, default="float32", help="read both as")
    _output(diff)

    for name, summary in (
        ("add", "Add deltas of one base"),
        ("average", "Average deltas of one base"),
        ("stock", "Model Stock of two fine-tunes of one base"),
        ("stack", "Make one delta of two, the second trained on top of the first"),
    ):
        sub = verb(name, summary, _combine)
        sub.add_argument("deltas", nargs="+", help=_DELTA)
        if name in ("add", "average"):
            sub.add_argument("--weights", type=numbers, metavar="A,B", help="one for each delta; 1 unless given")
        _base(sub)
        _output(sub)

    scale = verb("scale", "Multiply what a delta changes; 0.5 is half way from the base", _scale)
    scale.add_argument("delta", help=_DELTA)
    scale.add_argument("weight", type=float)
    _base(scale)
    _output(scale)

    compress = verb("compress", "Make a delta smaller, at a loss that is printed", _compress)
    compress.add_argument("delta", help=_DELTA)
    compress.add_argument("how", help="int8, int4, top_k=10%%, delta_come or delta_come=2x8,32x3,512x2")
    compress.add_argument("--tensors", action="store_true", help="print the loss of each tensor too")
    _base(compress)
    _output(compress)

    between = verb("interpolate", "Evaluate a run between its base (0) and its result (1)", _interpolate)
    between.add_argument("delta", help=_DELTA)
    between.add_argument("settings", nargs="*", metavar="key=value", help="what to measure: data.eval=... eval.*")
    _base(between)
    between.add_argument(
        "--weights", type=numbers, default=[0, 0.25, 0.5, 0.75, 1], metavar="A,B", help="0,.25,.5,.75,1"
    )

    transfer = verb("transfer", "Make the same change to another base, such as a newer version of the model", _transfer)
    transfer.add_argument("delta", help=_DELTA)
    transfer.add_argument("--base", required=True, metavar="MODEL", help="the other base")
    _output(transfer)


def _output(sub: argparse.ArgumentParser, what: str = "a new folder") -> None:
    sub.add_argument("--output", required=True, metavar="FOLDER", help=what)


def _base(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--base", metavar="MODEL", help="the deltas' base; needed where low-rank pairs are summed")


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _show(arguments: argparse.Namespace) -> int:
    from thrifty.delta.show import draw, rows, table
    from thrifty.run.deltas import open_delta
    from thrifty.run.display import human_bytes
    from thrifty.run.model import delta_folder

    delta = open_delta(arguments.delta)
    size = sum(file.stat().st_size for file in delta_folder(arguments.delta).rglob("*") if file.is_file())
    print(f"method: {dict(delta.method)}")
    if delta.info:
        print("run: " + ", ".join(f"{key} {value}" for key, value in delta.info.items() if not isinstance(value, dict)))
    if delta.new_tokens is not None:
        print(f"new tokens: {', '.join(delta.new_tokens.ids)}")
    if not delta.pieces:
        print(f"a PEFT adapter of {human_bytes(size)} on disk; `thrifty delta convert` makes regions of it")
        return 0
    print(delta.plan)
    print(f"on disk: {human_bytes(size)}\n")
    print(table(rows(delta, ranks=arguments.rank), each=arguments.tensors or arguments.rank))
    if arguments.plot:
        draw(delta, Path(arguments.plot))
        print(f"\nwrote {arguments.plot}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from thrifty.run.deltas import base_name, open_delta, verify

    delta = open_delta(arguments.delta)
    _dtype(delta)
    model = base_name(arguments.delta, arguments.base)
    found = verify(delta, model)
    for state, what in (("base", "the delta can be applied"), ("applied", "the delta can be removed")):
        if set(found.values()) <= {state, "unchanged"}:
            print(f"{state}: all {len(found)} tensors; {what}")
            return 0
    for name, said in found.items():
        print(f"{name}: {said}")
    raise ThriftyError(f"{model} is neither the delta's base nor the base with exactly this delta")


def _apply(arguments: argparse.Namespace) -> int:
    from thrifty.run.deltas import base_folder, open_delta
    from thrifty.run.gguf import gguf_command, write_gguf
    from thrifty.run.merged import merge_checkpoint

    base = base_folder(arguments.delta, arguments.base)
    print(f"wrote {merge_checkpoint(open_delta(arguments.delta), base, arguments.output, dtype=arguments.dtype)}")
    if arguments.gguf:
        print(f"wrote {write_gguf(arguments.output, arguments.gguf)}")
    else:
        print(f"as GGUF, with llama.cpp: {gguf_command(arguments.output)}")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    from thrifty.run.deltas import open_delta
    from thrifty.run.merged import unmerge_checkpoint

    print(f"wrote {unmerge_checkpoint(open_delta(arguments.delta), arguments.model, arguments.output)}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from thrifty.run.deltas import convert

    if arguments.to != "lora" and (arguments.rank is not None or arguments.error is not None):
        raise ThriftyError("--rank and --error are for --to lora")
    for line in convert(
        arguments.source,
        to=arguments.to,
        output=arguments.output,
        base=arguments.base,
        rank=arguments.rank,
        error=arguments.error,
    ):
        print(line)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    import torch

    from thrifty.delta.diff import diff
    from thrifty.run.deltas import base_tensors

    dtype = getattr(torch, arguments.dtype)
    delta = diff(
        base_tensors(arguments.base, dtype=dtype), base_tensors(arguments.tuned, dtype=dtype), error=arguments.error
    )
    return _write(delta, arguments.output)


def _combine(arguments: argparse.Namespace) -> int:
    from thrifty.delta.algebra import average, combine, model_stock, stack
    from thrifty.run.deltas import open_delta

    deltas = [open_delta(source) for source in arguments.deltas]
    base = _tensors(arguments.base, deltas)
    kind, weights = arguments.delta_verb, getattr(arguments, "weights", None)
    if kind in ("stack", "stock"):
        if len(deltas) != 2:
            raise ThriftyError(f"thrifty delta {kind} takes two deltas, not {len(deltas)}")
        result = (stack if kind == "stack" else model_stock)(*deltas, base=base)
    elif kind == "average":
        result = average(deltas, weights=weights, base=base)
    else:
        weights = weights or [1.0] * len(deltas)
        if len(weights) != len(deltas):
            raise ThriftyError(f"--weights has {len(weights)} numbers for {len(deltas)} deltas: give one for each")
        result = combine(list(zip(deltas, weights, strict=True)), base=base)
    return _write(result, arguments.output)


def _scale(arguments: argparse.Namespace) -> int:
    from thrifty.delta.algebra import combine
    from thrifty.run.deltas import open_delta

    delta = open_delta(arguments.delta)
    return _write(combine([(delta, arguments.weight)], base=_tensors(arguments.base, [delta])), arguments.output)


def _compress(arguments: argparse.Namespace) -> int:
    from thrifty.delta import Delta
    from thrifty.delta.compress import compress, measure
    from thrifty.run.deltas import open_delta, unused

    delta = open_delta(arguments.delta)
    compress(delta, arguments.how, base=_tensors(arguments.base, [delta])).save(unused(arguments.output))
    report = measure(delta, Delta.load(arguments.output))
    print(report if arguments.tensors else f"in all: {report.total}")
    return 0


def _interpolate(arguments: argparse.Namespace) -> int:
    from thrifty.run.deltas import sweep
    from thrifty.run.folder import locate
    from thrifty.run.model import delta_folder

    if arguments.base is not None:
        place = locate(arguments.base, delta=str(delta_folder(arguments.delta)), settings=arguments.settings)
    else:
        place = locate(arguments.delta, settings=arguments.settings)
    if place.delta is None:
        raise ThriftyError(f"{arguments.delta} is no folder of a run or of a delta: there is nothing to scale")
    for number, (weight, scores) in enumerate(sweep(place, arguments.weights)):
        if number == 0:
            print("weight  " + "  ".join(f"{name:>11}" for name in scores))
        print(f"{weight:<6g}  " + "  ".join(f"{value:11.4f}" for value in scores.values()), flush=True)
    return 0


def _transfer(arguments: argparse.Namespace) -> int:
    from thrifty.delta.algebra import transfer
    from thrifty.run.deltas import base_tensors, open_delta

    delta = open_delta(arguments.delta)
    return _write(transfer(delta, base_tensors(arguments.base, dtype=_dtype(delta))), arguments.output)


def _write(delta: Delta, output: str) -> int:
    from thrifty.run.deltas import unused

    delta.save(unused(output))
    plan = delta.plan
    print(f"wrote {output}: {plan.trainable_parameters:,} numbers in {len(plan)} tensors")
    return 0


def _tensors(model: str | None, deltas: Sequence[Delta]) -> Any:
    from thrifty.run.deltas import base_tensors

    return None if model is None else base_tensors(model, dtype=_dtype(deltas[0]))


def _dtype(delta: Delta) -> Any:
    """Of the delta's tensors, in which its base must be read."""
    piece = next(iter(delta.pieces.values()), None)
    if piece is None:
        raise ThriftyError("this delta holds no regions (a PEFT adapter, or nothing changed): convert it first")
    return piece.dtype
