"""Many deltas on one base: swaps that are exact for ever, and what is refused."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from made_deltas import bits, refused, tuned
from torch import Tensor, nn

from thrifty import Deltas, attach
from thrifty.core.entries import Entries
from thrifty.core.low_rank import LowRank
from thrifty.core.region import Blocks, Region, Whole
from thrifty.delta import Delta, NewTokens, switch
from thrifty.delta.coded import CodedPiece
from thrifty.delta.compress import compress


class Small(nn.Module):
    """Matrices that blocks do not divide, stacked experts, an embedding and a bias; values of all sizes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.b, self.e = nn.Linear(7, 9), nn.Linear(6, 5, bias=False), nn.Embedding(11, 4)
        self.experts = nn.Parameter(torch.zeros(3, 6, 5))
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            powers = 10.0 ** torch.randint(-4, 4, p.shape, generator=generator)
            p.data = torch.randn(p.shape, generator=generator).mul(powers).to(dtype)
            p.data.view(-1)[:2] = torch.tensor([-0.0, 0.0])


def index(*places: tuple[int, ...]) -> Tensor:
    return torch.tensor(places)


SWAPPED: dict[str, dict[str, Region]] = {
    "blocks": {
        "a.weight": Blocks((4, 3), index((0, 0), (1, 2), (2, 1), (2, 2))),
        "experts": Blocks((4, 4), index((0, 1, 1), (2, 0, 0), (2, 1, 0))),
    },
    "rows": {"a.weight": Blocks((1, 7), index((2, 0), (8, 0))), "e.weight": Blocks((1, 4), index((0, 0), (10, 0)))},
    "columns": {"a.weight": Blocks((9, 1), index((0, 1), (0, 6))), "b.weight": Blocks((5, 2), index((0, 0), (0, 2)))},
    "entries": {"a.weight": Entries(torch.tensor([0, 1, 9, 62])), "experts": Entries(torch.tensor([3, 89]))},
    "whole": {"a.bias": Whole(), "e.weight": Whole(), "b.weight": Whole()},
    "pairs": {"a.weight": LowRank(2, 4.0), "b.weight": LowRank(1, 1.0), "a.bias": Whole()},
    "again": {"a.weight": Blocks((2, 2), index((0, 0), (4, 3), (1, 1))), "b.weight": LowRank(2, 1.0)},
}


