"""A method written in a run file: several select -> update parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..core.budget import Budget
from ..core.errors import ThriftyError, unknown
from ..core.method import Method, Part, Selector, Update
from ..core.registry import method
from ..schedule.every import Every
from ..select.blocks import TopBlocks
from ..select.diagonal import Diagonal
from ..select.entries import TopEntries
from ..select.tensors import Tensors
from ..update.in_place import InPlace
from ..update.low_rank import LowRank

__all__ = ["custom"]

_SELECT = {
    "blocks": TopBlocks,
    "rows": partial(TopBlocks, block_size="row"),
    "columns": partial(TopBlocks, block_size="column"),
    "entries": TopEntries,
    "diagonal": Diagonal,
    "tensors": Tensors,
    "weights": partial(Tensors, only="weights"),
    "biases": partial(Tensors, only="biases"),
    "norms": partial(Tensors, only="norms"),
}
_UPDATE: dict[str, type[InPlace] | type[LowRank]] = {"in_place": InPlace, "low_rank": LowRank}
_KEYS = ("select", "update", "budget")


@method(
    family="custom",
    paper="none: what the run file says",
    learning_rate=1e-3,
    cost="the sum of its parts",
    needs_probe=True,
)
def custom(*, parts: Sequence[Mapping[str, Any]], reselect_every: int | None = None) -> Method:
    """Several parts, each a selector with what is trained there; `method: [...]` in a run file is short for it.

    A part is `{select: {blocks: {block_size: 64, target_modules: [q_proj]}}, budget: 0.5%}`. Selectors: blocks, rows,
    columns, entries, diagonal, tensors, weights, biases, norms; those by score take `scope: per_layer` and
    `order: lowest` too. `update: {low_rank: {r: 8, alpha: 16}}` trains each matrix that is selected whole (weights) as
    a low-rank pair; `in_place`, the default, what is selected itself. Parts without a budget share what the others
    leave of the run's. No tensor may be in two parts. `{custom: {parts: [...], reselect_every: 100}}` chooses again
    every 100 steps, on the weights as they are then and the batches of the start; it takes no low-rank pairs.

    When not to use it: where a named method says the same.
    """
    if not isinstance(parts, Sequence) or isinstance(parts, str) or not parts:
        raise ThriftyError(f"parts must be a list such as [{{select: biases}}], not {parts!r}")
    schedule = None if reselect_every is None else Every(period=reselect_every, key="reselect_every")
    return Method(name="custom", parts=tuple(_part(i, part) for i, part in enumerate(parts, 1)), schedule=schedule)


def _part(number: int, value: Mapping[str, Any]) -> Part:
    if not isinstance(value, Mapping) or "select" not in value:
        raise ThriftyError(f"part {number} must be a mapping with 'select', such as {{select: biases}}, not {value!r}")
    for key in value:
        if key not in _KEYS:
            raise ThriftyError(f"part {number}: {unknown('key', str(key), _KEYS)}")
    budget = value.get("budget")
    return Part(
        select=_selector(number, value["select"]),
        update=_update(number, value.get("update", "in_place")),
        budget=None if budget is None else Budget.parse(budget),
    )


def _update(number: int, value: str | Mapping[str, Any]) -> Update:
    value = {value: {}} if isinstance(value, str) else value
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ThriftyError(f"part {number}: update must be a name or one mapping like {{low_rank: {{r: 8}}}}")
    (name, options), *_ = value.items()
    if name not in _UPDATE:
        raise ThriftyError(f"part {number}: {unknown('update', str(name), _UPDATE)}")
    build = _UPDATE[name]
    known = [field.name for field in dataclasses.fields(build) if field.name != "kind"]
    return build(**_options(number, str(name), options, known))


def _selector(number: int, value: str | Mapping[str, Any]) -> Selector:
    value = {value: {}} if isinstance(value, str) else value
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ThriftyError(f"part {number}: select must be a name or one mapping like {{blocks: {{block_size: 64}}}}")
    (name, options), *_ = value.items()
    if name not in _SELECT:
        raise ThriftyError(f"part {number}: {unknown('selector', str(name), _SELECT)}")
    build = _SELECT[name]
    fixed = build.keywords if isinstance(build, partial) else {}
    fields = dataclasses.fields(build.func if isinstance(build, partial) else build)
    known = [field.name for field in fields if field.name not in fixed]
    selector: Selector = build(**_options(number, str(name), options, known))
    return selector


def _options(number: int, name: str, options: Any, known: Sequence[str]) -> dict[str, Any]:
    """The options written for `name`, each of them known."""
    if not isinstance(options, Mapping | None):
        raise ThriftyError(f"part {number}: options of {name} must be a mapping, not {options!r}")
    for key in options or {}:
        if key not in known:
            raise ThriftyError(f"part {number}: {unknown(f'option of {name}:', str(key), known)}")
    return dict(options or {})
