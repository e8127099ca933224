"""From traces of few layers to the whole depth: every sum and every maximum within a segment is linear in the number of
layers of one sort, so one trace with each sort once, and one more with it twice, give all depths. The lowest layer that
backward reaches, which passes no gradient on, and the top one are sorts of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..objective.heads import unwrapped
from .heap import Event
from .job import Job
from .ledger import Segment
from .skeleton import layers_of
from .trace import Trace, trace
from .unroll import unroll

__all__ = ["allocations", "grow", "sorts"]

_MOST_SORTS = 3  # of layers told apart by how much they train; beyond, by what alone

_SUMS = ("saved", "gradient_bytes")


def sorts(job: Job, model: nn.Module) -> list[list[int]]:
    """The numbers of the layers, by sort: alike in their parameters, in what is trained, in whether backward reaches
    them and computes them again, and in whether there is a layer on both sides."""
    parent, name = layers_of(model)
    layers = list(getattr(parent, name))
    inside = {id(p) for layer in layers for p in layer.parameters()}
    head = {id(p) for p in _head(model)}
    reached = any(
        p.requires_grad and id(p) not in inside | head for n, p in model.named_parameters() if "norm" not in n
    )
    types = getattr(unwrapped(model).config.get_text_config(), "layer_types", None)
    exact: dict[Any, list[int]] = {}
    rough: dict[Any, list[int]] = {}
    edges: list[list[int]] = []
    for number, layer in enumerate(layers):
        before, reached = reached and number > 0, reached or any(p.requires_grad for p in layer.parameters())
        if reached > before or number == len(layers) - 1:
            edges.append([number])
            continue
        kind = (types[number] if types and len(types) == len(layers) else None, job.recomputes(number))
        form = tuple((n, tuple(p.shape)) for n, p in layer.named_parameters() if not p.requires_grad)
        trained = tuple((n, tuple(p.shape)) for n, p in layer.named_parameters() if p.requires_grad)
        exact.setdefault((reached, kind, form, trained), []).append(number)
        rough.setdefault((reached, kind, bool(trained), len(form) if not trained else 0), []).append(number)
    return edges + (list(exact.values()) if len(exact) <= _MOST_SORTS else list(rough.values()))


def _head(model: nn.Module) -> Iterator[nn.Parameter]:
    head = unwrapped(model).get_output_embeddings()
    embeddings = {id(p) for p in unwrapped(model).get_input_embeddings().parameters()}
    for p in () if head is None else head.parameters():
        if id(p) not in embeddings:
            yield p


def _middle(model: nn.Module, numbers: Sequence[int]) -> int:
    """The layer of `numbers` that trains the median of them."""
    parent, name = layers_of(model)
    every = getattr(parent, name)
    sizes = sorted((sum(p.numel() for p in every[i].parameters() if p.requires_grad), i) for i in numbers)
    return sizes[len(sizes) // 2][1]


def grow(job: Job, model: nn.Module, *, probe: bool = False) -> Trace:
    """A step of the whole attached `model`; of the probe if `probe`, which computes every second layer again."""
    if probe:
        return _grow_probe(job, model)
    alike = {_middle(model, numbers): numbers for numbers in sorts(job, model)}
    once = sorted(alike)
    base = trace(job, model, once)
    sums = {name: getattr(base, name) for name in _SUMS}
    result = Trace(work=Counter(base.work), **sums)
    twice = {
        number: (once.index(number), trace(job, model, sorted([*once, number])), len(numbers) - 1)
        for number, numbers in alike.items()
        if len(numbers) > 1
    }
    for _, more, times in twice.values():
        for sort in base.work.keys() | more.work.keys():
            result.work[sort] += times * (more.work[sort] - base.work[sort])
        for name in _SUMS:
            setattr(result, name, getattr(result, name) + times * (getattr(more, name) - sums[name]))
    for segment in base.peaks:
        own = once[segment[1]] if segment[0] in ("forward", "backward") else None
        for first in (True, False) if own in twice else (True,):
            kinds = Counter(base.peaks[segment])
            for number, (position, more, times) in twice.items():
                there = _there(segment, position, number == own and not first)
                for kind in base.peaks[segment].keys() | more.peaks[there].keys():
                    kinds[kind] += times * (more.peaks[there][kind] - base.peaks[segment][kind])
            layer = 0 if own is None else alike[own][0 if first else -1]
            result.peaks[(segment[0], layer)] = kinds
    return result


def allocations(job: Job, model: nn.Module) -> list[Event]:
    """What a step of `model` takes and frees, with all layers like its commonest."""
    numbers = max(sorts(job, model), key=len)
    parent, name = layers_of(model)
    depth = len(getattr(parent, name))
    layer = _middle(model, numbers)
    if depth < 3:
        return [(block, size) for _, block, size in trace(job, model, list(range(depth))).events]
    return unroll(trace(job, model, [layer] * 3).events, depth)


def _there(segment: Segment, position: int, last: bool) -> Segment:
    """The same segment where the layer at `position` stands twice; of the two, the upper one if `last`."""
    name, number = segment
    if name not in ("forward", "backward") or number < position or (number == position and not last):
        return segment
    return name, number + 1


def _grow_probe(job: Job, model: nn.Module) -> Trace:
    """Where not all layers are computed again, every second one is: layers come in pairs. All are taken to be like the
    first that has a gradient looked at."""
    parent, name = layers_of(model)
    layers = list(getattr(parent, name))
    first = next((i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), 0)
    every = 1 if job.checkpointing or len(layers) == 1 else 2
    unit = [min(first + i, len(layers) - 1) for i in range(every)]
    count = -(-len(layers) // every)
    if count <= 3:
        return trace(job, model, unit * count, probe=True)
    three, four = (trace(job, model, unit * number, probe=True) for number in (3, 4))  # lowest, middle, top
    times = count - 3
    result = Trace(saved=three.saved + times * (four.saved - three.saved))
    for sort in three.work.keys() | four.work.keys():
        result.work[sort] = three.work[sort] + times * (four.work[sort] - three.work[sort])
    for name, number in three.peaks:
        place = number // every if name in ("forward", "backward") else 0
        for up in ((0,), (0, every), (every,))[place]:  # of middle layers the lowest and the highest
            kinds = Counter(three.peaks[name, number])
            for kind in kinds.keys() | four.peaks[name, number + up].keys():
                kinds[kind] += times * (four.peaks[name, number + up][kind] - three.peaks[name, number][kind])
            result.peaks[name, number + times * up] = kinds
    return result