def test_compressed_deltas_are_swapped_exactly_too() -> None:
    model = Small(torch.float32)
    base, kept = bits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    found = {}
    for name, how in (("blocks", "int8"), ("entries", "int4"), ("pairs", "int8")):
        found[name] = compress(tuned(model, SWAPPED[name], seed=3), how, base=kept)
        found[name].pieces = dict(found[name].pieces)  # made now, while the base is there
    assert any(isinstance(piece, CodedPiece) for delta in found.values() for piece in delta.pieces.values())
    deltas, alone = Deltas(model, found), {}
    for name, delta in found.items():
        alone[name] = bits(delta.apply(Small(torch.float32)))
    for name in [*found, *reversed(found), "blocks", "pairs"]:
        deltas.activate(name)
        assert bits(model) == alone[name]
    deltas.deactivate()
    assert bits(model) == base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_swaps_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Small(dtype)
    expected: dict[str | None, dict[str, bytes]] = {None: bits(model)}
    deltas = Deltas(model)
    for seed, (name, regions) in enumerate(SWAPPED.items()):
        delta = tuned(model, regions, seed=seed)
        expected[name] = bits(delta.apply(copy.deepcopy(model)))
        assert expected[name] != expected[None]
        delta.save(tmp_path / name)
        deltas.add(name, tmp_path / name if seed % 2 else delta)
    assert deltas.names == tuple(SWAPPED)
    draw = random.Random(0)
    for _ in range(1000):
        name = draw.choice([None, *SWAPPED])
        if name is None:
            deltas.deactivate()
        else:
            deltas.activate(name)
        assert deltas.active == name
        assert bits(model) == expected[name]


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    st.sampled_from([None, 1, 3]),
    st.data(),
)
def test_any_blocks_and_any_entries_are_written_where_they_belong(
    shape: tuple[int, int], size: tuple[int, int], experts: int | None, data: st.DataObject
) -> None:
    full = shape if experts is None else (experts, *shape)
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(full))
    grid = [*full[:-2], -(-full[-2] // size[0]), -(-full[-1] // size[1])]
    place = st.tuples(*(st.integers(0, n - 1) for n in grid))
    chosen = data.draw(st.lists(place, min_size=1, max_size=6, unique=True))
    single = data.draw(st.lists(st.integers(0, model.w.numel() - 1), min_size=1, max_size=6, unique=True))
    before = bits(model)
    made = {
        "blocks": tuned(model, {"w": Blocks(size, torch.tensor(chosen))}),
        "entries": tuned(model, {"w": Entries(torch.tensor(single))}, seed=1),
    }
    deltas = Deltas(model, made)
    for name, delta in made.items():
        with deltas.using(name) as same:
            assert same is model
            assert bits(model) == bits(delta.apply(copy.deepcopy(deltas_off(deltas))))
        assert bits(model) == before


def deltas_off(deltas: Deltas) -> nn.Module:
    """A copy of the base, whatever is active."""
    with deltas.using(None) as model:
        return copy.deepcopy(model)


def test_using_gives_back_what_was_active_before() -> None:
    model = Small(torch.float32)
    deltas = Deltas(model, {name: tuned(model, SWAPPED[name]) for name in ("rows", "whole")})
    base = bits(model)
    deltas.activate("rows")
    rows = bits(model)

    def fail() -> None:
        with deltas.using("whole"):
            assert deltas.active == "whole"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (deltas.active, bits(model)) == ("rows", rows)
    with deltas.using(None):
        assert (deltas.active, bits(model)) == (None, base)
    with deltas.using("whole"):
        deltas.remove("rows")
    assert (deltas.active, bits(model)) == (None, base)
    deltas.activate("whole")
    deltas.remove("whole")
    assert (deltas.names, deltas.active, bits(model)) == ((), None, base)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_what_was_active(
    kind: type[BaseException], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small(torch.bfloat16)
    deltas = Deltas(model, {name: tuned(model, regions) for name, regions in SWAPPED.items()})
    real, left = switch._Write.run, [0]

    def run(write: Any) -> None:
        left[0] -= 1
        if left[0] == 0 and not late:
            raise kind
        real(write)
        if left[0] == 0:
            raise kind

    monkeypatch.setattr(switch._Write, "run", run)
    for before, after in (("pairs", "again"), ("again", "pairs"), ("blocks", "pairs"), ("whole", None)):
        left[0] = 0
        deltas.activate(before)
        expected = bits(model)
        writes = len(SWAPPED[before]) + len(SWAPPED.get(after or "", ()))
        for at in range(1, writes + 1):
            left[0] = at
            with pytest.raises(kind), deltas.using(after):
                pass
            assert (deltas.active, bits(model)) == (before, expected)


def test_what_does_not_belong_is_refused_and_nothing_is_kept() -> None:
    model = Small(torch.float32)
    deltas = Deltas(model, {"rows": tuned(model, SWAPPED["rows"])})
    good = tuned(model, SWAPPED["pairs"])
    deltas.activate("rows")
    active = bits(model)
    other = Small(torch.float32)
    other.b.weight.data[0, 0] += 1
    strange = Small(torch.float32)
    strange.c = nn.Linear(2, 2)
    refused(lambda: deltas.add("x", tuned(other, SWAPPED["pairs"])), "^b.weight differs from the base of this delta")
    refused(lambda: deltas.add("x", tuned(strange, {"c.weight": Whole()})), "the model has no tensor c.weight")
    refused(lambda: deltas.add("x", tuned(Small(torch.bfloat16), SWAPPED["rows"])), "load the base with dtype=bfloat16")
    refused(lambda: deltas.add("rows", good), "'rows' is held already: remove")
    refused(lambda: deltas.add("", good), "must be a text that is not empty")
    refused(lambda: deltas.add("x", "nowhere"), "nowhere is no delta folder")
    refused(lambda: deltas.activate("row"), "unknown delta 'row'; did you mean 'rows'")
    assert (deltas.names, deltas.active, bits(model)) == (("rows",), "rows", active)
    deltas.add("x", good)
    assert (deltas.names, deltas.active, bits(model)) == (("rows", "x"), "rows", active)
    model.double()
    refused(lambda: deltas.activate("x"), "was moved, cast or replaced after the delta was added")
    refused(lambda: Deltas(good.apply(Small(torch.float32)), {"x": good}), "the delta is applied already")


def test_attached_models_new_tokens_and_adapters_are_refused_with_the_fix() -> None:
    model = build("llama", layers=1)
    name = "model.layers.0.mlp.down_proj.weight"
    delta = tuned(model, {name: Whole()})
    deltas = Deltas(model, {"x": delta})
    tuning = attach(model, {"random_blocks": {"block_size": 8}}, budget=0.5)
    refused(lambda: Deltas(model), "still attached: call finish")
    refused(lambda: deltas.activate("x"), "still attached: call finish")
    tuning.finish()
    grown = Delta(delta.pieces, method={}, total=1, new_tokens=NewTokens(ids={"<t>": 97}, base_rows=97, rows=98))
    refused(lambda: deltas.add("grown", grown), "'grown' adds tokens .* with Delta.apply")
    peer = attach(build("llama", layers=1), {"peft": {"r": 2, "target_modules": ["q_proj"]}}).delta()
    refused(lambda: deltas.add("peer", peer), "'peer' is a PEFT adapter, .*: convert it")


def test_tied_weights_go_by_either_name() -> None:
    model = build("gemma2", layers=1)
    before = bits(model)
    rows = Blocks((1, 40), index((3, 0), (5, 0)))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    made = {name: tuned(model, {name: rows}) for name in names}
    both = tuned(model, {names[0]: rows})
    deltas = Deltas(model, {**made, "both": Delta(dict.fromkeys(names, both.pieces[names[0]]), method={}, total=1)})
    refused(lambda: deltas.add("two", tuned(model, dict.fromkeys(names, rows))), "are one tensor in this model")
    deltas.activate(names[0])
    trained = bits(model)
    assert trained != before
    for name in (names[1], "both"):
        deltas.activate(name)
        assert bits(model) == trained
    deltas.deactivate()
    assert bits(model) == before
