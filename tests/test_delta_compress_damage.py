"""Damaged folders of compressed deltas: always one line that says so, and nothing is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_changes import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_delta_damage import JUNK, NAME, model, parts, places, record, refused, tensor, write
from torch import Tensor

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.core.low_rank import LowRank
from thrifty.delta import Delta, LowRankPiece
from thrifty.delta.compress import compress

CODINGS = ["blocks int4", "pair int8", "whole delta_come"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good ones: ragged blocks in int4, a low-rank pair in int8, a whole matrix as singular vectors."""
    made = {name: tmp_path_factory.mktemp("whole") / "d" for name in CODINGS}
    for name, method in ((CODINGS[0], {"random_blocks": {"block_size": 4}}), (CODINGS[2], "full")):
        tuning = attach(model(), method, budget=0.8 if method != "full" else None)
        for leaf in tuning.parameters():
            leaf.data.add_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)))
        tuning.sync()
        delta = tuning.delta()
        compress(delta, "int4" if method != "full" else "delta_come=1x3,2x2").save(made[name])
    base = dict(model().named_parameters())
    generator = torch.Generator().manual_seed(0)
    pieces = {
        name: LowRankPiece.of(
            p.detach(),
            torch.randn(len(p), 3, generator=generator),
            torch.randn(3, p.shape[1], generator=generator),
            region=LowRank(3, 6.0),
        )
        for name, p in base.items()
    }
    compress(Delta(pieces, method={}, total=108), "int8", base=base).save(made[CODINGS[1]])
    return made


@pytest.mark.parametrize("coding", CODINGS)
def test_the_good_folders_load_apply_and_are_removed(folders: dict[str, Path], coding: str) -> None:
    loaded, base = Delta.load(folders[coding]), model()
    assert type(loaded.pieces[NAME]).__name__ == "CodedPiece"
    before = [p.detach().clone() for p in base.parameters()]
    loaded.apply(base)
    assert not torch.equal(next(base.parameters()), before[0])
    loaded.remove(base)
    assert all(torch.equal(p, b) for p, b in zip(base.parameters(), before, strict=True))


