"""Region gradients alone: the chosen way, every other way, and one ideal product of as many numbers.

    python -m benchmarks.region_grad --threads 1 --dtype float32

CPU time of this thread with one thread, wall time with more; ways interleaved (A B C A B C ...), medians over rounds.
`old` is the form before (blocks one by one from 32 x 32 on, else a line at a time, indices built at each call).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from thrifty.kernels.region_ways import BlockByBlock, LineByLine, OneProduct, StripGroup, Way, choose

_BLOCKS = ("8x8", "16x16", "32x32", "64x64", "128x128", "Ox1", "1xI")


def group_of(outputs: int, inputs: int, h: int, w: int, share: float) -> tuple[StripGroup, int]:
    """Random blocks, and how many input columns they use."""
    down, across = outputs // h, inputs // w
    index = torch.randperm(down * across)[: max(1, round(share * down * across))].sort().values
    cols, slots = (index % across).unique(return_inverse=True)
    rows = (index // across * h).tolist()
    return StripGroup(h=h, w=w, rows=tuple(rows), slots=tuple((slots * w).tolist()), offset=0), len(cols) * w


def before(dy_TO: Tensor, x_TU: Tensor, group: StripGroup, out: Tensor) -> None:
    """What was done before: the reference of the table."""
    h, w = group.h, group.w
    if h * w >= 1024 and min(h, w) >= 16:
        BlockByBlock(group).into(dy_TO, x_TU, out)
        return
    by_slot = len(set(group.slots)) <= len(set(group.rows))
    a, b, a_starts, b_starts, a_side, b_side = (
        (dy_TO, x_TU, group.rows, group.slots, h, w) if by_slot else (x_TU, dy_TO, group.slots, group.rows, w, h)
    )
    place, lines = out if by_slot else out.mT, {}
    for k, start in enumerate(b_starts):
        lines.setdefault(start, []).append(k)
    starts, side = torch.tensor(a_starts), torch.arange(a_side)
    for start, blocks in lines.items():
        index = (starts[blocks][:, None] + side).flatten()
        product = a.index_select(1, index).t() @ b[:, start : start + b_side]
        place[blocks] = product.view(len(blocks), a_side, b_side)


def measure(forms: dict[str, Callable[[], object]], *, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each form."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(rounds):
        for name, form in forms.items():
            start = clock()
            form()
            times[name].append(clock() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--matrices", nargs="+", default=["1536x576", "576x1536"], help="outputs x inputs")
    parser.add_argument("--blocks", nargs="+", default=_BLOCKS, help="h x w; O and I are the matrix's own")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.01, 0.05, 0.2])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype, clock = getattr(torch, args.dtype), time.thread_time if args.threads == 1 else time.perf_counter
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, {args.tokens} tokens; milliseconds")
    print("| matrix | block | share | ideal | old | block by block | lines | one product | chosen | over ideal |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for matrix in args.matrices:
        outputs, inputs = map(int, matrix.split("x"))
        for block in args.blocks:
            h, w = (int(side.replace("O", str(outputs)).replace("I", str(inputs))) for side in block.split("x"))
            for share in args.shares:
                group, columns = group_of(outputs, inputs, h, w, share)
                dy, x = torch.randn(args.tokens, outputs).to(dtype), torch.randn(args.tokens, columns).to(dtype)
                out = torch.empty(len(group.rows), h, w, dtype=dtype)
                side = max(1, round(group.numbers**0.5))
                a, b = (torch.randn(args.tokens, side).to(dtype) for _ in range(2))
                way = choose(group)
                by_row = way.by_row if isinstance(way, LineByLine) else len(set(group.rows)) <= len(set(group.slots))
                ways: dict[str, Way] = {
                    "block": BlockByBlock(group),
                    "lines": LineByLine.of(group, by_row=by_row),
                    "one": OneProduct.of(group),
                }
                ms = measure(
                    {"ideal": lambda a=a, b=b: a.t() @ b, "old": lambda g=group, d=dy, s=x, o=out: before(d, s, g, o)}
                    | {name: lambda f=form, d=dy, s=x, o=out: f.into(d, s, o) for name, form in ways.items()},
                    rounds=args.rounds,
                    clock=clock,
                )
                chosen = next(name for name, form in ways.items() if type(form) is type(way))
                cells = " | ".join(f"{ms[name]:.2f}" for name in ("ideal", "old", "block", "lines", "one"))
                print(f"| {matrix} | {block} | {share:g} | {cells} | {chosen} | {ms[chosen] / ms['ideal']:.2f} |")


if __name__ == "__main__":
    main()
