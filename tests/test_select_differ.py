"""No two methods that choose choose the same on one model, unless a docstring says why."""

from __future__ import annotations

import itertools

from contract_cells import METHODS, Cell


def test_no_two_methods_give_the_same_plan() -> None:
    found = {}
    for name, row in METHODS.items():
        if row.exact and not row.scheduled and "gpt2" in row.families:
            cell = Cell(name, "gpt2", "float32")
            found[name] = dict(cell.attach(cell.build()).plan)
    assert {"smt", "loki", "senszo_mask", "gps", "magnitude", "lift", "random_entries"} <= found.keys()
    same = [(a, b) for a, b in itertools.combinations(found, 2) if found[a] == found[b]]
    assert not same