def coded(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return record(lambda r: r["coding"].update(changes))


NO_SENSE = f"^{NAME}: the delta's coding .* makes no sense for it: it is damaged"
DAMAGE: dict[str, tuple[str, Any, str]] = {
    "no codes": (CODINGS[0], lambda h, t: t.pop(f"codes:{NAME}"), f"codes:{NAME}"),
    "no scales": (CODINGS[0], lambda h, t: t.pop(f"scales:{NAME}"), f"scales:{NAME}"),
    "no back": (CODINGS[0], lambda h, t: t.pop(f"back:{NAME}"), f"back:{NAME}"),
    "fewer codes": (CODINGS[0], tensor("codes", lambda c: c[1:].clone()), f"^{NAME}: the delta's codes are .* damaged"),
    "more codes": (CODINGS[2], tensor("codes", lambda c: torch.cat([c, c])), f"^{NAME}: the delta's codes are"),
    "fewer scales": (CODINGS[1], tensor("scales", lambda s: s[1:].clone()), f"^{NAME}: the delta's scales are"),
    "wide scales": (
        CODINGS[1],
        tensor("scales", lambda s: s.float()),
        f"^{NAME}: the delta's scales are torch.float32",
    ),
    "signed codes": (CODINGS[0], tensor("codes", lambda c: c.view(torch.int8)), f"^{NAME}: the delta's codes are"),
    "wide back": (CODINGS[0], tensor("back", lambda b: b.int()), f"^{NAME}: the delta's back are"),
    "square back": (CODINGS[0], tensor("back", lambda b: b[None]), f"^{NAME}: the delta's back are"),
    "no dtype": (CODINGS[0], record(lambda r: r.pop("dtype")), "lacks or garbles 'dtype'"),
    "integer dtype": (CODINGS[0], record(lambda r: r.update(dtype="int8")), "'int8' is no floating-point type"),
    "a function": (CODINGS[0], record(lambda r: r.update(dtype="load")), "'load' is no floating-point type"),
    "coding a word": (CODINGS[0], record(lambda r: r.update(coding="int4")), NO_SENSE),
    "coding none": (CODINGS[0], record(lambda r: r.update(coding=None)), NO_SENSE),
    "other coding": (CODINGS[0], coded(kind="huffman"), NO_SENSE),
    "bits 9": (CODINGS[0], coded(bits=9), NO_SENSE),
    "bits 1": (CODINGS[0], coded(bits=1), NO_SENSE),
    "bits true": (CODINGS[0], coded(bits=True), NO_SENSE),
    "bits 5": (CODINGS[0], coded(bits=5), f"^{NAME}: the delta's codes are"),
    "group 0": (CODINGS[0], coded(group=0), NO_SENSE),
    "no group": (CODINGS[0], coded(group=None), NO_SENSE),
    "huge group": (CODINGS[0], coded(group=2**70), NO_SENSE),
    "values of a pair": (CODINGS[1], coded(kind="values", bits=8), NO_SENSE),
    "too few vectors": (CODINGS[1], coded(vectors=[[2, 8]]), NO_SENSE),
    "too many vectors": (CODINGS[2], coded(vectors=[[7, 2]]), NO_SENSE),
    "billions of vectors": (CODINGS[2], coded(vectors=[[2**60, 2]]), NO_SENSE),
    "no vectors": (CODINGS[2], coded(vectors=[]), NO_SENSE),
    "vectors of words": (CODINGS[2], coded(vectors=[["1", 3]]), NO_SENSE),
    "negative vectors": (CODINGS[2], coded(vectors=[[-1, 3], [4, 2]]), NO_SENSE),
    "other precision": (CODINGS[2], coded(vectors=[[1, 3], [2, 3]]), f"^{NAME}: the delta's codes are"),
    "other shape": (CODINGS[2], record(lambda r: r.update(of=[90, 6])), f"^{NAME}: the delta's codes are"),
    "huge shape": (CODINGS[2], record(lambda r: r.update(of=[10**30, 6])), "the delta's codes are"),
    "flat shape": (CODINGS[2], record(lambda r: r.update(of=[54])), NO_SENSE),
    "fingerprint": (CODINGS[0], record(lambda r: r.update(base_sha256=3)), "fingerprint of the base is no text"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(folders: dict[str, Path], tmp_path: Path, damage: str) -> None:
    coding, change, message = DAMAGE[damage]
    head, tensors = parts(folders[coding])
    change(head, tensors)
    refused(write(tmp_path / "d", head, tensors), message)


@pytest.mark.parametrize("coding", CODINGS)
def test_scales_that_are_no_numbers_touch_nothing(folders: dict[str, Path], tmp_path: Path, coding: str) -> None:
    head, tensors = parts(folders[coding])
    tensors[f"scales:{NAME}"][0] = float("nan")
    base = model()
    before = [p.detach().clone() for p in base.parameters()]
    with pytest.raises(ThriftyError, match="a scale of its codes is not finite"):
        Delta.load(write(tmp_path / "d", head, tensors)).apply(base)
    assert all(torch.equal(p, b) for p, b in zip(base.parameters(), before, strict=True))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("cut", [lambda b: b[:-9].clone(), lambda b: b.flip(0), lambda b: b[:0].clone()])
def test_a_damaged_way_back_changes_nothing(folders: dict[str, Path], tmp_path: Path, coding: str, cut: Any) -> None:
    head, tensors = parts(folders[coding])
    base = Delta.load(folders[coding]).apply(model())
    trained = [p.detach().clone() for p in base.parameters()]
    tensors[f"back:{NAME}"] = cut(tensors[f"back:{NAME}"])
    with pytest.raises(ThriftyError, match="damaged"):
        Delta.load(write(tmp_path / "d", head, tensors)).remove(base)
    assert all(torch.equal(p, t) for p, t in zip(base.parameters(), trained, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(CODINGS))
def test_junk_anywhere_in_the_record_is_refused_or_harmless(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, coding: str
) -> None:
    good, tensors = parts(folders[coding])
    head = copy.deepcopy(good)
    *way, last = data.draw(st.sampled_from(places(head)[1:]))
    inner = head
    for key in way:
        inner = inner[key]
    inner[last] = data.draw(JUNK)
    base = model()
    before = [p.detach().clone() for p in base.parameters()]
    try:
        delta = Delta.load(write(tmp_path_factory.mktemp("junk") / "d", head, tensors))
        delta.apply(base)
        applied = [p.detach().clone() for p in base.parameters()]
    except ThriftyError as error:
        lines = str(error).splitlines()
        changed = [not torch.equal(p, b) for p, b in zip(base.parameters(), before, strict=True)]
        assert (len(lines), any(changed)) == (1, False), error  # noqa: PT017 (both ways out are right)
        return
    try:
        delta.remove(base)
    except ThriftyError:  # what takes the base back belongs to another record
        assert [bits(p) for p in base.parameters()] == [bits(p) for p in applied]
        return
    assert all(torch.equal(p, b) for p, b in zip(base.parameters(), before, strict=True))
