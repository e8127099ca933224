"""The largest changes of a delta, what compression leaves exact, and its text on the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_changes import bits, change_of, dense, exact_both_ways, holder, one, some
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.core.errors import ThriftyError
from thrifty.core.region import Blocks, Whole
from thrifty.delta import Delta, NewTokens, Piece
from thrifty.delta.coded import CodedPiece
from thrifty.delta.compress import compress, measure
from thrifty.delta.files import nbytes
from thrifty.delta.how import DeltaCome, Quantized, TopK, parse_how


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0.001, 1.0),
    top=st.integers(1, 6),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_top_k_keeps_the_largest_of_the_whole_delta(
    tmp_path_factory: pytest.TempPathFactory, share: float, top: int, seed: int, dtype: torch.dtype
) -> None:
    """Changes are small integers: many are equal, many are zero."""
    generator = torch.Generator().manual_seed(seed)
    bases = {n: torch.randint(-9, 9, (7, 9), generator=generator).to(dtype) for n in ("a", "b")}
    regions = {"a": Blocks((2, 4), some((4, 3), generator)), "b": Whole()}
    pieces = {}
    for name, base in bases.items():
        moved = base + torch.randint(-top, top + 1, base.shape, generator=generator).to(dtype)
        trained = base.clone()
        regions[name].scatter_(trained, regions[name].gather(moved))
        pieces[name] = Piece.of(base, trained, regions[name])
    delta = Delta(pieces, method={}, total=126)
    sizes = torch.cat([piece.change().abs().flatten() for piece in pieces.values()])
    wanted = min(max(1, int(share * len(sizes) + 1e-9)), int((sizes > 0).sum()))
    if not wanted:
        return
    small = compress(delta, TopK(share))
    small.save(folder := tmp_path_factory.mktemp("small") / "d")
    model = holder(**bases)
    Delta.load(folder).apply(model)
    kept = []
    for name, base in bases.items():
        found = model.get_parameter(name).detach()
        moved = found != base
        assert torch.equal(found[moved].double(), (base + dense(pieces[name]))[moved])  # exact
        kept.append((found - base)[moved].abs().double())
        assert (name in small.pieces) == bool(moved.any())
    kept_sizes = torch.cat(kept).sort().values
    assert torch.equal(kept_sizes, sizes.sort().values[-wanted:])
    Delta.load(folder).remove(model)
    assert all(bits(model.get_parameter(name)) == bits(base) for name, base in bases.items())
    assert measure(delta, small).total.bytes_after <= measure(delta, small).total.bytes_before


def test_top_k_of_a_low_rank_pair_and_its_measure(tmp_path: Path) -> None:
    base, delta = change_of("low_rank", (20, 16), torch.float32, 0.1, 0)
    small = compress(delta, "top_k=5%", base={"w": base})
    assert small.plan.trainable_parameters == 16
    exact_both_ways(small, base, tmp_path / "d")
    report = measure(delta, small)
    assert 0 < report.total.error < 1
    assert "in all: " in str(report)
    with pytest.raises(ThriftyError, match=r"w was changed by a low-rank pair .* give the base model"):
        compress(delta, "top_k=5%")


def test_a_tensor_of_which_nothing_is_left_is_lost_whole() -> None:
    base = torch.zeros(10, 10)
    large, tiny = one(base, base + 5).pieces["w"], one(base, base + 1).pieces["w"]
    delta = Delta({"large": large, "tiny": tiny}, method={}, total=200)
    small = compress(delta, "top_k=50%")
    assert list(small.pieces) == ["large"]
    report = measure(delta, small)
    assert report.tensors["tiny"].error == 1
    assert report.tensors["tiny"].bytes_after == 0
    assert math.isclose(report.total.error, 1 / math.sqrt(26))


def test_what_stays_exact() -> None:
    rows = torch.zeros(12, 40)
    delta = Delta(
        {
            "tokens": one(rows, rows + 1).pieces["w"],
            "bias": one(rows[0], rows[0] + 1).pieces["w"],
            "w": one(rows[:10], rows[:10] + 1).pieces["w"],
            "scalar": one(rows[0, :1], rows[0, :1] + 1).pieces["w"],
        },
        method={"made": {}},
        total=1000,
        new_tokens=NewTokens(ids={"<a>": 10, "<b>": 11}, base_rows=10, rows=12),
    )
    int8 = compress(delta, "int8")
    assert [type(piece) for piece in int8.pieces.values()] == [Piece, CodedPiece, CodedPiece, Piece]
    assert int8.new_tokens == delta.new_tokens
    assert int8.method == {"compress": {"how": "int8", "method": {"made": {}}}}
    come = compress(delta, "delta_come=2x8")
    assert [type(piece) for piece in come.pieces.values()] == [Piece, Piece, CodedPiece, Piece]
    kept = compress(delta, "top_k=10%")
    assert nbytes(kept.pieces["tokens"]) == nbytes(delta.pieces["tokens"])
    with pytest.raises(ThriftyError, match=r"no tensor of this delta .* use int4"):
        compress(Delta({"bias": delta.pieces["bias"]}, method={}, total=40), "delta_come")
    only = Delta({"t": delta.pieces["tokens"]}, method={}, total=480, new_tokens=delta.new_tokens)
    with pytest.raises(ThriftyError, match="nothing to compress"):
        compress(only, "int8")
    with pytest.raises(ThriftyError, match="nothing changes in this delta"):
        compress(one(rows, rows), "top_k=10%")


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("int8", Quantized(8)),
        ("INT4", Quantized(4)),
        ("top_k=10%", TopK(0.1)),
        ("top-k=0.1", TopK(0.1)),
        ("delta_come", DeltaCome(at_most=1 / 16)),
        ("delta_come=2x8, 32x3,512x2", DeltaCome(((2, 8), (32, 3), (512, 2)))),
        ("delta_come=2x8,6.25%", DeltaCome(((2, 8),), at_most=1 / 16)),
    ],
)
def test_the_text_form(text: str, how: Any) -> None:
    assert parse_how(text) == how
    assert parse_how(str(how)) == how


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5", "unknown compression 'int5'; did you mean 'int[84]'"),
        ("int8=2", "int8 takes no value"),
        ("topk", "did you mean 'top_k'"),
        ("", "unknown compression ''"),
        ("top_k", "top_k '' is not a share: give 0.1 or '10%'"),
        ("top_k=150%", "top_k '150%' is not a share"),
        ("top_k=0", "top_k '0' is not a share"),
        ("delta_come=", "'' is not <vectors>x<bits>: write it as in delta_come=2x8,32x3,512x2"),
        ("delta_come=2x8,3", "'3' is not <vectors>x<bits>"),
        ("delta_come=2x9", "2x9 is not valid: give at least 1 vector, of 1 to 8 bits"),
        ("delta_come=0x2", "0x2 is not valid"),
        ("delta_come=2x8,200%", "delta_come '200%' is not a share"),
        ("delta_come=10%", "no vectors are given"),
    ],
)
def test_a_wrong_text_is_one_line_with_the_fix(text: str, message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        parse_how(text)
    assert "\n" not in str(error.value)
